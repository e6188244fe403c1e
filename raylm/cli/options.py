"""What commands share: their settings, options of several, and how a manifest is printed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from raylm import settings as settings_module

if TYPE_CHECKING:
    from raylm.storage import Manifest

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
model_option = click.option("--model", help="Model directory. Default: the one that `raylm export` wrote.")


def with_settings(command: Command) -> Command:
    """Give a command `--cluster`, `--with` and `--set`, and hand it the loaded settings.

    One that has an argument `cluster`, `overlays` or `overrides` is given these words themselves, too.
    """
    wanted = inspect.signature(command).parameters

    @click.option("--cluster", type=click.Path(), help="Cluster YAML. Default: $RAYLM_CLUSTER, the head node's, local.")
    @click.option("--with", "overlays", multiple=True, type=click.Path(), help="YAML laid over metadata.raylm.")
    @click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value.")
    @wraps(command)
    def loaded(cluster: str | None, overlays: tuple[str, ...], overrides: tuple[str, ...], **arguments: Any) -> Any:
        said = {"cluster": cluster, "overlays": overlays, "overrides": overrides}
        arguments |= {name: words for name, words in said.items() if name in wanted}
        return command(settings=settings_module.load(cluster, overlays, overrides), **arguments)

    return loaded  # type: ignore[return-value]


def print_manifest(manifest: Manifest, as_json: bool) -> None:
    """What a stage has done, as a table or as JSON."""
    if as_json:
        click.echo(json.dumps(asdict(manifest), indent=2, ensure_ascii=False, default=str))
        return
    from raylm.summary import manifest_table

    click.echo(manifest_table(manifest))
