"""Training sequences straight from the sources: the same documents as a prepared corpus has, place by place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raylm.corpus.prepare import prepare
from raylm.corpus.stream import Stream, open_stream
from raylm.errors import ArtifactError
from raylm.models import load_tokenizer
from raylm.settings import Settings
from raylm.storage import StoragePath
from tests.corpus.test_pipeline import document, settings, write_jsonl

pytestmark = pytest.mark.usefixtures("ray_cluster")
FILES, DOCUMENTS = 6, 40


def sources(directory: Path) -> dict[str, Any]:
    """Some files with documents of their own, a row that cannot be read, a copy, and a text for evaluation."""
    for file in range(FILES):
        texts = [document(n) for n in range(file * DOCUMENTS, (file + 1) * DOCUMENTS)]
        write_jsonl(directory / f"{file}.jsonl", [*texts, *([texts[3].lower()] if file == 2 else [])])
    with (directory / "4.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    write_jsonl(directory / "evaluation.json", [document(11)])
    evaluation = {"type": "jsonl", "path": str(directory / "evaluation.json")}
    return {
        "documents": [{"type": "jsonl", "path": f"{directory}/*.jsonl"}],
        "decontaminate": {"against": [evaluation]},
        "dedup": {"fuzzy": False},
        "shard_mb": 0.02,
        "validation": 0.1,
        "max_rejected": 1,
    }


def streaming(directory: Path, **corpus: Any) -> Settings:
    return settings(directory, **corpus).model_copy(
        update={"pretrain": Settings().pretrain.model_copy(update={"stream": True})}
    )


def texts_of(table: pa.Table, tokenizer_directory: StoragePath) -> list[str]:
    tokenizer = load_tokenizer(str(tokenizer_directory / "tokenizer"))
    texts = []
    for ids, lengths in zip(table["input_ids"].to_pylist(), table["document_lengths"].to_pylist(), strict=True):
        start = 0
        for length in lengths:
            texts.append(tokenizer.decode(ids[start : start + length], skip_special_tokens=True))
            start += length
    return texts


def one_pass(stream: Stream, record: Path, number: int = 0) -> pa.Table:
    places = stream.places_per_pass
    return pa.concat_tables(stream.read(number * places + place, str(record)) for place in range(places))


def test_a_pass_gives_the_documents_of_the_prepared_corpus_once(tmp_path: Path) -> None:
    corpus = sources(tmp_path) | {"pack": {"max_padding": 1.0}, "sequence_length": 512}
    whole = prepare(settings(tmp_path / "whole", **corpus))
    prepare(streaming(tmp_path / "streamed", **corpus))
    stream = open_stream(streaming(tmp_path / "streamed", **corpus))

    root = StoragePath(str(tmp_path / "whole/storage/tokens/default"))
    shards = [pa.ipc.open_file(file.open_input()).read_all() for file, _ in (root / "documents/train").list()]
    expected = texts_of(pa.concat_tables(shards), root)
    rows = one_pass(stream, tmp_path / "record")
    assert stream.places_per_pass > 2
    assert Counter(texts_of(rows, stream.plan.root)) == Counter(expected)
    counts = stream.counts(str(tmp_path / "record"), stream.places_per_pass)
    assert counts["read"] == FILES * DOCUMENTS + 2
    assert counts["rejected"] == counts["dropped.duplicate"] == counts["dropped.contaminated"] == 1
    assert counts["trained"] == len(expected)
    assert counts["held_out"] == whole.counts["kept"] - len(expected)
    [rejected] = [row for file in (tmp_path / "record").iterdir() for row in json.loads(file.read_text())["rejected"]]
    assert rejected["file"].endswith("4.jsonl")


def test_each_pass_has_another_order(tmp_path: Path) -> None:
    corpus = sources(tmp_path)
    prepare(streaming(tmp_path, **corpus))
    stream = open_stream(streaming(tmp_path, **corpus))
    first, again, second = (one_pass(stream, tmp_path / "record", number) for number in (0, 0, 1))
    assert first.equals(again)
    texts = [texts_of(table, stream.plan.root) for table in (first, second)]
    assert texts[0] != texts[1]
    assert len(set(texts[0]) & set(texts[1])) > len(texts[0]) / 2


@pytest.mark.parametrize("epochs", [0.5, 1.5, 2.0])
def test_a_source_is_taken_as_often_as_its_epochs_say(tmp_path: Path, epochs: float) -> None:
    corpus = sources(tmp_path) | {"sequence_length": 512, "pack": {"max_padding": 1.0}}
    corpus["documents"][0]["epochs"] = epochs
    prepare(streaming(tmp_path, **corpus))
    stream = open_stream(streaming(tmp_path, **corpus))
    seen = [Counter(texts_of(one_pass(stream, tmp_path / "record", number), stream.plan.root)) for number in (0, 1)]
    there = FILES * DOCUMENTS * 0.9
    for texts in seen:
        assert texts.total() == pytest.approx(there * epochs, rel=0.15)
    if epochs == 0.5:  # the second pass takes others
        assert len(seen[0].keys() & seen[1].keys()) < there * 0.35


def test_a_dataset_begins_at_any_place_and_keeps_their_order(tmp_path: Path) -> None:
    corpus = sources(tmp_path)
    prepare(streaming(tmp_path, **corpus))
    stream = open_stream(streaming(tmp_path, **corpus))
    dataset = stream.dataset(first_place=3, sequences=1, record=str(tmp_path / "record"))
    dataset.context.execution_options.preserve_order = True
    rows = pa.concat_tables(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    places = sorted(set(rows["place"].to_pylist()))
    assert rows["place"].to_pylist() == sorted(rows["place"].to_pylist())
    assert places[0] == 3
    assert rows.equals(pa.concat_tables(stream.read(place, str(tmp_path / "record")) for place in places))


def test_a_place_with_too_many_bad_rows_is_a_failure_with_the_first_of_them(tmp_path: Path) -> None:
    corpus = sources(tmp_path) | {"max_rejected": 0.0}
    (tmp_path / "4.jsonl").rename(tmp_path / "4.hidden")
    prepare(streaming(tmp_path, **corpus))
    stream = open_stream(streaming(tmp_path, **corpus))
    assert not one_pass(stream, tmp_path / "record")["failure"].drop_null()
    (tmp_path / "3.jsonl").write_text('{"text": 7}\n')
    [failure] = one_pass(stream, tmp_path / "record")["failure"].drop_null().to_pylist()
    assert "rows could not be read" in failure
    assert "3.jsonl, at 0" in failure


def test_a_stream_is_refused_where_its_sample_is_of_other_sources(tmp_path: Path) -> None:
    corpus = sources(tmp_path)
    with pytest.raises(ArtifactError, match="not prepared with these settings; run `raylm prepare` first"):
        open_stream(streaming(tmp_path, **corpus))
    prepare(streaming(tmp_path, **corpus))
    changed = streaming(tmp_path, **corpus, filters={"min_chars": 100})
    with pytest.raises(ArtifactError, match="not prepared with these settings"):
        open_stream(changed)


def test_only_a_sample_of_the_documents_is_prepared(tmp_path: Path) -> None:
    corpus = sources(tmp_path) | {"decontaminate": {}, "max_rejected": 1}
    corpus["tokenizer"] = {"vocab_size": 600, "languages": [], "sample_mb": 0.03}
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("source,target\n" + "".join(f"number {n},Nummer {n}\n" for n in range(50)))
    corpus["pairs"] = [{"type": "csv", "path": str(pairs), "to": "de"}]
    manifest = prepare(streaming(tmp_path, **corpus))
    documents, labelled = manifest.statistics["sources"]
    assert 0 < documents["counts"]["read"] < FILES * DOCUMENTS / 2
    assert labelled["counts"]["read"] == 50
    stream = open_stream(streaming(tmp_path, **corpus))
    tokens = sum(map(len, one_pass(stream, tmp_path / "record")["input_ids"].to_pylist()))
    assert stream.tokens_per_pass == pytest.approx(tokens, rel=0.2)


def test_a_source_of_several_epochs_is_read_so_often(tmp_path: Path) -> None:
    """Its readings are no copies of each other, though they stand in one place."""
    trained = {}
    for epochs in (1, 3):
        place = tmp_path / str(epochs)
        place.mkdir()
        values = sources(place) | {"shard_mb": 10, "max_rejected": 10}
        values["documents"][0]["epochs"] = epochs
        asked = streaming(place, **values)
        prepare(asked)
        stream = open_stream(asked)
        assert stream.places_per_pass == 1
        stream.read(0, str(place / "record"))
        counts = stream.counts(str(place / "record"), 1)
        trained[epochs] = counts["trained"]
        assert counts["dropped.duplicate"] == epochs
    assert trained[3] == 3 * trained[1] > 500
