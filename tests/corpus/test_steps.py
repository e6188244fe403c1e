from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from raylm.corpus.steps import cut_by_hash, read_part, read_rows, read_table, run_step, write_table
from raylm.errors import InputError
from raylm.storage import StoragePath


def test_only_items_without_a_result_are_done(tmp_path: Path, ray_cluster: None) -> None:
    place, log = StoragePath(str(tmp_path / "step")), tmp_path / "log"
    log.mkdir()

    def work(number: int) -> dict[str, int]:
        (log / f"{number}").touch()
        return {"square": number * number}

    names = [f"item-{number}" for number in range(4)]
    (place / "item-2.json").write_json({"square": 40})
    results = run_step(place, "test", names, work)
    assert [result["square"] for result in results] == [0, 1, 40, 9]
    assert sorted(file.name for file in log.iterdir()) == ["0", "1", "3"]
    assert run_step(place, "test", names, lambda number: 1 // 0) == results


def test_an_error_of_ours_comes_back_as_itself_and_leaves_no_result(tmp_path: Path, ray_cluster: None) -> None:
    place = StoragePath(str(tmp_path / "step"))

    def work(number: int) -> dict[str, int]:
        raise InputError(f"file {number}: damaged")

    with pytest.raises(InputError, match="file 0: damaged"):
        run_step(place, "test", ["a"], work)
    assert not (place / "a.json").is_file()


def test_tables_come_back_whole_in_parts_and_by_rows(tmp_path: Path) -> None:
    file = StoragePath(str(tmp_path / "a.arrow"))
    table = pa.table({"n": range(1_000), "text": [f"text {n}" for n in range(1_000)]})
    write_table(file, table)
    assert read_table(file).equals(table)
    rows = [0, 3, 255, 256, 700, 999]
    assert read_rows(file, rows, ["text"])["text"].to_pylist() == [f"text {n}" for n in rows]
    write_table(file, table, [10, 0, 990])
    assert [len(read_part([file, file], part, table.schema)) for part in range(3)] == [20, 0, 1_980]
    write_table(file, table.slice(0, 0), [0, 0])
    assert len(read_part([file], 1, table.schema)) == 0


def test_hashes_are_cut_into_equal_ranges() -> None:
    hashes = pa.chunked_array([pa.array([0, 2**62, 2**63 - 1, 2**63, 2**64 - 1], pa.uint64())])
    assert cut_by_hash(hashes, 1) == [5]
    assert cut_by_hash(hashes, 2) == [3, 2]
    assert cut_by_hash(hashes, 4) == [1, 2, 1, 1]
    assert sum(cut_by_hash(hashes, 7)) == 5
