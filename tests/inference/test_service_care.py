"""What the service is careful of: keys and limits, slow answers, updates, replicas that die or sleep, its metrics."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raylm.errors import RaylmError
from raylm.inference.batch import run_batch
from raylm.inference.service.keys import add_key
from raylm.inference.service.start import build, deploy_file, is_running, start_service, stop_service
from raylm.settings import ServeSettings, Settings, Topology
from raylm.storage import StoragePath
from raylm.tasks import TRANSLATE
from tests.browser import live_page
from tests.cluster.panels import metrics_of
from tests.conftest import REPOSITORY
from tests.inference.conftest import wait_for_a_part

DECODE = {"compute_type": "float32"}


def settings(**values: Any) -> ServeSettings:
    return ServeSettings.model_validate({"port": 0, "decode": DECODE, "batch_wait_s": 0.0} | values)


@pytest.fixture
def started(ray_cluster: None, model_directory: Path) -> Iterator[Callable[..., str]]:
    """Starts a service of this test's own."""
    yield lambda **values: start_service(settings(**values), str(model_directory))
    if is_running():
        stop_service()


@pytest.fixture
def another_model(model_directory: Path, tmp_path: Path) -> Path:
    """The same with another fingerprint."""
    other = tmp_path / "other"
    shutil.copytree(model_directory, other, ignore=shutil.ignore_patterns("ctranslate2"))
    (other / "raylm.json").write_text((other / "raylm.json").read_text() + " ")
    return other


def ask(service: str, text: Any = "Find", key: str | None = None, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{service}/v1/translate", json={"text": text} | more, headers=headers, timeout=150)


def test_keys_and_their_limits(started: Callable[..., str], tmp_path: Path) -> None:
    place = StoragePath(str(tmp_path / "keys.yaml"))
    slow, free = add_key(place, "slow", 3, None), add_key(place, "free", None, None)
    service = started(keys=place.uri, texts_per_minute=10)
    missing, wrong = ask(service), ask(service, key=free + "x")
    assert (missing.status_code, wrong.status_code) == (401, 401)
    assert "an API key is missing" in missing.json()["detail"] and "not known" in wrong.json()["detail"]
    assert missing.headers["www-authenticate"] == "Bearer"
    openai = httpx.get(f"{service}/v1/models", timeout=60)
    assert openai.status_code == 401 and "API key" in openai.json()["error"]["message"]
    with_header = httpx.post(f"{service}/v1/translate", json={"text": "Find"}, headers={"X-API-Key": free}, timeout=60)
    assert with_header.status_code == 200
    statuses = [ask(service, key=slow).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    assert ask(service, ["Find"] * 9, free).status_code == 200
    turned = ask(service, ["Find"] * 10, free)
    assert turned.status_code == 429 and "free may send 10 texts a minute" in turned.json()["detail"]
    assert 1 <= int(turned.headers["retry-after"]) <= 60
    free_for_all = ("/", "/healthz", "/readyz", "/docs")
    assert [httpx.get(f"{service}{path}", timeout=60).status_code for path in free_for_all] == [200] * 4
    with live_page(f"{service}/", tmp_path) as page:
        seen = page.wait("document.querySelector('.bad')")
        assert "an API key is missing" in seen and not page.evaluate("document.getElementById('access').hidden")
        page.evaluate(f"const key = document.getElementById('key'); key.value = '{free}'; key.onchange()")
        page.wait("document.getElementById('model').textContent === 'tiny'")


def test_an_answer_that_takes_too_long_is_given_up(started: Callable[..., str]) -> None:
    service = started(request_timeout_s=0.001)
    late = ask(service, ["Find the file"] * 200)
    assert late.status_code == 504 and "no answer within 0.001 s" in late.json()["detail"]


def test_an_update_loses_no_request(started: Callable[..., str], another_model: Path) -> None:
    service = started()
    stop, found = threading.Event(), []

    def keep_asking() -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                answer = client.post(f"{service}/v1/translate", json={"text": "Find the file"})
                found.append((answer.status_code, answer.json().get("model")))

    people = [threading.Thread(target=keep_asking) for _ in range(4)]
    for person in people:
        person.start()
    time.sleep(2)
    assert start_service(settings(), str(another_model), is_update=True) == service
    time.sleep(2)
    stop.set()
    for person in people:
        person.join()
    assert {status for status, _ in found} == {200}
    models = [model for _, model in found]
    assert models[0] == "tiny" and models[-1] == "other" and len(found) > 40
    assert httpx.get(f"{service}/v1/models", timeout=60).json()["data"][0]["id"] == "other"


def test_an_update_needs_a_service(ray_cluster: None, model_directory: Path) -> None:
    with pytest.raises(RaylmError, match="no raylm service runs on this cluster; leave --update out"):
        start_service(settings(), str(model_directory), is_update=True)


def test_replicas_come_when_they_are_asked_for(started: Callable[..., str]) -> None:
    from ray import serve

    def running() -> int:
        states = serve.status().applications["raylm"].deployments["model"].replica_states
        return int(states.get("RUNNING", 0))

    service = started(replicas=[0, 2], idle_s=1)
    end = time.monotonic() + 90
    while running() and time.monotonic() < end:
        time.sleep(0.5)
    assert running() == 0
    looked = [httpx.get(f"{service}/{path}", timeout=60).status_code for path in ("readyz", "v1/models")]
    assert looked == [200, 200]
    assert running() == 0, "to look is not to ask"
    assert ask(service).status_code == 200
    assert running() == 1
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            assert ask(service, ["Find the file that was opened last"] * 200 + ["Find"]).status_code == 200

    people = [threading.Thread(target=keep_asking) for _ in range(32)]
    for person in people:
        person.start()
    end = time.monotonic() + 150  # the load has to last for half a minute, and a replica has to start beside it
    while (busy := running()) < 2 and time.monotonic() < end:
        time.sleep(0.5)
    stop.set()
    for person in people:
        person.join()
    assert busy == 2, "thirty-two at a time keep two busy"


def test_callers_who_go_take_no_other_with_them(started: Callable[..., str]) -> None:
    service = started()

    async def main() -> list[int | BaseException]:
        async with httpx.AsyncClient(timeout=60) as client:
            texts = [f"Find the file number {number} " * 4 for number in range(48)]
            asked = [asyncio.create_task(client.post(f"{service}/v1/translate", json={"text": text})) for text in texts]
            await asyncio.sleep(0.15)
            for task in asked[::2]:
                task.cancel()
            found = await asyncio.gather(*asked[1::2], return_exceptions=True)
            return [one if isinstance(one, BaseException) else one.status_code for one in found]

    assert asyncio.run(main()) == [200] * 24


def test_a_replica_that_dies_is_replaced(started: Callable[..., str]) -> None:
    from ray import serve

    service = started()
    handle = serve.get_deployment_handle("model", "raylm")
    before = handle.describe.remote().result(timeout_s=30)["pid"]
    os.kill(before, signal.SIGKILL)
    statuses = [ask(service).status_code for _ in range(5)]
    assert statuses == [200] * 5
    assert handle.describe.remote().result(timeout_s=30)["pid"] != before


def test_a_batch_job_outlives_replicas(
    started: Callable[..., str], tmp_path: Path, sentences: list[str], model_directory: Path
) -> None:
    """One is killed in the middle; the job's answers are those of own actors all the same."""
    from ray import serve

    started(batch_share=1.0)
    handle = serve.get_deployment_handle("model", "raylm")
    pid = handle.describe.remote().result(timeout_s=30)["pid"]
    source = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": sentences[:2_000]}), source)
    wanted = Settings.model_validate({"batch": {"chunk_rows": 64, "decode": DECODE}})

    def kill_in_the_middle() -> None:
        wait_for_a_part(tmp_path / "served.parquet")
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    manifest = run_batch(wanted, TRANSLATE, str(source), through="serve", output=str(tmp_path / "served.parquet"))
    killer.join()
    assert manifest.counts["answered"] == 2_000
    run_batch(wanted, TRANSLATE, str(source), model=str(model_directory), output=str(tmp_path / "acted.parquet"))
    served, acted = (pq.read_table(tmp_path / f"{name}.parquet")["translation"] for name in ("served", "acted"))
    same = sum(one == other for one, other in zip(served.to_pylist(), acted.to_pylist(), strict=True))
    assert same >= 1_990, "batches of another make may round otherwise"


def test_a_batch_job_does_not_mix_models_or_ways_to_decode(
    started: Callable[..., str], model_directory: Path, another_model: Path
) -> None:
    from raylm.inference.service.client import ServiceClient

    started()
    changed = r"another model or other decode settings meanwhile: it hosts .*"
    for decode, model in ({"max_output_tokens": 5}, model_directory), ({}, another_model):
        client = ServiceClient.connect(None)
        prompt = client.prompt_for(TRANSLATE, None, None, None, None)
        assert client.answer([("Find",)], prompt)[0].error is None
        start_service(settings(decode=DECODE | decode), str(model), is_update=True)
        with pytest.raises(RaylmError, match=changed + model.name):
            client.answer([("Find",)], prompt)


def test_the_file_for_serve_deploy_is_one(model_directory: Path, ray_cluster: None) -> None:
    from ray import serve
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    said = yaml.safe_load(deploy_file(settings(replicas=[0, 3]), str(model_directory)))
    parsed = ServeDeploySchema.model_validate(said)
    [application] = parsed.applications
    module, _, name = application.import_path.partition(":")
    build = getattr(sys.modules[module], name)
    assert isinstance(call_user_app_builder_with_args_if_necessary(build, application.args), serve.Application)


@pytest.mark.parametrize("gpus", [0, 2])
def test_replicas_wait_for_gpus_that_are_not_up_yet(model_directory: Path, ray_cluster: None, gpus: int) -> None:
    """On a cluster whose machines come when they are asked for."""
    topology = Topology("head", ({"CPU": 2}, {"CPU": 8, "GPU": gpus}))
    [application] = yaml.safe_load(deploy_file(settings(), str(model_directory), topology))["applications"]
    assert application["args"]["gpus"] is bool(gpus)
    replicas = build(application["args"])._bound_deployment.init_args[1]._bound_deployment
    assert replicas.ray_actor_options["num_gpus"] == (1 if gpus else 0)


def test_a_lone_row_that_kills_is_an_error(tmp_path: Path, model_directory: Path, sentences: list[str]) -> None:
    """In a Ray of its own, whose replicas do not survive one of the rows."""
    texts = [*sentences[:2], "this KILLS", *sentences[2:4]]  # each halving costs two replicas
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    script = REPOSITORY / "tests" / "inference" / "poisoned_service.py"
    # Ray tells a gauge while it is set: this one while requests come.
    names = sorted(metrics_of("Service") - {"ray_raylm_open_requests"})
    found = subprocess.run(
        [sys.executable, script, tmp_path / "t.parquet", model_directory, *names],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2_000:]
    errors = pq.read_table(tmp_path / "t.translated.parquet")["error"].to_pylist()
    assert [number for number, error in enumerate(errors) if error] == [2]
    assert "stopped its worker" in errors[2]
    assert [name for name in names if name not in found.stdout] == []
