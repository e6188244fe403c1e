"""Muon: which weights it trains, and that it does at each ZeRO stage, also after a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raylm import models
from raylm.settings import ModelSettings, PretrainSettings, Settings
from raylm.storage import StoragePath
from raylm.training.job import TrainingJob
from raylm.training.zero import hidden_matrices
from tests.training.runs import losses, on_workers


@pytest.mark.parametrize("family", ["marian", "llama", "bert", "t5"])
def test_the_ends_of_a_model_are_not_muons(family: Any, corpus: StoragePath) -> None:
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    model = models.build_model(models.build_config(ModelSettings(family=family), tokenizer), seed=1)
    names = {name for name, weight in model.named_parameters() if weight in hidden_matrices(model)}
    assert any("attention" in name.lower() or "attn" in name for name in names)
    assert not any(
        part in name for name in names for part in ("embed", "shared", "lm_head", "relative", "norm", "bias")
    )


def test_a_changing_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer: muon needs a fixed number of workers, not \[1, 4\]"):
        PretrainSettings(optimizer="muon", workers=(1, 4))


def test_muon_learns_at_every_stage(small_settings: Settings, corpus: StoragePath, tmp_path: Path) -> None:
    """On two workers, and as well after a break; stages 1 to 3 alike."""
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    tokenizer.save_pretrained(tmp_path / "model")
    models.build_config(small_settings.model, tokenizer).save_pretrained(tmp_path / "model")

    def job(name: str, stage: int, steps: int) -> TrainingJob:
        values = {"optimizer": "muon", "zero_stage": stage, "steps": steps, "log_every": 1, "checkpoint_every": 6,
                  "schedule": "constant", "warmup_steps": 2, "learning_rate": 1e-3}  # fmt: skip
        settings = small_settings.pretrain.model_copy(update=values)
        return TrainingJob(settings, str(tmp_path / f"{name}-{stage}"), str(corpus), str(tmp_path / "model"), None)

    def train_all(config: dict[str, Any]) -> None:
        import os

        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # a minute of compiling otherwise
        from raylm.training.loop import train_worker

        for each in config["jobs"]:
            train_worker(each, lambda _: None)

    stages = (0, 1, 2, 3)
    jobs = [
        job(*row) for stage in stages for row in (("whole", stage, 12), ("broken", stage, 6), ("broken", stage, 12))
    ]
    on_workers(2, train_all, tmp_path, jobs=jobs)
    for stage in stages:
        whole, broken = (losses(StoragePath(str(tmp_path / f"{name}-{stage}"))) for name in ("whole", "broken"))
        assert whole[-1] < whole[0] - 0.05, stage
        assert broken == pytest.approx(whole, abs=1e-5), stage
        if stage:  # without ZeRO, gradients are clipped before they are made orthogonal
            assert whole == pytest.approx(losses(StoragePath(str(tmp_path / "whole-1"))), abs=1e-4), stage
