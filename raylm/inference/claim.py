"""Where a job's results go, and that one job alone writes there.

A job keeps its parts, and in the end its manifest, in `<output>.raylm` beside its output; it holds that directory while
it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath

from raylm.errors import OutputError
from raylm.inference.io import FORMATS, InputFile, is_glob, suffix_of
from raylm.lease import held
from raylm.storage import Manifest, StoragePath, is_named
from raylm.tasks import Task

LOCK = "lock.json"
_NOTE = "job.json"
_CATALOG = ".po"


def output_place(pattern: str, files: Sequence[InputFile], task: Task, output: str | None) -> StoragePath:
    """Where a job's result goes: a file for a file, a directory for a directory or a glob.

    :raises OutputError: none can be told, it would replace or lie in its input, or its suffix says nothing.
    """
    place = StoragePath(pattern)
    if place.is_file():
        stem = place.name[: len(place.name) - len(suffix_of(place.name))]
        name = f"{stem}.{task.done}{suffix_of(place.name)}"
        target = StoragePath(output) if output else place.parent / name
        if output and (output.endswith("/") or target.is_dir()):
            target = target / name
        if suffix_of(target.name) not in FORMATS:
            raise OutputError(f"--output {output}: its suffix should be one of {', '.join(FORMATS)}")
        if suffix_of(target.name) == _CATALOG != suffix_of(place.name):
            raise OutputError(f"--output {output}: a gettext catalog is made of a catalog alone; the input is {place}")
        if target.path == place.path:
            raise OutputError(f"--output {output}: is the input itself")
        return target
    if is_glob(pattern) and not output:
        raise OutputError(f"{pattern}: name a directory for the results with --output")
    target = StoragePath(output.rstrip("/") if output else f"{pattern.rstrip('/')}.{task.done}")
    if suffix_of(target.name) in FORMATS or target.is_file():
        raise OutputError(f"--output {output}: {len(files)} input files give a directory, this names a file")
    if (PurePosixPath(target.path) / "x").is_relative_to(place.path):
        raise OutputError(f"--output {output}: lies in its own input {place}")
    inputs, outputs = {file.place.path for file in files}, output_files(target, files, pattern)
    if own := [file for file in outputs if file.path in inputs]:
        raise OutputError(f"--output {output}: would replace its input {own[0]}")
    if named := [file for file in outputs if is_named(file.path, place.path)]:
        raise OutputError(
            f"--output {output}: {pattern} names {named[0]} as well, which the next run would take for input"
        )
    return target


def output_files(target: StoragePath, files: Sequence[InputFile], pattern: str) -> list[StoragePath]:
    """The output file of each input file."""
    return [target] if StoragePath(pattern).is_file() else [target / file.relative for file in files]


def work_directory(target: StoragePath) -> StoragePath:
    """Where a job keeps its parts, and in the end its manifest: beside its output."""
    return target.parent / f"{target.name}.raylm"


def finished_manifest(target: StoragePath, key: str, places: Sequence[StoragePath]) -> Manifest | None:
    """The manifest of the same job, where it has been done and its outputs still are what it wrote.

    :param places: of the outputs.
    """
    manifest = Manifest.read(work_directory(target))
    if manifest is None or manifest.settings.get("key") != key:
        return None
    for output, place in zip(manifest.outputs, places, strict=True):
        info = place.info()
        if not info.is_file or info.size != output["bytes"]:
            return None
    return manifest


@contextmanager
def claimed_output(target: StoragePath, key: str, overwrite: bool) -> Iterator[StoragePath]:
    """The work directory, this job's alone for the time; parts of other jobs for the same output are gone.

    :raises OutputError: another job writes there now, something else is at the output's place, or it cannot be
        written to.
    """
    work = work_directory(target)
    work.mkdir()
    taken = f"{target}: another job writes to it now ({{who}}); wait for its end, or use another --output"
    with held(work / LOCK, taken):
        _check_free(target, work, key, overwrite)
        (work / _NOTE).write_json({"key": key})
        for stale, _ in (work / "parts").list():
            if stale.name != key:
                stale.delete()
        yield work


def _check_free(target: StoragePath, work: StoragePath, key: str, overwrite: bool) -> None:
    """:raises OutputError: something else is at the output's place."""
    note = work / _NOTE
    is_mine = note.is_file() and note.read_json().get("key") == key
    if is_mine or overwrite or not (target.is_file() or target.list()):
        return
    old = Manifest.read(work)
    if old is None:
        why = "made elsewhere"
    elif old.settings.get("key") == key:
        why = "changed since it was made"
    else:
        why = "made by another model, input or setting"
    raise OutputError(f"{target}: exists already, {why}; use --overwrite or --output")
