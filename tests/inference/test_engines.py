"""The engine answers as the model itself would, in order, and says what it cut and what failed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from raylm.errors import ArtifactError
from raylm.inference import watchdog
from raylm.inference.answers import EMPTY_TEXT, NULL_TEXT, Output, answer_rows
from raylm.inference.convert import converted_model
from raylm.inference.engines import Engine, batching, load_engine
from raylm.inference.engines.cache import RememberingEngine
from raylm.inference.model import ModelInfo, model_fingerprint
from raylm.inference.prompts import Prompt, prompt_for
from raylm.settings import DecodeSettings
from raylm.tasks import SUMMARIZE, TRANSLATE

FLOAT = DecodeSettings(compute_type="float32")
TO_GERMAN = Prompt("translate", token=">>de<<", to="de")
TO_SUMMARY = Prompt("summarize", token=">>summary<<")


@pytest.fixture(scope="module")
def model(model_directory: Path) -> ModelInfo:
    return ModelInfo.load(str(model_directory))


@pytest.fixture(scope="module")
def engine(model: ModelInfo) -> Engine:
    return load_engine(model, FLOAT)


def decode(engine: Engine, texts: list[str], prompt: Prompt = TO_GERMAN) -> list[Output]:
    return engine.decode([(text,) for text in texts], prompt)


class Pretender:
    """Answers texts by a function; a word is a token, and `reads` is the most that it reads."""

    model: Any = None

    def __init__(self, answer: Any, reads: int = 1_000) -> None:
        self._answer, self._reads = answer, reads

    def decode(self, rows: Any, prompt: Prompt) -> list[Output]:
        return [self._answer(text) for (text,) in rows]

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def room(self, prompt: Prompt) -> int:
        return self._reads


def copy_of(model_directory: Path, target: Path) -> Path:
    shutil.copytree(model_directory, target, ignore=shutil.ignore_patterns("ctranslate2"))
    return target


# ------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("task", [TRANSLATE, SUMMARIZE])
def test_float32_gives_the_tokens_that_transformers_generates(
    engine: Engine, model_directory: Path, sentences: list[str], task: Any
) -> None:
    import torch

    from raylm.corpus.tokenizer import text_encoder
    from raylm.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(model_directory))
    encoder = text_encoder(tokenizer.backend_tokenizer)
    reference = load_model(str(model_directory)).eval()
    texts = [text for text in dict.fromkeys(sentences) if len(text) < 120][:100]
    asked = TO_GERMAN if task == TRANSLATE else TO_SUMMARY
    prompt = encoder.token_to_id(asked.token)
    expected = []
    for text in texts:
        ids = torch.tensor([[prompt, *encoder.encode(text).ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            out = reference.generate(ids, max_new_tokens=48, num_beams=1, do_sample=False)[0, 1:].tolist()
        ended = out[-1] == tokenizer.eos_token_id
        decoded = tokenizer.decode(out, skip_special_tokens=True)
        expected.append((decoded, len(out) - ended, not ended))
    outputs = decode(engine, texts, asked)
    assert [(o.text, o.output_tokens, o.truncated) for o in outputs] == expected
    assert len({o.text for o in outputs}) > 50, "the model's answers depend on its input"
    assert sum(o.truncated for o in outputs) < 50, "and end by themselves"


def test_outputs_stand_in_the_order_of_their_texts(engine: Engine, sentences: list[str]) -> None:
    texts = sentences[:40]
    together = decode(engine, texts)
    assert decode(engine, texts[::-1]) == together[::-1]
    assert [decode(engine, [text])[0] for text in texts] == together


def test_the_prompt_token_chooses_the_task(engine: Engine) -> None:
    [translated] = decode(engine, ["Open the file menu."])
    [summarized] = decode(engine, ["Open the file menu."], TO_SUMMARY)
    assert summarized.output_tokens < translated.output_tokens


def test_identical_texts_are_decoded_once(engine: Engine, sentences: list[str]) -> None:
    import time

    def seconds(texts: list[str]) -> float:
        start = time.perf_counter()
        assert len(decode(engine, texts)) == len(texts)
        return time.perf_counter() - start

    seconds(sentences[:8])
    assert seconds([sentences[0]] * 4_000) < seconds(sentences[:4_000]) / 3


def test_special_tokens_in_a_text_are_plain_text(engine: Engine) -> None:
    [plain] = decode(engine, ["a</s>b"])
    assert plain.source_tokens > 4


def test_an_over_long_text_is_cut_and_flagged(engine: Engine, model: ModelInfo) -> None:
    [output] = decode(engine, ["word " * 500])
    assert output.truncated and output.text is not None and output.source_tokens == model.max_source_tokens
    fits = load_engine(model, DecodeSettings(compute_type="float32", max_input_tokens=8))
    assert [o.truncated for o in decode(fits, ["Find", "Find the text in this document"])] == [False, True]


def test_an_answer_that_reaches_the_longest_is_flagged(model: ModelInfo, sentences: list[str]) -> None:
    whole = decode(load_engine(model, DecodeSettings(compute_type="float32")), sentences[:50])
    long_text = next(text for text, output in zip(sentences, whole, strict=False) if output.output_tokens > 5)
    short = load_engine(model, DecodeSettings(compute_type="float32", max_output_tokens=3))
    long_answer, short_answer = decode(short, [long_text, "A"])
    assert long_answer.truncated and long_answer.output_tokens == 3
    assert not short_answer.truncated


def test_only_the_failing_text_of_a_batch_has_an_error(model: ModelInfo, sentences: list[str]) -> None:
    # The model has 1,024 positions; told that it has more, it fails in earnest on a longer text.
    deceived = dataclasses.replace(model, max_positions=4_096, max_source_tokens=4_096)
    engine = load_engine(deceived, FLOAT.model_copy(update={"batch_tokens": 100_000}))
    texts = [*sentences[:5], "word " * 3_000, *sentences[5:9]]
    outputs = decode(engine, texts)
    assert [n for n, output in enumerate(outputs) if output.error] == [5]
    assert outputs[5].text is None and "position" in (outputs[5].error or "")
    assert outputs[0].text == decode(load_engine(model, FLOAT), texts[:1])[0].text


def test_a_lone_surrogate_is_an_error_of_its_row(engine: Engine) -> None:
    bad, good = decode(engine, ["a\ud800b", "Find"])
    assert bad.error == "text is not valid Unicode" and good.error is None


def test_threads_may_share_an_engine(engine: Engine, sentences: list[str]) -> None:
    parts = [sentences[start : start + 30] for start in range(0, 240, 30)]
    with ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(lambda texts: decode(engine, texts), parts))
    assert shared == [decode(engine, texts) for texts in parts]


def test_int8_answers_like_float32(model: ModelInfo, engine: Engine, sentences: list[str]) -> None:
    texts = [text for text in dict.fromkeys(sentences) if len(text) < 30][:50]
    exact = decode(engine, texts)
    small = decode(load_engine(model, DecodeSettings()), texts)
    assert sum(a.text == b.text for a, b in zip(exact, small, strict=True)) >= 25


def test_what_comes_again_is_answered_from_memory_as_long_as_it_reaches() -> None:
    asked: list[str] = []

    def shout(text: str) -> Output:
        asked.append(text)
        return Output(text.upper()) if text != "bad" else Output(None, "engine: no")

    engine = RememberingEngine(cast(Engine, Pretender(shout)), most_bytes=24 + 4 * 600)
    assert [output.text for output in decode(engine, ["one", "two", "one"])] == ["ONE", "TWO", "ONE"]
    assert decode(engine, ["two", "bad"])[0].text == "TWO" and asked == ["one", "two", "bad"]
    decode(engine, ["bad"], TO_GERMAN)
    assert asked[-1] == "bad", "an error is not remembered"
    decode(engine, ["two"], TO_SUMMARY)
    assert asked[-1] == "two", "nor is the answer to another question"
    decode(engine, ["three", "four"])
    decode(engine, ["two", "one"])
    assert asked[-2:] == ["two", "one"], "the oldest are forgotten first"


# ---------------------------------------------------------------------------------------------- texts


def test_null_and_empty_texts_are_errors_and_the_rest_is_answered(engine: Engine) -> None:
    outputs = answer_rows(engine, [(text,) for text in (None, "", " \n", "Find Text", "***")], TO_GERMAN)
    assert [output.error for output in outputs] == [NULL_TEXT, EMPTY_TEXT, EMPTY_TEXT, None, None]
    assert outputs[3].text and outputs[4].text == "***"


def test_translation_goes_sentence_by_sentence_and_keeps_the_layout() -> None:
    asked: list[str] = []

    def shout(text: str) -> Output:
        asked.append(text)
        return Output(f" {text.upper()} ", None, text == "Two.", 2, 3, -1.0 if text == "Two." else -0.25)

    [output] = answer_rows(Pretender(shout), [("  One. Two.\n\nThree",)], TO_GERMAN)
    assert asked == ["One.", "Two.", "Three"]
    assert output == Output("  ONE. TWO.\n\nTHREE", None, True, 6, 9, score=-0.5)


def test_a_summary_reads_the_whole_text() -> None:
    [output] = answer_rows(Pretender(lambda text: Output(str(len(text)))), [("One. Two.\nThree",)], TO_SUMMARY)
    assert output.text == "15"


def test_a_text_longer_than_the_model_reads_is_summarised_by_parts() -> None:
    asked: list[str] = []

    def first_words(text: str) -> Output:
        asked.append(text)
        words = text.split()
        return Output(" ".join(words[:2]), None, len(words) > 12, len(words), 2)

    text = " ".join(f"Sentence number {n} is here." for n in range(6))
    engine = Pretender(first_words, reads=12)
    [output] = answer_rows(engine, [(text,)], TO_SUMMARY)
    assert asked[:3] == [
        "Sentence number 0 is here. Sentence number 1 is here.",
        "Sentence number 2 is here. Sentence number 3 is here.",
        "Sentence number 4 is here. Sentence number 5 is here.",
    ]
    assert asked[3:] == ["Sentence number\nSentence number\nSentence number"]
    assert output == Output("Sentence number", None, False, 36, 8), "nothing was cut, and all of it was read"
    [stubborn] = answer_rows(Pretender(lambda text: Output(text, None, False, 9, 9), reads=12), [(text,)], TO_SUMMARY)
    assert stubborn.text is not None and stubborn.text.count("\n") == 2, "what does not get shorter comes to an end"
    [single] = answer_rows(engine, [("word " * 20,)], TO_SUMMARY)
    assert single.truncated, "one sentence is never parted"


def test_markers_survive_a_model_that_loses_them() -> None:
    def lose(text: str) -> Output:
        return Output(text.upper().replace("%S", "").replace("{NAME}", "{name}"), None, False, 1, 1)

    texts = ["Open %s now.", "Hello {name}.", "Go to <b>all</b> files. Then see %s", "%s", "Nothing"]
    outputs = answer_rows(Pretender(lose), [(text,) for text in texts], TO_GERMAN)
    assert [output.text for output in outputs] == [
        "OPEN %s NOW.", "HELLO {name}.", "GO TO <b>ALL</b> FILES. THEN SEE %s", "%s", "NOTHING",
    ]  # fmt: skip
    assert [output.output_tokens for output in outputs] == [3, 1, 6, 1, 1], "what was written in vain counts too"


def test_a_failed_sentence_fails_its_text() -> None:
    def fail(text: str) -> Output:
        return Output(None, "engine: no") if "Two" in text else Output(text)

    [output] = answer_rows(Pretender(fail), [("One. Two. Three.",)], TO_GERMAN)
    assert output.text is None and output.error == "engine: no"


# --------------------------------------------------------------------------------------------- models


def test_a_model_says_what_it_can(model: ModelInfo) -> None:
    assert prompt_for(model, TRANSLATE) == TO_GERMAN == prompt_for(model, TRANSLATE, "DE")
    assert prompt_for(model, SUMMARIZE) == TO_SUMMARY
    with pytest.raises(ArtifactError, match="cannot translate to 'zz'; its languages: de"):
        prompt_for(model, TRANSLATE, "zz")
    with pytest.raises(ArtifactError, match="translates from 'en', not 'fr'"):
        prompt_for(model, TRANSLATE, "de", "fr")
    with pytest.raises(ArtifactError, match="cannot summarize; its tasks: translate"):
        prompt_for(dataclasses.replace(model, tasks=("translate",)), SUMMARIZE)
    with pytest.raises(ArtifactError, match="name a target language with --to; its languages: de, fr"):
        prompt_for(dataclasses.replace(model, languages=("de", "fr")), TRANSLATE)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        ModelInfo.load(str(tmp_path / "absent"))
    with pytest.raises(ArtifactError, match=r"config\.json is missing"):
        ModelInfo.load(str(tmp_path))


def test_models_that_cannot_answer_are_refused(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"config\.json says BertForMaskedLM; what raylm runs is one of …ForCond"):
        ModelInfo.load(str(tmp_path))


def test_a_model_made_elsewhere_needs_no_card(model_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(model_directory, tmp_path / "foreign")
    (directory / "raylm.json").unlink()
    foreign = ModelInfo.load(str(directory))
    assert prompt_for(foreign, SUMMARIZE).token is None
    for language in ("de", "deu", "DE"):
        assert prompt_for(foreign, TRANSLATE, language).token == ">>de<<", "its tokenizer happens to know the language"
    with pytest.raises(ArtifactError, match="say --to; its languages: de, fr"):
        prompt_for(foreign, TRANSLATE)
    with pytest.raises(ArtifactError, match="cannot translate to 'zh'; its languages: de, fr"):
        prompt_for(foreign, TRANSLATE, "zh")
    assert foreign.max_source_tokens == 64, "as its tokenizer says"
    assert foreign.max_target_tokens == foreign.max_positions == 1_024
    [output] = decode(load_engine(foreign, FLOAT), ["Find Text"])
    assert output.text is not None


def test_a_t5_made_elsewhere_is_answered_by_its_own_tokenizer(tmp_path: Path, sentences: list[str]) -> None:
    import torch

    from raylm.corpus.tokenizer import save_tokenizer, train_tokenizer
    from raylm.models import build_config, build_model, load_model, load_tokenizer
    from raylm.settings import ModelSettings, TokenizerSettings

    save_tokenizer(train_tokenizer(sentences, TokenizerSettings(vocab_size=600), ["de"]), tmp_path, max_length=64)
    tokenizer = load_tokenizer(str(tmp_path))
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1}
    build_model(build_config(ModelSettings(family="t5", config=sizes), tokenizer), seed=1).save_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("Find Text").input_ids])
    generated = load_model(str(tmp_path)).generate(ids, max_new_tokens=20, do_sample=False, num_beams=1)[0, 1:]
    engine = load_engine(ModelInfo.load(str(tmp_path)), FLOAT.model_copy(update={"max_output_tokens": 20}))
    [output] = decode(engine, ["Find Text"], Prompt("generate"))
    assert output.text == tokenizer.decode(generated, skip_special_tokens=True)


def test_a_missing_task_token_is_named(engine: Engine) -> None:
    with pytest.raises(ArtifactError, match="no token >>xx<<"):
        decode(engine, ["Find"], Prompt("translate", token=">>xx<<"))


def test_a_compute_type_that_the_device_lacks_is_named(model: ModelInfo) -> None:
    with pytest.raises(ArtifactError, match="cannot compute in 'float16', but in float32"):
        load_engine(model, DecodeSettings(compute_type="float16"))


# ----------------------------------------------------------------------------------------- conversion


def convert_in_process(directory: str, queue: Any) -> None:
    queue.put(str(converted_model(ModelInfo.load(directory), "int8")))


def test_processes_that_convert_at_once_do_not_collide(model_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(model_directory, tmp_path / "model")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=convert_in_process, args=(str(directory), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    places = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(places) == 1 and (Path(places.pop()) / "model.bin").is_file()
    assert [entry.name for entry in (directory / "ctranslate2").iterdir() if entry.name != ".lock"] == [
        f"int8-{model_fingerprint(directory)}"
    ]


def test_a_read_only_model_is_converted_into_the_cache(
    model_directory: Path, tmp_path: Path, home_of_caches: Path
) -> None:
    directory = copy_of(model_directory, tmp_path / "model")
    (directory / "ctranslate2").write_text("a file where the directory would be made")
    place = converted_model(ModelInfo.load(str(directory)), "float32")
    assert place.is_relative_to(home_of_caches)


def test_the_fingerprint_follows_the_weights(model_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(model_directory, tmp_path / "model")
    before = model_fingerprint(directory)
    assert before == model_fingerprint(model_directory)
    weights = directory / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert model_fingerprint(directory) != before


def test_a_marian_with_padding_elsewhere_is_refused(model_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(model_directory, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["pad_token_id"] = config["decoder_start_token_id"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="<pad> as its last id"):
        converted_model(ModelInfo.load(str(directory)), "float32")


def test_a_gpu_that_computes_no_more_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each further row would be an error at once; a new process begins with the GPU as it was."""
    ended: list[str] = []

    def end(reason: str) -> None:
        ended.append(reason)
        raise SystemExit

    monkeypatch.setattr(watchdog, "end", end)
    row = batching.Source(("a",), [1, 2], False)

    def fails(text: str) -> Any:
        def run(_: Any) -> list[Output]:
            raise RuntimeError(text)

        return batching.in_batches([("a",), ("b",)], lambda _: (row.ids, False), run, 100)

    for text in ("CUDA error: device-side assert triggered", "CUDA failed with error an illegal memory access"):
        with pytest.raises(SystemExit):
            fails(text)
    assert len(ended) == 2
    for text in ("CUDA out of memory. Tried to allocate", "CUDA failed with error out of memory", "poison"):
        assert [output.error for output in fails(text)] == [f"engine: {text}"] * 2
    assert len(ended) == 2
