"""AWS's machines by Ray's own provider, spot ones with on-demand ones behind them, from images of today."""

from __future__ import annotations

import os
from typing import Any

import boto3
import click
from botocore.exceptions import BotoCoreError, ClientError
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_USER_NODE_TYPE

from raylm.cluster.providers import ENDING
from raylm.cluster.providers.spot import SpotFallback
from raylm.errors import first_line

_PARAMETER = "resolve:ssm:"
"""What begins an ImageId that names a parameter of AWS's Systems Manager in the place of an image."""


class AwsProvider(SpotFallback, AWSNodeProvider):  # type: ignore[misc]
    """`type: external` with `module: raylm.cluster.providers.aws.AwsProvider`; the rest as with `type: aws`."""

    @classmethod
    def bootstrap_config(cls, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """As the bases do it, with images in the place of their parameters: workers get the ones that the head got.

        Those of machines that run stay: Ray ends a head whose image is another one. What ends a cluster needs none.

        :raises click.ClickException: there is no such parameter, or it may not be read; Ray's command line tells it so.
        """
        return super().bootstrap_config(cluster_config if ENDING in os.environ else _with_images(cluster_config))


def _with_images(config: dict[str, Any]) -> dict[str, Any]:
    provider = config["provider"]
    options = {"region_name": provider["region"], **provider.get("aws_credentials", {})}
    images: dict[str, str] = {}
    running: dict[str, str] | None = None
    for name, node_type in config["available_node_types"].items():
        node_config = node_type["node_config"]
        image = str(node_config.get("ImageId", ""))
        if not image.startswith(_PARAMETER):
            continue
        try:
            if running is None:
                running = _running_images(boto3.client("ec2", **options), config["cluster_name"])
            if name not in running and image not in images:
                found = boto3.client("ssm", **options).get_parameter(Name=image.removeprefix(_PARAMETER))
                images[image] = found["Parameter"]["Value"]
        except (BotoCoreError, ClientError) as error:
            where = f"available_node_types.{name}.node_config.ImageId"
            raise click.ClickException(f"{where}: {image}: {first_line(error)}") from error
        node_config["ImageId"] = running.get(name) or images[image]
    return config


def _running_images(ec2: Any, cluster_name: str) -> dict[str, str]:
    """The images of a cluster's machines, by their node types."""
    found = ec2.describe_instances(
        Filters=[
            {"Name": f"tag:{TAG_RAY_CLUSTER_NAME}", "Values": [cluster_name]},
            {"Name": "instance-state-name", "Values": ["pending", "running"]},
        ]
    )
    images = {}
    for reservation in found["Reservations"]:
        for instance in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", ())}
            images[tags.get(TAG_RAY_USER_NODE_TYPE, "")] = instance["ImageId"]
    return images
