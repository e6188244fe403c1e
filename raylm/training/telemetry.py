"""What a run says of itself while it trains: a window of measurements for each line of its log, and where it goes.

Rows go to the run's `metrics.jsonl`, to TensorBoard, to Ray's Prometheus endpoint, and to MLflow where the environment
names a tracking server.
"""

from __future__ import annotations

import importlib
import os
import queue
import threading
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from raylm.errors import first_line
from raylm.storage import METRICS, StoragePath, fingerprint
from raylm.training.throughput import peak_memory_gb

if TYPE_CHECKING:
    import torch

    from raylm.training.steps import StepResult

MEANINGS = {
    "step": "optimizer steps done",
    "loss": "mean training loss since the last line, nats per target token",
    "learning_rate": "learning rate of the last step",
    "gradient_norm": "norm of the last step's gradient before clipping",
    "tokens_per_s": "positions computed per second of training, padding included, all workers",
    "real_tokens_per_s": "source and target tokens per second of training, without padding, all workers",
    "mfu": "model FLOPs utilisation: share of the measured matmul peak of all workers",
    "step_s": "seconds per step of training",
    "skipped": "micro-batches left out as spikes since the last line",
    "data_wait": "share of the time of training spent waiting for data",
    "checkpoint_stall": "share of the wall time for which training stood still for checkpoints",
    "checkpoint_s": "seconds for which training stood still for checkpoints since the last line",
    "validation_s": "seconds of validation since the last line",
    "memory_gb": "most memory that the first worker has held, 10^9 bytes",
    "validation_loss": "mean loss on the validation split, nats per target token",
    "validation_perplexity": "exp of the validation loss",
    "validation_bits_per_byte": "bits of the validation loss for each byte of text",
}
"""What the values of a row are. The time of training is wall time without validation and checkpoints."""

_MLFLOW_LAST_ROWS_S = 30.0
_MLFLOW_BATCH = 100
"""The most parameters that MLflow takes at once."""


class Reporter(Protocol):
    """Takes what the first worker has to say to the driver."""

    def __call__(self, metrics: dict[str, Any]) -> None: ...


class Window:
    """What happened since the last line of the log.

    :param device: whose memory is told.
    :param peak: FLOP/s that all workers together can reach; None tells no utilisation.
    """

    def __init__(self, device: torch.device, peak: float | None) -> None:
        self._device, self._peak = device, peak
        self._steps: list[StepResult] = []
        self._start = time.monotonic()
        self.data_wait_s = 0.0
        self.validation_s = 0.0
        self.checkpoint_s = 0.0
        """Seconds for which training stood still; what a checkpoint does beside training is not among them."""

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self._steps.append(result)

    def metrics(self) -> dict[str, float]:
        """The row's values, see `MEANINGS`; what is not known is left out."""
        wall = max(time.monotonic() - self._start, 1e-9)
        seconds = max(wall - self.validation_s - self.checkpoint_s, 1e-9)
        steps = self._steps
        flops = [step.flops for step in steps if step.flops is not None]
        skipped = sum(step.skipped for step in steps)
        measured = {
            "loss": sum(step.loss_sum for step in steps) / max(sum(step.target_tokens for step in steps), 1),
            "tokens_per_s": round(sum(step.padded_tokens for step in steps) / seconds, 1),
            "real_tokens_per_s": round(sum(step.real_tokens for step in steps) / seconds, 1),
            "step_s": round(seconds / max(len(steps), 1), 5),
            "data_wait": round(self.data_wait_s / seconds, 4),
            "checkpoint_stall": round(self.checkpoint_s / wall, 4),
            "checkpoint_s": round(self.checkpoint_s, 3),
            "validation_s": round(self.validation_s, 3),
        }
        if skipped:
            measured["skipped"] = skipped
        if flops and self._peak:
            measured["mfu"] = round(sum(flops) / seconds / self._peak, 4)
        memory = peak_memory_gb(self._device)
        if memory is not None:
            measured["memory_gb"] = round(memory, 3)
        return measured


class MetricsLog:
    """The run's `metrics.jsonl` and its boards, kept by rank 0 and published with each checkpoint.

    Rows beyond the step that a run continues from are dropped: those steps come again.

    :param settings: what the run was started with, for boards that show it.
    """

    def __init__(
        self, run: StoragePath, first_step: int, report: Reporter, settings: dict[str, Any] | None = None
    ) -> None:
        self._file, self._report = run / METRICS, report
        self._rows = [row for row in read_metrics(run) if row["step"] <= first_step]
        self._boards = _boards(run, first_step, settings or {}, report)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._report(row)
        for board in self._boards:
            board.add(row)

    def publish(self) -> None:
        self._file.write_jsonl(self._rows)
        for board in self._boards:
            board.flush()

    def close(self, is_finished: bool = True) -> None:
        """Publish, and give each board the time to show the last rows.

        :param is_finished: the run has come to its last step, and is not to be continued.
        """
        self.publish()
        for board in self._boards:
            board.close(is_finished)


def read_metrics(run: StoragePath) -> list[dict[str, Any]]:
    """The rows of a run's metrics, oldest first; none where it has not logged yet."""
    return (run / METRICS).read_jsonl()


# --------------------------------------------------------------------------------------------- boards


class Board(Protocol):
    """A place that shows the rows of a run."""

    def add(self, row: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self, is_finished: bool) -> None: ...


def _boards(run: StoragePath, first_step: int, settings: dict[str, Any], report: Reporter) -> list[Board]:
    """The boards that there are for a run: what its storage, its process and its environment allow."""
    import ray

    boards: list[Board] = []
    if run.is_local:
        boards.append(TensorBoard(run, first_step))
    if ray.is_initialized():
        boards.append(Gauges(run.name))
    if os.environ.get("MLFLOW_TRACKING_URI"):
        if find_spec("mlflow"):
            boards.append(MlflowBoard(run, first_step, settings, report))
        else:
            report(
                {
                    "note": "MLFLOW_TRACKING_URI is set, but the first worker has no mlflow: this run is not tracked "
                    "there; `pip install 'raylm[tracking]'` on the machines of the cluster"
                }
            )
    return boards


class TensorBoard:
    """Event files in the run's `tensorboard` directory; the steps after the first one are taken to come anew."""

    def __init__(self, run: StoragePath, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets the purged step itself too, but the row of the first step stands.
        self._writer: Any = SummaryWriter(str(run.local() / "tensorboard"), purge_step=first_step + 1)

    def add(self, row: dict[str, Any]) -> None:
        for name, value in _values(row):
            self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self, is_finished: bool) -> None:
        self._writer.close()


class Gauges:
    """Gauges of Ray: Prometheus finds them at the node's metrics endpoint as `ray_raylm_train_loss` and the like.

    :param run: the value of their tag `run`.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def add(self, row: dict[str, Any]) -> None:
        from ray.util.metrics import Gauge

        for name, value in (("step", row["step"]), *_values(row)):
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"raylm_train_{name}", MEANINGS.get(name, ""), tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._run})

    def flush(self) -> None:
        """Nothing: Ray exports gauges at its own pace."""

    def close(self, is_finished: bool) -> None:
        """Nothing: the gauges end with the worker."""


class MlflowBoard:
    """A run on the MLflow tracking server that `MLFLOW_TRACKING_URI` names, with its settings as parameters.

    A thread of its own talks to the server, so training never waits for the network. Its first failure is noted and
    ends it: a run is worth more than its board. A continued run goes on in the MLflow run that it had; MLflow keeps
    the values of steps that come again beside the new ones.

    `MLFLOW_EXPERIMENT_NAME` names the experiment, else it is `raylm`.
    """

    def __init__(self, run: StoragePath, first_step: int, settings: dict[str, Any], report: Reporter) -> None:
        self._run, self._is_new, self._settings, self._report = run, first_step == 0, settings, report
        self._last_status = ""
        self._rows: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)
        self._thread.start()

    def add(self, row: dict[str, Any]) -> None:
        self._rows.put((time.time_ns() // 1_000_000, row))

    def flush(self) -> None:
        """Nothing: rows are on their way."""

    def close(self, is_finished: bool) -> None:
        self._last_status = "FINISHED" if is_finished else "SCHEDULED"
        self._rows.put(None)
        self._thread.join(_MLFLOW_LAST_ROWS_S)
        if self._thread.is_alive():
            self._report({"note": f"MLflow did not take the last rows within {_MLFLOW_LAST_ROWS_S:.0f} s"})

    def _follow(self) -> None:
        try:
            self._send_rows()
        except Exception as error:  # of MLflow, or of whatever store is behind the address
            self._report({"note": f"MLflow: {first_line(error)}; the run is tracked there no longer"})

    def _send_rows(self) -> None:
        # Not imported by name: it is there only with the extra, and type checks run without it.
        mlflow = importlib.import_module("mlflow")
        entities = importlib.import_module("mlflow.entities")
        client = mlflow.MlflowClient()
        run_id = self._open_run(client, entities)
        while item := self._rows.get():
            time_ms, row = item
            metrics = [entities.Metric(name, float(value), time_ms, row["step"]) for name, value in _values(row)]
            client.log_batch(run_id, metrics=metrics)
        client.set_terminated(run_id, self._last_status)

    def _open_run(self, client: Any, entities: Any) -> str:
        """The id of the MLflow run to log to."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "raylm")
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        key = fingerprint(str(self._run))
        if not self._is_new:
            found = client.search_runs([experiment_id], f"tags.`raylm.key` = '{key}'", max_results=1)
            if found:
                client.update_run(found[0].info.run_id, status="RUNNING")
                return str(found[0].info.run_id)
        tags = {"raylm.run": str(self._run), "raylm.key": key}
        run_id = client.create_run(experiment_id, tags=tags, run_name=self._run.name).info.run_id
        params = [entities.Param(name, str(value)) for name, value in _flat(self._settings)]
        for first in range(0, len(params), _MLFLOW_BATCH):
            client.log_batch(run_id, params=params[first : first + _MLFLOW_BATCH])
        return str(run_id)


def _values(row: dict[str, Any]) -> list[tuple[str, float]]:
    """The measured values of a row."""
    return [(name, value) for name, value in row.items() if name != "step" and isinstance(value, int | float)]


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Settings with the dotted paths of their keys."""
    flat: list[tuple[str, Any]] = []
    for name, value in settings.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return flat
