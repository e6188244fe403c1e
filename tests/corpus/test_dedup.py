"""Near-duplicates on a real Ray: what goes has a near-copy among what stays."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raylm.corpus.dedup import _EDGES, _components, band_keys, find_near_duplicates, near_duplicates, signatures
from raylm.corpus.merge import MERGED, merged_file
from raylm.corpus.plan import Plan
from raylm.corpus.shingles import shingles
from raylm.corpus.steps import write_table
from raylm.settings import CorpusSettings

VOCABULARY = [f"word{n}" for n in range(5_000)]


def prose(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(VOCABULARY) for _ in range(words)]


def jaccard(first: str, second: str) -> float:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[n : n + 5]) for n in range(len(words) - 4)}

    a, b = grams(first), grams(second)
    return len(a & b) / len(a | b)


def run(directory: Path, texts: list[str], parts: int, splits: list[str] | None = None, **dedup: object) -> set[int]:
    """The numbers of the texts that go, with text n as a row of part n modulo `parts`."""
    corpus = CorpusSettings.model_validate({"dedup": dedup})
    plan = Plan(corpus, None, None, str(directory), ())
    for part in range(parts):
        numbers = range(part, len(texts), parts)
        rows = [
            {"kind": "document", "split": splits[n] if splits else "train", "source": texts[n], "language": "en",
             "from": 0, "rank": n, "content": n}
            for n in numbers
        ]  # fmt: skip
        write_table(merged_file(plan, part), pa.Table.from_pylist(rows, MERGED))
    find_near_duplicates(plan, parts)
    return {int(row) * parts + part for part in range(parts) for row in near_duplicates(plan, part)}


@pytest.fixture
def planted() -> tuple[list[str], dict[int, int]]:
    """Texts, and for each edited copy the number of its original."""
    rng = random.Random(3)
    texts = [prose(rng, rng.randint(60, 300)) for _ in range(120)]
    copies = {}
    for number in range(0, 120, 2):
        words = list(texts[number])
        for _ in range(rng.randint(1, max(len(words) // 80, 1))):
            words[rng.randrange(len(words))] = "edited"
        copies[len(texts)] = number
        texts.append(words)
    return [" ".join(words) for words in texts], copies


def test_edited_copies_go_and_nothing_else(
    planted: tuple[list[str], dict[int, int]], tmp_path: Path, ray_cluster: None
) -> None:
    texts, copies = planted
    gone = run(tmp_path, texts, 3)
    for copy, original in copies.items():
        alike = jaccard(texts[copy], texts[original])
        if alike >= 0.85:
            assert len({copy, original} & gone) == 1, alike
        elif alike < 0.8:
            assert not {copy, original} & gone, alike
    assert gone <= {*copies, *copies.values()}


def test_the_number_of_parts_changes_nothing(
    planted: tuple[list[str], dict[int, int]], tmp_path: Path, ray_cluster: None
) -> None:
    texts, _ = planted
    # Equal lengths would be decided by ids, which contain the part.
    texts = [f"{text} {'x' * number}" for number, text in enumerate(texts)]
    assert run(tmp_path / "1", texts, 1) == run(tmp_path / "4", texts, 4) != set()


def test_the_longest_stays_or_the_first(tmp_path: Path, ray_cluster: None) -> None:
    base = " ".join(prose(random.Random(1), 200))
    texts = [f"{base} one", f"{base} one two three", base]
    assert run(tmp_path / "longest", texts, 1) == {0, 2}
    assert run(tmp_path / "first", texts, 1, keep="first") == {1, 2}


def test_a_held_out_copy_stays(tmp_path: Path, ray_cluster: None) -> None:
    base = " ".join(prose(random.Random(1), 200))
    texts = [f"{base} longer than the held-out one", base]
    assert run(tmp_path, texts, 1, splits=["train", "validation"]) == {0}


def test_a_chain_keeps_what_is_not_like_anything_that_stays(tmp_path: Path, ray_cluster: None) -> None:
    rng = random.Random(5)
    words = prose(rng, 240)
    texts = []
    for shift in range(6):  # each shares 9/10 with the next: the ends of the chain share half
        texts.append(" ".join(words[shift * 20 : shift * 20 + 140]))
    alike = [jaccard(texts[0], text) for text in texts]
    assert jaccard(texts[0], texts[1]) > 0.7 > alike[-1]
    gone = run(tmp_path, texts, 1, threshold=0.7)
    kept = set(range(6)) - gone
    assert len(kept) > 1
    for number in gone:
        assert max(jaccard(texts[number], texts[other]) for other in kept) >= 0.7


def test_a_template_is_no_reason(tmp_path: Path, ray_cluster: None) -> None:
    rng = random.Random(7)
    template = prose(rng, 120)
    texts = [" ".join([*template, *prose(rng, 80)]) for _ in range(150)]
    assert run(tmp_path / "template", texts, 2) == set()
    part = " ".join(template)
    assert run(tmp_path / "containment", [*texts[:5], part], 2, measure="containment") == {5}


def test_many_copies_of_one_text_leave_one(tmp_path: Path, ray_cluster: None) -> None:
    words = prose(random.Random(9), 300)
    texts = [" ".join([*words[:number], "edited", *words[number:]]) for number in range(100)]
    assert len(run(tmp_path, texts, 2)) == 99


def test_signatures_estimate_jaccard() -> None:
    rng = random.Random(11)
    words = prose(rng, 1_000)
    texts = [" ".join(words), " ".join(words[:900])]
    signed = signatures(*shingles(texts, 5), 512)
    assert signed.shape == (2, 512)
    assert abs((signed[0] == signed[1]).mean() - jaccard(*texts)) < 0.06


def test_bands_agree_where_their_rows_do() -> None:
    signed = np.arange(12, dtype=np.uint32).reshape(2, 6) % 6
    keys = band_keys(signed, 3)
    assert keys.shape == (2, 3)
    assert np.array_equal(keys[0], keys[1])
    assert len(set(keys[0].tolist())) == 3


def reached(node: int, neighbours: dict[int, set[int]]) -> set[int]:
    found, waiting = {node}, [node]
    while waiting:
        new = neighbours[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_components_are_what_a_walk_along_the_edges_reaches() -> None:
    rng = random.Random(5)
    chain = [(f"{n:03d}", f"{n + 1:03d}") for n in rng.sample(range(200), 199)]  # a long way, in any order
    for edges in ([], chain, *([rng.sample("abcdefghijklmnopqrst", 2) for _ in range(size)] for size in range(1, 40))):
        names = {name for edge in edges for name in edge}
        preferences = {
            name: {"trained": rng.random() < 0.5, "order": rng.randint(0, 3), "id": rng.getrandbits(40)}
            for name in sorted(names)
        }
        rows = [
            {"a": preferences[a]["id"], "b": preferences[b]["id"], "of_a": preferences[a], "of_b": preferences[b]}
            for a, b in edges
        ]
        found = _components([pa.Table.from_pylist(rows[::2], _EDGES), pa.Table.from_pylist(rows[1::2], _EDGES)])
        neighbours: dict[int, set[int]] = {}
        for row in rows:
            neighbours.setdefault(row["a"], set()).add(row["b"])
            neighbours.setdefault(row["b"], set()).add(row["a"])
        groups = {frozenset(reached(id, neighbours)) for id in neighbours}
        assert sorted(map(sorted, groups)) == sorted(sorted(found.members(n)) for n in range(len(found)))
        best = {value["id"]: tuple(value.values()) for value in preferences.values()}
        heads = [found.members(n)[0] for n in range(len(found))]
        assert heads == sorted(heads)
        for number in range(len(found)):
            members = found.members(number)
            assert members == sorted(members, key=best.__getitem__)
            inside = {tuple(sorted((r["a"], r["b"]), key=best.__getitem__)) for r in rows if r["a"] in members}
            assert found.pairs(number) == inside
