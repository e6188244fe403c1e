"""A connection to Ray for the time of a command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raylm.auth import ensure_token, not_let_in
from raylm.capacity import NODE_IP
from raylm.errors import RaylmError, first_line

_HELPERS = {
    "ActorLocationTracker", "AutoscalingCoordinator", "AutoscalingRequester", "DataUsageCollectionActor",
    "_dataset_stats_actor", "_dataset_stats_summary_actor",
}  # fmt: skip
"""The namespaces of Ray Data's detached actors."""


@contextmanager
def ray_session(join: bool = False, with_service: bool = False) -> Iterator[None]:
    """A connection to Ray: that of `$RAY_ADDRESS`, one that `ray start` started here, or a new one of this process.

    :param join: only to a running one: that of `raylm serve` on this machine, or any other.
    :param with_service: that of `raylm serve` on this machine, where it runs.
    :raises RaylmError: there is none to join.
    """
    # Ray warns of this in every process; nothing here depends on either behaviour.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address in (None, "local"):
        _use_own_token()
        # Workers that compute together all wait for the one that another process of this machine holds up.
        os.environ.setdefault("RAY_worker_niceness", "0")
    from raylm.inference.service.address import listens, noted_service

    if (join or with_service) and not address:
        address = noted_service() or ("auto" if join else None)
    import ray

    if ray.is_initialized():
        yield
        return
    if not address:
        _check_left_address()
    where = f"at {address}" if address not in (None, "", "auto") else "on this machine"
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False, **_own_machine())
    except ConnectionError as error:
        if address and listens(address):
            refused = ConnectionError("something listens there, but no Ray that this process may join")
            raise not_let_in(f"Ray {where}", refused) from error
        raise RaylmError(f"there is no running Ray {where}: {first_line(error)}") from error
    except ray.exceptions.AuthenticationError as error:
        raise not_let_in(f"Ray {where}", error) from error
    _hush_ray_data()
    try:
        yield
    finally:
        if address:
            _leave_nothing()
        ray.shutdown()


def _check_left_address() -> None:
    """Refuse the address of a Ray that has ended without a word; Ray itself would wait for it for minutes.

    :raises RaylmError: nobody answers at the address that the last `ray start` has left on this machine.
    """
    from ray._common.utils import get_ray_address_file
    from ray._private.utils import read_ray_address

    from raylm.inference.service.address import listens

    left = read_ray_address()
    if left and not listens(left):
        raise RaylmError(
            f"there is no running Ray at {left}, which the last `ray start` has left in {get_ray_address_file(None)}:"
            " remove that file, or say RAY_ADDRESS=local raylm …"
        )


def _leave_nothing() -> None:
    """End what Ray Data has left on this machine, where no other job may use it.

    Its helpers belong to the whole cluster, outlive every job, and stay where the first one ran: that machine would
    never be idle.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    with suppress(Exception):  # the work is done; a helper that is left costs no result
        jobs = GcsClient(address=ray.get_runtime_context().gcs_address).get_all_job_info().values()
        alive = [job for job in jobs if not job.is_dead and not job.config.ray_namespace.startswith("_ray_internal")]
        if len(alive) > 1:
            return
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] in _HELPERS:
                with suppress(ValueError):  # it has ended by itself
                    ray.kill(ray.get_actor(actor["name"], actor["namespace"]))


def _own_machine() -> dict[str, str]:
    """Of several machines that are one, Ray would take the head for that of this process."""
    return {"_node_ip_address": os.environ[NODE_IP]} if NODE_IP in os.environ else {}


def _use_own_token() -> None:
    """Guard a Ray of this machine's user with a token of raylm's own.

    Ray would write one to ~/.ray/auth_token, readable by all, and from then on every `ray start` would ask every
    `ray job submit` for it. Where that file is there already, or the environment says something, Ray has its way.
    """
    said = any(f"RAY_AUTH_{name}" in os.environ for name in ("MODE", "TOKEN", "TOKEN_PATH"))
    if said or Path("~/.ray/auth_token").expanduser().exists():
        return
    token = Path("~/.cache/raylm/ray_token").expanduser()
    ensure_token(token)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def _hush_ray_data() -> None:
    """Keep Ray Data's progress bars and notes off the terminal: raylm shows progress of its own."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)
