"""Labelled texts: from the column with the label to the shards that a classifier learns from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from raylm.corpus.pack import token_type
from raylm.corpus.pair_filters import reject_labelled
from raylm.corpus.prepare import prepare
from raylm.corpus.records import Pair
from raylm.corpus.rows import Cleaned, Dropped, cleaned_records
from raylm.corpus.shards import other_labels, tokenized_pairs
from raylm.corpus.tokenizer import text_encoder
from raylm.models import load_tokenizer
from raylm.settings import CorpusSettings, PairFileSource, PairFilterSettings, Settings
from raylm.storage import Manifest, StoragePath

RULES = PairFilterSettings()


def labelled(path: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A source of labelled texts in a file that this writes: JSON Lines or Parquet, by its suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return {
        "type": path.suffix[1:],
        "path": str(path),
        "source": "text",
        "target": "label",
        "task": "classify",
        **more,
    }


def prepared(directory: Path, *sources: dict[str, Any], **corpus: Any) -> Manifest:
    values = {
        "pairs": list(sources),
        "tokenizer": {"vocab_size": 600, "languages": []},
        "validation": 0.1,
        "keep_dropped": True,
    }
    return prepare(Settings.model_validate({"storage": str(directory / "storage"), "corpus": values | corpus}))


def pairs_of(manifest: Manifest, split: str) -> list[dict[str, Any]]:
    files = [file for file, _ in (StoragePath(manifest.directory) / "pairs" / split).list()]
    return [row for file in files for row in pa.ipc.open_file(file.open_input()).read_all().to_pylist()]


def outcome(text: str, label: str, **corpus: Any) -> Any:
    settings, counts = CorpusSettings.model_validate(corpus), Counter[str]()
    [found] = cleaned_records([Pair("classify", None, text, label)], settings, None, counts)
    return found


# ---------------------------------------------------------------------------------------- settings, rows


def test_labels_are_in_no_language() -> None:
    values = {"type": "jsonl", "path": "a.jsonl", "task": "classify"}
    assert PairFileSource.model_validate(values).to is None
    with pytest.raises(ValidationError, match="take `to` out"):
        PairFileSource.model_validate(values | {"to": "de"})


@pytest.mark.parametrize(
    ("text", "label", "reason"),
    [
        ("A good book.", "positive", None),
        ("A book with 12 chapters and %s", "1", None),  # numbers and placeholders need not agree
        ("positive thoughts", "positive thoughts", None),  # nor is it bad that both are the same
        ("x" * 1_999, "1", None),  # and no ratio of lengths
        (" ", "positive", "empty_source"),
        ("A good book.", " ", "empty_target"),
        ("x" * 2_001, "positive", "too_long"),
        ("A book", "x" * 2_001, None),
    ],
)
def test_only_the_length_of_the_text_counts(text: str, label: str, reason: str | None) -> None:
    assert reject_labelled(text, label, RULES) == reason


def test_settings_move_the_bounds_of_the_text_alone() -> None:
    rules = PairFilterSettings(min_chars=3, max_chars=5, exclude=("spam",))
    assert reject_labelled("ab", "1", rules) == "empty_source"
    assert reject_labelled("abc", "1", rules) is None
    assert reject_labelled("abcdef", "1", rules) == "too_long"
    assert reject_labelled("spam", "ham", rules) == "excluded"
    assert reject_labelled("ham", "spam", rules) is None


def test_cleaning_leaves_the_label_alone() -> None:
    """A label is a name: what would be mended, masked or dropped in a text stays."""
    name = "＜b＞ Müller\u00a0 &amp; x@example.org"
    found = outcome("Ein  gutes Buch, schreibt x@example.org", f"\n{name} ", pii={"action": "mask"})
    assert isinstance(found, Cleaned)
    assert found.target == name
    assert found.source == "Ein gutes Buch, schreibt <EMAIL>"
    dropped = outcome("x@example.org schreibt", "a", pii={"action": "drop"})
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.target) == ("pii", "a")
    assert isinstance(outcome("Ein gutes Buch", name, pii={"action": "drop"}), Cleaned)


def test_labels_of_a_text_lie_side_by_side() -> None:
    first, second, other = outcome("one", "a"), outcome("one", "b"), outcome("two", "a")
    assert first.hash[:8] == second.hash[:8] != other.hash[:8]
    assert first.hash != second.hash
    assert first.split_hash == second.split_hash
    assert first.hash == outcome("one", "a ").hash


def test_of_several_labels_the_held_out_then_the_first_stays() -> None:
    rows = pa.table(
        {
            "kind": ["classify", "translate", "classify", "classify", "classify", "classify", "translate"],
            "source": ["one", "one", "one", "two", "two", "three", "one"],
            "split": ["train", "train", "train", "train", "test", "train", "train"],
            "rank": pa.array([5, 0, 3, 1, 9, 2, 1], pa.uint64()),
        }
    )
    assert other_labels(rows).tolist() == [True, False, False, True, False, False, False]
    assert not other_labels(rows.filter(pc.equal(rows["kind"], "translate"))).any()


# ---------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    rows = [{"text": f"text number {n} of many", "label": f"label {n % 2}"} for n in range(200)]
    manifest = prepared(directory, labelled(directory / "a.jsonl", rows))
    return Tokenizer.from_file(str(Path(manifest.directory, "tokenizer", "tokenizer.json")))


def tokenized(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    end, vocabulary = tokenizer.token_to_id("</s>"), tokenizer.get_vocab()
    rows = pa.table(
        {
            "split": ["train"] * 3,
            "kind": ["classify", "summarize", "classify"],
            "to": pa.array([None] * 3, pa.string()),
            "source": ["text one", "text two", "text three"],
            "target": ["label", "two", "label"],
        }
    )
    table = tokenized_pairs(rows, text_encoder(tokenizer), vocabulary, end, token_type(len(vocabulary)))
    return {row["source"]: row for row in table.to_pylist()}


def test_a_text_to_classify_is_itself_and_its_end(small_tokenizer: Tokenizer) -> None:
    end, summary = (small_tokenizer.token_to_id(token) for token in ("</s>", ">>summary<<"))
    rows = tokenized(small_tokenizer)
    assert rows["text one"]["source_ids"] == [*small_tokenizer.encode("text one").ids, end]
    assert rows["text one"]["target_ids"] == rows["text three"]["target_ids"] == []
    assert rows["text two"]["source_ids"] == [summary, *small_tokenizer.encode("text two").ids, end]
    assert rows["text two"]["target_ids"] == [*small_tokenizer.encode("two").ids, end]


def test_a_tokenizer_with_a_beginning_of_its_own_keeps_it(small_tokenizer: Tokenizer) -> None:
    begin, end = (small_tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    framed = Tokenizer.from_str(small_tokenizer.to_str())
    framed.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)])
    rows = tokenized(framed)
    assert rows["text one"]["source_ids"] == framed.encode("text one").ids
    assert rows["text two"]["source_ids"][0] != begin


# ---------------------------------------------------------------------------------------- whole preparations


def test_labels_reach_the_shards(tmp_path: Path, ray_cluster: None) -> None:
    """Texts and numbers as labels; a text with two labels keeps the first, and of one that is for testing that one."""
    rows: list[dict[str, Any]] = [{"text": f"text number {n} of many", "label": n % 3} for n in range(300)]
    rows += [{"text": "which is it", "label": 7}, {"text": "which is it", "label": " also this "}]
    rows += [{"text": "which is it", "label": 7}, {"text": "tested", "label": "as training"}]
    rows += [{"text": "no label", "label": None}, {"text": "a share", "label": 0.5}, {"text": "truth", "label": True}]
    test = [{"text": "tested", "label": "for testing"}]
    manifest = prepared(
        tmp_path,
        labelled(tmp_path / "a.jsonl", rows),
        labelled(tmp_path / "b.jsonl", test, split="test"),
        max_rejected=3,
    )
    counts = manifest.counts
    assert (counts["rejected"], counts["dropped.duplicate"], counts["dropped.conflicting_label"]) == (3, 1, 2)
    found = {
        row["source"]: row["target"] for split in ("train", "validation", "test") for row in pairs_of(manifest, split)
    }
    assert len(found) == 302
    assert found["which is it"] == "7"
    assert {row["source"]: row["target"] for row in pairs_of(manifest, "test")}["tested"] == "for testing"
    assert Counter(found.values()) == Counter({"0": 100, "1": 100, "2": 100, "7": 1, "for testing": 1})
    assert {row["task"] for row in pairs_of(manifest, "train")} == {"classify"}
    rejected = [json.loads(line) for line in Path(manifest.directory, "rejected/rows.jsonl").read_text().splitlines()]
    assert {row["error"] for row in rejected} == {
        "label: nothing (null) where a text is expected",
        "label: a value of type float where a text is expected",
        "label: a value of type bool where a text is expected",
    }


def test_rows_with_other_labels_are_not_counted_as_kept(tmp_path: Path, ray_cluster: None) -> None:
    rows = [{"text": f"text number {n // 2} of many", "label": f"label {n % 2}"} for n in range(200)]
    counts = prepared(tmp_path, labelled(tmp_path / "a.jsonl", rows)).counts
    assert (counts["read"], counts["dropped.conflicting_label"], counts["kept"]) == (200, 100, 100)
    dropped = [
        row
        for file in Path(tmp_path, "storage/tokens/default/dropped").iterdir()
        for row in pq.read_table(file).to_pylist()
    ]
    assert {(row["reason"], row["target"]) for row in dropped} == {("conflicting_label", "label 1")}


def test_labels_of_parquet_files_may_be_whole_numbers(tmp_path: Path, ray_cluster: None) -> None:
    rows = [{"text": f"text number {n} of many", "label": n % 2} for n in range(100)]
    manifest = prepared(tmp_path, labelled(tmp_path / "a.parquet", rows))
    assert {row["target"] for row in pairs_of(manifest, "train")} == {"0", "1"}


def test_the_tokenizer_learns_from_the_texts_alone(tmp_path: Path, ray_cluster: None) -> None:
    rows = [{"text": f"text number {n} of many", "label": ("zyxwvuts", "abcdefgh")[n % 2]} for n in range(400)]
    manifest = prepared(tmp_path, labelled(tmp_path / "a.jsonl", rows))
    vocabulary = load_tokenizer(str(Path(manifest.directory, "tokenizer"))).get_vocab()
    assert "Ġnumber" in vocabulary
    assert not any("zy" in token or "abc" in token for token in vocabulary)


def test_chinese_reviews(tmp_path: Path, data: Path, ray_cluster: None) -> None:
    names = {"source": "text", "target": "label", "task": "classify", "type": "parquet"}
    sources = [
        {"path": str(data / f"classify.zh.sentiment.{name}.parquet"), **names, "split": split}
        for name, split in (("train", None), ("validation", "test"))
    ]
    manifest = prepared(tmp_path, *sources, validation=0.05)
    counts = manifest.counts
    assert counts["read"] == 14_681 + 910
    assert counts["kept"] > 0.95 * counts["read"]
    assert not {f"dropped.{reason}" for reason in ("length_ratio", "identical", "numbers_differ")} & counts.keys()
    train = pairs_of(manifest, "train")
    assert {row["target"] for row in train} == {"positive", "negative"}
    held_out = {row["source"] for split in ("validation", "test") for row in pairs_of(manifest, split)}
    assert len(pairs_of(manifest, "test")) > 850
    assert not held_out & {row["source"] for row in train}
