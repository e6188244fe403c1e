"""Logs of a cluster's machines, kept on storage before the machines are gone."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from raylm.errors import RaylmError, first_line
from raylm.storage import StoragePath

_PATIENCE_S = 300.0
"""How long machines have for their logs."""
_WRITTEN_ANEW_BYTES = 1 << 20
"""Files that Ray writes anew are smaller."""


class Collected(NamedTuple):
    """:param missed: machines whose logs could not be had, and why."""

    machines: list[str]
    missed: dict[str, str]


def collect(place: StoragePath) -> Collected:
    """Write what Ray and its workers have logged on each machine that is up: an archive of each, by its address.

    :param place: a directory, made if need be.
    :raises RaylmError: no machine's logs could be had.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place.mkdir()
    take = ray.remote(num_cpus=0, max_retries=0)(_archive)
    tasks = {
        node["NodeManagerAddress"]: take.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote((place / f"{node['NodeManagerAddress']}.tar.gz").address)
        for node in ray.nodes()
        if node["Alive"]
    }
    _, late = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=_PATIENCE_S, fetch_local=False)
    machines, missed = [], {}
    for address, task in tasks.items():
        if task in late:
            missed[address] = f"not written within {_PATIENCE_S:.0f} s"
            continue
        try:
            ray.get(task)
        except ray.exceptions.RayError as error:
            missed[address] = first_line(error)
        else:
            machines.append(address)
    if missed and not machines:
        raise RaylmError(f"{place}: no logs: {next(iter(missed.values()))}")
    return Collected(machines, missed)


def _archive(address: str) -> None:
    """Write this machine's logs to a file on storage."""
    import ray._private.worker

    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    with StoragePath(address).writing() as sink, tarfile.open(fileobj=sink, mode="w|gz") as archive:
        for file in sorted(logs.rglob("*")):
            if file.is_file():
                with suppress(FileNotFoundError):  # it has just been removed
                    _add(archive, file, str(file.relative_to(logs)))


def _add(archive: tarfile.TarFile, file: Path, name: str) -> None:
    """Add a file as it is now: others grow meanwhile, and small ones are written anew."""
    with file.open("rb") as content:
        entry = archive.gettarinfo(arcname=name, fileobj=content)
        if entry.size > _WRITTEN_ANEW_BYTES:
            archive.addfile(entry, content)
            return
        held = content.read(_WRITTEN_ANEW_BYTES)
    entry.size = len(held)
    archive.addfile(entry, io.BytesIO(held))
