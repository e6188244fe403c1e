"""When not to go on: micro-batches to leave out, training that has diverged, and training that no longer gains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raylm.errors import TrainingError

_MEMORY = 0.98
"""How much of the mean and the variance each new loss leaves: some fifty micro-batches count."""
_LEAST_SEEN = 50
"""Losses that have to be seen before one can stand out."""
_MOST_IN_A_ROW = 10


@dataclass
class SpikeGuard:
    """Follows the losses of micro-batches by exponentially weighted mean and variance (West 1979).

    A loss so many standard deviations above the mean is a spike, and does not count into either. The same on all ranks,
    which hand it the same numbers.

    :param sigma: how many; None lets all pass.
    """

    sigma: float | None
    section: str
    """The settings' section, for errors."""
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    in_a_row: int = 0

    def is_spike(self, loss: float) -> bool:
        """Whether to leave out a micro-batch.

        :param loss: in nats per token.
        :raises TrainingError: it is not a number, or too many in a row are spikes.
        """
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss}: training has diverged; lower {self.section}.learning_rate")
        if self.sigma is None:
            return False
        limit = self.mean + self.sigma * math.sqrt(self.variance)
        if self.seen >= _LEAST_SEEN and loss > limit:
            self.in_a_row += 1
            if self.in_a_row >= _MOST_IN_A_ROW:
                raise TrainingError(
                    f"{_MOST_IN_A_ROW} micro-batches in a row have a loss above {limit:.3f}, the last one {loss:.3f}: "
                    f"training has diverged; lower {self.section}.learning_rate or raise {self.section}.spike_sigma"
                )
            return True
        self.in_a_row = 0
        weight = max(1 - _MEMORY, 1 / (self.seen + 1))  # a plain mean at first
        delta = loss - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta * delta)
        self.seen += 1
        return False

    def state(self) -> dict[str, float]:
        """What a checkpoint has to note for the guard to go on as if nothing had been."""
        return {"mean": self.mean, "variance": self.variance, "seen": self.seen, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, float]) -> None:
        self.mean, self.variance = state["mean"], state["variance"]
        self.seen, self.in_a_row = int(state["seen"]), int(state["in_a_row"])


@dataclass
class Patience:
    """Counts the validations since the lowest loss.

    :param most: so many without a lower one end training; None never does.
    """

    most: int | None
    lowest: float = math.inf
    since: int = 0

    def is_over(self, validation_loss: float) -> bool:
        """Whether training is to end after this validation."""
        if validation_loss < self.lowest:
            self.lowest, self.since = validation_loss, 0
        else:
            self.since += 1
        return self.most is not None and self.since >= self.most

    def state(self) -> dict[str, float | None]:
        """What a checkpoint has to note; JSON knows no infinity."""
        return {"lowest": self.lowest if math.isfinite(self.lowest) else None, "since": self.since}

    def restore(self, state: dict[str, float | None]) -> None:
        lowest = state["lowest"]
        self.lowest, self.since = math.inf if lowest is None else lowest, int(state["since"] or 0)
