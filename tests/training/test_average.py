"""A moving average of the weights: the same at every ZeRO stage and width, validated and exported in their place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from raylm import models
from raylm.settings import Settings
from raylm.storage import StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.average import EVERY, averaged_weights, deal
from raylm.training.job import TrainingJob
from raylm.training.telemetry import read_metrics
from raylm.training.trained import load_trained
from raylm.training.zero import whole_weights
from tests.training.runs import losses, train_jobs

DECAY = 0.95
STAGES = (0, 3)


def test_every_weight_has_one_owner_and_ranks_have_about_as_much() -> None:
    owners = deal({"a": (4, 4), "b": (3, 3), "c": (8,), "d": ()}, 2)
    assert owners == {"a": 0, "b": 1, "c": 1, "d": 0}
    assert set(deal({"only": (2,)}, 4).values()) == {0}


@pytest.fixture(scope="module")
def runs(small_settings: Settings, corpus: StoragePath, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs without a break on two workers, and others that go from two to one and back to two."""
    place = tmp_path_factory.mktemp("averages")
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    tokenizer.save_pretrained(place / "model")
    models.build_config(small_settings.model, tokenizer).save_pretrained(place / "model")

    def jobs(name: str, steps: int) -> list[TrainingJob]:
        values: dict[str, Any] = {
            "ema_decay": DECAY, "steps": steps, "checkpoint_every": EVERY, "validate_every": EVERY, "keep_last": 9,
            "schedule": "constant", "warmup_steps": 2, "learning_rate": 1e-3, "log_every": 1,
        }  # fmt: skip
        return [
            TrainingJob(
                small_settings.pretrain.model_copy(update={**values, "zero_stage": stage}),
                str(place / f"{name}-{stage}"), str(corpus), str(place / "model"), None,
            )
            for stage in STAGES
        ]  # fmt: skip

    train_jobs(2, [*jobs("whole", 3 * EVERY), *jobs("changing", EVERY)], place)
    train_jobs(1, jobs("changing", 2 * EVERY), place)
    train_jobs(2, jobs("changing", 3 * EVERY), place)
    return place


def saved(run: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The weights of a run's checkpoints and their averages, oldest first."""
    found = [checkpoint.localize() for checkpoint in checkpoints.checkpoints(StoragePath(str(run)))]
    return [(whole_weights(place, int(run.name[-1])), averaged_weights(place)) for place in found]


@pytest.mark.parametrize("stage", STAGES)
def test_averages_follow_the_weights_by_the_formula(runs: Path, stage: int) -> None:
    fresh = models.build_model(models.load_config(str(runs / "model")), seed=1)
    expected = {name: weight.detach() for name, weight in fresh.named_parameters() if weight.requires_grad}
    for number, (weights, averages) in enumerate(saved(runs / f"whole-{stage}"), start=1):
        decay = min(DECAY**EVERY, (1 + number) / (10 + number))
        expected = {name: decay * old + (1 - decay) * weights[name] for name, old in expected.items()}
        assert averages.keys() == expected.keys()
        for name, value in averages.items():
            assert value.numpy() == pytest.approx(expected[name].detach().numpy(), abs=1e-6), name


@pytest.mark.parametrize("stage", STAGES)
def test_training_takes_no_notice_of_them(runs: Path, stage: int) -> None:
    """Validation puts the averages in the weights' place for a while; and the number of workers changes nothing."""
    assert losses(StoragePath(str(runs / f"changing-{stage}"))) == pytest.approx(
        losses(StoragePath(str(runs / "whole-0"))), abs=1e-5
    )
    # Of a gradient near zero, Adam makes its rounding a part of a whole step, which is 1e-3 here.
    for ours, others in zip(saved(runs / f"changing-{stage}"), saved(runs / "whole-0"), strict=True):
        for name, value in ours[1].items():
            assert value.numpy() == pytest.approx(others[1][name].numpy(), abs=5e-4), name


def test_the_average_is_what_is_validated_and_exported(runs: Path) -> None:
    import torch

    run = StoragePath(str(runs / "whole-3"))
    shutil.copytree(runs / "model", runs / "whole-3" / "model")
    model, best = load_trained(run)
    averages = averaged_weights(best.localize())
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(weight, averages[name]), name
    by_stage = [
        [row["validation_loss"] for row in read_metrics(StoragePath(str(runs / f"whole-{stage}"))) if len(row) < 5]
        for stage in STAGES
    ]
    assert len(by_stage[0]) == 3
    for found in by_stage[1:]:
        assert found == pytest.approx(by_stage[0], abs=1e-5)
    assert best.validation_loss == min(by_stage[1])
