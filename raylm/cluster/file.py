"""A cluster file with the line of each of its keys, so that what is wrong can be pointed at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raylm.errors import SettingsError

CLOUDS = ("aws", "gcp", "azure")

OWN_PROVIDERS = {cloud: f"raylm.cluster.providers.{cloud}.{cloud.capitalize()}Provider" for cloud in CLOUDS}
"""`provider.module` of the clouds' providers that have on-demand machines stand in for spot ones."""

Key = tuple[str | int, ...]
"""Where something stands: the keys, and the numbers of list items, that lead to it."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a cluster file.

    :param key: where, as `available_node_types.gpu.node_config`; empty for the file as a whole.
    :param why: what was found, and what it leads to.
    :param remedy: what would be right.
    :param is_error: false for what works, but is hardly meant.
    """

    file: str
    line: int
    key: str
    why: str
    remedy: str
    is_error: bool

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" + (f": {self.key}" if self.key else "")
        return f"{where}: {'error' if self.is_error else 'warning'}: {self.why}; {self.remedy}"


@dataclass(frozen=True)
class ClusterFile:
    """What a file says, and where.

    :param lines: of each key, counted from 1.
    :param repeated: keys that stand twice in one mapping, where YAML takes the last.
    """

    path: Path
    values: dict[str, Any]
    lines: Mapping[Key, int] = field(repr=False)
    repeated: tuple[Key, ...] = ()

    def get(self, *key: str | int, default: Any = None) -> Any:
        """The value at a place, or the default where there is none."""
        value: Any = self.values
        for part in key:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return default
        return default if value is None else value

    def mapping(self, *key: str | int) -> dict[str, Any]:
        """The mapping at a place; an empty one where something else stands, which Ray's schema tells of."""
        value = self.get(*key)
        return value if isinstance(value, dict) else {}

    @property
    def provider(self) -> str:
        """What kind of cluster it is: `aws`, `local`, …; with a provider of ours, the cloud that it is of."""
        kind, module = self.get("provider", "type", default=""), self.get("provider", "module")
        return next((cloud for cloud, own in OWN_PROVIDERS.items() if kind == "external" and own == module), str(kind))

    @property
    def node_types(self) -> dict[str, dict[str, Any]]:
        """The types of machines, by name."""
        return {name: value for name, value in self.mapping("available_node_types").items() if isinstance(value, dict)}

    @property
    def head_type(self) -> str:
        return str(self.get("head_node_type", default=""))

    def workers_of(self, node_type: str) -> int:
        """How many machines of a type there may be beside the head."""
        total = self.get("max_workers")
        own = self.get("available_node_types", node_type, "max_workers")
        if own is None:
            own = 0 if node_type == self.head_type else total or 0
        return int(own if total is None else min(own, total))

    def error(self, key: Iterable[str | int], why: str, remedy: str) -> Finding:
        return self._finding(tuple(key), why, remedy, is_error=True)

    def warning(self, key: Iterable[str | int], why: str, remedy: str) -> Finding:
        return self._finding(tuple(key), why, remedy, is_error=False)

    def _finding(self, key: Key, why: str, remedy: str, is_error: bool) -> Finding:
        known = next((key[:length] for length in range(len(key), 0, -1) if key[:length] in self.lines), ())
        return Finding(str(self.path), self.lines.get(known, 1), dotted(key), why, remedy, is_error)

    def texts(self) -> Iterator[tuple[Key, str]]:
        """Every text in the file, and where it stands."""
        yield from _texts(self.values, ())


def dotted(key: Iterable[str | int]) -> str:
    """A place as it is written: `setup_commands[1]`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read(path: Path) -> ClusterFile:
    """A cluster file.

    :raises SettingsError: it is missing, not YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise SettingsError(f"{path}: there is no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if node is None or not isinstance(values, dict):
        raise SettingsError(f"{path}: holds no mapping of keys, as a cluster file is")
    lines: dict[Key, int] = {}
    repeated = tuple(_walk(node, (), lines))
    return ClusterFile(path, values, lines, repeated)


def _walk(node: yaml.Node, key: Key, lines: dict[Key, int]) -> Iterator[Key]:
    """Note the line of each key below a node, and give those that stand there twice."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, value in node.value:
            here = (*key, str(name.value))
            if name.value in seen:
                yield here
            seen.add(name.value)
            lines[here] = name.start_mark.line + 1
            yield from _walk(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[(*key, number)] = item.start_mark.line + 1
            yield from _walk(item, (*key, number), lines)


def _texts(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, (*key, str(name)))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, (*key, number))
