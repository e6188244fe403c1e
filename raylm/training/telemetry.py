"""What a run says of itself while it trains: windows of measurements, `metrics.jsonl`, TensorBoard events."""

from __future__ import annotations

import json
import time
from typing import Any, Protocol

from raylm.storage import METRICS, StoragePath


class Reporter(Protocol):
    """Takes what the first worker has to say to the driver."""

    def __call__(self, metrics: dict[str, Any]) -> None: ...


class Window:
    """What happened since the last line of the log."""

    def __init__(self) -> None:
        self._loss_sum, self._target_tokens, self._padded_tokens = 0.0, 0, 0
        self._start = time.monotonic()
        self.data_wait_s = 0.0
        self.paused_s = 0.0
        """Seconds spent on validation and checkpoints: not training, so not in the speed."""

    def add(self, loss_sum: float, target_tokens: int, padded_tokens: int) -> None:
        self._loss_sum += loss_sum
        self._target_tokens += target_tokens
        self._padded_tokens += padded_tokens

    def metrics(self) -> dict[str, float]:
        """Mean loss in nats per target token; padded tokens per second of all workers; share spent on data."""
        seconds = max(time.monotonic() - self._start - self.paused_s, 1e-9)
        return {
            "loss": self._loss_sum / max(self._target_tokens, 1),
            "tokens_per_s": round(self._padded_tokens / seconds, 1),
            "data_wait": round(self.data_wait_s / seconds, 4),
        }


class MetricsLog:
    """The run's `metrics.jsonl` and TensorBoard events, kept by rank 0 and published with each checkpoint.

    Rows beyond the step that a run continues from are dropped: those steps come again.
    """

    def __init__(self, run: StoragePath, first_step: int, report: Reporter) -> None:
        self._file, self._report = run / METRICS, report
        self._rows = [row for row in read_metrics(run) if row["step"] <= first_step]
        self._board: Any = None
        if run.is_local:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run.local() / "tensorboard"), purge_step=first_step)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._report(row)
        if self._board:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def publish(self) -> None:
        self._file.write_bytes("".join(json.dumps(row) + "\n" for row in self._rows).encode())
        if self._board:
            self._board.flush()


def read_metrics(run: StoragePath) -> list[dict[str, Any]]:
    """The rows of a run's metrics, oldest first; none where it has not logged yet."""
    return (run / METRICS).read_jsonl()
