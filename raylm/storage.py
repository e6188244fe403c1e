"""Paths on any pyarrow filesystem, atomic publishing, and the manifest that makes a directory an artifact."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import xxhash
from pyarrow import fs

from raylm import __version__
from raylm.errors import ArtifactError, InputError, OutputError, StoreError, first_line

MANIFEST = "manifest.json"
_MEND = "delete this file, and make the artifact anew"
METRICS = "metrics.jsonl"
"""In a run: what training measured, a row for each line of its log."""
PREDICTIONS = "predictions.jsonl"
"""In an evaluation: what the model answered to each held-out source."""
_COPY_BYTES = 8 << 20
_RETRY_AFTER_S = (1.0, 5.0, 20.0)
"""How long to wait before an object store is asked again."""
_UNUSED_S = 30 * 86_400
"""Copies that nobody has asked for so long are not kept."""
_AT_ONCE = 16
"""Questions to a storage at once: an object store answers each after tens of milliseconds."""

Rows = list[dict[str, Any]]
T = TypeVar("T")
About = TypeVar("About")

_LOCAL = fs.LocalFileSystem()


def cache_directory() -> Path:
    """What raylm keeps on a machine: copies of remote files, converted models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "raylm"


_URI = re.compile(r"(?P<root>[a-z][a-z0-9+.-]*://[^/?]*)(?P<path>.*?)(?P<query>\?\w+=[^?]*)?", re.DOTALL)
"""A root that names the store, a path in it (`?` may be a glob's), and the options of the store."""

_SECRETS = re.compile(r"(?<=://)[^/@:\s]*:[^/@\s]*@|(?<=[?&])\w*(?:key|secret|token)\w*=[^&\s]*&?")


def _filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    parts = _URI.fullmatch(uri)
    if parts is None:
        return _LOCAL, str(Path(uri).expanduser().absolute())
    filesystem, root = _remote_filesystem(parts["root"], parts["query"] or "")
    path = urllib.parse.unquote(parts["path"])
    return filesystem, root.rstrip("/") + path if path else root


@lru_cache(maxsize=256)
def _remote_filesystem(root: str, query: str) -> tuple[fs.FileSystem, str]:
    """One client for each store: Arrow makes one, and may ask for the bucket's region, whenever it reads a URI."""
    try:
        filesystem, path = fs.FileSystem.from_uri(f"{root}/{query}")
    except (OSError, ValueError, NotImplementedError) as error:  # Arrow's own errors are of these kinds
        raise ArtifactError(f"{_SECRETS.sub('', root)}: cannot be reached: {first_line(error)}") from error
    return filesystem, path


@dataclass(frozen=True)
class StoragePath:
    """A place on local disk or on any filesystem that pyarrow opens (`s3://…`, `gs://…`, `hdfs://…`).

    :param uri: a local path, or a URI with percent escapes, at its end the store's options, such as
        `?endpoint_override=minio:9000&scheme=http`.
    """

    uri: str

    @property
    def filesystem(self) -> fs.FileSystem:
        return _filesystem(self.uri)[0]

    @property
    def path(self) -> str:
        """The path as its filesystem wants it."""
        return _filesystem(self.uri)[1]

    @property
    def name(self) -> str:
        place, _ = self._parts
        last = place.rstrip("/").rsplit("/", 1)[-1]
        return urllib.parse.unquote(last) if "://" in place else last

    @property
    def parent(self) -> StoragePath:
        place, options = self._parts
        head, slash, _ = place.rstrip("/").rpartition("/")
        return StoragePath(head + options if slash else ".")

    @property
    def is_local(self) -> bool:
        """Whether it is on the disk of this machine; known without asking any store."""
        return "://" not in self.uri or self.uri.startswith("file:")

    @property
    def _parts(self) -> tuple[str, str]:
        """The URI without and with nothing but the store's options."""
        parts = _URI.fullmatch(self.uri)
        return (parts["root"] + parts["path"], parts["query"] or "") if parts else (self.uri, "")

    def __truediv__(self, part: str) -> StoragePath:
        place, options = self._parts
        return StoragePath(f"{place.rstrip('/')}/{urllib.parse.quote(part) if '://' in place else part}{options}")

    def __str__(self) -> str:
        """The local path, or the URI without the passwords in it: what people and manifests may see."""
        is_remote = "://" in self.uri and not self.uri.startswith("file:")
        return _SECRETS.sub("", self.uri) if is_remote else self.path

    @property
    def address(self) -> str:
        """What opens this place in any process of the cluster: the absolute path, or the URI with its passwords."""
        return self.path if self.is_local else self.uri

    def local(self) -> Path:
        """The same place as a `pathlib.Path`; only for local storage."""
        if not self.is_local:
            raise ValueError(f"{self.uri} is not a local path")
        return Path(self.path)

    # ------------------------------------------------------------------------------------- looking

    def info(self) -> fs.FileInfo:
        """What is here, if anything.

        :raises StoreError: the storage does not say.
        """
        with _answering(self):
            return self.filesystem.get_file_info(self.path)

    def is_file(self) -> bool:
        return bool(self.info().type == fs.FileType.File)

    def is_dir(self) -> bool:
        return bool(self.info().type == fs.FileType.Directory)

    def list(self, recursive: bool = False) -> list[tuple[StoragePath, fs.FileInfo]]:
        """The entries of this directory in the order of their paths; empty where there is no directory.

        :raises StoreError: the storage does not say.
        """
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        with _answering(self):
            try:
                found = self.filesystem.get_file_info(selector)
            except FileNotFoundError:  # it was not there when Arrow listed it, and was when it looked why
                found = self.filesystem.get_file_info(selector)
        infos = sorted(found, key=lambda info: info.path)
        root = self.path.rstrip("/")
        return [(self / info.path[len(root) + 1 :], info) for info in infos]

    # ----------------------------------------------------------------------------- reading, writing

    def read_bytes(self) -> bytes:
        """The whole file.

        :raises FileNotFoundError: there is none.
        :raises StoreError: it cannot be read.
        """
        with _answering(self), self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def read_jsonl(self) -> Rows:
        """The rows of a JSON Lines file; none where there is no file."""
        return [json.loads(line) for line in self.read_bytes().splitlines() if line] if self.is_file() else []

    def open_input(self) -> pa.NativeFile:
        return self.filesystem.open_input_file(self.path)

    def write_bytes(self, data: bytes) -> None:
        """Publish a file whole: a reader sees the old content or the new, never a part of it.

        :raises OutputError: the place is read-only or full.
        """
        with self.writing() as stream:
            stream.write(data)

    def write_json(self, value: Any) -> None:
        self.write_bytes((json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())

    def write_jsonl(self, rows: Rows) -> None:
        self.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())

    def writing(self) -> AtomicWriter:
        """A context that gives a stream and publishes what was written to it when it ends well."""
        return AtomicWriter(self)

    def mkdir(self) -> StoragePath:
        """This directory, made with its parents where it was missing.

        :raises OutputError: the place is read-only or full.
        """
        try:
            self.filesystem.create_dir(self.path, recursive=True)
        except OSError as error:
            raise OutputError(f"cannot make the directory {self}: {reason(error)}") from error
        return self

    def delete(self) -> None:
        """Remove a file, or a directory with all it holds; nothing happens where there is neither."""
        kind = self.info().type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.path)

    def move_to(self, target: StoragePath) -> None:
        """Rename within one filesystem, replacing a file that is there."""
        self.filesystem.move(self.path, target.path)

    def upload(self, local_file: Path) -> None:
        """Publish a local file here."""
        if not self.is_local:  # which is whole already
            try:
                self.filesystem.create_dir(self.parent.path, recursive=True)
                self._send(local_file)
            except OSError as error:
                raise OutputError(f"cannot write {self}: {reason(error)}") from error
            return
        with local_file.open("rb") as source, self.writing() as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)

    def _send(self, local_file: Path) -> None:
        with local_file.open("rb") as source, self.filesystem.open_output_stream(self.path) as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)

    def download(self, local_file: Path) -> None:
        """Copy this file to a local one, making its directory."""
        local_file.parent.mkdir(parents=True, exist_ok=True)
        with self.filesystem.open_input_stream(self.path) as source, local_file.open("wb") as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)

    def upload_files(self, local: Path) -> None:
        """Publish the files of a local directory here, `config.json` last: what finds it finds a whole model."""
        for file in sorted(local.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
            (self / file.name).upload(file)

    def at_hand(self) -> Path:
        """This file, or this directory with the files in it, on local disk: itself, or a copy.

        A copy is made once on a machine, and again when what is on storage has changed. A process that
        makes one first removes those that nobody has asked for in a month.

        :raises FileNotFoundError: there is nothing to copy.
        """
        if self.is_local:
            return self.local()
        own = self.info()
        files = [(self, own)] if own.is_file else [(file, info) for file, info in self.list() if info.is_file]
        if not files:
            raise FileNotFoundError(f"there is nothing at {self}")
        versions = [(file.name, info.size, info.mtime_ns) for file, info in files]
        copies = cache_directory() / "copies"
        copies.mkdir(parents=True, exist_ok=True)
        place = copies / f"{self.name}-{fingerprint([self.uri, versions])}"
        with Path(f"{place}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # others wait for the first; the system frees it if that one dies
            if not place.is_dir():
                _forget_unused(copies)
                partial = Path(f"{place}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                for file, _ in files:
                    file.download(partial / file.name)
                partial.rename(place)
            os.utime(place)
        return place / self.name if own.is_file else place

    def content_hash(self) -> str:
        """The xxh3-128 of the file's bytes, in hex."""
        digest = xxhash.xxh3_128()
        with self.filesystem.open_input_stream(self.path) as source:
            while block := source.read(_COPY_BYTES):
                digest.update(block)
        return digest.hexdigest()


@lru_cache(maxsize=1)
def _forget_unused(copies: Path) -> None:
    """Remove the copies that nobody has asked for in a month; once a process."""
    for place in copies.iterdir():
        if not place.is_dir() or time.time() - place.stat().st_mtime < _UNUSED_S:
            continue
        with Path(f"{place}.lock").open("w") as lock, suppress(BlockingIOError):  # somebody asks for it now
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _answering(place: StoragePath) -> Iterator[None]:
    """Name the place of which a filesystem does not tell; a file that is not there is told as ever."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        told = StoreError(f"{place}: cannot be looked at: {reason(error)}; mend the path, or get the right to read it")
        told.errno = error.errno
        raise told from error


class AtomicWriter:
    """Writes beside the target and renames at the end; for an object store, into a local file that is uploaded then.

    A stream into an object store cannot be given up: whatever ends it publishes what it has got.
    """

    def __init__(self, target: StoragePath) -> None:
        self._target = target
        place = target.parent if target.is_local else StoragePath(tempfile.gettempdir())
        self._written_to = place / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"

    def __enter__(self) -> pa.NativeFile:
        try:
            self._target.filesystem.create_dir(self._target.parent.path, recursive=True)
            self._stream = self._written_to.filesystem.open_output_stream(self._written_to.path)
        except OSError as error:
            raise OutputError(f"cannot write {self._target}: {reason(error)}") from error
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self._stream.close()
            if kind is None:
                self._publish()
        except OSError as failure:
            error = error or failure
        with suppress(OSError):  # what failed was the disk; the first error says so
            self._written_to.delete()
        if isinstance(error, OSError):
            by_way = "" if self._target.is_local else f" (it is put together in {tempfile.gettempdir()})"
            raise OutputError(f"cannot write {self._target}: {reason(error)}{by_way}") from error

    def _publish(self) -> None:
        if self._target.is_local:
            self._written_to.move_to(self._target)
        else:
            self._target._send(self._written_to.local())


def persistently(place: StoragePath, action: Callable[[], T]) -> T:
    """What an action on a place gives; an object store that refuses is asked again after a while.

    :raises RaylmError: as the action, or OSError; it refuses for good, or it is a local disk that does.
    """
    for wait_s in () if place.is_local else _RETRY_AFTER_S:
        try:
            return action()
        except (OSError, InputError, OutputError):
            time.sleep(wait_s)
    return action()


def at_once(ask: Callable[[About], T], about: Iterable[About]) -> list[T]:
    """What a question to a storage gives of each of many things, in their order."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, about))


def reason(error: OSError) -> str:
    """What the system says, without pyarrow's prefix."""
    text = os.strerror(error.errno) if error.errno else str(error)
    return text.splitlines()[0]


# ------------------------------------------------------------------------------------------- manifest


@dataclass
class Manifest:
    """What a finished artifact says of itself; written last, so a directory without one is unfinished."""

    stage: str
    settings: dict[str, Any] = field(default_factory=dict)
    """The resolved settings that made it."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """What was read, with fingerprints."""
    outputs: list[dict[str, Any]] = field(default_factory=list)
    """Files: name, rows, bytes, hash."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Rows read, kept, and dropped by reason."""
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    """A few rows for a person to look at."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """What a report draws: sources, histograms, languages, duplicates, samples by reason."""
    wall_time_s: float = 0.0
    created_at: str = ""
    version: str = __version__
    seal: str = ""
    """A hash of all the rest of the file; manifests of old have none."""
    directory: str = ""
    """Where it was written to or read from; not in the file, which may be moved."""

    def write(self, directory: StoragePath) -> Manifest:
        """Publish this manifest into its directory: from now on the artifact exists."""
        self.created_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.directory = str(directory)
        content = {name: value for name, value in asdict(self).items() if name not in ("seal", "directory")}
        content = without_passwords(json.loads(json.dumps(content, default=str)))  # what a reader will find
        self.seal = fingerprint(content)
        (directory / MANIFEST).write_json({**content, "seal": self.seal})
        return self

    @classmethod
    def read(cls, directory: StoragePath) -> Manifest | None:
        """The manifest of an artifact, or None where it is absent or unfinished.

        :raises ArtifactError: there is a manifest that cannot be read, or that was changed after it was written.
        """
        file = directory / MANIFEST
        if not file.is_file():
            return None
        try:
            content = file.read_json()
            manifest = cls(**content, directory=str(directory))
        except FileNotFoundError:  # it has just been removed
            return None
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{file}: not a manifest of raylm ({error}); {_MEND}") from error
        if content.pop("seal", None) not in (None, "", fingerprint(content)):
            raise ArtifactError(f"{file}: is not as it was written, its seal does not fit; {_MEND}")
        return manifest


def without_passwords(value: Any) -> Any:
    """Plain data without the passwords in its URIs."""
    if isinstance(value, dict):
        return {key: without_passwords(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_passwords(item) for item in value]
    return _SECRETS.sub("", value) if isinstance(value, str) and "://" in value else value


def fingerprint(value: Any) -> str:
    """The xxh3-128 of plain data (what JSON can say), in hex: equal data, equal fingerprint."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return round(time.monotonic() - self._start, 3)


def find_files(pattern: str, suffixes: tuple[str, ...]) -> Iterator[tuple[StoragePath, fs.FileInfo]]:
    """The files that a path names: itself, the fitting files below a directory, or the matches of a glob.

    Hidden files and those that start with `_` are passed over, as Hive and Spark do, where they are not named; so are
    the directories `….raylm` in which batch jobs work.
    """
    place = StoragePath(pattern)
    info = place.info()
    if info.type == fs.FileType.File:
        yield place, info
        return
    if info.type == fs.FileType.Directory:
        for child, child_info in place.list(recursive=True):
            below = child_info.path[len(place.path.rstrip("/")) + 1 :]
            is_shown = not _is_hidden(below) and child.name.lower().endswith(suffixes)
            if child_info.type == fs.FileType.File and is_shown:
                yield child, child_info
        return
    if any(sign in place.path for sign in "*?["):
        parts = place.path.split("/")
        globs = [number for number, part in enumerate(parts) if any(sign in part for sign in "*?[")]
        folder = "/".join(parts[: globs[0]]) or "/"
        base = place if "://" in place.uri else StoragePath(place.path)
        for _ in parts[globs[0] :]:
            base = base.parent
        deep = len(parts) > globs[0] + 1 or "**" in parts[-1]
        selector = fs.FileSelector(folder, recursive=deep, allow_not_found=True)
        with _answering(base):
            matches = base.filesystem.get_file_info(selector)
        for match in sorted(matches, key=lambda entry: entry.path):
            if match.type == fs.FileType.File and is_named(match.path, place.path):
                yield base / match.path[len(folder.rstrip("/")) + 1 :], match


def is_named(path: str, glob: str) -> bool:
    """Whether a glob names a path; a hidden one where what is hidden stands in the glob."""
    folder = re.split(r"[*?\[]", glob, maxsplit=1)[0].rpartition("/")[0]
    below, wanted = path[len(folder) + 1 :], glob[len(folder) + 1 :]
    return _matches(path, glob) and (_is_hidden(wanted) or not _is_hidden(below))


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) or part.endswith(".raylm") for part in path.split("/"))


def _matches(path: str, pattern: str) -> bool:
    """Whether a path fits a glob, part by part, so that `*` does not cross a slash; `**` does, wherever it stands."""
    regex = ""
    position = 0
    while position < len(pattern):
        if pattern.startswith("**/", position):
            regex += "(?:[^/]+/)*"
            position += 3
            continue
        if pattern.startswith("**", position):
            regex += ".*"
            position += 2
            continue
        sign = pattern[position]
        if sign == "*":
            regex += "[^/]*"
        elif sign == "?":
            regex += "[^/]"
        elif sign == "[" and "]" in pattern[position:]:
            end = pattern.index("]", position)
            regex += pattern[position : end + 1].replace("[!", "[^", 1)
            position = end
        else:
            regex += re.escape(sign)
        position += 1
    return re.fullmatch(regex, path) is not None
