"""How the service is started, updated and stopped, and the file that `serve deploy` starts it from."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from contextlib import AbstractContextManager, suppress
from typing import Any

import ray
import yaml
from ray import serve
from ray.exceptions import RayActorError

from raylm.capacity import machines
from raylm.errors import RaylmError
from raylm.inference.engines import check_engine
from raylm.inference.engines.text import Device
from raylm.inference.model import ModelInfo, absolute
from raylm.inference.service.address import forget_service, note_service
from raylm.inference.service.gateway import Gateway
from raylm.inference.service.host import ModelHost
from raylm.inference.service.keys import read_keys
from raylm.inference.service.replicas import APPLICATION, MODEL, fewest_and_most, needed
from raylm.inference.service.routes import Card
from raylm.progress import hushed, note
from raylm.settings import Section, ServeSettings, Topology
from raylm.storage import StoragePath

_BULK_REQUESTS = 32
"""Of batch jobs, at a replica beside the online ones."""
_LOOK_S = 2
"""How often a replica is asked whether it lives."""
_PATIENCE_S = 30
_ALL_AT_ONCE = 100
"""Percent of the replicas that are started beside those that an update replaces."""


class Deployed(Section):
    """What `serve deploy` hands to `build`."""

    model: str
    serve: ServeSettings
    gpus: bool = False
    """Whether replicas compute on GPUs that are not up yet, as their machines come when they are asked for; on those
    that are up they do in any case."""


def build(deployed: Deployed | dict[str, Any]) -> serve.Application:
    """The application that hosts a model, on GPUs where the connected cluster has any, or will have.

    :param deployed: also as plain data, as `serve deploy` hands it over.
    :raises ArtifactError: the model is none that can be served.
    :raises SettingsError: the file of keys is none.
    """
    deployed = Deployed.model_validate(deployed)
    settings, model = _anywhere(deployed.serve), absolute(deployed.model)
    info = ModelInfo.load(model)
    if settings.keys:
        read_keys(StoragePath(settings.keys))
    are_up = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    device: Device = "cuda" if deployed.gpus or are_up else "cpu"
    check_engine(info, settings.decode, device)
    card = Card(info.name, info.fingerprint, info.tasks, info.languages, int(time.time()))
    host: Any = serve.deployment(ModelHost)
    gateway: Any = serve.deployment(serve.ingress()(Gateway))
    hosted = host.options(
        name=MODEL,
        max_ongoing_requests=settings.max_queued_requests + _BULK_REQUESTS,
        # An answer that is being written when its replica has to go is written to its end.
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        health_check_period_s=_LOOK_S,
        max_surge_percent=_ALL_AT_ONCE if settings.surge else 0,
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": 1 if device == "cuda" else 0},
        **_replicas(settings),
    ).bind(settings, model, device)
    return gateway.options(
        name="gateway",
        # Requests past the queue come in here to be sent away with a Retry-After.
        max_ongoing_requests=4 * settings.max_queued_requests + _BULK_REQUESTS,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        max_surge_percent=_ALL_AT_ONCE,
        ray_actor_options={"num_cpus": 0},
    ).bind(settings, hosted, card)


def _anywhere(settings: ServeSettings) -> ServeSettings:
    """The settings for processes with another working directory."""
    if settings.keys is None:
        return settings
    return settings.model_copy(update={"keys": StoragePath(settings.keys).address})


def _replicas(settings: ServeSettings) -> dict[str, Any]:
    fewest, most = fewest_and_most(settings.replicas)
    if fewest == most:
        return {"num_replicas": most}
    return {
        "autoscaling_config": {
            "min_replicas": fewest,
            "max_replicas": most,
            "initial_replicas": max(fewest, 1),
            "policy": {"policy_function": f"{needed.__module__}:{needed.__name__}"},
            "upscale_delay_s": 5,
            "downscale_delay_s": settings.idle_s,
        }
    }


def deploy_file(settings: ServeSettings, model: str, topology: Topology | None = None) -> str:
    """The YAML for `serve deploy`, which starts the service or gives a running one another model or settings.

    :param topology: the machines that the cluster may have.
    :raises ArtifactError: the model is none that can be served.
    """
    model = absolute(model)
    ModelInfo.load(model)
    listening = {"proxy_location": "EveryNode", "http_options": {"host": settings.host, "port": settings.port}}
    values = {**listening, "applications": [application(settings, model, topology)]}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def application(settings: ServeSettings, model: str, topology: Topology | None = None) -> dict[str, Any]:
    """What a config of Ray Serve says of the service; nothing is looked at."""
    return {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": f"{__name__}:{build.__name__}",
        "args": {
            "model": model,
            "serve": _anywhere(settings).model_dump(mode="json"),
            "gpus": topology is not None and any(machine.get("GPU") for machine in topology.machines),
        },
    }


def start_service(
    settings: ServeSettings, model: str, is_update: bool = False, topology: Topology | None = None
) -> str:
    """The URL of the service, up and ready on the connected cluster. The caller waits, and stops it.

    :param is_update: the service runs there already, and is given this model and these settings replica by replica, so
        that no request is lost.
    :param topology: the machines that the cluster may have, where it is one of a cluster file.
    :raises RaylmError: the port is taken, no replica comes up, the service runs already, or does not for an update.
    :raises ArtifactError: the model is none that can be served.
    """
    host, port = settings.host, settings.port
    deployed = build(Deployed(model=model, serve=settings, gpus=sum(machines("GPU", topology)) > 0))
    with _quiet_serve():
        if is_running() != is_update:
            raise RaylmError(
                "no raylm service runs on this cluster; leave --update out"
                if is_update
                else "a raylm service runs on this cluster already; `raylm serve --update` gives it another model"
            )
        running = _running_port()
        if running is None:
            port = _free_port(host, port)
            serve.start(http_options=serve.HTTPOptions(host=host, port=port))
        elif port not in (0, running) and not is_update:
            raise RaylmError(f"this cluster's Ray Serve listens on port {running} already; set serve.port={running}")
        else:
            port = running
        waiting = threading.Timer(_PATIENCE_S, _note_waiting, [settings])
        waiting.start()
        try:
            serve.run(deployed, name=APPLICATION, route_prefix="/")
        except BaseException as error:  # also of a person who does not want to wait
            if not is_update:
                serve.delete(APPLICATION)
            if not isinstance(error, RuntimeError):
                raise
            reason = " ".join(str(error).split())
            raise RaylmError(f"the service did not come up: {reason[-400:]}") from error
        finally:
            waiting.cancel()
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    note_service(ray.get_runtime_context().gcs_address)
    if host in _LOOPBACK and sum(node["Alive"] for node in ray.nodes()) > 1:
        note(f"serve: {url} is an address of the head alone; serve.host=0.0.0.0 lets other machines in")
    return url


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _note_waiting(settings: ServeSettings) -> None:
    free = ray.available_resources()
    note(
        f"serve: still waiting for replicas; each takes {settings.threads} CPUs, free are {free.get('CPU', 0):g} CPUs"
        f" and {free.get('GPU', 0):g} GPUs. serve.surge=false updates without room for old and new ones"
    )


def is_running() -> bool:
    """Whether the service runs on the connected cluster."""
    return _running_port() is not None and APPLICATION in serve.status().applications


def stop_service() -> None:
    """Take the service down, and Ray Serve with it where nothing else runs on it."""
    forget_service(ray.get_runtime_context().gcs_address)
    with _quiet_serve():
        with suppress(TimeoutError):  # some answer takes its time; what is left of it ends with Ray Serve
            serve.delete(APPLICATION)
        if serve.status().applications.keys() <= {APPLICATION}:
            serve.shutdown()  # which may return before its end
            end = time.monotonic() + _PATIENCE_S
            while _running_port() is not None and time.monotonic() < end:
                time.sleep(0.1)


def wait_for_signal() -> None:
    """Comes back at SIGINT or SIGTERM; only for the main thread."""
    told, tell = os.pipe()  # an Event has a lock, which a handler would wait for that comes while it is held
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda *_: os.write(tell, b"."))
    try:
        os.read(told, 1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(told)
        os.close(tell)


def _running_port() -> int | None:
    """The HTTP port of the Ray Serve that runs on this cluster; None where none does."""
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        return int(ray.get(controller.get_http_config.remote()).port)
    except (ValueError, RayActorError):  # there is none, or it is ending
        return None


def _free_port(host: str, port: int) -> int:
    """The port itself, or any free one for 0.

    :raises RaylmError: it cannot be listened on.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise RaylmError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with serve.port"
            ) from error
        return int(listener.getsockname()[1])


def _quiet_serve() -> AbstractContextManager[None]:
    """Ray Serve's notices of what it deploys, not shown for what is done inside."""
    return hushed("ray.serve", logging.ERROR)
