"""The engine answers as the model itself would, in order, and says what it cut and what failed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raylm.errors import ArtifactError
from raylm.inference.convert import converted_model
from raylm.inference.engines import EMPTY_TEXT, NULL_TEXT, Engine, Output, answer_texts
from raylm.inference.model import ModelInfo, model_fingerprint
from raylm.settings import DecodeSettings
from raylm.tasks import SUMMARIZE, TRANSLATE

FLOAT = DecodeSettings(compute_type="float32")


@pytest.fixture(scope="module")
def model(model_directory: Path) -> ModelInfo:
    return ModelInfo.load(str(model_directory))


@pytest.fixture(scope="module")
def engine(model: ModelInfo) -> Engine:
    return Engine(model, FLOAT)


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
    prompt = encoder.token_to_id(task.prompt_token("de"))
    expected = []
    for text in texts:
        ids = torch.tensor([[prompt, *encoder.encode(text).ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            out = reference.generate(ids, max_new_tokens=48, num_beams=1, do_sample=False)[0, 1:].tolist()
        ended = out[-1] == tokenizer.eos_token_id
        decoded = tokenizer.decode(out, skip_special_tokens=True)
        expected.append((decoded, len(out) - ended, not ended))
    outputs = engine.decode(texts, task.prompt_token("de"))
    assert [(o.text, o.output_tokens, o.truncated) for o in outputs] == expected
    assert len({o.text for o in outputs}) > 50, "the model's answers depend on its input"
    assert sum(o.truncated for o in outputs) < 50, "and end by themselves"


def test_outputs_stand_in_the_order_of_their_texts(engine: Engine, sentences: list[str]) -> None:
    texts = sentences[:40]
    together = engine.decode(texts, ">>de<<")
    assert engine.decode(texts[::-1], ">>de<<") == together[::-1]
    assert [engine.decode([text], ">>de<<")[0] for text in texts] == together


def test_the_prompt_token_chooses_the_task(engine: Engine) -> None:
    [translated] = engine.decode(["Open the file menu."], ">>de<<")
    [summarized] = engine.decode(["Open the file menu."], ">>summary<<")
    assert summarized.output_tokens < translated.output_tokens


def test_identical_texts_are_decoded_once(engine: Engine, sentences: list[str]) -> None:
    import time

    def seconds(texts: list[str]) -> float:
        start = time.perf_counter()
        assert len(engine.decode(texts, ">>de<<")) == len(texts)
        return time.perf_counter() - start

    seconds(sentences[:8])
    assert seconds([sentences[0]] * 4_000) < seconds(sentences[:4_000]) / 3


def test_special_tokens_in_a_text_are_plain_text(engine: Engine) -> None:
    [plain] = engine.decode(["a</s>b"], ">>de<<")
    assert plain.source_tokens > 4


def test_an_over_long_text_is_cut_and_flagged(engine: Engine, model: ModelInfo) -> None:
    [output] = engine.decode(["word " * 500], ">>de<<")
    assert output.truncated and output.text is not None and output.source_tokens == model.max_source_tokens
    fits = Engine(model, DecodeSettings(compute_type="float32", max_input_tokens=8))
    assert [o.truncated for o in fits.decode(["Find", "Find the text in this document"], ">>de<<")] == [False, True]


def test_an_answer_that_reaches_the_longest_is_flagged(model: ModelInfo, sentences: list[str]) -> None:
    whole = Engine(model, DecodeSettings(compute_type="float32")).decode(sentences[:50], ">>de<<")
    long_text = next(text for text, output in zip(sentences, whole, strict=False) if output.output_tokens > 5)
    short = Engine(model, DecodeSettings(compute_type="float32", max_output_tokens=3))
    long_answer, short_answer = short.decode([long_text, "A"], ">>de<<")
    assert long_answer.truncated and long_answer.output_tokens == 3
    assert not short_answer.truncated


def test_only_the_failing_text_of_a_batch_has_an_error(model: ModelInfo, sentences: list[str]) -> None:
    # The model has 1,024 positions; told that it has more, it fails in earnest on a longer text.
    deceived = dataclasses.replace(model, max_positions=4_096, max_source_tokens=4_096)
    engine = Engine(deceived, FLOAT.model_copy(update={"batch_tokens": 100_000}))
    texts = [*sentences[:5], "word " * 3_000, *sentences[5:9]]
    outputs = engine.decode(texts, ">>de<<")
    assert [n for n, output in enumerate(outputs) if output.error] == [5]
    assert outputs[5].text is None and "position" in (outputs[5].error or "")
    assert outputs[0].text == Engine(model, FLOAT).decode(texts[:1], ">>de<<")[0].text


def test_a_lone_surrogate_is_an_error_of_its_row(engine: Engine) -> None:
    bad, good = engine.decode(["a\ud800b", "Find"], ">>de<<")
    assert bad.error == "text is not valid Unicode" and good.error is None


def test_threads_may_share_an_engine(engine: Engine, sentences: list[str]) -> None:
    parts = [sentences[start : start + 30] for start in range(0, 240, 30)]
    with ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(lambda texts: engine.decode(texts, ">>de<<"), parts))
    assert shared == [engine.decode(texts, ">>de<<") for texts in parts]


def test_int8_answers_like_float32(model: ModelInfo, engine: Engine, sentences: list[str]) -> None:
    texts = [text for text in dict.fromkeys(sentences) if len(text) < 30][:50]
    exact = engine.decode(texts, ">>de<<")
    small = Engine(model, DecodeSettings()).decode(texts, ">>de<<")
    assert sum(a.text == b.text for a, b in zip(exact, small, strict=True)) >= 35


# ---------------------------------------------------------------------------------------------- texts


def test_null_and_empty_texts_are_errors_and_the_rest_is_answered(engine: Engine) -> None:
    outputs = answer_texts(engine.decode, TRANSLATE, [None, "", " \n", "Find Text", "***"], ">>de<<")
    assert [output.error for output in outputs] == [NULL_TEXT, EMPTY_TEXT, EMPTY_TEXT, None, None]
    assert outputs[3].text and outputs[4].text == "***"


def test_translation_goes_sentence_by_sentence_and_keeps_the_layout() -> None:
    def shout(texts: Any, token: str | None) -> list[Output]:
        assert list(texts) == ["One.", "Two.", "Three"]
        return [Output(f" {text.upper()} ", None, text == "Two.", 2, 3) for text in texts]

    [output] = answer_texts(shout, TRANSLATE, ["  One. Two.\n\nThree"], None)
    assert output == Output("  ONE. TWO.\n\nTHREE", None, True, 6, 9)


def test_a_summary_reads_the_whole_text() -> None:
    def count(texts: Any, token: str | None) -> list[Output]:
        return [Output(str(len(text))) for text in texts]

    [output] = answer_texts(count, SUMMARIZE, ["One. Two.\nThree"], None)
    assert output.text == "15"


def test_a_failed_sentence_fails_its_text() -> None:
    def fail(texts: Any, token: str | None) -> list[Output]:
        return [Output(None, "engine: no") if "Two" in text else Output(text) for text in texts]

    [output] = answer_texts(fail, TRANSLATE, ["One. Two. Three."], None)
    assert output.text is None and output.error == "engine: no"


# --------------------------------------------------------------------------------------------- models


def test_a_model_says_what_it_can(model: ModelInfo) -> None:
    assert model.prompt_token(TRANSLATE) == ">>de<<" == model.prompt_token(TRANSLATE, "DE")
    assert model.prompt_token(SUMMARIZE) == ">>summary<<"
    with pytest.raises(ArtifactError, match="cannot translate to 'zz'; its languages: de"):
        model.prompt_token(TRANSLATE, "zz")
    with pytest.raises(ArtifactError, match="translates from 'en', not from 'fr'"):
        model.prompt_token(TRANSLATE, "de", "fr")
    with pytest.raises(ArtifactError, match="cannot summarize; its tasks: translate"):
        dataclasses.replace(model, tasks=("translate",)).prompt_token(SUMMARIZE)
    with pytest.raises(ArtifactError, match="name a target language with --to; its languages: de, fr"):
        dataclasses.replace(model, languages=("de", "fr")).prompt_token(TRANSLATE)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        ModelInfo.load(str(tmp_path / "absent"))
    with pytest.raises(ArtifactError, match=r"config\.json is missing"):
        ModelInfo.load(str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("llama", "decoder or encoder alone"), ("bert", "supported encoder-decoders: marian"), ("m2m_100", "code in")],
)
def test_models_that_cannot_answer_are_refused(tmp_path: Path, model_type: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=reason):
        ModelInfo.load(str(tmp_path))


def test_a_model_made_elsewhere_needs_no_card(model_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(model_directory, tmp_path / "foreign")
    (directory / "raylm.json").unlink()
    foreign = ModelInfo.load(str(directory))
    assert foreign.prompt_token(SUMMARIZE) is None and foreign.prompt_token(TRANSLATE) is None
    assert foreign.prompt_token(TRANSLATE, "de") == ">>de<<", "its tokenizer happens to know the language"
    assert foreign.max_source_tokens == 1_024
    [output] = Engine(foreign, FLOAT).decode(["Find Text"], ">>de<<")
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
    engine = Engine(ModelInfo.load(str(tmp_path)), FLOAT.model_copy(update={"max_output_tokens": 20}))
    [output] = engine.decode(["Find Text"], None)
    assert output.text == tokenizer.decode(generated, skip_special_tokens=True)


def test_a_missing_task_token_is_named(engine: Engine) -> None:
    with pytest.raises(ArtifactError, match="no token >>xx<<"):
        engine.decode(["Find"], ">>xx<<")


def test_a_compute_type_that_the_device_lacks_is_named(model: ModelInfo) -> None:
    with pytest.raises(ArtifactError, match="cannot compute in 'float16', but in float32"):
        Engine(model, DecodeSettings(compute_type="float16"))


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
