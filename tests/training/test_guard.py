from __future__ import annotations

import math
import random

import pytest

from raylm.errors import TrainingError
from raylm.training.guard import Patience, SpikeGuard


def seen(guard: SpikeGuard, count: int, seed: int = 1) -> SpikeGuard:
    chance = random.Random(seed)
    for _ in range(count):
        assert not guard.is_spike(chance.gauss(3.0, 0.1))
    return guard


def test_mean_and_variance_are_those_of_the_losses() -> None:
    guard = seen(SpikeGuard(20, "pretrain"), 3_000)
    assert guard.mean == pytest.approx(3.0, abs=0.06)
    assert math.sqrt(guard.variance) == pytest.approx(0.1, rel=0.3)


def test_a_spike_is_left_out_and_does_not_count() -> None:
    guard = seen(SpikeGuard(6, "pretrain"), 200)
    before = guard.state()
    assert guard.is_spike(4.5)
    assert guard.state() == before | {"in_a_row": 1}
    assert not guard.is_spike(3.05)
    assert guard.in_a_row == 0


def test_the_first_losses_are_no_spikes() -> None:
    guard = SpikeGuard(3, "pretrain")
    assert not any(guard.is_spike(loss) for loss in [9.0, 8.0, 11.0, 7.0, 12.0])


def test_too_many_in_a_row_end_training_with_the_remedy() -> None:
    guard = seen(SpikeGuard(6, "finetune"), 200)
    for _ in range(9):
        assert guard.is_spike(30.0)
    with pytest.raises(TrainingError, match=r"10 micro-batches in a row .* lower finetune.learning_rate"):
        guard.is_spike(30.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_no_number_ends_training_also_without_a_limit(loss: float) -> None:
    with pytest.raises(TrainingError, match=r"training has diverged; lower pretrain.learning_rate"):
        SpikeGuard(None, "pretrain").is_spike(loss)


def test_a_restored_guard_goes_on_as_the_first() -> None:
    whole, broken = seen(SpikeGuard(6, "pretrain"), 120), SpikeGuard(6, "pretrain")
    broken.restore(whole.state())
    for guard in (whole, broken):
        seen(guard, 50, seed=2)
    assert whole.state() == broken.state()


def test_patience_ends_after_so_many_validations_without_a_lower_loss() -> None:
    patience = Patience(2)
    assert [patience.is_over(loss) for loss in (3.0, 2.0, 2.5, 1.9, 1.9, 2.0)] == [False] * 5 + [True]
    assert not any(Patience(None).is_over(3.0) for _ in range(50))


def test_restored_patience_goes_on_as_the_first() -> None:
    for losses in ((), (3.0, 2.0, 2.5)):
        whole, broken = Patience(2), Patience(2)
        for loss in losses:
            whole.is_over(loss)
        broken.restore(whole.state())
        assert broken == whole
        assert [broken.is_over(2.2), broken.is_over(2.2)] == [whole.is_over(2.2), whole.is_over(2.2)]
