"""Fine-tuning beyond encoder-decoders: decoders that write, classifiers, adapters; on real workers where it trains."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm import models
from raylm.corpus.prepare import prepare
from raylm.errors import ArtifactError, SettingsError
from raylm.inference.answers import answer_rows
from raylm.inference.engines import load_engine
from raylm.inference.model import ModelInfo
from raylm.inference.prompts import prompt_for
from raylm.settings import DecodeSettings, Settings
from raylm.settings.training import LoraSettings
from raylm.storage import StoragePath
from raylm.tasks import ANSWER, GENERATE, TRANSLATE
from raylm.training.evaluate import evaluate, lead_sentence
from raylm.training.export import export
from raylm.training.generation import classify, generate, padded
from raylm.training.runs import run_directory
from raylm.training.telemetry import read_metrics
from raylm.training.trained import load_trained
from raylm.training.trainer import finetune, pretrain
from tests.training.runs import changed, losses, on_workers

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
FLOAT = DecodeSettings(compute_type="float32")
GOOD, BAD = ("good", "fine", "lovely", "great"), ("bad", "poor", "awful", "boring")
REST = "the book film hotel room is was very and with a story that we saw read of for once more again"


def run_snippet(card: Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the Python of a model card prints for a text."""
    code = card.read_text().split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(code, {"path": str(card.parent), "text": text})
    return capsys.readouterr().out.strip()


def reviews(rows: int, seed: int) -> pa.Table:
    """Texts of which a single word says whether they are good (1) or bad (0)."""
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(rows)]
    texts = []
    for label in labels:
        words = rng.choices(REST.split(), k=rng.randint(5, 20))
        words.insert(rng.randrange(len(words)), rng.choice((BAD, GOOD)[label]))
        texts.append(" ".join(words))
    return pa.table({"text": texts, "label": [("negative", "positive")[label] for label in labels]})


# ---------------------------------------------------------------------------------- a decoder that writes


@pytest.fixture(scope="module")
def decoder_settings(small_settings: Settings, corpus: StoragePath) -> Settings:
    return changed(
        small_settings,
        model={"family": "llama", "config": SMALL, "name": "llama"},
        pretrain={"name": "llama-start", "workers": 1, "learning_rate": 5e-3},
        finetune={"name": "llama-tuned", "workers": 2, "learning_rate": 5e-3, "steps": 40, "log_every": 1},
    )


@pytest.fixture(scope="module")
def pretrained_decoder(decoder_settings: Settings) -> StoragePath:
    pretrain(decoder_settings)
    return run_directory(decoder_settings, "llama-start")


def test_a_decoder_learns_pairs_and_is_exported(
    decoder_settings: Settings, pretrained_decoder: StoragePath, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finetune(decoder_settings)
    run = run_directory(decoder_settings, "llama-tuned")
    found = losses(run)
    assert sum(found[-3:]) < sum(found[:3]) - 1.5

    scored = evaluate(decoder_settings)
    assert set(scored.metrics) == {"translate-de", "summarize", "validation_perplexity"}
    export(decoder_settings)
    directory = Path(decoder_settings.storage, "models/llama")
    described = json.loads((directory / "raylm.json").read_text())
    assert described["tasks"] == ["translate", "summarize"]
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 48
    assert "max_length" not in generation

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Monday, 5 May 2025"
    ids = np.asarray(tokenizer(f">>de<<{text}</s>", add_special_tokens=False)["input_ids"])
    trained, _ = load_trained(run)
    expected = generate(trained, tokenizer, [ids], 48, 1, lambda rows: None)
    assert generate(model, tokenizer, [ids], 48, 1, lambda rows: None) == expected
    assert run_snippet(directory / "README.md", text, capsys) == expected[0].strip()


def test_a_pretrained_decoder_is_exported_and_writes_on(
    decoder_settings: Settings, pretrained_decoder: StoragePath, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(decoder_settings, model={"name": "llama-pretrained"})
    exported = export(settings, pretrained=True)
    assert export(settings, pretrained=True) == exported
    directory = Path(settings.storage, "models/llama-pretrained")
    described = json.loads((directory / "raylm.json").read_text())
    assert described["tasks"] == ["generate"]
    assert described["max_positions"] == settings.corpus.sequence_length
    assert described["metrics"]["validation_bits_per_byte"] > 0

    model = ModelInfo.load(str(directory))
    with pytest.raises(ArtifactError, match="cannot translate; its tasks: generate"):
        prompt_for(model, TRANSLATE, "de")
    text = "Return the first"
    [output] = answer_rows(load_engine(model, FLOAT), [(text,)], prompt_for(model, GENERATE))
    tokenizer = models.load_tokenizer(str(directory))
    trained, _ = load_trained(pretrained_decoder)
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])
    [expected] = generate(trained, tokenizer, [ids], settings.corpus.sequence_length // 2, 1)
    assert output.text == expected.strip()
    assert (directory / "README.md").read_text().count("bits per byte") == 1
    assert run_snippet(directory / "README.md", text, capsys).startswith(expected.strip())


def test_a_decoder_answers_a_batch_as_it_answers_each_alone(corpus: StoragePath) -> None:
    """Sources of all lengths side by side, which are padded at the left; the answer does not repeat its source."""
    from raylm.settings import ModelSettings

    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    model = models.build_model(models.build_config(ModelSettings(family="llama", config=SMALL), tokenizer), seed=1)
    generator = np.random.default_rng(1)
    sources = [np.append(generator.integers(200, 900, n), tokenizer.eos_token_id) for n in (3, 40, 11, 17)]
    seen: list[int] = []
    together = generate(model.eval(), tokenizer, sources, 12, 1, seen.append)
    alone = [generate(model, tokenizer, [source], 12, 1, seen.append)[0] for source in sources]
    assert together == alone
    assert seen == [4, 1, 1, 1, 1]
    assert all(len(tokenizer(text)["input_ids"]) <= 24 for text in together)
    beams = generate(model, tokenizer, sources, 12, 3, seen.append)
    assert beams == [generate(model, tokenizer, [source], 12, 3, seen.append)[0] for source in sources]


def test_padding_stands_before_the_text_of_a_decoder() -> None:
    rows = [np.asarray([5, 6, 7]), np.asarray([8])]
    ids, mask = padded(rows, pad=9, at_left=True)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.sum(axis=1).tolist() == [3, 1]
    assert padded(rows, pad=9)[0].tolist() == [[5, 6, 7], [8, 9, 9]]


def test_the_first_sentence_is_a_summary() -> None:
    assert lead_sentence("  One. Two.\nThree.") == "One."
    assert lead_sentence("一。二。") == "一。"
    assert lead_sentence("no end\nThree.") == "no end"
    assert lead_sentence(" ") == ""


# ---------------------------------------------------------------------------------------- classifiers


@pytest.fixture(scope="module")
def labelled_settings(
    small_settings: Settings, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Settings:
    """A prepared corpus of documents, labelled reviews and translations, and an encoder of a few thousand weights."""
    directory = tmp_path_factory.mktemp("labelled")
    pq.write_table(reviews(2_000, seed=1), directory / "reviews.parquet")
    source = {"type": "parquet", "path": str(directory / "reviews.parquet"), "source": "text", "target": "label"}
    settings = changed(
        small_settings,
        corpus={
            "name": "labelled",
            "documents": [{"type": "parquet", "path": source["path"]}],
            "pairs": [source | {"task": "classify"}, {"type": "cldr", "to": "de", "rows": 300}],
            "filters": {"min_chars": 10},
            "dedup": {"fuzzy": False},
        },
        model={"family": "bert", "config": SMALL, "name": "bert"},
        pretrain={"name": "bert-start", "workers": 1, "learning_rate": 5e-3},
        finetune={
            "name": "bert-tuned",
            "workers": 2,
            "steps": 40,
            "log_every": 1,
            "learning_rate": 5e-3,
            "warmup_steps": 5,
        },
        evaluate={"rows_per_task": 100},
    )
    prepare(settings)
    return settings


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_is_trained_scored_and_exported(
    labelled_settings: Settings, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An encoder from its pretraining (by itself), and a decoder from nothing (when asked)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    settings = labelled_settings
    if family == "llama":
        values = {"name": "llama-labels", "start": "scratch", "objective": "classify"}
        settings = changed(settings, model={"family": family, "name": "llama-labels"}, finetune=values)
    else:
        pretrain(settings)
    finetune(settings)
    run = run_directory(settings, settings.finetune.name)
    found = losses(run)
    assert found[0] == pytest.approx(np.log(2), abs=0.3)
    assert sum(found[-3:]) / 3 < 0.2

    scored = evaluate(settings)
    assert set(scored.metrics) == {"classify", "validation_perplexity"}
    scores = scored.metrics["classify"]
    assert scores["accuracy"] > 90
    assert scores["macro_f1"] > 90
    assert scores["baseline"]["method"].startswith("always '")
    assert scores["baseline"]["accuracy"] < 70
    assert scores["baseline"]["macro_f1"] < 50

    export(settings)
    directory = Path(settings.storage, "models", settings.model.name)
    described = json.loads((directory / "raylm.json").read_text())
    assert (described["tasks"], described["labels"]) == (["classify"], ["negative", "positive"])
    assert not (directory / "generation_config.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    assert model.config.id2label == {0: "negative", 1: "positive"}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    table = reviews(40, seed=2)
    texts = table["text"].to_pylist()
    ids = [np.asarray(row) for row in tokenizer(texts)["input_ids"]]
    assert all(row[-1] == tokenizer.eos_token_id and row[0] != row[-1] for row in ids)
    trained, _ = load_trained(run)
    answers = classify(trained, tokenizer, ids, lambda rows: None)
    assert classify(model, tokenizer, ids, lambda rows: None) == answers
    assert np.mean([a == b for a, b in zip(answers, table["label"].to_pylist(), strict=True)]) > 0.9
    # What a user of transformers does gives the same, also for a batch of different lengths.
    piped = pipeline("text-classification", model=str(directory), device="cpu")(texts, batch_size=8)
    assert [answer["label"] for answer in piped] == answers
    assert run_snippet(directory / "README.md", texts[0], capsys) == answers[0]
    card = (directory / "README.md").read_text()
    assert "| classify (" in card
    assert "`negative`, `positive`" in card
    assert '"cldr"' not in card  # which this model has not learned from


def test_a_writing_run_leaves_labelled_texts_out(labelled_settings: Settings) -> None:
    """From the same corpus as the classifiers; and what it is tested on are translations."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    settings = changed(
        labelled_settings,
        model={"family": "marian", "config": sizes, "name": "marian"},
        finetune={"name": "writes", "start": "scratch", "steps": 4, "checkpoint_every": 4},
    )
    finetune(settings)
    assert set(evaluate(settings).metrics) == {"translate-de", "validation_perplexity"}
    export(settings)
    assert json.loads(Path(settings.storage, "models/marian/raylm.json").read_text())["tasks"] == ["translate"]


def test_an_encoder_decoder_learns_to_answer(
    small_settings: Settings, ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the columns of questions, texts and answers to a model that `raylm batch-answer` can ask."""
    rows = [
        {"question": f"Where is the {name}?", "text": f"It is late. The {name} is {place}.", "answer": place}
        for name in dict.fromkeys(REST.split())
        for place in ("at home", "on the table", "in the garden", "under the tree", "far away")
    ]
    columns = {"type": "parquet", "task": "answer", "source": "question", "context": "text", "target": "answer"}
    pairs = []
    for name, chosen, split in (("learned", rows[:70], None), ("held out", rows[70:], "test")):
        pq.write_table(pa.Table.from_pylist(chosen), tmp_path / f"{name}.parquet")
        pairs.append(columns | {"path": str(tmp_path / f"{name}.parquet"), "split": split})
    settings = changed(
        small_settings,
        corpus={"name": "questions", "documents": [], "pairs": pairs, "dedup": {"fuzzy": False}, "validation": 0.2},
        model={"name": "answers"},
        finetune={"name": "answers", "start": "scratch", "workers": 1, "task_weights": {}, "log_every": 1},
    )
    prepare(settings)
    finetune(settings)
    found = losses(run_directory(settings, "answers"))
    assert sum(found[-3:]) < sum(found[:3]) - 0.5
    scores = evaluate(settings).metrics["answer"]
    assert {"f1", "exact_match"} < set(scores)
    assert scores["baseline"]["method"] == "sentence most like the question"
    assert scores["baseline"]["f1"] > 50

    export(settings)
    directory = Path(settings.storage, "models/answers")
    assert json.loads((directory / "raylm.json").read_text())["tasks"] == ["answer"]
    model = ModelInfo.load(str(directory))
    prompt = prompt_for(model, ANSWER)
    [output] = answer_rows(load_engine(model, FLOAT), [(rows[0]["question"], rows[0]["text"])], prompt)
    asked = f"question: {rows[0]['question']} context: {rows[0]['text']}"
    assert output.text and run_snippet(directory / "README.md", asked, capsys)[:100] == output.text[:100]


def test_a_label_that_was_not_learned_is_named_before_training(labelled_settings: Settings, tmp_path: Path) -> None:
    pq.write_table(reviews(200, seed=3), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["neither good nor bad"], "label": ["mixed"]}), tmp_path / "b.parquet")
    names = {"type": "parquet", "source": "text", "target": "label", "task": "classify"}
    sources = [
        {**names, "path": str(tmp_path / "a.parquet")},
        {**names, "path": str(tmp_path / "b.parquet"), "split": "test"},
    ]
    settings = changed(
        labelled_settings,
        corpus={"name": "mixed", "pairs": sources, "documents": []},
        finetune={"name": "mixed", "start": "scratch"},
    )
    prepare(settings)
    with pytest.raises(ArtifactError, match="pairs/test has 1 times the label 'mixed', which no training text has"):
        finetune(settings)


def test_a_corpus_without_labels_is_refused(small_settings: Settings, corpus: StoragePath) -> None:
    settings = changed(
        small_settings,
        model={"family": "bert", "config": SMALL},
        finetune={"name": "nothing", "start": "scratch"},
    )
    with pytest.raises(ArtifactError, match="pairs/train has no labelled texts"):
        finetune(settings)


def test_an_encoder_decoder_has_no_labels_to_give(labelled_settings: Settings) -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    settings = changed(
        labelled_settings,
        model={"family": "marian", "config": sizes},
        finetune={"name": "unlabelled", "start": "scratch", "objective": "classify"},
    )
    with pytest.raises(SettingsError, match="objective 'classify' does not fit an encoder-decoder; use 'seq2seq'"):
        finetune(settings)


@pytest.mark.slow
def test_chinese_sentiment(small_settings: Settings, data: Path, ray_cluster: None) -> None:
    """A small encoder from nothing, some minutes: well above the majority, near a linear model on TF-IDF (0.84)."""
    names = {"type": "parquet", "source": "text", "target": "label", "task": "classify"}
    sources = [
        {**names, "path": str(data / "classify.zh.sentiment.train.parquet")},
        {**names, "path": str(data / "classify.zh.sentiment.validation.parquet"), "split": "test"},
    ]
    corpus = {"documents": [], "pairs": sources, "name": "zh", "tokenizer": {"vocab_size": 6_000, "languages": []}}
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
    settings = changed(
        small_settings,
        corpus=corpus,
        model={"family": "bert", "config": sizes, "name": "zh"},
        finetune={
            "name": "zh",
            "start": "scratch",
            "workers": 1,
            "steps": 300,
            "learning_rate": 1e-3,
            "global_batch_tokens": 6_144,
            "micro_batch_tokens": 6_144,
            "checkpoint_every": 100,
            "validation_batches": 16,
            "max_source_tokens": 128,
        },
        evaluate={"rows_per_task": 1_000},
    )
    prepare(settings)
    finetune(settings)
    scores = evaluate(settings).metrics["classify"]
    assert scores["baseline"]["accuracy"] < 55
    assert scores["accuracy"] > 75
    assert scores["macro_f1"] > 75


# ------------------------------------------------------------------------------------------ new heads


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory, corpus: StoragePath) -> Path:
    """A small encoder with its language-model head, saved as the hub has it."""
    from raylm.settings import ModelSettings

    directory = tmp_path_factory.mktemp("language-model")
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    config = models.build_config(ModelSettings(family="bert", config=SMALL), tokenizer)
    models.build_model(config, seed=5).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_new_head_stands_on_the_weights_that_are_there(language_model: Path, tmp_path: Path) -> None:
    import torch

    base = models.load_model(str(language_model))
    config = models.with_head(base.config, ["a", "b", "c"], pad_token_id=0)
    assert not models.is_classifier(base.config)
    assert models.is_classifier(config)
    model = models.load_model(str(language_model), config, seed=7)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.classifier.out_features == 3
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    again = models.load_model(str(language_model), config, seed=7)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(
        model.classifier.weight, models.load_model(str(language_model), config, seed=8).classifier.weight
    )

    model.save_pretrained(tmp_path)
    saved = models.load_config(str(tmp_path))
    assert models.labels_of(saved) == ["a", "b", "c"]
    # The same labels in another order: the head that there is knows them by its own numbers.
    assert models.labels_of(models.with_head(saved, ["c", "b", "a"], 0)) == ["a", "b", "c"]
    other = models.load_model(str(tmp_path), models.with_head(saved, ["x", "y"], 0))
    assert other.classifier.out_features == 2
    back = models.load_model(str(tmp_path), models.with_head(saved, [], 0))
    assert type(back).__name__ == "BertForMaskedLM"


def test_there_is_no_classifier_of_every_kind(corpus: StoragePath) -> None:
    from raylm.settings import ModelSettings

    config = models.build_config(ModelSettings(), models.load_tokenizer(str(corpus / "tokenizer")))
    with pytest.raises(SettingsError, match="no classifier of the kind 'marian'"):
        models.with_head(config, ["a", "b"], 0)


def test_every_tokenizer_has_an_end_and_padding(language_model: Path, tmp_path: Path) -> None:
    """Llama's has no padding, BERT's no end, but a separator."""
    from transformers import PreTrainedTokenizerFast

    file = str(language_model / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, eos_token="</s>").save_pretrained(tmp_path / "llama")
    loaded = models.load_tokenizer(str(tmp_path / "llama"))
    assert (loaded.eos_token, loaded.pad_token) == ("</s>", "</s>")
    PreTrainedTokenizerFast(tokenizer_file=file, sep_token="</s>", pad_token="<pad>").save_pretrained(tmp_path / "bert")
    loaded = models.load_tokenizer(str(tmp_path / "bert"))
    assert (loaded.eos_token, loaded.pad_token) == ("</s>", "<pad>")


# ------------------------------------------------------------------------------------------- adapters


FAMILIES = {
    "marian": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    "llama": SMALL,
    "bert": SMALL,
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1},
}


def small_model(corpus: StoragePath, family: str, labels: tuple[str, ...] = ()) -> Any:
    from raylm.settings import ModelSettings

    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    config = models.build_config(ModelSettings(family=family, config=FAMILIES[family]), tokenizer)  # type: ignore[arg-type]
    return models.build_model(models.with_head(config, labels, tokenizer.pad_token_id), seed=2)


def inputs_for(model: Any) -> dict[str, Any]:
    import torch

    ids = torch.arange(200, 224).reshape(2, 12)
    return {"input_ids": ids} | ({"decoder_input_ids": ids + 30} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize(
    ("family", "labels"),
    [("marian", ()), ("llama", ()), ("bert", ()), ("t5", ()), ("bert", ("a", "b")), ("llama", ("a", "b"))],
)
def test_adapters_learn_and_become_part_of_the_weights(
    corpus: StoragePath, family: str, labels: tuple[str, ...]
) -> None:
    import torch

    model = small_model(corpus, family, labels)
    inputs = inputs_for(model)
    whole = models.parameter_count(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        untrained = model.eval()(**inputs).logits

    adapted = models.with_lora(model, LoraSettings(rank=4, alpha=8))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert any("modules_to_save" in name for name in trained) == bool(labels)
    assert models.parameter_count(adapted) == sum(p.numel() for p in trained.values()) < whole / 2
    with torch.no_grad():
        assert torch.allclose(adapted.eval()(**inputs).logits, untrained, atol=1e-6)  # an adapter begins as nothing

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    adapted.train()
    for _ in range(5):
        logits = adapted(**inputs).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.size(-1)), torch.full((logits[..., 0].numel(),), logits.size(-1) - 2)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        learned = adapted.eval()(**inputs).logits
    assert (learned - untrained).abs().max() > 0.01
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): parameter
        for name, parameter in adapted.named_parameters()
        if name not in trained
    }
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], parameter) for name, parameter in before.items())

    plain = models.merged(adapted)
    assert type(plain) is type(model)
    assert {name for name, _ in plain.named_parameters()} == before.keys()
    assert models.parameter_count(plain) == whole
    with torch.no_grad():
        assert torch.allclose(plain.eval()(**inputs).logits, learned, atol=1e-5)


def test_adapters_stand_where_they_are_wanted(corpus: StoragePath) -> None:
    adapted = models.with_lora(small_model(corpus, "llama"), LoraSettings(target_modules=("q_proj", "v_proj")))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "v_proj"}
    every = models.with_lora(small_model(corpus, "llama"), LoraSettings())
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, p in every.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(SettingsError, match=r"finetune.lora.target_modules: \['query'\] fits no layer.*q_proj"):
        models.with_lora(small_model(corpus, "llama"), LoraSettings(target_modules=("query",)))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_trains_adapters_alone(decoder_settings: Settings, pretrained_decoder: StoragePath, stage: int) -> None:
    """What comes out is a plain model: adapters are in the weights that have them, the others are as they were."""
    import torch

    values = {"name": f"llama-lora-{stage}", "lora": {"rank": 4, "target_modules": ["q_proj"]}, "zero_stage": stage}
    settings = changed(decoder_settings, finetune=values | {"steps": 12, "checkpoint_every": 6})
    manifest = finetune(settings)
    run = run_directory(settings, settings.finetune.name)
    assert losses(run)[-1] < losses(run)[0]
    # Two layers, each with matrices of 32 × 4 and 4 × 32.
    assert manifest.metrics["parameters"] == 2 * 2 * 32 * 4

    start, (tuned, best) = models.load_model(f"{run}/start"), load_trained(run)
    weights = dict(tuned.named_parameters())
    assert weights.keys() == dict(start.named_parameters()).keys()
    moved = {name for name, p in start.named_parameters() if not torch.equal(p, weights[name])}
    assert moved == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert best.validation_loss == min(row["validation_loss"] for row in read_metrics(run) if "validation_loss" in row)
    assert evaluate(settings).metrics["translate-de"]["rows"] == 20


@pytest.fixture(scope="module")
def frozen(small_settings: Settings, corpus: StoragePath) -> Path:
    """Checkpoints `stage0` to `stage3` of adapters beside frozen weights, of two workers after two steps."""

    root = Path(small_settings.storage, "frozen")

    def train(config: dict[str, Any]) -> None:
        import ray.train.torch
        import torch
        import torch.distributed as dist

        from raylm.training.zero import build_engine, deepspeed_config, prepare_backend

        device = ray.train.torch.get_device()
        prepare_backend(device)
        for stage in (0, 1, 2, 3):
            settings = small_settings.finetune.model_copy(update={"zero_stage": stage, "learning_rate": 1e-2})
            adapted = models.with_lora(small_model(corpus, "llama"), LoraSettings())
            engine = build_engine(adapted, settings, deepspeed_config(settings, 2, 1, "fp32"), device)
            inputs = {name: tensor.to(device) for name, tensor in inputs_for(adapted).items()}
            for _ in range(2):
                engine.backward(engine(**inputs).logits.logsumexp(-1).sum())
                engine.step()
            engine.save_checkpoint(str(root / f"stage{stage}"), tag="zero", save_latest=False)
            engine.eval()
            with torch.no_grad():
                logits = engine(**inputs).logits
            if dist.get_rank() == 0:
                torch.save(logits, root / f"stage{stage}" / "logits.pt")

    on_workers(2, train, root)
    return root


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_weights_are_in_a_checkpoint(frozen: Path, corpus: StoragePath, stage: int) -> None:
    """Put together, a checkpoint is all that the workers had, without the model that they started from."""
    import torch

    from raylm.training.zero import whole_weights

    fresh = small_model(corpus, "llama")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    adapted = models.with_lora(fresh, LoraSettings())
    missing, unexpected = adapted.load_state_dict(whole_weights(frozen / f"stage{stage}", stage), strict=False)
    assert not unexpected
    assert not {name for name, _ in adapted.named_parameters()} & set(missing)
    adapted.tie_weights()
    with torch.no_grad():
        found = models.merged(adapted).eval()(**inputs_for(fresh)).logits
    assert torch.allclose(found, torch.load(frozen / f"stage{stage}" / "logits.pt"), atol=1e-5)
