from __future__ import annotations

import gzip
import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm.corpus import sources
from raylm.corpus.reading import read_texts, read_unit
from raylm.corpus.records import Document, Pair, Rejected
from raylm.corpus.sources import Unit, plan_units
from raylm.errors import InputError
from raylm.settings import CorpusSettings, EvaluationSource
from raylm.storage import StoragePath


def corpus(**values: object) -> CorpusSettings:
    return CorpusSettings.model_validate(values)


def read(settings: CorpusSettings) -> list[Document | Pair | Rejected]:
    """What a worker reads: units travel as plain data."""
    units = [Unit(**json.loads(json.dumps(asdict(unit)))) for unit in plan_units(settings)]
    return records(settings, units)


def records(settings: CorpusSettings, units: list[Unit]) -> list[Document | Pair | Rejected]:
    sources = [*settings.documents, *settings.pairs]
    return [record for unit in units for record in read_unit(unit, sources[unit.source])]


def texts(settings: CorpusSettings) -> list[str]:
    return [record.text for record in read(settings) if isinstance(record, Document)]


def documents(**source: object) -> CorpusSettings:
    return corpus(documents=[source])


# --------------------------------------------------------------------------------------------- cutting


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", 300)
    monkeypatch.setattr(sources, "_MAX_UNIT_BYTES", 300)


def write_sources(folder: Path) -> dict[str, dict[str, object]]:
    """The same forty texts as every type that files are cut of."""
    rows = [f'Zeile {n}, "ü"\nund weiter' for n in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows))
    (folder / "a.csv").write_text(
        "id,text\n" + "".join(f'{n},"{row.replace(chr(34), chr(34) * 2)}"\n' for n, row in enumerate(rows))
    )
    (folder / "a.txt").write_text("\n\n".join(rows))
    table = pa.table({"id": list(range(40)), "text": rows})
    pq.write_table(table, folder / "a.parquet", row_group_size=17)
    pq.write_table(table, folder / "b.pq", row_group_size=1)
    (folder / "saved").mkdir()
    with pa.ipc.new_stream(str(folder / "saved" / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    paths = {"jsonl": "a.jsonl", "csv": "a.csv", "text": "a.txt", "parquet": "a.parquet", "datasets": "saved"}
    return {kind: {"type": kind, "path": str(folder / name)} for kind, name in paths.items()}


def test_no_cut_changes_what_comes_out(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    written = write_sources(tmp_path)
    whole = {kind: texts(documents(**source)) for kind, source in written.items()}
    request.getfixturevalue("small_units")
    for kind, source in written.items():
        units = plan_units(documents(**source))
        assert len(units) > 3 or kind == "datasets", kind
        assert all(unit.bytes <= 600 for unit in units) or kind == "datasets", kind
        cut = texts(documents(**source))
        assert cut == whole[kind], kind
        assert [text.strip() for text in cut] == whole["jsonl"], kind
    small_groups = documents(type="parquet", path=str(tmp_path / "b.pq"))
    assert 1 < len(plan_units(small_groups)) < 40
    assert texts(small_groups) == whole["jsonl"]


def test_a_large_row_group_is_cut_into_a_few_parts(tmp_path: Path, small_units: None) -> None:
    rows = [f"row {n}" for n in range(2_000)]
    pq.write_table(pa.table({"text": rows, "other": rows}), tmp_path / "a.parquet")
    settings = documents(type="parquet", path=str(tmp_path))
    assert len(plan_units(settings)) == 16
    assert texts(settings) == rows


def test_a_large_corpus_has_large_units_and_a_slightly_larger_one_the_same() -> None:
    mib = 1 << 20
    assert [sources._unit_bytes(size) // mib for size in (0, 30 << 30, 33 << 30, 60 << 30)] == [8, 8, 16, 16]
    assert sources._unit_bytes(1 << 40) == 256 * mib
    assert sources._unit_bytes(1 << 50) == 32 * 256 * mib, "with the root of the size"


def test_many_small_files_share_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MANY_FILES", 30)
    for number in range(31):
        (tmp_path / f"{number:02}.jsonl").write_text(f'{{"text": "{number}"}}\nbad\n')
    settings = documents(type="jsonl", path=str(tmp_path))
    units = plan_units(settings)
    assert len(units) == 1
    assert units[0].origin == f"{tmp_path}/00.jsonl and 30 more"
    found = records(settings, units)
    assert [record.text for record in found if isinstance(record, Document)] == [str(n) for n in range(31)]
    bad = [record for record in found if isinstance(record, Rejected)]
    assert [record.file for record in bad] == [str(tmp_path / f"{n:02}.jsonl") for n in range(31)]
    (tmp_path / "30.jsonl").unlink()
    assert len(plan_units(documents(type="jsonl", path=str(tmp_path)))) == 30


def test_units_stand_in_the_order_of_the_yaml_then_of_files_and_places(tmp_path: Path, small_units: None) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name}{n} " + "x" * 90 for n in range(5)))
    settings = corpus(
        documents=[
            {"type": "text", "path": str(tmp_path / "b.txt")},
            {"type": "docstrings", "packages": ["wsgiref"]},
            {"type": "text", "path": str(tmp_path)},
        ],
        pairs=[{"type": "docstrings", "packages": ["wsgiref", "html"]}, {"type": "cldr", "to": "de", "rows": 100}],
    )
    units = plan_units(settings)
    assert [unit.order for unit in units] == list(range(len(units)))
    places = [(unit.source, Path(unit.origin).name) for unit, _ in itertools.groupby(units, lambda unit: unit)]
    assert list(dict.fromkeys(places)) == [
        (0, "b.txt"),
        (1, "wsgiref"),
        (2, "a.txt"),
        (2, "b.txt"),
        (3, "html"),
        (4, "cldr de"),
    ]
    html, wsgiref = units[-2], next(unit for unit in units if unit.origin == "wsgiref")
    assert (wsgiref.documents, wsgiref.pairs, html.documents, html.pairs) == (True, True, False, True)
    found = records(settings, [unit for unit in units if unit.source in (0, 2)])
    first = [record.text[:2] for record in found if isinstance(record, Document)]
    assert first == [f"{name}{n}" for name in "bab" for n in range(5)]


def test_identity_knows_the_file_and_how_it_is_read_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    source = {"type": "jsonl", "path": str(file)}

    def identity(*before: dict[str, object], **more: object) -> dict[str, object]:
        return plan_units(corpus(documents=[*before, source | more]))[-1].identity

    first = identity()
    assert identity({"type": "docstrings", "packages": ["html"]}, weight=2.0, epochs=3.0, path=f"{tmp_path}/*") == first
    for change in ({"split_into": "sentence"}, {"validation": True}, {"markup": "markdown"}):
        assert identity(**change) != first
    os.utime(file, ns=(0, 1))
    assert identity() != first


# --------------------------------------------------------------------------------------- each file type


def test_rows_become_documents_with_their_places(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\nbad\n{"text": "two"}\n')
    assert read(documents(type="jsonl", path=str(file), validation=True)) == [
        Document("one", "validation", 0),
        Rejected("not JSON: Expecting value: line 1 column 1 (char 0)", 16, "bad"),
        Document("two", "validation", 20),
    ]


def test_pairs_are_two_columns_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,en,de\n1,"a\nb",c\n2,d,"e, f"\n')
    source = {"type": "csv", "path": str(tmp_path), "source": "en", "target": "de", "to": "de", "split": "test"}
    assert read(corpus(pairs=[source])) == [
        Pair("translate", "de", "a\nb", "c", "test", position=9),
        Pair("translate", "de", "d", "e, f", "test", position=19),
    ]


def test_a_saved_dataset_is_read_with_its_splits_and_without_its_caches(tmp_path: Path) -> None:
    def save(folder: Path, shards: int, first: int) -> None:
        folder.mkdir(parents=True)
        names = [f"data-{n:05}-of-{shards:05}.arrow" for n in range(shards)]
        for number, name in enumerate([*names, "cache-1a2b.arrow"]):
            table = pa.table({"text": [f"row {first + number}"]})
            with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
                writer.write_table(table)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_info.json").write_text("{}")

    save(tmp_path / "both" / "train", 2, 0)
    save(tmp_path / "both" / "validation", 1, 10)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert texts(documents(type="datasets", path=str(tmp_path / "both"))) == ["row 0", "row 1", "row 10"]
    assert texts(documents(type="datasets", path=str(tmp_path / "both" / "train"))) == ["row 0", "row 1"]
    (tmp_path / "both" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match="data-00001-of-00002.arrow: the file is missing; .*state.json names it"):
        plan_units(documents(type="datasets", path=str(tmp_path / "both")))


def test_markdown_and_html_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Title\n\nSome [text](link).\n")
    (tmp_path / "b.md").write_text("")
    (tmp_path / "c.md").write_bytes(b"\xff")
    (tmp_path / "a.html").write_text("<body><main><p>A <b>page</b> of text.</p></main></body>")
    found = read(documents(type="markdown", path=str(tmp_path)))
    assert found == [
        Document("Title\n\nSome text."),
        Rejected("the file is empty"),
        Rejected("text: not UTF-8 text, see its byte 0", 0, "\ufffd"),
    ]
    assert read(documents(type="html", path=str(tmp_path))) == [Document("A page of text.")]


def test_the_text_of_a_column_may_be_marked_up_and_is_split(tmp_path: Path) -> None:
    text = "# One *two*\n\nFirst sentence. Second one.\n\n\nThird?\n"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    source = {"type": "jsonl", "path": str(tmp_path), "markup": "markdown"}
    assert texts(documents(**source)) == ["One two\n\nFirst sentence. Second one.\n\nThird?"]
    split = {"paragraph": ["One two", "First sentence. Second one.", "Third?"]}
    split["sentence"] = ["One two", "First sentence.", "Second one.", "Third?"]
    for into, expected in split.items():
        assert texts(documents(**source, split_into=into)) == expected


def test_aligned_files_are_matched_in_order(tmp_path: Path, small_units: None) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.en").write_text("".join(f"{name} line {n}\n" for n in range(50)))
        (tmp_path / f"{name}.de").write_text("".join(f"{name} Zeile {n}\n" for n in range(50)))
    source = {"type": "text", "path": f"{tmp_path}/*.en", "target_path": f"{tmp_path}/*.de", "to": "de"}
    assert len(plan_units(corpus(pairs=[source]))) == 4
    pairs = [(record.source, record.target) for record in read(corpus(pairs=[source])) if isinstance(record, Pair)]
    assert pairs == [(f"{name} line {n}", f"{name} Zeile {n}") for name in "ab" for n in range(50)]
    (tmp_path / "a.de").unlink()
    with pytest.raises(InputError, match=r"corpus.pairs\[0\]: .*/\*.en is 2 files and .*/\*.de 1: give as many"):
        plan_units(corpus(pairs=[source]))


def test_a_docstring_gives_its_document_and_its_pair(tmp_path: Path) -> None:
    settings = corpus(
        documents=[{"type": "docstrings", "packages": ["email"]}],
        pairs=[{"type": "docstrings", "packages": ["email"]}],
    )
    records = read(settings)
    pairs = [(n, record) for n, record in enumerate(records) if isinstance(record, Pair)]
    assert len(pairs) > 5
    for n, pair in pairs:
        assert pair.with_document
        following = records[n + 1]
        assert isinstance(following, Document)
        assert following.text.split()[0] == pair.target.split()[0]
        assert following.position == pair.position


def test_real_text_is_read_alike_from_every_type(data: Path, tmp_path: Path) -> None:
    expected = pq.read_table(data / "text.zh.mixed.validation.parquet")["text"].to_pylist()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in expected).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.table({"text": pa.array(expected).dictionary_encode()}), tmp_path / "a.parquet")
    assert texts(documents(type="parquet", path=str(data / "text.zh.mixed.validation.parquet"))) == expected
    assert texts(documents(type="parquet", path=str(tmp_path))) == expected
    assert texts(documents(type="jsonl", path=str(tmp_path))) == expected * 2


# ---------------------------------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def bucket(object_store: str) -> str:
    """The URI of a bucket with some files, to be completed with a key, and its options."""
    filesystem = StoragePath(object_store.format("")).filesystem
    for name, content in {
        "raw/part 1.parquet": _parquet_bytes(["one", "two"]),
        "raw/part-2[x].parquet": _parquet_bytes(["three"]),
        "raw/deep/a.jsonl.gz": gzip.compress(b'{"text": "four"}\nbad\n{"text": "five"}\n'),
        "raw/big.jsonl": b"".join(b'{"text": "line %d"}\n' % n for n in range(100)),
    }.items():
        with filesystem.open_output_stream(f"corpus/{name}", compression=None) as stream:
            stream.write(content)
    return object_store


def _parquet_bytes(rows: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": rows}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("pattern", ["raw", "raw/*.parquet", "raw/part%20*.parquet", "raw/part-?[[]x].parquet"])
def test_parquet_is_read_from_s3(bucket: str, pattern: str) -> None:
    expected = {"raw/part%20*.parquet": ["one", "two"], "raw/part-?[[]x].parquet": ["three"]}
    settings = documents(type="parquet", path=bucket.format(pattern))
    assert texts(settings) == expected.get(pattern, ["one", "two", "three"])
    for unit in plan_units(settings):
        assert "secret" not in unit.origin + json.dumps(unit.identity)
        assert unit.origin.startswith("s3://corpus/raw/part")


def test_lines_are_read_from_s3(bucket: str, small_units: None) -> None:
    assert read(documents(type="jsonl", path=bucket.format("raw/**/*.jsonl.gz"))) == [
        Document("four"),
        Rejected("not JSON: Expecting value: line 1 column 1 (char 0)", 17, "bad"),
        Document("five", position=21),
    ]
    settings = documents(type="jsonl", path=bucket.format("raw/big.jsonl"))
    assert len(plan_units(settings)) == 7
    assert texts(settings) == [f"line {n}" for n in range(100)]
    with pytest.raises(InputError, match=r"corpus.documents\[0\].path: s3://corpus/none.*: no such file"):
        plan_units(documents(type="jsonl", path=bucket.format("none/*.jsonl")))
    with pytest.raises(InputError, match=r"documents\[0\].path: s3://corpus: cannot be reached: Unexpected query"):
        plan_units(documents(type="jsonl", path=bucket.format("a") + "&wrong=1"))


# ------------------------------------------------------------------------------------- evaluation texts


def evaluation(**values: object) -> EvaluationSource:
    return EvaluationSource.model_validate(values)


def test_evaluation_texts_are_every_column_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "one", "a": "1"}\n{"q": "two", "a": null}\n')
    (tmp_path / "b.jsonl").write_text('{"q": "three", "a": "3"}\n')
    (tmp_path / "a.txt").write_text("block\none\n\nblock two")
    source = evaluation(type="jsonl", path=str(tmp_path), columns=["q", "a"])
    assert list(read_texts(source, "key")) == ["one", "two", "three", "1", "3"]
    assert list(read_texts(evaluation(type="text", path=str(tmp_path)), "key")) == ["block\none\n", "block two"]


def test_evaluation_texts_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "a": null}\nbad\n')
    with pytest.raises(InputError, match="a.jsonl, at 27: not JSON"):
        list(read_texts(evaluation(type="jsonl", path=str(tmp_path)), "key"))
    (tmp_path / "a.jsonl").write_text('{"text": "one", "a": null}\n')
    with pytest.raises(InputError, match="key: .*: no text in column 'a'"):
        list(read_texts(evaluation(type="jsonl", path=str(tmp_path), columns=["text", "a"]), "key"))
    with pytest.raises(InputError, match=r"key.path: .*nowhere: no such file"):
        list(read_texts(evaluation(type="jsonl", path=str(tmp_path / "nowhere")), "key"))


# ------------------------------------------------------------------------------------------ bad sources


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        (None, None, {"type": "parquet"}, r"corpus.documents\[0\].path: .*: no such file"),
        ("a.parquet", b"not parquet at all", {"type": "parquet"}, "a.parquet: not readable as parquet"),
        ("a.arrow", b"not arrow at all", {"type": "datasets"}, "a.arrow: not readable as an Arrow stream"),
        ("a.jsonl", b"", {"type": "jsonl"}, "a.jsonl: the file is empty"),
        ("a.csv", b"texts,b\n1,2\n", {"type": "csv"}, "no column 'text' among texts, b; did you mean 'texts'"),
        ("a.csv", b"\n1,2\n", {"type": "csv"}, "a.csv: the first line is not a header of column names"),
        ("a.jsonl.gz", b"no gzip", {"type": "jsonl"}, "a.jsonl.gz: not readable as JSON Lines: zlib"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str | None, content: bytes | None, source: dict[str, str], message: str
) -> None:
    path = tmp_path / (name or "absent")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(documents(**source, path=str(path)))


def test_a_parquet_file_without_a_text_column_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"src": ["a"], "tgt": [1]}), tmp_path / "a.parquet")
    source = {"type": "parquet", "path": str(tmp_path), "to": "de"}
    with pytest.raises(InputError, match="no column 'source' among src, tgt"):
        plan_units(corpus(pairs=[source]))
    with pytest.raises(InputError, match=r"a.parquet: column 'tgt' holds int64, text \(string\) is expected"):
        plan_units(corpus(pairs=[source | {"source": "src", "target": "tgt"}]))


def test_a_key_that_json_lines_lack_is_named_before_all_of_them_are_read(tmp_path: Path) -> None:
    rows = [json.dumps({"texts": "one", "id": 1}), "no JSON"] * 200
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"a\.jsonl: no column 'text' among texts, id; did you mean 'texts'\?"):
        plan_units(documents(type="jsonl", path=str(tmp_path)))
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:190], '{"text": "two"}', *rows[190:]]))
    assert texts(documents(type="jsonl", path=str(tmp_path))) == ["two"], "each row that lacks it costs itself alone"


def test_unknown_packages_and_languages_are_named() -> None:
    with pytest.raises(InputError, match="docstrings of package 'no_such_package'"):
        plan_units(corpus(documents=[{"type": "docstrings", "packages": ["no_such_package"]}]))
    with pytest.raises(InputError, match=r"corpus.pairs\[0\].to: "):
        plan_units(corpus(pairs=[{"type": "cldr", "to": "germn"}]))


def test_a_link_to_nowhere_in_a_package_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "linked_package").mkdir()
    (tmp_path / "linked_package" / "__init__.py").write_text('"""What this package is for."""\n')
    (tmp_path / "linked_package" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.syspath_prepend(tmp_path)
    source = documents(type="docstrings", packages=["linked_package"])
    assert texts(source) == ["What this package is for."]


def test_a_file_is_scanned_for_its_cuts_once(
    tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again when it has changed."""
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"line {number} of many\n" for number in range(100)))
    scanned: list[str] = []
    cuts = sources.readers.csv_cuts

    def counted(file: StoragePath, unit_bytes: int) -> list[int]:
        scanned.append(file.name)
        return cuts(file, unit_bytes)

    monkeypatch.setattr(sources.readers, "csv_cuts", counted)
    settings = documents(type="csv", path=str(tmp_path / "a.csv"))
    first = plan_units(settings)
    assert plan_units(settings) == first and len(first) > 3
    assert scanned == ["a.csv"]
    with (tmp_path / "a.csv").open("a") as file:
        file.write("one more\n")
    assert len(texts(settings)) == 101
    assert scanned == ["a.csv"] * 2
