"""Groups of workers: how many there may be, Ray Train around the loop, and what follows when some are lost or come."""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raylm.capacity import is_of, machines
from raylm.errors import RaylmError, StoreError, TrainingError
from raylm.progress import Progress, note
from raylm.settings import FinetuneSettings, PretrainSettings, Topology
from raylm.storage import StoragePath
from raylm.training.control import Attention, Follower, Relay, stopping
from raylm.training.examples import sequence_length, step_sequences
from raylm.training.job import TrainingJob
from raylm.training.loop import train_worker
from raylm.training.streaming import TokenStream, dataset_from_checkpoint

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

_CPUS_A_WORKER = 4
"""Without GPUs: fewer compute as fast in one worker as in several, which have to add up their gradients."""
_MOST_CPU_WORKERS = 4
_GROW_AFTER_S = 30.0
"""Machines for more workers have to be there for so long before training pauses for them."""
_ASK_EVERY_S = 20.0
_LOOK_EVERY_S = 1.0
"""How often Ray Train's controller looks at its workers, and the driver at their machines."""
_PLACE_S = 10
"""An elastic group is as large as the machines that are there hold: it is placed at once, or one has just gone."""
_TELL_EVERY_S = 60.0
"""How often it is said that training waits for machines."""
_FREED_AFTER_S = 10.0
"""What a group had is free a little after its end; what is not by then is other work's."""
_MOST_HEALTH_CHECK_S = 600.0
_NEVER_S = 1e9
_READ_AHEAD_BYTES = 32 << 20
"""Of a stream's sequences, for each worker."""


@dataclass(frozen=True)
class Width:
    """How many workers may train, and on what."""

    least: int
    most: int
    use_gpu: bool
    cpus: int = 1
    """Of each worker: as many threads compute where there is no GPU."""
    cpus_for_data: int = 0
    """Left to Ray Data."""

    @property
    def resources(self) -> dict[str, float]:
        """Of one worker."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.use_gpu else {})}

    @property
    def is_elastic(self) -> bool:
        return self.least < self.most


def choose_width(
    training: PretrainSettings | FinetuneSettings, cpus_for_data: int, topology: Topology | None = None
) -> Width:
    """How many workers, and whether each has a GPU, from the settings and what the cluster can grow to.

    :param cpus_for_data: left to Ray Data, which gets none that a worker has.
    :param topology: what the cluster file lets the cluster grow to.
    :raises TrainingError: more are wanted than there are machines for.
    """
    gpus, cpus = sum(machines("GPU", topology)), sum(machines("CPU", topology))
    have = min(gpus, cpus - cpus_for_data) if gpus else cpus - cpus_for_data
    if training.workers == "auto":
        least = most = automatic_workers(gpus, cpus - cpus_for_data)
    elif isinstance(training.workers, tuple):
        least, most = training.workers
    else:
        least = most = training.workers
    if least > have:
        kind = "GPUs" if gpus else "CPUs"
        beside = f", {cpus_for_data} CPU of which {training.section}.stream needs" if cpus_for_data else ""
        raise TrainingError(f"{training.section}.workers is {least}, the cluster has {gpus or cpus} {kind}{beside}")
    if cpus_for_data or (topology and is_of(topology)):
        # An autoscaler that cannot bring all that is asked for brings nothing; workers on all CPUs leave none for data.
        most = min(most, have)
    is_elastic = least < most
    each = 1 if gpus or is_elastic else _cpus_each(machines("CPU", topology), least, cpus_for_data)
    return Width(least, most, bool(gpus), each, cpus_for_data)


def automatic_workers(gpus: int, cpus: int) -> int:
    """How many workers train where the settings do not say: one for each GPU, else one for every few CPUs."""
    return max(min(gpus, cpus) if gpus else min(cpus // _CPUS_A_WORKER, _MOST_CPU_WORKERS), 1)


def _cpus_each(machines: Sequence[int], workers: int, cpus_for_data: int) -> int:
    """The most CPUs that each of some workers can have, all of one worker's on one machine."""
    cpus = max((sum(machines) - cpus_for_data) // workers, 1)
    while cpus > 1 and sum(machine // cpus for machine in machines) < workers:
        cpus -= 1
    return cpus


def _leaving() -> set[str]:
    """The machines that will be taken away."""
    from ray._private.state import state

    return set(state.get_draining_nodes())  # as Ray Train asks itself: `ray.nodes()` does not tell


def _possible(width: Width) -> tuple[int, int]:
    """How many workers the machines that stay could hold, each as a whole; and how many beside what else runs there.

    Where workers compute on CPUs, Ray Data's are none of theirs.
    """
    import ray
    from ray._private.state import available_resources_per_node

    leaving, free = _leaving(), available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]

    def held(resources: Mapping[str, float]) -> int:
        return int(min(resources.get(name, 0) // wanted for name, wanted in width.resources.items()))

    kept = 0 if width.use_gpu else width.cpus_for_data
    whole = sum(held(node["Resources"]) for node in nodes)
    return max(whole - kept, 0), max(sum(held(free.get(node["NodeID"], {})) for node in nodes) - kept, 0)


def _of_what_is_free(width: Width) -> Width:
    """The width of a group that begins now.

    Ray Train counts machines that will be taken away, and those that other work has, and would wait in vain to have its
    group placed on them.
    """
    if not width.is_elastic:
        return width
    end = time.monotonic() + _FREED_AFTER_S
    while (possible := _possible(width))[1] < min(possible[0], width.most) and time.monotonic() < end:
        time.sleep(_LOOK_EVERY_S / 2)
    return replace(width, most=max(min(possible[1], width.most), width.least))


def _ask_for_machines(run: str, workers: int, width: Width) -> None:
    """Let the autoscaler bring machines for so many workers, though Ray Train's group has no use for them yet."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

    coordinator.get_or_create_autoscaling_coordinator().request_resources.remote(
        requester_id=f"raylm-{run}", resources=[width.resources] * workers, expire_after_s=3 * _ASK_EVERY_S
    )


def train_in_groups(job: TrainingJob, width: Width, progress: Progress, stream: TokenStream | None) -> int:
    """Run the loop on groups of workers, one after the other, until the last step; the last group's size.

    :raises TrainingError: it cannot be brought to its end.
    :raises KeyboardInterrupt: it was stopped by a signal; what was trained is in a checkpoint.
    """
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    relay = ray.remote(num_cpus=0, scheduling_strategy=here)(Relay).remote()
    run = StoragePath(job.run)
    try:
        with Follower(relay, progress), stopping(relay) as stopped:
            while True:
                ray.get(relay.begin.remote())
                if stopped.is_set():
                    raise KeyboardInterrupt
                failure = _attempt(job, width, relay, stream)
                fatal = ray.get(relay.failed.remote())
                if fatal:
                    raise TrainingError(fatal)
                if isinstance(failure, TrainingFailedError):
                    raise _lost(run, failure, ray.get(relay.trace.remote())) from failure
                if failure is not None:
                    raise failure
                if ray.get(relay.is_finished.remote()):
                    return int(ray.get(relay.world_size.remote()))
    finally:
        (run / "ray").delete()


def _trainer(job: TrainingJob, width: Width, relay: ActorHandle, stream: TokenStream | None) -> TorchTrainer:
    from ray.data import ExecutionOptions, ExecutionResources
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raylm.training.backend import ProcessGroup

    run, patience_s = StoragePath(job.run), job.settings.collective_timeout_s
    # A frozen worker answers neither its peers in a collective nor the controller's health checks.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(min(patience_s, _MOST_HEALTH_CHECK_S))
    os.environ.pop("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", None)
    if width.is_elastic:
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(_PLACE_S)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(_LOOK_EVERY_S)
    # One more process, whose start all workers would wait for; `_attempt` watches the machines itself.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    datasets: dict[str, Any] = {}
    if stream:
        length = sequence_length(StoragePath(job.tokens))
        sequences = job.settings.steps * step_sequences(job.settings.global_batch_tokens, length)
        # Called for each group of workers: one that replaces another goes on behind its last checkpoint.
        datasets["train"] = lambda: dataset_from_checkpoint(stream, run, sequences)
    read_ahead = ExecutionResources(object_store_memory=_READ_AHEAD_BYTES * width.most)
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job, "relay": relay},
        torch_config=ProcessGroup(backend="nccl" if width.use_gpu else "gloo", timeout_s=math.ceil(patience_s)),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True, resource_limits=read_ahead)),
        scaling_config=ScalingConfig(
            num_workers=(width.least, width.most) if width.is_elastic else width.most,
            use_gpu=width.use_gpu,
            resources_per_worker=width.resources,
            # Ray would end a group that could be larger wherever it stands; `_attempt` lets it pause first.
            elastic_resize_monitor_interval_s=_NEVER_S,
        ),
        run_config=RunConfig(
            # Ray's own record of the attempt; which checkpoint to continue from is our manifests' to say.
            name=f"attempt-{time.time_ns()}",
            storage_path=(run / "ray").path,
            storage_filesystem=run.filesystem,
            failure_config=FailureConfig(max_failures=job.settings.max_failures),
        ),
    )


def _attempt(job: TrainingJob, width: Width, relay: ActorHandle, stream: TokenStream | None) -> Exception | None:
    """Let a group of workers train until it ends; what it failed with, or None.

    It is asked to pause when one of its machines will be taken away, and an elastic one when there have been machines
    for a larger one for a while.
    """
    import ray

    width_now = _of_what_is_free(width)
    trainer = _trainer(job, width_now, relay, stream)
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # raised, or explained, in the main thread
            failures.append(error)

    # Not in the main thread, where Ray Train would answer Ctrl-C by ending the process with 0.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    room_since: float | None = None
    asked, told = -math.inf, time.monotonic()
    while thread.is_alive():
        thread.join(timeout=_LOOK_EVERY_S)
        used = ray.get(relay.machines.remote())
        if used & _leaving():
            relay.request.remote("a machine will be taken away")
        if not used and time.monotonic() - told > _TELL_EVERY_S:
            workers = f"{width_now.least:,} worker{'s' * (width_now.least > 1)}"
            note(f"{job.settings.section}: waiting for machines that {workers} can have, with {_said(width)} for each")
            told = time.monotonic()
        if width.is_elastic:
            size = ray.get(relay.world_size.remote())
            has_room = 0 < size < width.most and _possible(width)[1] > 0
            room_since = (room_since or time.monotonic()) if has_room else None
            if room_since and time.monotonic() - room_since > _GROW_AFTER_S:
                relay.request.remote("there are machines for more workers")
        if width_now.most < width.most and time.monotonic() - asked > _ASK_EVERY_S:
            _ask_for_machines(job.run, width.most - width_now.most, width)
            asked = time.monotonic()
    return failures[0] if failures else None


def _said(width: Width) -> str:
    return " and ".join(f"{count:g} {name}{'s' * (count > 1)}" for name, count in width.resources.items())


def _lost(run: StoragePath, failure: TrainingFailedError, trace: str | None) -> TrainingError:
    """The error of workers that were lost too often, after writing down all that is known of it.

    :param trace: of the first worker of a group that failed by itself. One that died left none, and the traces of
        others tell of its silence.
    """
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    file = run / "error.txt"
    file.write_bytes("\n\n".join(filter(None, (str(failure), trace))).encode())
    silent = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
    died = [error for error in getattr(failure, "worker_failures", {}).values() if isinstance(error, silent)]
    cause = str(died[0]) if died else trace or str(failure)
    last = [line.strip() for line in cause.splitlines() if line.strip()][-1]
    return TrainingError(f"run {run}: workers failed: {last} (whole trace: {file})")


def _worker(config: dict[str, Any]) -> None:
    import ray.train

    job, relay = config["job"], config["relay"]
    leads = ray.train.get_context().get_world_rank() == 0

    def report(metrics: dict[str, Any]) -> None:
        if leads:
            relay.push.remote(metrics)

    relay.join.remote(ray.get_runtime_context().get_node_id())
    # Of a group that Ray Train puts in the place of one that such an error has ended.
    if ray.get(relay.failed.remote()):
        return
    try:
        is_finished = train_worker(job, report, Attention(relay if leads else None))
    except Exception as error:
        # Raised all the same: the other workers are waiting for this one.
        if isinstance(error, RaylmError) and not isinstance(error, StoreError):
            ray.get(relay.fail.remote(str(error)))  # trying again would come to the same end
        else:
            ray.get(relay.explain.remote(traceback.format_exc()))  # of which Ray keeps the beginning and the end
        raise
    if leads and is_finished:
        ray.get(relay.finish.remote())
