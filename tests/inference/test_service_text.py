"""A decoder behind the service: text generated whole and in pieces, for `curl` and for OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from raylm.inference.answers import answer_rows
from raylm.inference.engines import Engine, load_engine
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Prompt
from raylm.inference.service.start import start_service, stop_service
from raylm.settings import ServeSettings
from raylm.tasks import GENERATE
from tests.browser import live_page
from tests.inference.models import CHAT_TEMPLATE, save_llama

SETTINGS = ServeSettings.model_validate(
    {"port": 0, "decode": {"compute_type": "float32", "max_output_tokens": 24}, "batch_wait_s": 0.05}
)
PLAIN = Prompt("generate")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("models") / "talker"
    save_llama(directory, sentences, CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def service(ray_cluster: None, llama: Path) -> Iterator[str]:
    yield start_service(SETTINGS, str(llama))
    stop_service()


@pytest.fixture(scope="module")
def engine(llama: Path) -> Engine:
    return load_engine(ModelInfo.load(str(llama)), SETTINGS.decode)


def written(engine: Engine, text: str, prompt: Prompt = PLAIN) -> str:
    [output] = answer_rows(engine, [(text,)], prompt)
    assert output.text is not None
    return output.text


def events(service: str, route: str, **body: Any) -> list[Any]:
    with httpx.stream("POST", f"{service}/v1/{route}", json=body | {"stream": True}, timeout=60) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def client(service: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service}/v1", api_key="none", max_retries=0)


def test_text_is_generated(service: str, engine: Engine, llama: Path) -> None:
    from raylm.inference.prompts import prompt_for

    answer = httpx.post(f"{service}/v1/generate", json={"text": ["Open", ""]}, timeout=60).json()
    chat = prompt_for(ModelInfo.load(str(llama)), GENERATE)
    assert chat.is_chat and answer["generated"][0]["text"] == written(engine, "Open", chat)
    assert answer["generated"][1]["error"] == "empty text"


def test_pieces_arrive_and_make_the_answer(service: str) -> None:
    whole = httpx.post(f"{service}/v1/generate", json={"text": "Open the file"}, timeout=60).json()["generated"][0]
    *pieces, last = events(service, "generate", text="Open the file")
    assert len(pieces) > 3
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert last == {"done": True, "truncated": whole["truncated"], "error": None}


def test_streams_beside_each_other_are_each_their_own(service: str, engine: Engine, sentences: list[str]) -> None:
    texts = sentences[:12]
    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda text: events(service, "completions", model="talker", prompt=text), texts))
    for text, pieces in zip(texts, told, strict=True):
        assert "".join(piece["choices"][0]["text"] for piece in pieces[:-1]) == written(engine, text)


def test_a_stream_without_a_text_says_so(service: str) -> None:
    assert events(service, "generate", text=" ") == [{"done": True, "truncated": False, "error": "empty text"}]
    refused = httpx.post(f"{service}/v1/generate", json={"text": ["a", "b"], "stream": True}, timeout=60)
    assert refused.status_code == 400 and "one at a time" in refused.json()["detail"]


def test_an_answer_stops_where_it_is_told_to(service: str, engine: Engine) -> None:
    whole = written(engine, "Open the file")
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    cut = whole[: whole.index(stop)].rstrip()
    body = {"model": "talker", "prompt": "Open the file", "stop": [stop, "never"]}
    answer = httpx.post(f"{service}/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (cut, "stop")
    pieces = events(service, "completions", **body)
    assert "".join(piece["choices"][0]["text"] for piece in pieces[:-1]) == cut
    assert pieces[-2]["choices"][0]["finish_reason"] == "stop"


def test_white_space_stops_an_answer_too(service: str, engine: Engine, sentences: list[str]) -> None:
    text = next(text for text in sentences if " " in written(engine, text))
    first = written(engine, text).split(" ")[0]
    body = {"model": "talker", "prompt": text, "stop": " "}
    pieces = events(service, "completions", **body)
    assert "".join(piece["choices"][0]["text"] for piece in pieces[:-1]) == first
    assert pieces[-2]["choices"][0]["finish_reason"] == "stop"


def test_openai_s_client_is_answered(service: str, engine: Engine) -> None:
    models = client(service).models
    assert [model.id for model in models.list()] == ["talker"]
    assert models.retrieve("talker").owned_by == "raylm"
    found = client(service).completions.create(model="talker", prompt=["Open the file", "Close"], user="somebody")
    assert [choice.text for choice in found.choices] == [written(engine, text) for text in ("Open the file", "Close")]
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage and found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.completion_tokens > 4


def test_openai_s_client_hears_a_stream(service: str, engine: Engine) -> None:
    stream = client(service).completions.create(
        model="talker", prompt="Open the file", stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(part.choices[0].text for part in parts if part.choices) == written(engine, "Open the file")
    assert parts[-1].usage and parts[-1].usage.completion_tokens > 4
    assert parts[-2].choices[0].finish_reason in ("stop", "length")


def test_max_tokens_are_kept_to(service: str) -> None:
    found = client(service).completions.create(model="talker", prompt="Open the file", max_tokens=3)
    assert found.usage and found.usage.completion_tokens == 3
    assert found.choices[0].finish_reason == "length"
    most = client(service).completions.create(model="talker", prompt="Open the file", max_tokens=5_000)
    assert most.usage and most.usage.completion_tokens <= 24


def test_what_is_drawn_differs(service: str) -> None:
    found = client(service).completions.create(
        model="talker", prompt=["Open the file"] * 8, temperature=1.5, max_tokens=12
    )
    assert len({choice.text for choice in found.choices}) > 4


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"model": "gpt-9"}, 404, "model 'gpt-9' is not here; 'talker' is"),
        ({"stop": ""}, 422, "stop"),
        ({"n": 2}, 400, "n: found 2; only 1 is supported"),
        ({"echo": True}, 400, "echo: found True"),
        ({"temperature": -1}, 422, "temperature"),
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": [[1, 2]]}, 422, "prompt"),
        ({"prompt": " "}, 400, "prompt 0: empty text"),
    ],
)
def test_openai_s_client_is_told_what_is_wrong(service: str, body: dict[str, Any], status: int, reason: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client(service).completions.create(**{"model": "talker", "prompt": "Open"} | body)
    assert refused.value.status_code == status
    assert isinstance(refused.value.body, dict) and reason in refused.value.body["message"]


def test_a_caller_that_goes_away_is_not_written_for(service: str) -> None:
    with httpx.stream(
        "POST", f"{service}/v1/generate", json={"text": "Open the file", "stream": True}, timeout=60
    ) as response:
        next(response.iter_lines())
    assert httpx.post(f"{service}/v1/generate", json={"text": "Open"}, timeout=60).status_code == 200


def test_the_page_writes_on(service: str, tmp_path: Path) -> None:
    with live_page(f"{service}/?task=generate&text=Open+the+file&go=1", tmp_path) as page:
        page.wait("document.getElementById('answer').dataset.done")
        seen = page.evaluate("document.getElementById('answer').textContent")
        assert not page.evaluate("document.querySelector('.bad')")
    [answer] = httpx.post(f"{service}/v1/generate", json={"text": "Open the file"}, timeout=60).json()["generated"]
    assert seen == answer["text"]
