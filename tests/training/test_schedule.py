from __future__ import annotations

from itertools import pairwise

import pytest

from raylm.settings import PretrainSettings
from raylm.training.schedule import learning_rate


def _rates(schedule: str) -> list[float]:
    settings = PretrainSettings(
        steps=100, warmup_steps=10, schedule=schedule, learning_rate=1.0, decay_ratio=0.2, min_learning_rate_ratio=0.1
    )
    return [learning_rate(step, settings) for step in range(100)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear", "inverse_sqrt", "constant"])
def test_every_schedule_warms_up_to_its_peak_and_never_rises_again(schedule: str) -> None:
    rates = _rates(schedule)
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert all(after <= before + 1e-12 for before, after in pairwise(rates[9:]))
    assert min(rates[10:]) >= 0.1 - 1e-9


def test_wsd_stays_then_falls_at_the_end() -> None:
    rates = _rates("wsd")
    assert rates[79] == pytest.approx(1.0)
    assert rates[90] == pytest.approx(0.55)


def test_known_values() -> None:
    assert _rates("cosine")[55] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-6)
    assert _rates("inverse_sqrt")[39] == pytest.approx(0.5)
    assert _rates("linear")[55] == pytest.approx(0.55)
