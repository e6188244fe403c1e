"""`raylm status`: the machines of a running cluster, what they cost, and its jobs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylm.auth import not_let_in
from raylm.capacity import MARKET, NODE_TYPE
from raylm.errors import RaylmError, first_line
from raylm.prices import OTHER, price_of
from raylm.progress import duration
from raylm.summary import rendered

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_JOBS = 10
_MACHINES = 10_000


@dataclass(frozen=True)
class Machines:
    """Equal machines that are up.

    :param market: `spot` or `on-demand`, as their label says; empty where they have none.
    :param price: of an hour of all of them; None where one has no price.
    """

    node_type: str
    market: str
    count: int
    cpus: float
    gpus: float
    price: float | None


@dataclass(frozen=True)
class Job:
    """:param seconds: from its start to its end, or until now."""

    submission_id: str
    status: str
    seconds: float
    entrypoint: str


@dataclass(frozen=True)
class Status:
    """:param price: of an hour of all machines; None where one has no price.
    :param jobs: the newest ones, the last one first.
    """

    machines: list[Machines]
    price: float | None
    jobs: list[Job]


def status(client: JobSubmissionClient, prices: Mapping[str, float]) -> Status:
    """What is up and what runs.

    :raises RaylmError: the cluster does not say.
    """
    machines = _machines(client, prices)
    price = price_of([group.node_type for group in machines for _ in range(group.count)], prices)
    return Status(machines, price, _jobs(client))


def _machines(client: JobSubmissionClient, prices: Mapping[str, float]) -> list[Machines]:
    from ray.exceptions import AuthenticationError
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        nodes = list_nodes(client.get_address(), filters=[("state", "=", "ALIVE")], detail=True, limit=_MACHINES)
    except (RayStateApiException, OSError) as error:
        raise RaylmError(f"{client.get_address()}: does not tell its machines: {first_line(error)}") from error
    except AuthenticationError as error:
        raise not_let_in(client.get_address(), error) from error
    kinds = Counter(
        (
            (node.labels or {}).get(NODE_TYPE, OTHER),
            (node.labels or {}).get(MARKET, ""),
            node.resources_total.get("CPU", 0.0),
            node.resources_total.get("GPU", 0.0),
        )
        for node in nodes
    )
    return [
        Machines(name, market, count, cpus, gpus, price_of([name] * count, prices))
        for (name, market, cpus, gpus), count in sorted(kinds.items())
    ]


def _jobs(client: JobSubmissionClient) -> list[Job]:
    from ray.exceptions import AuthenticationError

    try:
        found = client.list_jobs()
    except (RuntimeError, OSError) as error:
        raise RaylmError(f"{client.get_address()}: does not tell its jobs: {first_line(error)}") from error
    except AuthenticationError as error:
        raise not_let_in(client.get_address(), error) from error
    submitted = sorted((job for job in found if job.submission_id), key=lambda job: -(job.start_time or 0))
    now = time.time()
    return [
        Job(
            str(job.submission_id),
            str(job.status.value),
            ((job.end_time / 1_000) if job.end_time else now) - (job.start_time or 0) / 1_000,
            job.entrypoint,
        )
        for job in submitted[:_JOBS]
    ]


def status_table(found: Status) -> str:
    """A status for the terminal."""
    from rich.table import Table

    machines = Table(title="machines", title_justify="left")
    for title in ("type", "market", "up", "CPUs of each", "GPUs of each", "an hour"):
        machines.add_column(title, justify="left" if title in ("type", "market") else "right")
    for group in found.machines:
        price = "" if group.price is None else f"{group.price:,.2f}"
        machines.add_row(group.node_type, group.market, str(group.count), f"{group.cpus:g}", f"{group.gpus:g}", price)
    jobs = Table(title="jobs", title_justify="left")
    for title in ("id", "status", "time", "runs"):
        jobs.add_column(title)
    for job in found.jobs:
        jobs.add_row(job.submission_id, job.status.lower(), duration(job.seconds), job.entrypoint)
    cost = "" if found.price is None else f"all machines: {found.price:,.2f} an hour"
    return rendered([machines, jobs, cost] if found.jobs else [machines, cost])
