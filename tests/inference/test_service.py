"""The service answers over HTTP as the engine does, refuses what it should, and takes batch jobs beside."""

from __future__ import annotations

import html
import os
import shutil
import signal
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm.errors import ArtifactError, RaylmError
from raylm.inference.answers import answer_rows
from raylm.inference.batch import run_batch
from raylm.inference.engines import Engine, load_engine
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Prompt
from raylm.inference.service.start import start_service, stop_service, wait_for_signal
from raylm.settings import BatchSettings, DecodeSettings, Settings
from raylm.tasks import TRANSLATE
from tests.browser import live_page

SETTINGS = Settings.model_validate(
    {
        "serve": {
            "port": 0,
            "decode": {"compute_type": "float32"},
            "max_request_texts": 50,
            "max_queued_requests": 12,
            "batch_wait_s": 0.02,
            "max_request_bytes": 100_000,
        },
        "batch": {"workers": 1, "chunk_rows": 32, "decode": {"compute_type": "float32"}},
    }
)
LONG = "word " * 200
DONE = "document.getElementById('answer').dataset.done"
TO_GERMAN = Prompt("translate", token=">>de<<")


@pytest.fixture(scope="module")
def service(ray_cluster: None, model_directory: Path) -> Iterator[str]:
    yield start_service(SETTINGS.serve, str(model_directory))
    stop_service()


@pytest.fixture(scope="module")
def engine(model_directory: Path) -> Engine:
    return load_engine(ModelInfo.load(str(model_directory)), SETTINGS.serve.decode)


def answered(engine: Engine, texts: list[str], prompt: Prompt = TO_GERMAN) -> list[str | None]:
    return [output.text for output in answer_rows(engine, [(text,) for text in texts], prompt)]


def post(service: str, route: str, **body: object) -> httpx.Response:
    return httpx.post(f"{service}/v1/{route}", json=body, timeout=60)


def test_no_service_is_said_plainly(ray_cluster: None, tmp_path: Path, sentences: list[str]) -> None:
    pq.write_table(pa.table({"text": sentences[:5]}), tmp_path / "t.parquet")
    with pytest.raises(RaylmError, match="no raylm service runs on this cluster; start it with `raylm serve"):
        run_batch(SETTINGS, TRANSLATE, str(tmp_path / "t.parquet"), through="serve")


def test_a_taken_port_is_named(ray_cluster: None, model_directory: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = Settings.model_validate({"serve": {"port": port}})
        with pytest.raises(RaylmError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            start_service(settings.serve, str(model_directory))


def test_a_model_that_is_none_is_told_before_anything_starts(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        start_service(SETTINGS.serve, str(tmp_path / "absent"))


def test_a_compute_type_that_the_cpu_lacks_is_told_at_once(ray_cluster: None, model_directory: Path) -> None:
    settings = Settings.model_validate({"serve": {"port": 0, "decode": {"compute_type": "float16"}}})
    with pytest.raises(ArtifactError, match="cannot compute in 'float16'"):
        start_service(settings.serve, str(model_directory))


def test_one_text_and_several_are_answered(service: str, engine: Engine, sentences: list[str]) -> None:
    texts = [*sentences[:5], "Find it. Open it.\nClose it."]
    answer = post(service, "translate", text=texts, to="de").json()
    assert answer["model"] == "tiny"
    assert [row["text"] for row in answer["translations"]] == answered(engine, texts)
    single = post(service, "translate", text=texts[0]).json()["translations"]
    assert single == answer["translations"][:1]
    summaries = post(service, "summarize", text=texts[:2]).json()["summaries"]
    in_short = Prompt("summarize", token=">>summary<<")
    assert [row["text"] for row in summaries] == answered(engine, texts[:2], in_short)


def test_faulty_rows_are_answered_by_their_errors(service: str) -> None:
    rows = post(service, "translate", text=["", LONG, "Find"]).json()["translations"]
    assert rows[0] == {"text": None, "truncated": False, "error": "empty text"}
    assert rows[1]["truncated"] and rows[1]["text"] and not rows[2]["truncated"]
    assert post(service, "translate", text=[]).json()["translations"] == []


def test_concurrent_requests_get_their_own_answers(service: str, engine: Engine, sentences: list[str]) -> None:
    texts = sentences[100:140]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: post(service, "translate", text=text).json(), texts))
    assert [answer["translations"][0]["text"] for answer in answers] == answered(engine, texts)


@pytest.mark.parametrize(
    ("route", "body", "status", "reason"),
    [
        ("translate", {}, 422, "body.text: Field required"),
        ("translate", {"text": 5}, 422, "body.text"),
        ("translate", {"text": "a", "too": "de"}, 422, "body.too: Extra inputs are not permitted"),
        ("translate", {"text": "a", "to": "zz"}, 400, "cannot translate to 'zz'; its languages: de"),
        ("summarize", {"text": ["a"] * 51}, 413, "51 texts in a request; 50 are allowed"),
        ("paint", {"text": "a"}, 404, "Not Found"),
    ],
)
def test_bad_requests_are_explained(
    service: str, route: str, body: dict[str, object], status: int, reason: str
) -> None:
    answer = post(service, route, **body)
    assert answer.status_code == status
    assert isinstance(answer.json()["detail"], str) and reason in answer.json()["detail"]


def test_requests_past_the_queue_are_sent_away_at_once(service: str) -> None:
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda n: post(service, "translate", text=[f"{LONG} {n}"] * 40), range(60)))
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 429}
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429)
    assert post(service, "translate", text="Find").status_code == 200, "and later ones are welcome again"


def test_a_request_that_is_too_large_is_refused_before_it_is_read(service: str) -> None:
    answer = post(service, "translate", text="word " * 30_000)
    assert answer.status_code == 413 and "100,000 bytes" in answer.json()["detail"]
    parts = (b'{"text": "', *(b"word " * 10_000 for _ in range(10)), b'"}')  # without a length in front
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{service}/v1/translate", content=iter(parts), headers=headers, timeout=60)
    assert answer.status_code == 413


def test_health_and_readiness(service: str, engine: Engine) -> None:
    assert httpx.get(f"{service}/healthz", timeout=60).json() == {"status": "ok"}
    ready = httpx.get(f"{service}/readyz", timeout=60)
    assert ready.status_code == 200
    assert ready.json() == {"status": "ready", "model": "tiny", "fingerprint": engine.model.fingerprint}


def test_a_second_service_is_refused(service: str, model_directory: Path) -> None:
    with pytest.raises(RaylmError, match="runs on this cluster already; `raylm serve --update`"):
        start_service(SETTINGS.serve, str(model_directory))
    assert post(service, "translate", text="Find").status_code == 200


def test_the_routes_are_described(service: str) -> None:
    paths = httpx.get(f"{service}/openapi.json", timeout=60).json()["paths"]
    assert {f"/v1/{task}" for task in ("translate", "summarize", "generate", "classify", "answer")} < paths.keys()
    assert "swagger" in httpx.get(f"{service}/docs", timeout=60).text


def test_the_page_translates(service: str, engine: Engine, tmp_path: Path) -> None:
    asked = urllib.parse.urlencode({"task": "translate", "text": "Find <the> file", "go": 1})
    with live_page(f"{service}/?{asked}", tmp_path) as page:
        seen = page.wait(DONE)
    [wanted] = answered(engine, ["Find <the> file"])
    assert wanted and html.escape(wanted, quote=False) in seen
    assert 'data-done="yes"' in seen and ">tiny<" in seen
    assert "curl " in seen and f"{service}/v1/translate" in seen


def test_the_page_says_what_is_wrong(service: str, tmp_path: Path) -> None:
    asked = urllib.parse.urlencode({"task": "translate", "text": "Find", "to": "zz", "go": 1})
    with live_page(f"{service}/?{asked}", tmp_path) as page:
        seen = page.wait(DONE)
        page.evaluate("document.getElementById('to').value = 'de'; document.getElementById('go').click()")
        mended = page.wait("!document.querySelector('.bad') && document.getElementById('note').textContent")
    assert ">Find<" not in seen and " s</span>" in mended
    assert 'class="bad"' in seen and "cannot translate to 'zz'" in seen


def test_a_batch_job_through_the_service_gives_what_actors_give(
    service: str, tmp_path: Path, model_directory: Path, sentences: list[str]
) -> None:
    source = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [*sentences[:300], None]}), source)
    model = str(model_directory)
    served = run_batch(SETTINGS, TRANSLATE, str(source), through="serve", output=str(tmp_path / "serve.parquet"))
    acted = run_batch(SETTINGS, TRANSLATE, str(source), model=model, output=str(tmp_path / "actors.parquet"))
    assert pq.read_table(tmp_path / "serve.parquet").equals(pq.read_table(tmp_path / "actors.parquet"))
    assert served.counts == acted.counts and served.counts["answered"] == 300
    assert served.settings["through"] == "serve"
    other = SETTINGS.model_copy(update={"batch": BatchSettings(decode=DecodeSettings(beam_size=4))})
    foretold = run_batch(other, TRANSLATE, str(source), through="serve", dry_run=True)
    assert foretold.settings["decode"] == served.settings["decode"], "the service decodes in its own way"


def test_online_requests_do_not_wait_for_batch_jobs(service: str, sentences: list[str]) -> None:
    from ray import serve

    handle = serve.get_deployment_handle("model", "raylm")
    rows = [[(f"{text} {n} {text}",) for text in sentences[:1_500]] for n in range(8)]
    fingerprint = handle.describe.remote().result()["fingerprint"]
    bulk = [handle.answer.remote(part, TO_GERMAN, fingerprint) for part in rows]
    bulk[0].result(timeout_s=300)
    assert post(service, "translate", text="Find Text").status_code == 200
    last_is_done = False
    try:
        bulk[-1].result(timeout_s=0)
        last_is_done = True
    except TimeoutError:
        pass
    assert not last_is_done, "the online request was answered before the batch job's chunks"
    for response in bulk:
        assert len(response.result(timeout_s=300)) == 1_500


def test_a_short_request_does_not_wait_for_large_ones(service: str, sentences: list[str]) -> None:
    large = [" ".join(sentences[n : n + 30])[:1_900] for n in range(50)]
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(post, service, "translate", text=large) for _ in range(3)]
        time.sleep(0.3)
        assert post(service, "translate", text="Find Text").status_code == 200
        assert not any(answer.done() for answer in answers)
    assert [answer.result().status_code for answer in answers] == [200] * 3


def test_a_batch_job_for_another_model_is_refused(service: str, tmp_path: Path, model_directory: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_directory, other, ignore=shutil.ignore_patterns("ctranslate2"))
    (other / "raylm.json").write_text((other / "raylm.json").read_text() + " ")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(RaylmError, match=r"the service hosts .*tiny .* not .*other"):
        run_batch(SETTINGS, TRANSLATE, str(tmp_path / "t.parquet"), model=str(other), through="serve")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_waiting_ends_with_a_signal_and_leaves_the_handlers(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def send() -> None:
        while signal.getsignal(number) is before:
            time.sleep(0.01)
        time.sleep(0.1)  # until it waits
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    wait_for_signal()
    sender.join()
    assert signal.getsignal(number) is before
