"""Questions about texts: from the three columns of a row to the shards that a model learns to answer from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from raylm.corpus.prepare import prepare
from raylm.models import load_tokenizer
from raylm.settings import PairFileSource, Settings
from raylm.storage import Manifest, StoragePath

COLUMNS = {"source": "question", "context": "text", "target": "answer", "task": "answer"}
THINGS = ("table", "window", "field", "menu", "file", "cell", "page", "line")


def rows() -> list[dict[str, Any]]:
    """Three questions about each of many texts."""
    found = []
    for number in range(60):
        facts = {f"{THINGS[(number + k) % len(THINGS)]} {number}": f"part {number * 3 + k} of it" for k in range(3)}
        text = " ".join(f"The {name} is {what}." for name, what in facts.items())
        found += [{"question": f"What is the {name}?", "text": text, "answer": what} for name, what in facts.items()]
    return found


def prepared(directory: Path, lines: list[dict[str, Any]], **corpus: Any) -> Manifest:
    file = directory / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"type": "jsonl", "path": str(file), **COLUMNS}
    values = {"pairs": [source], "tokenizer": {"vocab_size": 600, "languages": []}, "validation": 0.2, **corpus}
    return prepare(Settings.model_validate({"storage": str(directory / "storage"), "corpus": values}))


def pairs_of(manifest: Manifest, split: str) -> list[dict[str, Any]]:
    files = [file for file, _ in (StoragePath(manifest.directory) / "pairs" / split).list()]
    return [row for file in files for row in pa.ipc.open_file(file.open_input()).read_all().to_pylist()]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"type": "jsonl", "task": "answer"}, "reads three columns"),
        ({"type": "text", "task": "answer", "context": "text"}, "reads three columns"),
        ({"type": "jsonl", "task": "summarize", "context": "text"}, "take `context` out"),
    ],
)
def test_answering_needs_a_context_and_nothing_else_does(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        PairFileSource.model_validate({"path": "a"} | values)


def test_questions_and_their_texts_become_what_the_model_reads(ray_cluster: None, tmp_path: Path) -> None:
    manifest = prepared(tmp_path, rows())
    tokenizer = load_tokenizer(f"{manifest.directory}/tokenizer")
    splits = {split: pairs_of(manifest, split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 180
    assert all(splits.values())
    for row in splits["train"]:
        assert row["source"].startswith("question: What is the ")
        read = tokenizer.decode(row["source_ids"])
        assert read == f">>answer<<{row['source']}</s>"
        assert tokenizer.decode(row["target_ids"]) == f"{row['target']}</s>"
    # All questions about one text are learned, or none is.
    contexts = {name: {row["source"].partition(" context: ")[2] for row in found} for name, found in splits.items()}
    assert not contexts["train"] & (contexts["validation"] | contexts["test"])
    assert len(contexts["train"]) == len(splits["train"]) / 3


def test_a_question_without_a_text_costs_itself_alone(ray_cluster: None, tmp_path: Path) -> None:
    good = rows()
    bad = [{**good[0], "text": None}, {**good[0], "question": "  "}, {"question": "a", "answer": "b"}]
    manifest = prepared(tmp_path, [*bad, *good], max_rejected=3)
    rejected = (StoragePath(manifest.directory) / "rejected" / "rows.jsonl").read_jsonl()
    assert [row["error"] for row in rejected] == [
        "text: nothing (null) where a text is expected",
        "question: empty where a text is expected",
        "no 'text' among the line's keys: question, answer",
    ]
