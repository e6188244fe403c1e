"""What each setting of a preparation does to the artifact, on a real Ray and small files."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm.corpus.plan import WORK, part_bytes
from raylm.corpus.prepare import prepare
from raylm.corpus.sources import _unit_bytes
from raylm.errors import ArtifactError, InputError
from raylm.models import load_tokenizer
from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath

pytestmark = pytest.mark.usefixtures("ray_cluster")

_TEXT = """queue scheduler memory page table driver module kernel buffer stream socket packet thread process signal
    file system device interrupt handler lock mutex semaphore cache line register address pointer stack heap frame
    reads writes holds frees copies moves waits sends takes gives opens closes maps counts checks sorts keeps
    every first last small large old new empty full busy idle ready local remote the a one its this that each"""
_WORDS = _TEXT.split()


def sentences(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [f"The {' '.join(rng.choices(_WORDS, k=rng.randint(8, 16)))} number {seed}." for _ in range(count)]


def document(seed: int) -> str:
    return " ".join(sentences(seed, 6))


def write_jsonl(path: Path, texts: list[str]) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return {"type": "jsonl", "path": str(path)}


def settings(directory: Path, **corpus: Any) -> Settings:
    values = {"tokenizer": {"vocab_size": 600, "languages": []}, "sequence_length": 64, "validation": 0.02}
    return Settings.model_validate({"storage": str(directory / "storage"), "corpus": values | corpus})


def artifact(directory: Path) -> StoragePath:
    return StoragePath(str(directory / "storage/tokens/default"))


def shards(manifest: Manifest) -> dict[str, str]:
    return {entry["name"]: entry["xxh3_128"] for entry in manifest.outputs}


def trained_text(directory: Path) -> str:
    """All training documents, decoded, sequence by sequence."""
    place = artifact(directory)
    tokenizer = load_tokenizer(str(place / "tokenizer"))
    rows = [
        ids
        for file, _ in (place / "documents/train").list()
        for ids in pa.ipc.open_file(file.open_input()).read_all()["input_ids"].to_pylist()
    ]
    return "\n".join(tokenizer.batch_decode(rows))


def dropped(directory: Path) -> list[dict[str, Any]]:
    files = (artifact(directory) / "dropped").list()
    return [row for file, _ in files for row in pq.read_table(file.open_input()).to_pylist()]


# ------------------------------------------------------------------------------------------- dead letter


def test_a_bad_row_costs_itself_and_is_recorded(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(n) for n in range(200)])
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines[120] = b'{"text": "cut off\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    manifest = prepare(settings(tmp_path, documents=[source]))
    assert (manifest.counts["read"], manifest.counts["kept"], manifest.counts["rejected"]) == (200, 199, 1)
    rows = (artifact(tmp_path) / "rejected/rows.jsonl").read_jsonl()
    assert len(rows) == 1
    assert rows[0]["file"].endswith("a.jsonl")
    assert rows[0]["position"] == sum(map(len, lines[:120]))
    assert rows[0]["stage"] == "read"
    assert rows[0]["error"]
    assert "cut off" in rows[0]["excerpt"]


def test_too_many_bad_rows_fail_the_job_with_the_first_of_them(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(n) for n in range(20)])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("[1]\n")
    with pytest.raises(InputError, match=r"1 of 21 rows could not be read, corpus.max_rejected allows 1.00%.*a.jsonl"):
        prepare(settings(tmp_path, documents=[source]))
    assert Manifest.read(artifact(tmp_path)) is None
    assert prepare(settings(tmp_path, documents=[source], max_rejected=1)).counts["kept"] == 20
    with pytest.raises(InputError, match="allows 0 rows"):
        prepare(settings(tmp_path, documents=[source], max_rejected=0))


# --------------------------------------------------------------------------------- dropped, and the funnel


def test_dropped_rows_are_written_with_their_reasons(tmp_path: Path) -> None:
    base = document(1)
    texts = [document(n) for n in range(60)] + ["too short", base.upper(), base.replace("number 1.", "number one.", 1)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare(settings(tmp_path, documents=[source], keep_dropped=True, filters={"max_uppercase_ratio": 1}))
    reasons = Counter(row["reason"] for row in dropped(tmp_path))
    assert reasons == {"too_short": 1, "duplicate": 1, "near_duplicate": 1}
    assert {name: manifest.counts[f"dropped.{name}"] for name in reasons} == reasons
    assert manifest.counts["read"] == manifest.counts["kept"] + 3
    statistics = manifest.statistics
    assert statistics["sources"][0]["counts"]["read"] == len(texts)
    assert sum(count for _, count in statistics["lengths"]["documents"]) == manifest.counts["kept"]
    assert sum(statistics["languages"]["documents"].values()) == manifest.counts["kept"]
    assert {cluster["copies"] for cluster in statistics["duplicates"]} == {2}
    assert statistics["samples"]["dropped.too_short"] == ["too short"]


def test_personal_data_is_masked_and_counted_or_drops_the_row(tmp_path: Path) -> None:
    texts = [document(n) for n in range(80)]
    texts[3] += " Write to jane.doe@example.net for more of it."
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare(settings(tmp_path, documents=[source], pii={"action": "mask"}))
    assert manifest.counts["masked.email"] == 1
    text = trained_text(tmp_path)
    assert "jane.doe" not in text
    assert prepare(settings(tmp_path, documents=[source], pii={"action": "drop"})).counts["dropped.pii"] == 1


def test_evaluation_texts_are_kept_out_of_training(tmp_path: Path) -> None:
    texts = [document(n) for n in range(80)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    quoted = " ".join(texts[5].split()[10:24])
    pq.write_table(pa.table({"src": ["unrelated words", f"They say: {quoted}, so it is."], "tgt": ["x", "y"]}),
                   tmp_path / "test.parquet")  # fmt: skip
    against = [{"type": "parquet", "path": str(tmp_path / "test.parquet"), "columns": ["src", "tgt"]}]
    manifest = prepare(
        settings(tmp_path, documents=[source], decontaminate={"against": against}, keep_dropped=True, validation=1e-9)
    )
    assert manifest.counts["dropped.contaminated"] == 1
    assert [row["source"] for row in dropped(tmp_path)] == [texts[5]]
    with pytest.raises(InputError, match=r"corpus.decontaminate.against\[0\].path: .*no such file"):
        prepare(settings(tmp_path, documents=[source], decontaminate={"against": [against[0] | {"path": "absent"}]}))


def test_paragraphs_that_were_there_before_go(tmp_path: Path) -> None:
    licence = "This paragraph about a licence stands in every document of the corpus, word for word, without change."
    texts = [f"{document(n)}\n\n{licence}" for n in range(40)]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, licence + "\n\nShort."])
    manifest = prepare(settings(tmp_path, documents=[source], dedup={"paragraphs": True}, validation=1e-9))
    assert manifest.counts["paragraphs_dropped"] == 40
    assert trained_text(tmp_path).replace("\n", "").count("word for word") <= 1
    assert manifest.counts["kept"] + manifest.counts.get("dropped.repeated_paragraphs", 0) == 41


@pytest.mark.parametrize("first", ["alpha", "omega"])
def test_of_copies_in_two_sources_the_first_sources_stays(tmp_path: Path, first: str) -> None:
    text = document(1)
    variants = {"alpha": text, "omega": text.replace(" ", "  ").replace("number", "Number")}
    sources = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", [copy, *(document(n) for n in range(10, 30))])
        for name, copy in variants.items()
    }
    order = sorted(sources, key=lambda name: name != first)
    documents = [sources[name] for name in order]
    manifest = prepare(settings(tmp_path, documents=documents, dedup={"keep": "first"}, validation=1e-9))
    assert manifest.counts["dropped.duplicate"] == 21
    assert ("Number" in trained_text(tmp_path)) == (first == "omega")


@pytest.mark.parametrize(("unique", "kept"), [("pair", 4), ("source", 3), ("target", 2)])
def test_what_is_unique_among_pairs(tmp_path: Path, unique: str, kept: int) -> None:
    rows = [("Open it", "Öffnen"), ("Open it", "Öffnen"), ("Open it", "Aufmachen"), ("Start it", "Öffnen"),
            ("Begin it", "Öffnen")]  # fmt: skip
    path = tmp_path / "a.csv"
    path.write_text("source,target\n" + "".join(f"{source},{target}\n" for source, target in rows))
    pairs = [{"type": "csv", "path": str(path), "to": "de"}]
    manifest = prepare(settings(tmp_path, pairs=pairs, dedup={"pairs": unique}, pair_filters={"languages": False}))
    assert manifest.counts["kept"] == kept


# -------------------------------------------------------------------------------------- tokens and mixture


def test_weights_and_epochs_make_a_mixture(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [document(n).replace("number", "alpha") for n in range(150)])
    second = write_jsonl(tmp_path / "b.jsonl", [document(n).replace("number", "omega") for n in range(1_000, 1_300)])
    sources = [first | {"epochs": 2}, second | {"epochs": 0.5}]
    prepare(settings(tmp_path, documents=sources, validation=1e-9))
    text = trained_text(tmp_path).replace("\n", "")
    assert 280 * 6 <= text.count("alpha") <= 300 * 6
    assert 110 * 6 <= text.count("omega") <= 190 * 6
    sources = [first | {"weight": 3, "epochs": 4}, second | {"weight": 1}]
    prepare(settings(tmp_path, documents=sources, validation=1e-9))
    text = trained_text(tmp_path).replace("\n", "")
    assert 2.4 < text.count("alpha") / text.count("omega") < 3.6


def test_documents_are_truncated_only_where_asked_and_counted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(n) for n in range(30)])
    whole = prepare(settings(tmp_path, documents=[source]))
    assert whole.counts.get("truncated_documents", 0) == 0
    assert whole.metrics["padding"] <= 0.02  # of one part; its last sequence is open
    cut = prepare(settings(tmp_path, documents=[source], pack={"max_document_tokens": 20}))
    assert cut.counts["truncated_documents"] == 30
    assert sum(cut.counts["tokens"].values()) == 30 * 20
    assert cut.counts["truncated_tokens"] + 600 == sum(whole.counts["tokens"].values())


def test_the_tokenizer_of_another_corpus_is_taken(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(n) for n in range(30)])
    prepare(settings(tmp_path, documents=[source], tokenizer={"vocab_size": 700, "kind": "unigram", "languages": []}))
    other = artifact(tmp_path) / "tokenizer"
    prepare(settings(tmp_path / "2", documents=[source], tokenizer={"start_from": str(other)}))
    assert (artifact(tmp_path / "2") / "tokenizer/tokenizer.json").read_bytes() == (
        other / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("name", "files", "reason"),
    [
        ("ByT5Tokenizer", (), r"has no tokenizer\.json, .* corpus\.tokenizer\.start_from"),
        ("MarianTokenizer", ("source.spm", "target.spm", "vocab.json"), "needs a package .* SentencePiece"),
    ],
)
def test_a_tokenizer_that_cannot_be_taken_is_told_before_anything_is_done(
    tmp_path: Path, name: str, files: tuple[str, ...], reason: str
) -> None:
    if name == "MarianTokenizer" and importlib.util.find_spec("sentencepiece"):
        pytest.skip("sentencepiece is here")
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    for file in files:
        (model / file).write_text("{}")
    source = write_jsonl(tmp_path / "a.jsonl", [document(1)])
    with pytest.raises(ArtifactError, match=f"model {model}: .*{reason}"):
        prepare(settings(tmp_path, documents=[source], tokenizer={"start_from": str(model)}))
    assert not (artifact(tmp_path) / WORK).is_dir()


# --------------------------------------------------------------------------------------- what is redone


def _made(directory: Path) -> dict[str, int]:
    """Every file that the steps left, with its time."""
    work = artifact(directory).local() / WORK
    return {str(path.relative_to(work)): path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"sequence_length": 32}, {"pack"}),
        ({"pack": {"strategy": "concatenate"}}, {"pack"}),
        ({"tokenizer": {"vocab_size": 640, "languages": []}}, {"tokenizer", "tokenize", "pack"}),
        ({"dedup": {"threshold": 0.9}}, {"dedup", "tokenizer", "tokenize", "pack"}),
        ({"validation": 0.1}, {"merge", "minhash", "dedup", "tokenizer", "tokenize", "pack"}),
        ({"filters": {"min_chars": 60}}, {"clean", "merge", "minhash", "dedup", "tokenizer", "tokenize", "pack"}),
        ({"keep_work": True, "max_rejected": 3}, set()),
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it(tmp_path: Path, change: dict[str, Any], redone: set[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(n) for n in range(40)])
    prepare(settings(tmp_path, documents=[source]))
    before = _made(tmp_path)
    second = prepare(settings(tmp_path, documents=[source], **change))
    after = _made(tmp_path)
    changed = {name for name, time in after.items() if before.get(name) != time}
    assert {name.split("/")[0].split("-")[0] for name in changed} == redone
    fresh = prepare(settings(tmp_path / "fresh", documents=[source], **change))
    assert shards(second) == shards(fresh)


def test_another_file_is_cleaned_alone(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(n) for n in range(40)])
    prepare(settings(tmp_path, documents=[source]))
    before = _made(tmp_path)
    other = write_jsonl(tmp_path / "b.jsonl", [document(n) for n in range(100, 140)])
    manifest = prepare(settings(tmp_path, documents=[source, other]))
    assert manifest.counts["read"] == 80
    kept = {name for name, time in _made(tmp_path).items() if before.get(name) == time and name.startswith("clean/")}
    assert kept == {name for name in before if name.startswith("clean/")} != set()


def test_no_work_is_kept_where_none_is_wanted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(n) for n in range(40)])
    prepare(settings(tmp_path, documents=[source], keep_work=False))
    assert not (artifact(tmp_path).local() / WORK).exists()


def test_the_reads_of_a_merge_grow_with_the_corpus() -> None:
    """Each part is read from every run: were these of one size, a tenfold corpus would take a hundred times as many."""

    def reads(total: int) -> float:
        run = min(_unit_bytes(total), part_bytes(total, 32))
        return total / part_bytes(total, 16) * total / run

    assert part_bytes(4e9, 16) == 16e6
    assert reads(10**12) < 2e7
    assert reads(10**14) / reads(10**12) < 150, "units are powers of two"


def test_files_order_and_cut_change_no_byte(tmp_path: Path) -> None:
    texts = [document(n) for n in range(300)]
    texts += [text.replace("number", "count") for text in texts[:40]] + texts[:20]
    one = write_jsonl(tmp_path / "one.jsonl", texts)
    whole = prepare(settings(tmp_path / "whole", documents=[one], shard_mb=0.05))
    random.Random(1).shuffle(texts)
    several = []
    for number in range(3):
        pq.write_table(pa.table({"text": texts[number::3]}), tmp_path / f"{number}.parquet", row_group_size=50)
        several.append({"type": "parquet", "path": str(tmp_path / f"{number}.parquet")})
    cut = prepare(settings(tmp_path / "cut", documents=several, shard_mb=0.05))
    assert len(shards(whole)) > 3
    assert shards(whole) == shards(cut)
