"""Pretraining straight from the sources, on real workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylm.corpus.prepare import prepare
from raylm.corpus.stream import open_stream
from raylm.errors import TrainingError
from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.runs import run_directory
from raylm.training.streaming import PLACE, RECORD
from raylm.training.trainer import pretrain
from tests.corpus.test_pipeline import document, write_jsonl
from tests.training.runs import changed, losses

FILES = 8


def streaming(small_settings: Settings, directory: Path, **training: object) -> Settings:
    for file in range(FILES):
        write_jsonl(directory / f"{file}.jsonl", [document(file * 100 + n) for n in range(60)])
    corpus = {
        "documents": [{"type": "jsonl", "path": f"{directory}/*.jsonl"}],
        "pairs": [],
        "tokenizer": {"vocab_size": 600, "languages": []},
        "shard_mb": 0.03,
    }
    values = changed(small_settings, corpus=corpus, pretrain={"stream": True, **training}).model_dump()
    return Settings.model_validate(values | {"storage": str(directory / "storage")})


def train(settings: Settings) -> Manifest:
    prepare(settings)
    return pretrain(settings, open_stream(settings))


def places(run: StoragePath) -> list[int]:
    return sorted(int(file.name[6:14]) for file, _ in (run / RECORD).list() if file.name.startswith("place-"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_trains_and_goes_on_behind_its_last_checkpoint(
    small_settings: Settings, ray_cluster: None, tmp_path: Path, workers: int
) -> None:
    steps = 12 * workers
    settings = streaming(small_settings, tmp_path, workers=workers, steps=steps, checkpoint_every=steps)
    first = train(settings)
    run = run_directory(settings, "pretrain")
    # So many steps of sixteen sequences are more than a place for each worker, and less than a pass.
    place = checkpoints.best(run).manifest.metrics[PLACE]
    assert 0 < place < FILES
    assert places(run)[0] == 0
    assert first.counts["trained"] > 0
    assert first.counts["read"] >= first.counts["trained"] + first.counts["held_out"]

    (run / RECORD).move_to(run / "stream-before")
    second = train(changed(settings, pretrain={"steps": 2 * steps}))
    assert places(run)[0] == place
    assert second.metrics["step"] == 2 * steps
    assert len(losses(run)) == 2 * steps
    assert losses(run)[-1] < losses(run)[0] - 0.1


def test_a_source_that_breaks_ends_training_with_its_error(
    small_settings: Settings, ray_cluster: None, tmp_path: Path
) -> None:
    settings = streaming(small_settings, tmp_path, workers=2, steps=400)
    prepare(settings)
    stream = open_stream(settings)
    for file in range(FILES):
        (tmp_path / f"{file}.jsonl").write_text('{"text": 7}\n')
    with pytest.raises(TrainingError, match=r"rows could not be read.*\.jsonl, at 0: text: a value of type int"):
        pretrain(settings, stream)


def test_reading_needs_a_cpu_beside_the_workers(small_settings: Settings, ray_cluster: None, tmp_path: Path) -> None:
    settings = streaming(small_settings, tmp_path, workers=4)
    with pytest.raises(TrainingError, match=r"workers is 4, the cluster has 4 CPUs, 1 CPU of which .* needs"):
        train(settings)
