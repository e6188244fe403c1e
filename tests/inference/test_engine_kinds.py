"""Each engine answers as the model itself would, whatever kind of model it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raylm.errors import ArtifactError
from raylm.inference.answers import Output, answer_rows
from raylm.inference.convert import _CONVERTIBLE
from raylm.inference.engines import Engine, check_engine, choose_engine, load_engine
from raylm.inference.engines import vllm as vllm_engine
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import Prompt, prompt_for
from raylm.settings import DecodeSettings
from raylm.tasks import ANSWER, CLASSIFY, GENERATE, TRANSLATE
from tests.inference.models import save_bert, save_llama, save_nllb

FLOAT = DecodeSettings(compute_type="float32", max_output_tokens=20, scores=True)
BY_TRANSFORMERS = FLOAT.model_copy(update={"engine": "transformers"})


def asked(texts: list[str]) -> list[tuple[str, ...]]:
    return [(text,) for text in texts]


def short(sentences: list[str], count: int = 24) -> list[str]:
    return [text for text in dict.fromkeys(sentences) if 4 < len(text) < 60][:count]


def same(one: list[Output], other: list[Output]) -> None:
    """Equal but for the last digits of the scores."""
    plain = [(output.text, output.truncated, output.source_tokens, output.output_tokens) for output in one]
    assert plain == [(output.text, output.truncated, output.source_tokens, output.output_tokens) for output in other]
    assert [output.score for output in one] == pytest.approx([output.score for output in other], abs=1e-2)


# --------------------------------------------------------------------------------------------- decoders


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> ModelInfo:
    directory = tmp_path_factory.mktemp("llama")
    save_llama(directory, sentences, chat_template=None)
    return ModelInfo.load(str(directory))


def test_a_decoder_writes_on_as_transformers_does(llama: ModelInfo, sentences: list[str]) -> None:
    import torch

    from raylm.models import load_model, load_tokenizer

    texts, prompt = short(sentences), prompt_for(llama, GENERATE)
    fast = load_engine(llama, FLOAT).decode(asked(texts), prompt)
    same(fast, load_engine(llama, BY_TRANSFORMERS).decode(asked(texts), prompt))
    tokenizer, reference = load_tokenizer(str(llama.directory)), load_model(str(llama.directory)).eval()
    for text, output in zip(texts[:5], fast, strict=False):
        ids = torch.tensor([tokenizer(text).input_ids[:-1]])
        written = reference.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        assert output.text == tokenizer.decode(written, skip_special_tokens=True)
    assert len({output.text for output in fast}) > len(texts) / 2


@pytest.mark.parametrize("change", [{"beam_size": 3}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.5}])
def test_ways_of_decoding_mean_the_same_to_both_engines(
    llama: ModelInfo, sentences: list[str], change: dict[str, Any]
) -> None:
    texts, prompt = short(sentences), prompt_for(llama, GENERATE)
    one, other = (
        load_engine(llama, settings.model_copy(update=change)).decode(asked(texts), prompt)
        for settings in (FLOAT, BY_TRANSFORMERS)
    )
    # Beams of equal scores may be cut differently.
    assert sum(a.text == b.text for a, b in zip(one, other, strict=True)) >= 0.8 * len(texts)
    plain = load_engine(llama, FLOAT).decode(asked(texts), prompt)
    assert sum(a.text == b.text for a, b in zip(one, plain, strict=True)) < len(texts)


def test_answers_may_be_drawn(llama: ModelInfo, sentences: list[str]) -> None:
    rows = asked([short(sentences)[0]] * 12)
    prompt = prompt_for(llama, GENERATE)
    for engine in ("ctranslate2", "transformers"):
        settings = FLOAT.model_copy(update={"engine": engine, "temperature": 1.5})
        drawn = [output.text for output in load_engine(llama, settings).decode(rows, prompt)]
        assert len(set(drawn)) > 6, "equal rows have answers of their own"
        likeliest = settings.model_copy(update={"top_k": 1})
        greedy = load_engine(llama, FLOAT).decode(rows[:1], prompt)[0].text
        assert {output.text for output in load_engine(llama, likeliest).decode(rows, prompt)} == {greedy}
    other_seed = settings.model_copy(update={"seed": 1})
    again, others = (
        [output.text for output in load_engine(llama, chosen).decode(rows, prompt)] for chosen in (settings, other_seed)
    )
    assert again == drawn != others


def test_the_answer_has_at_least_and_at_most_so_many_tokens(llama: ModelInfo, sentences: list[str]) -> None:
    prompt, rows = prompt_for(llama, GENERATE), asked(short(sentences))
    bounds = FLOAT.model_copy(update={"min_output_tokens": 12, "max_output_tokens": 12})
    for settings in (bounds, bounds.model_copy(update={"engine": "transformers"})):
        outputs = load_engine(llama, settings).decode(rows, prompt)
        assert {output.output_tokens for output in outputs} == {12}


def test_what_vllm_is_told(llama: ModelInfo) -> None:
    """It needs a GPU; its arguments do not."""
    settings = DecodeSettings(temperature=0.7, top_p=0.9, top_k=40, seed=3, max_output_tokens=99, scores=True)
    assert vllm_engine.load_arguments(llama, settings, gpus=2) == {
        "model": str(llama.directory), "dtype": "auto", "tensor_parallel_size": 2, "max_model_len": 512, "seed": 3,
        "enable_prefix_caching": True, "disable_log_stats": True,
    }  # fmt: skip
    told = vllm_engine.sampling_arguments(settings, 99, [2])
    assert (told["temperature"], told["top_p"], told["top_k"]) == (0.7, 0.9, 40)
    assert (told["max_tokens"], told["stop_token_ids"], told["logprobs"]) == (99, [2], 0)
    assert vllm_engine.row_seed(DecodeSettings(), [5, 6], 0) is None, "nothing is drawn"
    seeds = [vllm_engine.row_seed(settings, [5, 6], number) for number in (0, 1, 0)]
    assert seeds[0] == seeds[2] != seeds[1], "equal rows have answers of their own, the same each time"
    assert vllm_engine.row_seed(settings.model_copy(update={"seed": 4}), [5, 6], 0) != seeds[0]
    with pytest.raises(ArtifactError, match="vLLM has neither beam_size > 1 nor no_repeat_ngram_size"):
        vllm_engine.sampling_arguments(DecodeSettings(beam_size=4), 5, [2])
    with pytest.raises(ArtifactError, match="vLLM computes in auto, float32, float16, bfloat16; found 'int8'"):
        vllm_engine.load_arguments(llama, DecodeSettings(compute_type="int8"), 1)
    with pytest.raises(ArtifactError, match=r"vllm is not installed: pip install 'raylm\[vllm\]'"):
        vllm_engine.VllmEngine(llama, DecodeSettings())


# ----------------------------------------------------------------------------------- encoder-decoders


def test_both_engines_translate_alike(model_directory: Path, sentences: list[str]) -> None:
    model = ModelInfo.load(str(model_directory))
    rows, prompt = asked(short(sentences)), prompt_for(model, TRANSLATE)
    for change in ({}, {"beam_size": 4}):
        one, other = (
            load_engine(model, settings.model_copy(update=change)).decode(rows, prompt)
            for settings in (FLOAT, BY_TRANSFORMERS)
        )
        if change:
            assert sum(a.text == b.text for a, b in zip(one, other, strict=True)) >= 0.8 * len(rows)
        else:
            same(one, other)


def test_a_model_with_language_codes_begins_its_answer_with_one(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[str]
) -> None:
    import torch

    from raylm.models import load_tokenizer

    directory = tmp_path_factory.mktemp("nllb")
    reference = save_nllb(directory, sentences)
    model = ModelInfo.load(str(directory))
    texts = short(sentences)
    answers = {}
    for to in ("de", "zh"):
        prompt = prompt_for(model, TRANSLATE, to, "en")
        fast = load_engine(model, FLOAT).decode(asked(texts), prompt)
        same(fast, load_engine(model, BY_TRANSFORMERS).decode(asked(texts), prompt))
        tokenizer = load_tokenizer(str(directory))
        tokenizer.src_lang = "eng_Latn"
        target = tokenizer.convert_tokens_to_ids(prompt.target_code)
        for text, output in zip(texts[:4], fast, strict=False):
            ids = torch.tensor([tokenizer(text).input_ids])
            written = reference.generate(ids, forced_bos_token_id=target, max_new_tokens=21, do_sample=False)[0]
            assert output.text == tokenizer.decode(written, skip_special_tokens=True)
        answers[to] = [output.text for output in fast]
    assert answers["de"] != answers["zh"]


# ------------------------------------------------------------------------------ classifiers and readers


def test_a_classifier_gives_the_likeliest_label_with_its_probability(tmp_path: Path, sentences: list[str]) -> None:
    import torch

    from raylm.models import load_tokenizer

    labels = {0: "bad", 1: "fair", 2: "good"}
    reference = save_bert(tmp_path, sentences, "BertForSequenceClassification", num_labels=3, id2label=labels)
    model = ModelInfo.load(str(tmp_path))
    texts, tokenizer = short(sentences, 40), load_tokenizer(str(tmp_path))
    outputs = answer_rows(load_engine(model, FLOAT), [*asked(texts), (None,), ("word " * 400,)], Prompt(CLASSIFY.name))
    for text, output in zip(texts, outputs, strict=False):
        with torch.no_grad():
            chances = reference(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.softmax(-1)
        assert output.text == labels[int(chances.argmax())]
        assert output.score == pytest.approx(float(chances.max()), abs=1e-4)
    assert len({output.text for output in outputs[: len(texts)]}) > 1
    assert outputs[-2].error == "null text" and outputs[-1].truncated and outputs[-1].source_tokens == 128


def test_a_reader_marks_the_likeliest_span_of_a_context(tmp_path: Path, sentences: list[str]) -> None:
    """A context that fits into a window: the span is the best of all of them, tried one by one."""
    import torch

    from raylm.models import load_tokenizer

    reference = save_bert(tmp_path, sentences, "BertForQuestionAnswering")
    model = ModelInfo.load(str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    contexts = [text for text in dict.fromkeys(sentences) if 60 < len(text) < 160][:8]
    rows = [("Which file is open?", context) for context in contexts]
    outputs = load_engine(model, FLOAT).decode(rows, prompt_for(model, ANSWER))
    for (question, context), output in zip(rows, outputs, strict=True):
        encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets, parts = encoded.pop("offset_mapping")[0], encoded.sequence_ids(0)
        with torch.no_grad():
            found = reference(**encoded)
        starts, ends = found.start_logits[0].softmax(0), found.end_logits[0].softmax(0)
        places = [place for place, part in enumerate(parts) if part == 1]
        spans = {
            (float(starts[i] * ends[j]), context[offsets[i][0] : offsets[j][1]])
            for i in places for j in places if i <= j < i + 20
        }  # fmt: skip
        score, text = max(spans)
        none = float(starts[0] * ends[0])
        assert output.text == ("" if none > score else text)
        assert output.score == pytest.approx(max(score, none), rel=1e-3)
    assert any(output.text for output in outputs)


def test_a_long_context_is_read_to_its_end(tmp_path: Path, sentences: list[str]) -> None:
    save_bert(tmp_path, sentences, "BertForQuestionAnswering")
    model = ModelInfo.load(str(tmp_path))
    engine = load_engine(model, FLOAT)
    context = " ".join(sentences[:60])
    [whole] = engine.decode([("Which?", context)], prompt_for(model, ANSWER))
    assert not whole.truncated and whole.source_tokens > 2 * 128, "several windows"
    assert whole.text is not None and whole.text in context
    [cut] = engine.decode([("Which " * 200, context)], prompt_for(model, ANSWER))
    assert cut.truncated


# ------------------------------------------------------------------------------------------- choosing


def test_the_fastest_engine_that_can_is_chosen(
    llama: ModelInfo, model_directory: Path, tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marian = ModelInfo.load(str(model_directory))
    save_bert(tmp_path, sentences, "BertForSequenceClassification")
    classifier, settings = ModelInfo.load(str(tmp_path)), DecodeSettings()
    assert [choose_engine(model, settings, "cpu") for model in (llama, marian, classifier)] == [
        "ctranslate2", "ctranslate2", "transformers",
    ]  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "vllm" or None)
    assert [choose_engine(model, settings, "cuda") for model in (llama, marian, classifier)] == [
        "vllm", "ctranslate2", "transformers",
    ]  # fmt: skip
    with pytest.raises(ArtifactError, match="vllm runs decoders on GPUs; this is a decoder on a cpu"):
        choose_engine(llama, DecodeSettings(engine="vllm"), "cpu")
    with pytest.raises(ArtifactError, match="ctranslate2 does not know a classifier of type bert"):
        choose_engine(classifier, DecodeSettings(engine="ctranslate2"), "cpu")
    with pytest.raises(ArtifactError, match="cannot compute in 'float16', but in"):
        check_engine(llama, DecodeSettings(compute_type="float16"), "cpu")
    with pytest.raises(
        ArtifactError, match="runs in PyTorch computes in float32, float16, bfloat16, auto; found 'int8'"
    ):
        load_engine(classifier, DecodeSettings(compute_type="int8"))


def test_what_is_said_to_be_convertible_has_a_converter() -> None:
    from ctranslate2.converters.transformers import _MODEL_LOADERS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for types in _CONVERTIBLE.values():
        for name in types:
            assert CONFIG_MAPPING_NAMES[name] in _MODEL_LOADERS, name


def test_engines_count_tokens_alike(llama: ModelInfo) -> None:
    engines: list[Engine] = [load_engine(llama, settings) for settings in (FLOAT, BY_TRANSFORMERS)]
    assert len({engine.count_tokens("Find the file.") for engine in engines}) == 1
