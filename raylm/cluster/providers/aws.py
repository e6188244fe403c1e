"""AWS's machines by Ray's own provider, spot ones with on-demand ones behind them, from images of today."""

from __future__ import annotations

from typing import Any

import boto3
import click
from botocore.exceptions import BotoCoreError, ClientError
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from raylm.cluster.providers.spot import SpotFallback
from raylm.errors import first_line

_PARAMETER = "resolve:ssm:"
"""What begins an ImageId that names a parameter of AWS's Systems Manager in the place of an image."""


class AwsProvider(SpotFallback, AWSNodeProvider):  # type: ignore[misc]
    """`type: external` with `module: raylm.cluster.providers.aws.AwsProvider`; the rest as with `type: aws`."""

    @classmethod
    def bootstrap_config(cls, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """As the bases do it, with images in the place of their parameters: workers get the ones that the head got.

        :raises click.ClickException: there is no such parameter, or it may not be read; Ray's command line tells it so.
        """
        return super().bootstrap_config(_with_images(cluster_config))


def _with_images(config: dict[str, Any]) -> dict[str, Any]:
    provider = config["provider"]
    images: dict[str, str] = {}
    for name, node_type in config["available_node_types"].items():
        node_config = node_type["node_config"]
        image = str(node_config.get("ImageId", ""))
        if not image.startswith(_PARAMETER):
            continue
        if image not in images:
            try:
                asked = boto3.client("ssm", region_name=provider["region"], **provider.get("aws_credentials", {}))
                found = asked.get_parameter(Name=image.removeprefix(_PARAMETER))
            except (BotoCoreError, ClientError) as error:
                where = f"available_node_types.{name}.node_config.ImageId"
                raise click.ClickException(f"{where}: {image}: {first_line(error)}") from error
            images[image] = found["Parameter"]["Value"]
        node_config["ImageId"] = images[image]
    return config
