from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm.corpus import sources
from raylm.corpus.sources import Document, Pair, Rejected, plan_units, read_unit
from raylm.errors import InputError
from raylm.settings import CorpusSettings


def corpus(**values: object) -> CorpusSettings:
    return CorpusSettings.model_validate(values)


def read(settings: CorpusSettings) -> list[object]:
    return [record for unit in plan_units(settings) for record in read_unit(unit)]


def texts(settings: CorpusSettings) -> list[str]:
    return [record.text for record in read(settings) if isinstance(record, Document)]


def test_parquet_is_read_by_row_group(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": [f"text {n}" for n in range(10)]}), file, row_group_size=4)
    settings = corpus(documents=[{"type": "parquet", "path": str(file), "column": "body"}])
    assert len(plan_units(settings)) == 3
    assert texts(settings) == [f"text {n}" for n in range(10)]


@pytest.mark.parametrize("unit_bytes", [1, 7, 20, 1_000])
def test_jsonl_loses_and_repeats_no_line_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    monkeypatch.setattr(sources, "_UNIT_BYTES", unit_bytes)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"Zeile {n} ü"}, ensure_ascii=False) + "\n" for n in range(9)))
    settings = corpus(documents=[{"type": "jsonl", "path": str(file)}])
    assert sorted(texts(settings)) == [f"Zeile {n} ü" for n in range(9)]


def test_malformed_rows_cost_themselves_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": \n[1]\n{"text": 5}\n{"other": "x"}\n\n{"text": "two"}\n')
    records = read(corpus(documents=[{"type": "jsonl", "path": str(file)}]))
    assert [record.text for record in records if isinstance(record, Document)] == ["one", "two"]
    reasons = [record.reason for record in records if isinstance(record, Rejected)]
    assert reasons == ["malformed_row", "malformed_row", "not_text", "not_text"]


def test_csv_cells_may_hold_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('id,source,target\n1,"a\nb",c\n2,d,"e, f"\n')
    settings = corpus(pairs=[{"type": "csv", "path": str(file), "to": "de"}])
    assert read(settings) == [Pair("translate", "de", "a\nb", "c"), Pair("translate", "de", "d", "e, f")]


def test_blank_lines_part_the_documents_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\r\n\r\nfour\n")
    settings = corpus(documents=[{"type": "text", "path": str(tmp_path), "validation": True}])
    assert [text.strip() for text in texts(settings)] == ["one\ntwo", "three", "four"]
    assert {record.split for record in read(settings) if isinstance(record, Document)} == {"validation"}


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


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        (None, None, {"type": "parquet"}, r"corpus.documents\[0\].path: .*: no such file"),
        ("a.parquet", b"not parquet at all", {"type": "parquet"}, "a.parquet: not a readable parquet file"),
        ("a.jsonl", b"", {"type": "jsonl"}, "a.jsonl: the file is empty"),
        ("a.csv", b"texts,b\n1,2\n", {"type": "csv"}, "no column 'text' among texts, b; did you mean 'texts'"),
        ("a.txt", b"\xff\xfe\x00", {"type": "text"}, "a.txt: not UTF-8 text, see the byte at offset 0"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str | None, content: bytes | None, source: dict[str, str], message: str
) -> None:
    path = tmp_path / (name or "absent")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(corpus(documents=[{**source, "path": str(path)}]))


def test_a_parquet_file_without_the_column_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"src": ["a"], "tgt": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column 'source' among src, tgt"):
        plan_units(corpus(pairs=[{"type": "parquet", "path": str(tmp_path), "to": "de"}]))


def test_unknown_packages_and_languages_are_named() -> None:
    with pytest.raises(InputError, match="docstrings of package 'no_such_package'"):
        plan_units(corpus(documents=[{"type": "docstrings", "packages": ["no_such_package"]}]))
    with pytest.raises(InputError, match=r"corpus.pairs\[0\].to: "):
        plan_units(corpus(pairs=[{"type": "cldr", "to": "germn"}]))
