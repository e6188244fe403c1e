"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math

from raylm.settings import TrainingSettings


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """The rate of optimizer step `step`, counted from 0.

    All schedules warm up linearly. `wsd` then stays, and falls linearly at the end (warmup-stable-decay: Hu et al.
    2024, MiniCPM); `cosine` is Loshchilov and Hutter 2017; `inverse_sqrt` is Vaswani et al. 2017.
    """
    peak, total = settings.learning_rate, settings.steps
    warmup = min(settings.warmup_steps, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * _factor(step, settings, warmup, total)


def _factor(step: int, settings: TrainingSettings, warmup: int, total: int) -> float:
    floor = settings.min_learning_rate_ratio
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "inverse_sqrt":
        return max(math.sqrt(max(warmup, 1) / (step + 1)), floor)
    if settings.schedule == "wsd":
        decay = max(round(total * settings.decay_ratio), 1)
        return 1.0 - (1.0 - floor) * min(max(step - (total - decay), 0) / decay, 1.0)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    if settings.schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (1.0 - floor) * (1.0 - progress)
