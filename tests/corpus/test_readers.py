"""Each reader against the plain way of reading its format, and that no cut changes what comes out."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import write_po
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylm.corpus import catalogs, readers, tables
from raylm.corpus.readers import END, AlignedRange, Row, row_texts
from raylm.corpus.records import Rejected
from raylm.errors import InputError
from raylm.storage import StoragePath

Found = list[Row | Rejected]
Reader = Callable[[StoragePath, int, int], Iterable[Row | Rejected]]


def zst(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def place(path: Path) -> StoragePath:
    return StoragePath(str(path))


def jsonl(file: StoragePath, start: int = 0, stop: int = END) -> Iterator[Row | Rejected]:
    return readers.jsonl_rows(file, start, stop, ["text"])


def table(file: StoragePath, start: int = 0, stop: int = END) -> Iterator[Row | Rejected]:
    return readers.csv_rows(file, start, stop, ["text"])


def values(found: Iterable[Row | Rejected]) -> list[str]:
    return [row_texts(row, ["text"])[0] for row in found if isinstance(row, Row)]  # type: ignore[index]


def rejected(found: Iterable[Row | Rejected]) -> list[tuple[str, int]]:
    return [(row.error, row.position) for row in found if isinstance(row, Rejected)]


def in_ranges(read: Reader, file: StoragePath, cuts: list[int]) -> Found:
    size = file.info().size
    bounds = sorted({0, *(cut for cut in cuts if cut < size)})
    return [row for start, stop in itertools.pairwise([*bounds, size]) for row in read(file, start, stop)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


# ----------------------------------------------------------------------------------------- cuts, by property

LINES = st.lists(st.sampled_from([b"", b" ", b"a", b"\xc3\xbc", b"long line of words", b"\r", b"\t"]), max_size=12)
CUTS = st.lists(st.integers(1, 200), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, st.booleans(), CUTS)
def test_blocks_are_what_blank_lines_part_however_a_file_is_cut(
    folder: Path, lines: list[bytes], ends: bool, cuts: list[int]
) -> None:
    content = b"\n".join(lines) + b"\n" * ends
    (folder / "a.txt").write_bytes(content)
    expected = [
        b"\n".join(block).strip()
        for blank, block in itertools.groupby(content.split(b"\n"), lambda line: not line.strip())
        if not blank
    ]
    found = in_ranges(readers.text_blocks, place(folder / "a.txt"), cuts) if content else []
    assert [row.values[0].strip() for row in found if isinstance(row, Row)] == expected
    for row in found:
        assert isinstance(row, Row)
        assert content[row.position :].startswith(row.values[0])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(), st.just(None)), min_size=1, max_size=8), st.booleans(), CUTS)
def test_json_lines_come_once_however_a_file_is_cut(
    folder: Path, texts: list[str | None], ends: bool, cuts: list[int]
) -> None:
    lines = [b"{not json" if text is None else json.dumps({"text": text}).encode() for text in texts]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n" * ends)
    found = in_ranges(jsonl, place(folder / "a.jsonl"), cuts)
    assert values(found) == [text for text in texts if text is not None]
    starts = [0, *itertools.accumulate(len(line) + 1 for line in lines)][: len(lines)]
    assert [row.position for row in found] == starts


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.text('a"\n\r,ü'), st.text('b"\n,')), min_size=1, max_size=10),
    st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
    st.integers(1, 40),
)
def test_csv_rows_are_those_of_the_csv_module_however_a_file_is_cut(
    folder: Path, rows: list[tuple[str, str]], dialect: tuple[str, Literal[0, 1]], unit_bytes: int
) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator=dialect[0], quoting=dialect[1]).writerows([("text", "other"), *rows])
    (folder / "a.csv").write_text(text.getvalue(), newline="")
    file = place(folder / "a.csv")
    cuts = readers.csv_cuts(file, unit_bytes)
    assert len(cuts) > 1 or file.info().size < unit_bytes * 3 + 40
    assert values(in_ranges(table, file, cuts)) == [row[0] for row in rows]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=6).map(lambda line: line.replace(b"\n", b'"')), min_size=1, max_size=12), CUTS)
def test_csv_of_any_bytes_is_read_alike_whole_and_cut(folder: Path, lines: list[bytes], sizes: list[int]) -> None:
    file = place(folder / "b.csv")
    file.write_bytes(b"text,other\n" + b"\n".join(lines))
    whole = list(table(file))
    for unit_bytes in (1, 7, *sizes):
        assert in_ranges(table, file, readers.csv_cuts(file, unit_bytes)) == whole


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 12), CUTS)
def test_parquet_rows_come_once_across_row_groups(folder: Path, rows: int, group: int, cuts: list[int]) -> None:
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(rows)]}), folder / "a.parquet", row_group_size=group)
    bounds = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    found = [
        row
        for start, stop in itertools.pairwise(bounds)
        for row in tables.parquet_rows(place(folder / "a.parquet"), start, stop, ["text"])
    ]
    assert [(row.position, row.values) for row in found] == [(n, [f"row {n}"]) for n in range(rows)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text("aü "), st.text("bß ")), min_size=1, max_size=12), st.booleans(), st.integers(1, 30))
def test_aligned_lines_stay_together_however_files_are_cut(
    folder: Path, pairs: list[tuple[str, str]], ends: bool, unit_bytes: int
) -> None:
    pairs.append(("end", "Ende"))  # a last line that is empty and has no line end is none
    source, target = folder / "a.en", folder / "a.de"
    source.write_text("\n".join(pair[0] for pair in pairs) + "\n" * ends)
    target.write_text("\r\n".join(pair[1] for pair in pairs) + "\n" * (not ends), newline="")
    ranges = readers.aligned_ranges(place(source), place(target), unit_bytes)
    assert len(ranges) > 1 or source.stat().st_size < 2 * unit_bytes + 60
    found = [row for part in ranges for row in readers.aligned_rows(place(source), place(target), part)]
    assert [row_texts(row, "ab") for row in found if isinstance(row, Row)] == pairs


# ------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl.gz", gzip.compress),
        ("b.jsonl.gz", lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:])),  # as `cat a.gz b.gz`
        ("c.jsonl.zst", zst),
        ("d.jsonl.zst", lambda data: zst(data[:1000]) + zst(data[1000:])),
    ],
)
def test_compressed_files_are_whole_or_an_error(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    data = b"".join(json.dumps({"text": f"line {n}"}).encode() + b"\n" for n in range(5_000))
    packed = pack(data)
    (tmp_path / name).write_bytes(packed)
    assert values(jsonl(place(tmp_path / name))) == [f"line {n}" for n in range(5_000)]
    for size in (len(packed) - 1, len(packed) // 2):
        (tmp_path / name).write_bytes(packed[:size])
        with pytest.raises(InputError, match=f"{name}: not readable as JSON Lines: Truncated"):
            list(jsonl(place(tmp_path / name)))


def test_text_and_csv_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo"))
    assert values(readers.text_blocks(place(tmp_path / "a.txt.gz"), 0, END)) == ["one\n", "two"]
    (tmp_path / "a.tsv.zst").write_bytes(zst(b'id\ttext\n1\t"a\nb"\n'))
    assert values(table(place(tmp_path / "a.tsv.zst"))) == ["a\nb"]


def test_suffixes_count_in_any_case(tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "A.TSV.GZ").write_bytes(gzip.compress(b"id\ttext\n1\ta, b\n"))
    assert values(table(place(tmp_path / "A.TSV.GZ"))) == ["a, b"]
    catalog.delete(("one", "many"))
    with (tmp_path / "A.MO").open("wb") as stream:
        write_mo(stream, catalog)
    assert sorted(pairs(tmp_path / "A.MO")) == sorted(PAIRS)


def test_a_huge_compressed_file_is_streamed(tmp_path: Path) -> None:
    import resource

    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as stream:
        line = json.dumps({"text": "word " * 200_000}).encode() + b"\n"  # 1 MB
        for _ in range(300):
            stream.write(line)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in jsonl(place(tmp_path / "a.jsonl.gz"))) == 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100_000


# --------------------------------------------------------------------------------------- the dead letter


def test_bad_json_lines_cost_themselves_alone(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "one"}',
        b'{"text": ',
        b"[1]",
        b"3",
        b'{"other": "x"}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"\\ud800": "x"}',
        b"",
        b'{"text": "\\ud83d\\ude00"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    starts = [0, *itertools.accumulate(len(line) + 1 for line in lines)]
    found = list(jsonl(place(tmp_path / "a.jsonl")))
    read = [row_texts(row, ["text"]) if isinstance(row, Row) else row for row in found]
    assert [row for row in read if isinstance(row, tuple)] == [("one",), ("😀",)]
    bad = [row for row in read if isinstance(row, Rejected)]
    assert [row.position for row in bad] == starts[1:11]
    assert all((row.error + row.excerpt).encode() for row in bad), "no half of a surrogate pair is left"
    assert all(len(row.excerpt) <= 200 for row in bad)
    assert bad[0].excerpt == '{"text": '
    errors = [row.error.partition(":")[0] for row in bad]
    assert errors == [
        "not JSON",
        "an array where an object, {…}, is expected on the line",
        "a bare value where an object, {…}, is expected on the line",
        "no 'text' among the line's keys",
        "text",
        "text",
        "not UTF-8 text, see byte 10 of the line",
        "text",
        "not JSON",
        "no 'text' among the line's keys",
    ]


def test_bad_csv_rows_cost_themselves_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,a\n2\n3,b,c\n\n4,\xff\n5,"d"\n6,e\n7,"open\n8,f\n')
    read = [row_texts(row, ["text"]) if isinstance(row, Row) else row for row in table(place(tmp_path / "a.csv"))]
    assert [row[0] for row in read if isinstance(row, tuple)] == ["a", "d", "e"]
    assert rejected(row for row in read if isinstance(row, Rejected)) == [
        ("1 cells where the header has 2", 12),
        ("3 cells where the header has 2", 14),
        ("text: not UTF-8 text, see its byte 0", 21),
        ("the file ends inside of quotes; the row is 2 lines long: is a quote left open?", 35),
    ]


def test_a_quote_left_open_in_the_middle_says_how_many_lines_it_took(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"open\n2,b\n3,"c"\n4,d\n5,"e"f"\n6,"g\n7"",h\n8",i\n9,j\n')
    found = list(table(place(tmp_path / "a.csv")))
    hint = "; the row is 3 lines long: is a quote left open?"
    assert rejected(found) == [
        (f"',' expected after '\"'{hint}", 8),
        ("',' expected after '\"'", 30),
        (f"3 cells where the header has 2{hint}", 38),
    ]
    assert values(found) == ["d", "j"]


def test_cells_may_be_larger_than_the_csv_module_allows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 300_000}\n")
    assert values(table(place(tmp_path / "a.csv"))) == ["x" * 300_000]


def test_what_is_too_long_is_dropped_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_RECORD_BYTES", 30)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "x" * 100 + '"}\n{"text": "b"}\n')
    for cuts in ([], [20], [40, 80], list(range(1, 150))):
        found = in_ranges(jsonl, place(tmp_path / "a.jsonl"), cuts)
        assert values(found) == ["a", "b"]
        assert [position for _, position in rejected(found)] == [14]
    (tmp_path / "a.txt").write_text("a\n\n" + "0123456789\n" * 9 + "\nb\n")
    for cuts in ([], [20], [40, 80], list(range(1, 100))):
        found = in_ranges(readers.text_blocks, place(tmp_path / "a.txt"), cuts)
        assert values(found) == ["a\n", "b\n"]
        assert [position for _, position in rejected(found)] == [3]
    (tmp_path / "a.csv").write_text("text\na\n" + "x" * 100 + "\nb\n")
    found = list(table(place(tmp_path / "a.csv")))
    assert values(found) == ["a", "b"]
    assert len(rejected(found)) == 1
    (tmp_path / "a.md").write_text("x" * 31)
    assert isinstance(readers.whole_file(place(tmp_path / "a.md")), Rejected)


def test_utf16_is_told_apart_from_damage(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(InputError, match="a.txt: not readable as text: it is UTF-16, UTF-8 is expected"):
        list(readers.text_blocks(place(tmp_path / "a.txt"), 0, END))


def test_null_and_damaged_texts_of_parquet_cost_themselves_alone(tmp_path: Path) -> None:
    damaged = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    column = pa.chunked_array([damaged, pa.array(["ü", None])])
    pq.write_table(pa.table({"text": column, "code": column.cast(pa.large_binary())}), tmp_path / "a.parquet")
    for name in ("text", "code"):
        read = [row_texts(row, [name]) for row in tables.parquet_rows(place(tmp_path / "a.parquet"), 0, 5, [name])]
        assert [row[0] for row in read if isinstance(row, tuple)] == ["a", "c", "ü"]
        assert rejected(row for row in read if isinstance(row, Rejected)) == [
            (f"{name}: not UTF-8 text, see its byte 0", 1),
            (f"{name}: nothing (null) where a text is expected", 4),
        ]


def test_a_cut_off_parquet_row_group_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{n} text" for n in range(10_000)]}), file)
    data = file.read_bytes()
    file.write_bytes(data[:100] + bytes(3_000) + data[3_100:])
    with pytest.raises(InputError, match="a.parquet: not readable as parquet: "):
        list(tables.parquet_rows(place(file), 0, END, ["text"]))


# -------------------------------------------------------------------------------------- Arrow, as saved


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_of_both_formats_are_read(tmp_path: Path, kind: str) -> None:
    data = pa.table({"text": [f"row {n}" for n in range(3_000)], "n": list(range(3_000))})
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(str(tmp_path / "a.arrow"), data.schema) as writer:
        writer.write_table(data, max_chunksize=1_700)
    rows = list(tables.arrow_rows(place(tmp_path / "a.arrow"), ["text"]))
    assert [(row.position, row.values) for row in rows] == [(n, [f"row {n}"]) for n in range(3_000)]
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:5_000])
    with pytest.raises(InputError, match="a.arrow: not readable as an Arrow stream"):
        list(tables.arrow_rows(place(tmp_path / "a.arrow"), ["text"]))


# --------------------------------------------------------------------------------------- aligned, gettext


def test_aligned_files_of_different_length_are_refused_with_both_counts(tmp_path: Path) -> None:
    source, target = tmp_path / "a.en", tmp_path / "a.de"
    source.write_text("one\ntwo\nthree\n")
    target.write_text("eins\nzwei")
    message = "a.en has 3 lines and .*a.de 2: line n is to be the target of line n"
    with pytest.raises(InputError, match=message):
        list(readers.aligned_rows(place(source), place(target), AlignedRange(0, END, 0, END)))
    with pytest.raises(InputError, match=message):
        readers.aligned_ranges(place(source), place(target), 4)


@pytest.fixture
def catalog() -> Catalog:
    catalog = Catalog(locale="pl", header_comment="# not a message")
    catalog.add("Open", "Otwórz", context="menu")
    catalog.add("Closed", "")
    catalog.add("Maybe", "Może", flags=["fuzzy"])
    catalog.add(("%(n)d file", "%(n)d files"), ("%(n)d plik", "%(n)d pliki", "%(n)d plików"))
    catalog.add(("one", "many"), ("", "", ""))
    catalog.add("two\nlines", "dwie\nlinie")
    return catalog


PAIRS = [
    ("Open", "Otwórz"),
    ("%(n)d file", "%(n)d plik"),
    ("%(n)d files", "%(n)d plików"),
    ("two\nlines", "dwie\nlinie"),
]


def pairs(path: Path) -> list[tuple[str, ...]]:
    return [row_texts(row, "st") for row in catalogs.gettext_rows(place(path)) if isinstance(row, Row)]  # type: ignore[misc]


def test_catalogs_give_their_translated_messages(tmp_path: Path, catalog: Catalog) -> None:
    with (tmp_path / "pl.po").open("wb") as stream:
        write_po(stream, catalog)
    catalog.delete(("one", "many"))  # which Babel would write as translations of themselves
    with (tmp_path / "pl.mo").open("wb") as stream:
        write_mo(stream, catalog)
    assert pairs(tmp_path / "pl.po") == PAIRS
    assert sorted(pairs(tmp_path / "pl.mo")) == sorted(PAIRS)
    lines = (tmp_path / "pl.po").read_text().splitlines()
    first = next(iter(catalogs.gettext_rows(place(tmp_path / "pl.po"))))
    assert "Open" in "".join(lines[first.position - 1 : first.position + 2])


def test_a_malformed_message_costs_itself_alone(
    tmp_path: Path, catalog: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    text = io.BytesIO()
    write_po(text, catalog)
    broken = b'msgid "broken\nmsgstr "kaputt"\n\nmsgid "bytes"\nmsgstr "\xff"\n\n'
    content = text.getvalue().replace(b'msgctxt "menu"', broken + b'msgctxt "menu"')
    (tmp_path / "pl.po").write_bytes(content)
    assert pairs(tmp_path / "pl.po") == PAIRS
    found = rejected(catalogs.gettext_rows(place(tmp_path / "pl.po")))
    first = content[: content.index(b'msgid "broken')].count(b"\n") + 1
    assert [position for _, position in found] == [first, first + 3]
    assert capsys.readouterr().out == ""


def test_a_damaged_mo_file_is_named(tmp_path: Path, catalog: Catalog) -> None:
    with (tmp_path / "pl.mo").open("wb") as stream:
        write_mo(stream, catalog)
    for content in ((tmp_path / "pl.mo").read_bytes()[:100], b"no catalog", b"x"):
        (tmp_path / "pl.mo").write_bytes(content)
        with pytest.raises(InputError, match="pl.mo: not readable as a gettext catalog"):
            list(catalogs.gettext_rows(place(tmp_path / "pl.mo")))


def test_damage_is_that_of_the_file_that_has_it(tmp_path: Path) -> None:
    source, target = tmp_path / "train.en", tmp_path / "train.de"
    source.write_text("one\ntwo\n")
    target.write_text("eins\nzwei\n", encoding="utf-16")
    part = AlignedRange(0, END, 0, END)
    with pytest.raises(InputError, match=r"train\.de: not readable as text: it is UTF-16"):
        list(readers.aligned_rows(StoragePath(str(source)), StoragePath(str(target)), part))
    with pytest.raises(InputError, match=r"train\.en: not readable as text: it is UTF-16"):
        source.write_text("one\ntwo\n", encoding="utf-16")
        list(readers.aligned_rows(StoragePath(str(source)), StoragePath(str(target)), part))


def test_row_groups_without_rows_are_passed_over(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for one in (table, table.slice(0, 0), table):
            writer.write_table(one)
    found = tables.parquet_rows(StoragePath(str(tmp_path / "a.parquet")), 0, 4, ["text"])
    assert [(row.position, row.values[0]) for row in found] == [(0, "a"), (1, "b"), (2, "a"), (3, "b")]
