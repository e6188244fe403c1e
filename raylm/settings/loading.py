"""How a settings file is found, read and overridden."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from raylm.errors import SettingsError, nearest
from raylm.settings.root import Settings
from raylm.settings.topology import Topology

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the whole cluster file on the head node."""


def packaged_cluster_file() -> Path:
    """The `clusters/local.yaml` that belongs to this installation or checkout."""
    here = Path(__file__).parent.parent
    installed = here / "local.yaml"
    return installed if installed.exists() else here.parent / "clusters" / "local.yaml"


def find_cluster_file(cluster: str | os.PathLike[str] | None = None) -> Path:
    """The file a command reads: the argument, `$RAYLM_CLUSTER`, the head node's copy, the packaged one.

    :raises SettingsError: the named file does not exist.
    """
    for named, origin in ((cluster, ""), (os.environ.get("RAYLM_CLUSTER"), "$RAYLM_CLUSTER: ")):
        if named:
            path = Path(named).expanduser()
            if not path.is_file():
                raise SettingsError(f"{origin}there is no file {path}")
            return path
    bootstrap = BOOTSTRAP_CONFIG.expanduser()
    return bootstrap if bootstrap.is_file() else packaged_cluster_file()


def load(
    cluster: str | os.PathLike[str] | None = None,
    overlays: Sequence[str | os.PathLike[str]] = (),
    overrides: Sequence[str] = (),
) -> Settings:
    """The settings of a cluster file with overlays and `key=value` overrides laid over it.

    :raises SettingsError: a file is missing or not YAML, a key is unknown, a value is of the wrong kind.
    """
    cluster_file = find_cluster_file(cluster)
    document = _read_yaml(cluster_file)
    metadata = document.get("metadata") or {}
    values = (metadata.get("raylm") if isinstance(metadata, dict) else None) or {}
    if not isinstance(values, dict):
        raise SettingsError(
            f"{cluster_file}: metadata.raylm: holds a {type(values).__name__}; a mapping of keys is expected"
        )
    layers = [(f"{cluster_file}: metadata.raylm", values)]
    for overlay in overlays:
        path = Path(overlay).expanduser()
        if not path.is_file():
            raise SettingsError(f"--with: there is no file {path}")
        layers.append((str(path), _read_yaml(path)))
    layers += [(f"--set {override}", _parse_override(override)) for override in overrides]
    settings = _settled(layers)
    try:
        topology = Topology.of(document)
    except ValueError as error:
        raise SettingsError(f"{cluster_file}: {error}") from error
    return settings.on(topology)


def with_options(settings: Settings, section: str, options: dict[str, Any]) -> Settings:
    """The settings with what options of a command line say in the place of a section's own values.

    :raises SettingsError: a value is of the wrong kind.
    """
    given = [(f"--{key.replace('_', '-')}", {section: {key: value}}) for key, value in options.items()]
    return _settled([("the settings", settings.model_dump()), *given]).on(settings.topology)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `metadata.raylm`, for editors that complete YAML."""
    return Settings.model_json_schema()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Each value that differs between two resolved settings, as `path: old → new`."""
    for key in sorted(old.keys() | new.keys()):
        before, after, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{path}.")
        elif before != after:
            yield f"{path}: {before} → {after}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: holds a {type(document).__name__}; a mapping of keys is expected")
    return document


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {override}: write key=value, such as pretrain.steps=200")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override}: the value is not YAML") from error
    # YAML 1.1 reads `2e-3` as text.
    if isinstance(parsed, str) and parsed and parsed[0] in "0123456789.+-":
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    nested: Any = parsed
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def problems(values: object) -> Iterator[tuple[tuple[int | str, ...], str, str]]:
    """All that is wrong with what stands under `metadata.raylm`: where, why, and what would be right."""
    for found in _errors(values):
        yield found["loc"], *_told(found)


def _settled(layers: Sequence[tuple[str, dict[str, Any]]]) -> Settings:
    """The settings that values come to, each laid over those before; what they say together counts, not their order.

    :param layers: values, and where they are from.
    :raises SettingsError: something is wrong in the end; it names the values that brought it.
    """
    states = list(accumulate((values for _, values in layers), _merge))
    try:
        return Settings.model_validate(states[-1])
    except ValidationError as error:
        first = error.errors()[0]
    mistake, path = (first["loc"], first["type"]), ".".join(str(part) for part in first["loc"])
    origin = layers[-1][0]
    for (earlier, _), values in zip(reversed(layers[:-1]), reversed(states[:-1]), strict=True):
        if mistake not in [(found["loc"], found["type"]) for found in _errors(values)]:
            break
        origin = earlier
    why, remedy = _told(first)
    if first["type"] == "extra_forbidden":
        raise SettingsError(f"{origin}: {why} '{path}'" + (f"; {remedy}" if remedy else ""))
    raise SettingsError(f"{origin}: {path}: {remedy}, {why}")


def _errors(values: object) -> list[ErrorDetails]:
    try:
        Settings.model_validate(values)
    except ValidationError as error:
        return error.errors()
    return []


def _told(error: ErrorDetails) -> tuple[str, str]:
    """What was found, and what would be right."""
    if error["type"] != "extra_forbidden":
        return f"found {error['input']!r}", error["msg"]
    near = _nearest_key(error["loc"])
    return "unknown key", f"did you mean '{near}'?" if near else ""


def _nearest_key(location: tuple[int | str, ...]) -> str | None:
    """The known key nearest to the last part of a location, among those of the section it stands in."""
    schema = json_schema()
    node: Any = schema
    for part in location[:-1]:
        node = _step_into(schema, node, part)
        if node is None:
            return None
    return nearest(str(location[-1]), _resolve(schema, node).get("properties", {}))


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for, also the one of a section that may be left out."""
    while True:
        sections = [choice for choice in node.get("anyOf", ()) if "$ref" in choice]
        if len(sections) == 1:
            node = sections[0]
        if "$ref" not in node:
            return node
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]


def _step_into(schema: dict[str, Any], node: dict[str, Any], part: int | str) -> dict[str, Any] | None:
    node = _resolve(schema, node)
    if isinstance(part, int):
        items: dict[str, Any] | None = node.get("items")
        return items
    if part in node.get("properties", {}):
        found: dict[str, Any] = node["properties"][part]
        return found
    tagged = node.get("discriminator", {}).get("mapping", {}).get(part)
    return {"$ref": tagged} if tagged else None
