"""`raylm cluster plan`: what will run where, and what it will take, before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raylm.cluster.file import read
from raylm.cluster.fit import OURS, widest
from raylm.cluster.pools import Pool, Stage, estimate, gpus_in, pools_of
from raylm.errors import SettingsError
from raylm.prices import cost
from raylm.progress import duration
from raylm.settings import FinetuneSettings, PretrainSettings, Settings, problems
from raylm.summary import rendered, size

MODEL_FLOPS_UTILISATION = 0.35
"""What a GPU is taken to reach of its data sheet: Chowdhery et al. 2022 report 0.46 for PaLM, Llama Team 2024 0.38 to
0.43; small models and slow networks get less."""


@dataclass(frozen=True)
class StagePlan:
    """A stage on the machines that it would get.

    :param machines: how many of each pool.
    :param workers: that train; None of other stages, which take what there is.
    :param memory: bytes of each worker at its peak; None where the model is not known.
    :param gpu: what each worker has.
    :param spot: the share of the machines that a cloud may take away.
    :param hourly: what the machines and the head cost in an hour; None where one has no price.
    :param seconds: predicted; None where nobody knows.
    """

    stage: str
    machines: dict[str, int]
    workers: int | None
    memory: int | None
    gpu: str | None
    spot: float
    hourly: float | None
    seconds: float | None

    @property
    def cost(self) -> float | None:
        """What it will cost, in the currency of the prices."""
        return None if self.hourly is None or self.seconds is None else cost(self.hourly, self.seconds)


def plan(path: Path) -> list[StagePlan]:
    """The stages of a cluster file on its machines. No cloud and no storage is asked.

    :raises RaylmError: the file does not say what is to run, or it could not.
    """
    cluster = read(path)
    values = cluster.get(*OURS, default={})
    for key, why, remedy in problems(values):
        raise SettingsError(f"{path}: {'.'.join(map(str, (*OURS, *key)))}: {why}; {remedy or 'take it out'}")
    settings = Settings.model_validate(values)
    pools = pools_of(cluster, settings)
    head = next((pool for pool in pools if pool.name == cluster.head_type), None)
    jobs = [_planned("prepare", _all_of(pools, head, gpus=False), head)]
    for stage in ("pretrain", "finetune"):
        jobs += _trainings(settings, stage, pools, head)
    batch = _all_of(pools, head, gpus=gpus_in(pools) > 0)
    return [*jobs, _planned("batch", batch, head)]


def _trainings(settings: Settings, stage: Stage, pools: Sequence[Pool], head: Pool | None) -> list[StagePlan]:
    """A training at its widest and, where its width may change, at its narrowest."""
    training: PretrainSettings | FinetuneSettings = getattr(settings, stage)
    most = widest(training, pools)
    least = training.workers[0] if isinstance(training.workers, tuple) else most
    jobs = []
    for workers in sorted({most, least}, reverse=True):
        machines = _machines_for(workers, pools)
        gpu = next((pool.gpu for pool, _ in machines if pool.gpu), None)
        memory, seconds = None, None
        if settings.model.start_from is None:
            found = estimate(settings, stage, workers, on_gpus=gpu is not None)
            memory = found.memory.peak - found.memory.offloaded
            slowest = min((pool.gpu.flops for pool, _ in machines if pool.gpu), default=None)
            if slowest and found.work.flops:
                seconds = found.work.flops / (workers * slowest * MODEL_FLOPS_UTILISATION)
        jobs.append(_planned(stage, machines, head, workers, memory, gpu.name if gpu else None, seconds))
    return jobs


def _machines_for(workers: int, pools: Sequence[Pool]) -> list[tuple[Pool, int]]:
    """Machines for so many workers, as the autoscaler takes them: the highest priority first.

    Without GPUs, as many as there are: workers of one machine share its CPUs.
    """
    with_gpus = sorted((pool for pool in pools if pool.gpus and pool.most), key=lambda pool: -pool.priority)
    if not with_gpus:
        return [(pool, pool.most) for pool in pools if pool.most]
    found, left = [], workers
    for pool in with_gpus:
        count = min(-(-left // pool.gpus), pool.most)
        if count > 0:
            found.append((pool, count))
        left -= count * pool.gpus
    return found


def _all_of(pools: Sequence[Pool], head: Pool | None, gpus: bool) -> list[tuple[Pool, int]]:
    """All machines with or without GPUs that take work."""
    fitting = [pool for pool in pools if pool.most and bool(pool.gpus) == gpus and (pool.cpus or pool.cpus is None)]
    return [(pool, pool.most) for pool in fitting if pool is not head or len(fitting) == 1]


def _planned(
    stage: str,
    machines: Sequence[tuple[Pool, int]],
    head: Pool | None,
    workers: int | None = None,
    memory: int | None = None,
    gpu: str | None = None,
    seconds: float | None = None,
) -> StagePlan:
    count = sum(number for _, number in machines)
    beside = [(head, 1)] if head and all(pool is not head for pool, _ in machines) else []
    hourly = None
    if all(pool.price is not None for pool, _ in [*machines, *beside]):
        hourly = sum(number * (pool.price or 0.0) for pool, number in [*machines, *beside])
    return StagePlan(
        stage=stage,
        machines={pool.name: number for pool, number in machines},
        workers=workers,
        memory=memory,
        gpu=gpu,
        spot=sum(number for pool, number in machines if pool.is_spot) / max(count, 1),
        hourly=hourly,
        seconds=seconds,
    )


def plan_table(jobs: Sequence[StagePlan]) -> str:
    """A plan for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in ("stage", "machines, at the most", "workers", "memory of each", "spot", "an hour", "hours", "cost"):
        table.add_column(title, justify="left" if title.startswith(("stage", "machines")) else "right")
    for job in jobs:
        memory = size(job.memory) + (f" of {job.gpu}" if job.gpu else "") if job.memory else ""
        table.add_row(
            job.stage,
            ", ".join(f"{number} {name}" for name, number in job.machines.items()),
            str(job.workers or ""),
            memory,
            f"{job.spot:.0%}",
            "" if job.hourly is None else f"{job.hourly:,.2f}",
            "" if job.seconds is None else duration(job.seconds),
            "" if job.cost is None else f"{job.cost:,.2f}",
        )
    share = f"{MODEL_FLOPS_UTILISATION:.0%}"
    note = (
        f"hours: the FLOPs of all steps at {share} of what the GPUs' data sheets say; none are told of CPUs, and of "
        "stages whose work is not known before. Costs count the head."
    )
    return rendered([table, Text(note, style="dim")])
