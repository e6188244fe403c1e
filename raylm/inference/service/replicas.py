"""The replicas of the model: what Ray Serve calls them, and how many of them there are to be."""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

APPLICATION = "raylm"
MODEL = "model"
"""The deployment of the model's replicas."""
OPEN = "open_questions"
"""What a replica tells of itself: the questions of people, streams and chunks of batch jobs that are with it."""
_BUSY = 16
"""Of these, at a replica: with more another one is started, where there may be more."""


def fewest_and_most(replicas: int | tuple[int, int]) -> tuple[int, int]:
    """Between how many there are to be."""
    return replicas if isinstance(replicas, tuple) else (replicas, replicas)


def needed(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """How many replicas are kept busy: Ray Serve's own policy counts calls, of which one holds many questions."""
    told = (context.aggregated_metrics or {}).get(OPEN, {})
    at_least = 1.0 if context.total_num_requests else 0.0  # the first call, of which no replica has told yet
    return max(sum(told.values()) / _BUSY, at_least), {}
