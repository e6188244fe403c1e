"""The whole preparation on a real Ray."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raylm.corpus.plan import make_plan, plan_stream
from raylm.corpus.prepare import prepare
from raylm.errors import InputError, OutputError
from raylm.lease import held
from raylm.models import load_tokenizer
from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath


def read(directory: StoragePath) -> pa.Table:
    files = [file for file, _ in directory.list()]
    return pa.concat_tables([pa.ipc.open_file(file.open_input()).read_all() for file in files])


def test_the_artifact_is_what_its_manifest_says(corpus: StoragePath, small_settings: Settings) -> None:
    manifest = Manifest.read(corpus)
    assert manifest is not None
    counts = manifest.counts
    dropped = sum(number for name, number in counts.items() if name.startswith("dropped."))
    assert counts["read"] == counts["kept"] + counts.get("rejected", 0) + dropped
    assert counts["dropped.duplicate"] > 0
    for entry in manifest.outputs:
        assert (corpus / entry["name"]).content_hash() == entry["xxh3_128"]
    listed = {entry["name"] for entry in manifest.outputs}
    assert {"documents/train", "documents/validation", "pairs/train", "pairs/validation", "pairs/test"} == {
        name.rpartition("/")[0] for name in listed
    }


def test_shards_hold_the_text_and_the_task_tokens(corpus: StoragePath, small_settings: Settings) -> None:
    tokenizer = load_tokenizer(str(corpus / "tokenizer"))
    pairs = read(corpus / "pairs" / "train")
    row = pairs.slice(0, 1).to_pylist()[0]
    prefix = ">>de<<" if row["task"] == "translate" else ">>summary<<"
    assert tokenizer.decode(row["source_ids"]) == f"{prefix}{row['source']}</s>"
    assert tokenizer.decode(row["target_ids"]) == f"{row['target']}</s>"
    documents = read(corpus / "documents" / "train")
    assert {len(ids) for ids in documents["input_ids"].to_pylist()} == {small_settings.corpus.sequence_length}


def test_no_source_is_in_two_splits(corpus: StoragePath) -> None:
    splits = {split: read(corpus / "pairs" / split) for split in ("train", "validation", "test")}
    sources = {split: set(table["source"].to_pylist()) for split, table in splits.items()}
    assert not sources["train"] & sources["test"]
    assert not sources["train"] & sources["validation"]
    assert set(splits["test"]["task"].to_pylist()) == {"translate", "summarize"}


def test_a_target_of_train_is_never_tested(corpus: StoragePath) -> None:
    """CLDR's test rows have values and combinations that no other row has; a share of the others is for validation."""
    from raylm.corpus.cldr import pairs

    made = {pair.source: pair.split for pair in pairs("de", 1, 0, 3_000)}
    of = {split: read(corpus / "pairs" / split).to_pylist() for split in ("train", "validation", "test")}
    found = {
        split: {made[row["source"]] for row in rows if row["task"] == "translate" and row["source"] in made}
        for split, rows in of.items()
    }
    assert found == {"train": {"train"}, "validation": {"train"}, "test": {"test"}}


def test_the_document_of_a_held_out_pair_is_held_out(corpus: StoragePath, small_settings: Settings) -> None:
    """The summary of a docstring is its first sentence: that of a test pair must not be in a training document."""
    tokenizer = load_tokenizer(str(corpus / "tokenizer"))
    trained = read(corpus / "documents" / "train")
    text = "".join(tokenizer.batch_decode(trained["input_ids"].to_pylist()))
    summaries = {
        split: [row["target"] for row in read(corpus / "pairs" / split).to_pylist() if row["task"] == "summarize"]
        for split in ("train", "test")
    }
    found = {split: sum(summary in text for summary in those) / len(those) for split, those in summaries.items()}
    assert found["train"] > 0.2, found  # a fifth of the pairs is from packages whose documents are read too
    assert found["test"] < 0.05, found  # what is left are sentences that stand in other docstrings too


def test_a_second_run_does_nothing_and_another_setting_makes_all_anew(
    corpus: StoragePath, small_settings: Settings, tmp_path: Path, ray_cluster: None
) -> None:
    before = Manifest.read(corpus)
    assert prepare(small_settings) == before
    pq.write_table(pa.table({"text": [f"A sentence of prose, long enough to keep, number {n}." for n in range(50)]}),
                   tmp_path / "a.parquet")  # fmt: skip
    values = {
        "storage": str(tmp_path / "storage"),
        "corpus": {"documents": [{"type": "parquet", "path": str(tmp_path / "a.parquet")}], "sequence_length": 32,
                   "tokenizer": {"vocab_size": 600}},
    }  # fmt: skip
    first = prepare(Settings.model_validate(values))
    values["corpus"]["sequence_length"] = 16  # type: ignore[index]
    second = prepare(Settings.model_validate(values))
    assert first.inputs["key"] != second.inputs["key"]
    assert first.counts["kept"] == second.counts["kept"] == 50
    rows = read(StoragePath(str(tmp_path / "storage/tokens/default/documents/train")))
    assert len(rows["input_ids"][0]) == 16


def test_one_file_may_be_read_in_two_ways(tmp_path: Path, ray_cluster: None) -> None:
    rows = [
        {"text": f"A sentence of prose, long enough to keep, number {n}.", "title": f"Number {n}"} for n in range(60)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = {"type": "parquet", "path": str(tmp_path / "a.parquet")}
    values = {
        "storage": str(tmp_path / "storage"),
        "corpus": {
            "documents": [source],
            "pairs": [{**source, "source": "text", "target": "title", "task": "summarize"}],
            "tokenizer": {"vocab_size": 600},
        },
    }
    manifest = prepare(Settings.model_validate(values))
    assert manifest.counts["kept"] == 120
    assert manifest.counts["rows"]["pairs/train"] > 50
    assert manifest.counts["rows"]["documents/train"] > 5


def test_what_is_held_out_is_held_out_everywhere(tmp_path: Path, ray_cluster: None) -> None:
    """A text that is document and pair at once, and one that another file declares to be for testing."""
    texts = [f"A sentence of prose, long enough to keep, number {n}." for n in range(400)]
    for name, title, those in (("a", "Number", texts), ("b", "The number", texts[:200])):
        rows = [{"text": text, "title": f"{title} {n}"} for n, text in enumerate(those)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    document = {"type": "parquet", "path": str(tmp_path / "a.parquet")}
    pair = {"type": "parquet", "source": "text", "target": "title", "task": "summarize"}
    values = {
        "storage": str(tmp_path / "storage"),
        "corpus": {
            "documents": [document],
            "pairs": [
                {**pair, "path": str(tmp_path / "a.parquet")},
                {**pair, "path": str(tmp_path / "b.parquet"), "split": "test"},
            ],
            "validation": 0.1,
            "tokenizer": {"vocab_size": 600},
            "dedup": {"fuzzy": False},
        },
    }
    prepare(Settings.model_validate(values))
    tokens = StoragePath(str(tmp_path / "storage/tokens/default"))
    tokenizer = load_tokenizer(str(tokens / "tokenizer"))
    trained = "".join(tokenizer.batch_decode(read(tokens / "documents" / "train")["input_ids"].to_pylist()))
    asked = {
        split: set(read(tokens / "pairs" / split)["source"].to_pylist()) for split in ("train", "validation", "test")
    }
    by_hash = asked["test"] - set(texts[:200])
    assert asked["test"] > set(texts[:200]) and len(by_hash) > 5 and asked["validation"]
    assert not asked["train"] & asked["test"] and not asked["validation"] & asked["test"]
    assert not [text for text in by_hash | asked["validation"] if text in trained]
    assert sum(text in trained for text in asked["train"]) > 100


def test_a_tokenizer_that_has_changed_in_its_place_is_taken_anew(
    corpus: StoragePath, small_settings: Settings, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(corpus / "tokenizer"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values = small_settings.model_dump(mode="json")
    values["storage"] = str(tmp_path / "storage")
    values["corpus"]["tokenizer"] |= {"start_from": str(tmp_path / "tokenizer")}
    first = make_plan(Settings.model_validate(values))
    assert make_plan(Settings.model_validate(values)).key == first.key
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    second = make_plan(Settings.model_validate(values))
    assert second.key != first.key
    assert second.keys["paragraphs"] == first.keys["paragraphs"]  # nothing before the tokenizer is made again


def test_how_cldr_is_split_follows_the_share_for_validation(small_settings: Settings) -> None:
    values = small_settings.model_dump(mode="json")
    before = make_plan(Settings.model_validate(values))
    values["corpus"]["validation"] = 0.2
    after = make_plan(Settings.model_validate(values))
    same = [unit.kind for unit, one, other in zip(after.units, before.unit_names, after.unit_names, strict=True)
            if one == other]  # fmt: skip
    assert set(same) == {"docstrings"} and {unit.kind for unit in after.units} == {"cldr", "docstrings"}


def test_a_stream_needs_documents_and_its_preparation_none() -> None:
    corpus = {"pairs": [{"type": "cldr", "to": "de", "rows": 100}]}
    settings = Settings.model_validate({"corpus": corpus, "pretrain": {"stream": True}})
    assert [unit.kind for unit in make_plan(settings).units] == ["cldr"]
    with pytest.raises(InputError, match=r"corpus\.documents: pretrain\.stream reads documents, and none are named"):
        plan_stream(settings)


def test_nothing_left_is_an_error_with_reasons_and_no_artifact(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"text": "12345"}\n')
    settings = Settings.model_validate(
        {
            "storage": str(tmp_path / "storage"),
            "corpus": {
                "documents": [{"type": "jsonl", "path": str(tmp_path / "a.jsonl")}],
                "tokenizer": {"vocab_size": 600},
            },
        }
    )
    with pytest.raises(InputError, match="nothing is left of 2 rows read: dropped.too_short 2"):
        prepare(settings)
    assert Manifest.read(StoragePath(str(tmp_path / "storage/tokens/default"))) is None


def test_an_error_inside_a_worker_arrives_as_itself(tmp_path: Path, ray_cluster: None) -> None:
    lines = "".join(json.dumps({"text": f"Line {number} of a file that ends early."}) + "\n" for number in range(5_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-100])
    settings = Settings.model_validate(
        {
            "storage": str(tmp_path / "storage"),
            "corpus": {"documents": [{"type": "jsonl", "path": str(tmp_path / "a.jsonl.gz")}]},
        }
    )
    with pytest.raises(InputError, match=r"a.jsonl.gz: not readable as JSON Lines"):
        prepare(settings)
    assert Manifest.read(StoragePath(str(tmp_path / "storage/tokens/default"))) is None


def test_one_and_two_cpus_give_the_same_bytes(tmp_path: Path) -> None:
    """Each count in a process and a Ray of its own; the second also reads its sources in another order."""
    for number in range(4):
        rows = [f"Sentence {n} of file {number}: the quick brown fox reads {n * n} pages." for n in range(200)]
        rows += [f"This line is in every file and once in the corpus, number {n}." for n in range(20)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    hashes = {}
    for cpus in (1, 2):
        names = range(4) if cpus == 1 else reversed(range(4))
        settings = {
            "storage": str(tmp_path / f"cpus-{cpus}"),
            "corpus": {
                "documents": [{"type": "jsonl", "path": str(tmp_path / f"{n}.jsonl")} for n in names],
                "pairs": [{"type": "cldr", "to": "fr", "rows": 20_000}],
                "tokenizer": {"vocab_size": 800},
                "shard_mb": 0.5,
            },
        }
        cluster = tmp_path / f"{cpus}.yaml"
        cluster.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": settings}}))
        code = f"""
import ray, tempfile
from raylm.corpus.prepare import prepare
from raylm.settings import load
directory = tempfile.mkdtemp(dir="/tmp", prefix="raylm-")
ray.init("local", num_cpus={cpus}, include_dashboard=False, log_to_driver=False, _temp_dir=directory)
prepare(load({str(cluster)!r}))
"""
        subprocess.run(
            [sys.executable, "-c", code], check=True, timeout=600, env=os.environ | {"PYTHONHASHSEED": str(cpus)},
            capture_output=True,
        )  # fmt: skip
        manifest = Manifest.read(StoragePath(f"{settings['storage']}/tokens/default"))
        assert manifest is not None
        hashes[cpus] = {entry["name"]: entry["xxh3_128"] for entry in manifest.outputs}
        tokens = StoragePath(f"{settings['storage']}/tokens/default/tokenizer/tokenizer.json")
        hashes[cpus]["tokenizer"] = tokens.content_hash()
    assert len(hashes[1]) > 8
    assert hashes[1] == hashes[2]


def small(directory: Path, **corpus: object) -> Settings:
    """Settings of a corpus of some lines of text."""
    lines = [f"Paragraph {number} tells of window {number * 7} and of table {number * 13}." for number in range(200)]
    (directory / "lines.txt").write_text("\n\n".join(lines))
    values = {
        "documents": [{"type": "text", "path": str(directory / "lines.txt")}],
        "tokenizer": {"vocab_size": 600, "languages": []},
        "dedup": {"fuzzy": False},
        "sequence_length": 32,
        **corpus,
    }
    return Settings.model_validate({"storage": str(directory / "storage"), "corpus": values})


def test_shards_that_another_setting_has_written_over_are_written_again(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare(small(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("raylm.corpus.prepare._publish", interrupted)  # its shards are there, its manifest is not
        prepare(small(tmp_path, sequence_length=64))
    after = prepare(small(tmp_path))
    assert after.outputs == before.outputs
    root = StoragePath(after.directory)
    assert all((root / entry["name"]).content_hash() == entry["xxh3_128"] for entry in after.outputs)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_two_preparations_of_a_corpus_do_not_mix(ray_cluster: None, tmp_path: Path) -> None:
    settings = small(tmp_path)
    root = StoragePath(settings.storage) / "tokens" / "default"
    with held(root.mkdir() / "prepare.lock", "{who}"), pytest.raises(OutputError, match="is being prepared by process"):
        prepare(settings)
    assert prepare(settings).counts["kept"] == 200
    assert not (root / "prepare.lock").is_file()


@pytest.mark.parametrize("unique", ["pair", "target"])
def test_a_source_that_is_tested_is_not_learned_with_another_target(
    ray_cluster: None, tmp_path: Path, unique: str
) -> None:
    rows = [{"source": f"Open window {n}", "target": f"Fenster {n} öffnen"} for n in range(60)]
    other = [{"source": f"Open window {n}", "target": f"Öffnen Sie Fenster {n}"} for n in range(20)]
    for name, content in (("learned", rows), ("tested", other)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    source = {"type": "jsonl", "to": "de"}
    pairs = [
        source | {"path": str(tmp_path / "learned.jsonl")},
        source | {"path": str(tmp_path / "tested.jsonl"), "split": "test"},
    ]
    options = {"dedup": {"pairs": unique}, "shard_mb": 0.002, "keep_dropped": True}  # in several parts
    manifest = prepare(small(tmp_path, documents=[], pairs=pairs, **options))
    root = StoragePath(manifest.directory) / "pairs"
    sources = {split: set(read(root / split)["source"].to_pylist()) for split in ("train", "test")}
    assert not sources["train"] & sources["test"]
    assert {f"Open window {n}" for n in range(20)} <= sources["test"]
    assert 10 < manifest.counts["dropped.held_out_source"] <= 20
