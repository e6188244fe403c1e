"""Input files are found, counted, checked and read by ranges; outputs carry every column through."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from raylm.errors import InputError, OutputError
from raylm.inference.chunks import plan_chunks, result_schema
from raylm.inference.claim import output_place
from raylm.inference.io import (
    InputTable,
    check_same_columns,
    check_unchanged,
    choose_columns,
    list_inputs,
    open_table,
    read_fields,
)
from raylm.inference.output import write_output
from raylm.inference.prompts import Prompt
from raylm.inference.tabular import PREPARED_ROWS
from raylm.storage import StoragePath
from raylm.tasks import TRANSLATE


def opened(path: Path, work: Path) -> InputTable:
    [file] = list_inputs(str(path))
    return open_table(file, StoragePath(str(work)))


def written(table: InputTable, place: Path, kind: Any) -> Path:
    """The output with answers `0`, `1`, … cut in batches that fit nothing else."""
    answers = pa.table(
        {
            "translation": [str(n) for n in range(table.rows)],
            "error": pa.array([None] * table.rows, pa.string()),
            "truncated": [False] * table.rows,
        }
    )
    schema = answers.schema

    def batches() -> Iterator[pa.RecordBatch]:
        yield pa.record_batch([pa.array([], field.type) for field in schema], schema)
        yield from answers.to_batches(max_chunksize=7)

    write_output(table, table.rows, batches(), StoragePath(str(place)), kind)
    return place


EVERY_TYPE = pa.table(
    {
        "id": pa.array([1, 2, None], pa.uint8()),
        "text": pa.array(["One", None, "Drei ü"]),
        "when": pa.array([datetime.datetime(2026, 1, 2, 3), None, None], pa.timestamp("ns", "UTC")),
        "day": pa.array([datetime.date(2026, 1, 2), None, None]),
        "price": pa.array([decimal.Decimal("1.50"), None, None], pa.decimal128(9, 2)),
        "raw": pa.array([b"\x00\xff", None, b""]),
        "tags": pa.array([["a", None], [], None], pa.list_(pa.string())),
        "where": pa.array([{"x": 1.5, "y": None}, None, {"x": None, "y": "z"}]),
        "kind": pa.array(["p", "q", "p"]).dictionary_encode(),
        "big": pa.array(["l", None, "m"], pa.large_string()),
        "pairs": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        "ratio": pa.array([1.5, float("nan"), None]),
    }
).replace_schema_metadata({"made by": "a test"})


# -------------------------------------------------------------------------------------------- finding


def test_files_are_found_with_their_names_below_the_input(tmp_path: Path) -> None:
    for name in ("b.parquet", "deep/a.jsonl", "_hidden.csv", ".tmp.csv", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [file.relative for file in list_inputs(str(tmp_path))] == ["b.parquet", "deep/a.jsonl"]
    assert [file.relative for file in list_inputs(f"{tmp_path}/**/*.jsonl")] == ["a.jsonl"]
    assert [file.relative for file in list_inputs(f"{tmp_path}/b.parquet")] == ["b.parquet"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.parquet: there is no such file"):
        list_inputs(str(tmp_path / "absent.parquet"))
    with pytest.raises(InputError, match="no file matches"):
        list_inputs(f"{tmp_path}/*.parquet")
    with pytest.raises(InputError, match="holds no file that ends in"):
        list_inputs(str(tmp_path))
    (tmp_path / "empty.parquet").touch()
    with pytest.raises(InputError, match=r"empty\.parquet: the file is empty"):
        list_inputs(str(tmp_path / "empty.parquet"))
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(InputError, match=r"unknown suffix '\.xlsx'; expected one of \.parquet"):
        list_inputs(str(tmp_path / "a.xlsx"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", b"PAR1 cut off", "not readable as parquet, corrupt or cut off"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl: line 3: not JSON"),
        ("a.jsonl", b'["a"]\n', "line 1: holds a JSON array; an object is expected"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not UTF-8"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: JSON that is nested too deeply"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.csv", b"text,id\na,1\nb,2,3\n", "not readable as CSV: .*Row #3: Expected 2 columns, got 3"),
        ("a.csv", b"text,text\na,1\n", "names a column twice: text"),
        ("a.csv", b"text\n\xff\xfe\n", r"a\.csv: line 2: not UTF-8 at byte 0; save it as UTF-8"),
        ("a.csv", b"text\n" + b"a\n" * 600_000 + b"caf\xe9\n", r"a\.csv: line 600002: not UTF-8 at byte 3"),
        ("a.csv", b"\ntext\n", "first line is blank"),
    ],
)
def test_malformed_files_are_told_in_one_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as failure:
        opened(tmp_path / name, tmp_path / "work")
    assert len(str(failure.value).splitlines()) == 1
    assert not list((tmp_path / "work").glob("*.arrow*"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.csv", "a.po"])
def test_a_file_that_the_system_withholds_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text\na\n")
    [file] = list_inputs(str(tmp_path / name))
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"{re.escape(name)}: not readable: No such file or directory$"):
        open_table(file, StoragePath(str(tmp_path / "work")))
    assert not list((tmp_path / "work").glob("*"))


# --------------------------------------------------------------------------------------------- column


def column_of(tmp_path: Path, table: pa.Table, wanted: str | None = None) -> str:
    pq.write_table(table, tmp_path / "t.parquet")
    return chosen(opened(tmp_path / "t.parquet", tmp_path), wanted)


def chosen(table: InputTable, wanted: str | None = None) -> str:
    [column] = choose_columns(table, Prompt("translate"), {"text": wanted} if wanted else {})
    return column


def test_the_only_text_column_is_chosen(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string()):
        assert column_of(tmp_path, pa.table({"n": [1], "body": pa.array(["a"], kind)})) == "body"
    assert column_of(tmp_path, pa.table({"n": [1], "body": pa.array(["a"]).dictionary_encode()})) == "body"


def test_an_unclear_column_is_refused_with_what_there_is(tmp_path: Path) -> None:
    two = pa.table({"title": ["a"], "body": ["b"], "n": [1]})
    assert column_of(tmp_path, two, "body") == "body"
    with pytest.raises(InputError, match="several columns hold text, name one with --column: title, body"):
        column_of(tmp_path, two)
    with pytest.raises(InputError, match=r"no column 'bodi'; did you mean 'body'\? Its columns: title \(string\)"):
        column_of(tmp_path, two, "bodi")
    with pytest.raises(InputError, match="column 'n' holds int64, text"):
        column_of(tmp_path, two, "n")
    with pytest.raises(InputError, match=r"no column holds text; its columns: n \(int64\)"):
        column_of(tmp_path, pa.table({"n": [1]}))


def test_csv_cells_that_are_numbers_or_dates_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,when,text,flag\n007,2026-01-02,Hello,true\n008,2026-01-03,World,false\n")
    assert chosen(opened(tmp_path / "a.csv", tmp_path)) == "text"


def test_json_columns_of_mixed_kinds_give_row_problems(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": 5}, {"n": 1}, {"text": None}, {"text": ["b"]}, {"text": True}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = opened(tmp_path / "a.jsonl", tmp_path)
    assert chosen(table) == "text"
    texts = read_fields(table, ["text"], 0, 6)
    assert texts.values == [("a",), *[(None,)] * 5]
    kinds = [problem and problem.rsplit(" ", 1)[1] for problem in texts.problems]
    assert kinds == [None, "number", None, None, "array", "boolean"]
    with pytest.raises(InputError, match="column 'n' holds int64"):
        chosen(table, "n")


def test_files_of_one_table_have_the_same_columns(tmp_path: Path) -> None:
    for name, table in (
        ("a", pa.table({"text": ["a"], "n": [1]})),
        ("b", pa.table({"text": ["a"], "n": ["1"]})),
        ("c", pa.table({"text": ["a"]})),
    ):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    a, b, c = (opened(tmp_path / f"{name}.parquet", tmp_path) for name in "abc")
    check_same_columns([a, a])
    with pytest.raises(
        InputError, match=r"b\.parquet: column 'n' is string, in .*a\.parquet it is int64; the files of"
    ):
        check_same_columns([a, b])
    with pytest.raises(InputError, match=r"c\.parquet: column 'n' is absent, in .*a\.parquet it is int64"):
        check_same_columns([a, c])


def test_a_file_that_is_no_arrow_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"t\.arrow: not readable as an Arrow IPC file: "):
        opened(tmp_path / "t.arrow", tmp_path / "work")


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_of_both_formats_are_read_and_damaged_ones_named(tmp_path: Path, kind: Any) -> None:
    table = pa.table({"text": [f"text {n}" for n in range(3_000)]})
    with kind(str(tmp_path / "t.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    found = opened(tmp_path / "t.arrow", tmp_path / "work")
    assert found.rows == 3_000 and found.columns == table.schema
    assert read_fields(found, ["text"], 1_500, 1_502).values == [("text 1500",), ("text 1501",)]
    content = (tmp_path / "t.arrow").read_bytes()
    (tmp_path / "t.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"t\.arrow: not readable as an Arrow IPC file: "):
        opened(tmp_path / "t.arrow", tmp_path / "work")


# -------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_any_range_of_rows_is_read(tmp_path: Path, suffix: str) -> None:
    rows = 2 * PREPARED_ROWS + 77
    texts = [f'row {n}, "quoted"\nsecond line' for n in range(rows)]
    file = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), file, row_group_size=500)
    elif suffix == "jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        pcsv.write_csv(pa.table({"text": texts}), file)
    table = opened(file, tmp_path / "work")
    assert table.rows == rows
    for start, stop in ((0, 1), (499, 501), (0, rows), (PREPARED_ROWS - 1, 2 * PREPARED_ROWS + 1), (rows - 1, rows)):
        assert read_fields(table, ["text"], start, stop).values == [(text,) for text in texts[start:stop]]


def test_only_the_row_groups_of_a_range_are_read(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"{n} " * 200 for n in range(400)]}), file, row_group_size=100)
    last = pq.ParquetFile(file).metadata.row_group(3).column(0)
    content = bytearray(file.read_bytes())
    start = last.dictionary_page_offset or last.data_page_offset
    content[start : start + last.total_compressed_size] = b"\xff" * last.total_compressed_size
    file.write_bytes(content)
    table = opened(file, tmp_path)
    assert len(read_fields(table, ["text"], 0, 300).values) == 300
    with pytest.raises(InputError, match=r"t\.parquet: not readable as parquet"):
        read_fields(table, ["text"], 299, 301)


def test_a_large_row_group_is_read_page_by_page(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    texts = [f"{n} " * 1_000 for n in range(2_000)]
    pq.write_table(pa.table({"text": texts}), file, compression="none", use_dictionary=False, data_page_size=100_000)
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    content = bytearray(file.read_bytes())
    stop = column.data_page_offset + column.total_compressed_size
    content[stop - 1_000_000 : stop] = b"\xff" * 1_000_000
    file.write_bytes(content)
    table = opened(file, tmp_path)
    for start, end in ((0, 300), (900, 950), (300, 500)):
        assert read_fields(table, ["text"], start, end).values == [(text,) for text in texts[start:end]]
    with pytest.raises(InputError, match=r"t\.parquet: not readable as parquet"):
        read_fields(table, ["text"], 500, 2_000)


def test_bytes_that_are_no_text_are_a_problem_of_their_row(tmp_path: Path) -> None:
    cells = pa.array([b"good", b"\xff\xfe", None], pa.binary())
    broken = pa.StringArray.from_buffers(3, cells.buffers()[1], cells.buffers()[2], cells.buffers()[0])
    pq.write_table(pa.table({"text": broken}), tmp_path / "t.parquet")
    texts = read_fields(opened(tmp_path / "t.parquet", tmp_path), ["text"], 0, 3)
    assert texts.values == [("good",), (None,), (None,)]
    assert texts.problems == [None, "text is not valid UTF-8", None]


# ------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_every_arrow_type_passes_through(tmp_path: Path, kind: Any) -> None:
    file = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(EVERY_TYPE, file, row_group_size=2)
    else:
        with pa.ipc.new_file(str(file), EVERY_TYPE.schema) as writer:
            writer.write_table(EVERY_TYPE, max_chunksize=2)
    place = written(opened(file, tmp_path / "work"), tmp_path / f"out.{kind}", kind)
    out = pq.read_table(place) if kind == "parquet" else pa.ipc.open_file(place).read_all()
    assert out.column_names == [*EVERY_TYPE.column_names, "translation", "error", "truncated"]
    # NaN is unequal to itself: that column is compared as text.
    assert str(out["ratio"].to_pylist()) == str(EVERY_TYPE["ratio"].to_pylist())
    same = EVERY_TYPE.drop_columns(["ratio"])
    kept = out.select(same.column_names)
    assert kept.schema.equals(same.schema)
    assert kept.to_pylist() == same.to_pylist()
    assert out.schema.metadata[b"made by"] == b"a test"
    assert out["translation"].to_pylist() == ["0", "1", "2"]


def test_a_pandas_frame_comes_back_with_its_index(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"text": ["a", "b"], "n": [1, 2]}, index=pd.Index(["x", "y"], name="key"))
    frame.to_parquet(tmp_path / "t.parquet")
    out = pd.read_parquet(written(opened(tmp_path / "t.parquet", tmp_path), tmp_path / "out.parquet", "parquet"))
    pd.testing.assert_frame_equal(out[["text", "n"]], frame)


def test_parquet_becomes_json_lines_and_csv(tmp_path: Path) -> None:
    pq.write_table(EVERY_TYPE, tmp_path / "t.parquet")
    table = opened(tmp_path / "t.parquet", tmp_path)
    lines = written(table, tmp_path / "out.jsonl", "jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["when"].startswith("2026-01-02T03:00:00") and first["price"] == "1.50" and first["raw"] == "AP8="
    assert first["tags"] == ["a", None] and first["where"] == {"x": 1.5, "y": None} and first["truncated"] is False
    assert json.loads(lines[1])["ratio"] is None
    with written(table, tmp_path / "out.csv", "csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0]["tags"] == '["a", null]' and rows[0]["truncated"] == "false" and rows[1]["text"] == ""
    assert [row["translation"] for row in rows] == ["0", "1", "2"]


def test_json_lines_keep_keys_numbers_and_nesting(tmp_path: Path) -> None:
    lines = ['{"text": "ü", "n": 1.0, "deep": {"a": [1, "x"]}}', '{"big": 123456789012345678901, "text": "b\\ud800"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = written(opened(tmp_path / "a.jsonl", tmp_path), tmp_path / "o.jsonl", "jsonl").read_text().splitlines()
    result = {"translation": "0", "error": None, "truncated": False}
    assert [json.loads(line) for line in out] == [
        json.loads(lines[0]) | result,
        json.loads(lines[1]) | result | {"translation": "1"},
    ]
    assert "ü" in out[0] and list(json.loads(out[1]))[:2] == ["big", "text"]


@pytest.mark.parametrize("floats_first", [True, False])
def test_large_integers_beside_floating_point_numbers_stay_what_they_are(tmp_path: Path, floats_first: bool) -> None:
    large: dict[str, Any] = {"n": 2**53 + 1, "deep": {"a": [2**60], "b": 1.5}, "id": 2**60, "small": 1}
    other: dict[str, Any] = {"n": 0.5, "deep": {"a": [0.5], "b": 1.5}, "id": 1, "small": 0.5}
    rows = [large] * PREPARED_ROWS + [other] * PREPARED_ROWS
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[::-1] if floats_first else rows)))
    table = pq.read_table(written(opened(tmp_path / "a.jsonl", tmp_path), tmp_path / "out.parquet", "parquet"))
    found = sorted(table.to_pylist(), key=lambda row: row["id"])
    assert [(row["n"], row["id"], row["small"]) for row in (found[0], found[-1])] == [
        ("0.5", 1, 0.5),
        (str(2**53 + 1), 2**60, 1.0),
    ]
    assert json.loads(found[-1]["deep"]) == large["deep"]


def test_json_lines_become_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "n": 1, "mixed": 1, "tags": [], "none": {}} for _ in range(PREPARED_ROWS)
    ]
    rows += [{"text": "b\ud800", "n": 2.5, "mixed": "x", "tags": ["t"], "late": True}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = pq.read_table(written(opened(tmp_path / "a.jsonl", tmp_path), tmp_path / "o.parquet", "parquet"))
    assert out.column_names == ["text", "n", "mixed", "tags", "none", "late", "translation", "error", "truncated"]
    assert out["n"].type == pa.float64() and out["mixed"].type == pa.string() and out["late"].type == pa.bool_()
    assert out.slice(PREPARED_ROWS).to_pylist()[0]["tags"] == ["t"]
    assert out["mixed"].to_pylist()[-2:] == ["1", "x"] and out["none"][0].as_py() == "{}"


def test_csv_comes_back_as_it_was_written(tmp_path: Path) -> None:
    content = 'id,text,rate\n007,"Hello, ""you""",1.50\n008,"two\nlines",\n'
    (tmp_path / "a.csv").write_text("\ufeff" + content)
    out = written(opened(tmp_path / "a.csv", tmp_path), tmp_path / "o.csv", "csv").read_text()
    assert out == (
        'id,text,rate,translation,error,truncated\n007,"Hello, ""you""",1.50,0,,false\n008,"two\nlines",,1,,false\n'
    )


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_no_rows_give_no_rows(tmp_path: Path, kind: str) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "t.parquet")
    out = written(opened(tmp_path / "t.parquet", tmp_path), tmp_path / f"o.{kind}", kind)
    if kind == "parquet":
        assert pq.read_table(out).column_names == ["text", "translation", "error", "truncated"]
    else:
        assert out.read_text() == ("text,translation,error,truncated\n" if kind == "csv" else "")


def test_a_failed_output_leaves_nothing_behind(tmp_path: Path) -> None:
    pq.write_table(EVERY_TYPE, tmp_path / "t.parquet")
    table = opened(tmp_path / "t.parquet", tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        written(table, tmp_path / "file" / "o.parquet", "parquet")
    (tmp_path / "out").mkdir()
    schema = result_schema(TRANSLATE, with_scores=False)
    empty = pa.record_batch([pa.array([], field.type) for field in schema], schema)
    with pytest.raises(ValueError, match="3 rows have no answers"):
        write_output(table, 3, iter([empty]), StoragePath(str(tmp_path / "out" / "o.parquet")), "parquet")
    assert list((tmp_path / "out").iterdir()) == []


# -------------------------------------------------------------------------------------------- chunks


def test_chunks_cover_all_rows_once_in_order() -> None:
    chunks = list(plan_chunks([1_000, 0, 1, 5_000], 512))
    assert [sum(chunk.rows for chunk in chunks if chunk.file == n) for n in range(4)] == [1_000, 0, 1, 5_000]
    assert chunks == sorted(chunks, key=lambda chunk: (chunk.file, chunk.start))
    assert max(chunk.rows for chunk in chunks) == 512
    assert len(list(plan_chunks([936], 512))) == 8, "small inputs are shared among workers"
    assert [chunk.rows for chunk in plan_chunks([40], 512)] == [32, 8]
    assert list(plan_chunks([], 512)) == []
    large = list(plan_chunks([10**8] * 10, 1_024))
    assert len(large) == 50_000 and sum(chunk.rows for chunk in large) == 10**9


def test_a_file_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\none\n")
    files = list_inputs(str(file))
    check_unchanged(files)
    file.write_text("text\none more\n")
    with pytest.raises(InputError, match=r"a\.csv: changed while the job ran"):
        check_unchanged(files)


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "in" / "a.csv"
    file.parent.mkdir()
    file.write_text("text\none\n")
    pattern = str(tmp_path / "in" / "*.csv")
    with pytest.raises(OutputError, match=r"would replace its input .*a\.csv"):
        output_place(pattern, list_inputs(pattern), TRANSLATE, str(tmp_path / "in"))


def test_an_output_that_the_next_run_would_take_for_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.csv").write_text("text\none\n")
    pattern = str(tmp_path / "**" / "*.csv")
    files = list_inputs(pattern)
    with pytest.raises(OutputError, match=rf"\*\.csv names {tmp_path}/out/a\.csv as well"):
        output_place(pattern, files, TRANSLATE, str(tmp_path / "out"))
    for output in (tmp_path / "_out", tmp_path.parent / f"{tmp_path.name}-out"):
        assert output_place(pattern, files, TRANSLATE, str(output)).path == str(output)
