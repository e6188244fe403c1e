"""`raylm cluster check`: what is wrong with cluster files, before they cost anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from raylm.cluster.commands import check_commands
from raylm.cluster.exposure import check_exposure
from raylm.cluster.file import ClusterFile, Finding, read
from raylm.cluster.fit import check_fit
from raylm.cluster.nodes import check_nodes
from raylm.cluster.stock import check_prepared, check_shape


def check(paths: Sequence[Path]) -> list[Finding]:
    """What is wrong with some files, in the order of their lines.

    Nothing is launched, and no cloud is asked.

    :raises SettingsError: a file is missing, not YAML, or no mapping.
    """
    return [finding for path in paths for finding in sorted(_findings(read(path)), key=lambda found: found.line)]


def _findings(cluster: ClusterFile) -> Iterator[Finding]:
    misshapen = list(check_shape(cluster))
    yield from misshapen
    if misshapen:
        return  # what follows takes the shape for granted
    yield from check_prepared(cluster)
    yield from check_nodes(cluster)
    yield from check_commands(cluster)
    yield from check_exposure(cluster)
    yield from check_fit(cluster)
