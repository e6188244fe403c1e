from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from raylm import storage
from raylm.errors import ArtifactError, InputError, OutputError, StoreError
from raylm.storage import MANIFEST, Manifest, StoragePath, find_files, fingerprint, persistently


def test_a_file_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    file = StoragePath(str(tmp_path / "deep" / "file.txt"))
    file.write_bytes(b"old")
    with pytest.raises(RuntimeError), file.writing() as stream:
        stream.write(b"new, but")
        raise RuntimeError("interrupted")
    assert file.read_bytes() == b"old"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_a_full_disk_is_an_error_and_leaves_nothing(small_disk: Path) -> None:
    file = StoragePath(str(small_disk / "file.bin"))
    with pytest.raises(OutputError, match=r"cannot write .*file\.bin: No space left on device"):
        file.write_bytes(b"x" * (2 << 20))
    assert list(small_disk.iterdir()) == []


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        StoragePath(str(tmp_path / "file" / "below.txt")).write_bytes(b"")
    with pytest.raises(OutputError, match="cannot make the directory"):
        StoragePath(str(tmp_path / "file" / "below")).mkdir()


def test_a_uri_and_a_path_name_the_same_file(tmp_path: Path) -> None:
    StoragePath(str(tmp_path / "a.txt")).write_bytes(b"text")
    place = StoragePath(tmp_path.as_uri()) / "a.txt"
    assert place.read_bytes() == b"text"
    assert place.is_local
    assert place.parent.uri == tmp_path.as_uri()


def test_a_place_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    long = StoragePath(str(tmp_path / ("x" * 300)))
    looks: list[Callable[[], object]] = [
        long.info,
        long.list,
        long.read_bytes,
        lambda: list(find_files(f"{long}/*", ())),
    ]
    for look in looks:
        with pytest.raises(StoreError, match=r"/x+(/\*)?: cannot be looked at: File name too long; ") as caught:
            look()
        assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(FileNotFoundError) as absent:
        StoragePath(str(tmp_path / "absent")).read_bytes()
    assert not isinstance(absent.value, StoreError)


def test_upload_download_and_hash_keep_the_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 1000)
    there = StoragePath(str(tmp_path / "there" / "file"))
    there.upload(source)
    there.download(tmp_path / "back" / "file")
    assert (tmp_path / "back" / "file").read_bytes() == source.read_bytes()
    assert there.content_hash() == StoragePath(str(source)).content_hash()
    there.write_bytes(b"other")
    assert there.content_hash() != StoragePath(str(source)).content_hash()


def test_a_manifest_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StoragePath(str(tmp_path))
    assert Manifest.read(directory) is None
    written = Manifest(stage="prepare", counts={"read": 3}, samples=[{"text": "日本"}]).write(directory)
    assert Manifest.read(directory) == written
    with monkeypatch.context() as looked:  # and then another process has removed it
        looked.setattr(StoragePath, "is_file", lambda _: True)
        assert Manifest.read(directory / "gone") is None
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace('"read": 3', '"read": 4'))
    with pytest.raises(ArtifactError, match="is not as it was written.*; delete this file, and make the artifact anew"):
        Manifest.read(directory)
    (tmp_path / "manifest.json").write_text('{"unheard": 1}')
    with pytest.raises(ArtifactError, match="not a manifest.*; delete this file, and make the artifact anew"):
        Manifest.read(directory)


def test_find_files_reads_a_file_a_directory_and_globs(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b/c.jsonl", "b/d.txt", "b/.hidden.jsonl", "_temporary/e.jsonl", "a.raylm/f.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")

    def found(pattern: str) -> list[str]:
        return [file.path.removeprefix(f"{tmp_path}/") for file, _ in find_files(pattern, (".jsonl",))]

    assert found(f"{tmp_path}/b/d.txt") == ["b/d.txt"]
    assert found(str(tmp_path)) == ["a.jsonl", "b/c.jsonl"]
    assert found(f"{tmp_path}/*.jsonl") == ["a.jsonl"]
    assert found(f"{tmp_path}/**/c.jsonl") == ["b/c.jsonl"]
    assert found(f"{tmp_path}/**.jsonl") == ["a.jsonl", "b/c.jsonl"]
    assert found(f"{tmp_path}/**") == ["a.jsonl", "b/c.jsonl", "b/d.txt"]
    assert found(f"{tmp_path}/[ab].jsonl") == ["a.jsonl"]
    assert found(f"{tmp_path}/*.raylm/*.jsonl") == ["a.raylm/f.jsonl"], "it is named"
    assert found(f"{tmp_path}/nothing") == []


def test_an_object_store_that_refuses_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_RETRY_AFTER_S", (0.0, 0.0))
    for error, place, tries in (
        (OSError("slow down"), "s3://bucket/file?region=us-east-1", 3),
        (InputError("slow down"), "s3://bucket/file?region=us-east-1", 3),
        (ValueError("never mind"), "s3://bucket/file?region=us-east-1", 1),
        (OSError("the disk"), str(tmp_path), 1),
    ):
        asked: list[Exception] = []

        def refuse(error: Exception = error, asked: list[Exception] = asked) -> None:
            asked.append(error)
            raise error

        with pytest.raises(type(error)):
            persistently(StoragePath(place), refuse)
        assert len(asked) == tries


def test_fingerprints_depend_on_content_alone() -> None:
    assert fingerprint({"a": 1, "b": "é"}) == fingerprint({"b": "é", "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_manifest_hides_passwords(tmp_path: Path) -> None:
    place = StoragePath(str(tmp_path))
    source = {"path": "s3://KEY:SECRET@in/a.jsonl?endpoint_override=x&secret_key=S", "note": "http://x is at a:b@c"}
    Manifest("prepare", settings={"corpus": {"documents": [source]}}).write(place)
    assert "SECRET" not in (tmp_path / MANIFEST).read_text()
    found = Manifest.read(place)
    assert found is not None
    hidden = {"path": "s3://in/a.jsonl?endpoint_override=x&", "note": "http://x is at a:b@c"}
    assert found.settings == {"corpus": {"documents": [hidden]}}


def test_a_uri_keeps_its_options_and_hides_its_passwords() -> None:
    options = "?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1"
    root = StoragePath(f"s3://someone:secret@bucket{options}")
    child = root / "a folder" / "[x] 100%.txt"
    assert child.path == "bucket/a folder/[x] 100%.txt"
    assert child.name == "[x] 100%.txt"
    assert child.parent.parent == root
    assert child.filesystem is root.filesystem
    assert root.path == "bucket"
    assert str(child) == f"s3://bucket/a%20folder/%5Bx%5D%20100%25.txt{options}"
    assert StoragePath(f"s3://bucket/part-?.txt{options}").path == "bucket/part-?.txt"
    assert "secret" not in str(StoragePath("s3://bucket/a?region=us-east-1&secret_key=secret&scheme=http"))


def test_names_that_a_uri_escapes_are_found_again(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "100%20.txt").write_text("text")
    for pattern in (tmp_path.as_uri(), f"{tmp_path.as_uri()}/a%20b", f"{tmp_path.as_uri()}/*/*.txt"):
        assert [file.read_bytes() for file, _ in find_files(pattern, (".txt",))] == [b"text"]


def test_hidden_files_are_passed_over_where_they_are_not_named(tmp_path: Path) -> None:
    for name in ("a.CSV", "_SUCCESS.csv", ".b.csv", "c.csv", "_old/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(pattern: str) -> list[str]:
        return [place.name for place, _ in find_files(str(tmp_path / pattern), (".csv",))]

    assert found("") == ["a.CSV", "c.csv"]
    assert found("*") == ["a.CSV", "c.csv"]
    assert found("**/*.csv") == ["c.csv"]
    assert found("_*") == ["_SUCCESS.csv"]
    assert found("_old/*") == ["d.csv"]
