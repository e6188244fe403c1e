"""`raylm export`: a trained model as a directory that `transformers` loads untouched."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import __version__, models
from raylm.errors import TrainingError
from raylm.progress import note
from raylm.settings import ModelSettings, Settings, model_directory
from raylm.storage import MANIFEST, Manifest, Stopwatch, StoragePath, without_passwords
from raylm.tasks import CLASSIFY, GENERATE, LEARNED, SUMMARIZE, TASKS, TRANSLATE
from raylm.training import checkpoint as checkpoints
from raylm.training.examples import sequence_length
from raylm.training.runs import prepared_corpus, run_directory, settings_of, sources_of
from raylm.training.trained import save_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.training.checkpoint import Checkpoint

_SHOWN_LABELS = 20
_HEADS = {
    "decoder": "AutoModelForCausalLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModelForMaskedLM",
}


def export(settings: Settings, pretrained: bool = False) -> Manifest:
    """The best checkpoint of the fine-tuning run in `<storage>/models/<name>`, with tokenizer and model card.

    :param pretrained: that of the pretraining run instead: a decoder writes on from any text, other models are there to
        be fine-tuned.
    :raises ArtifactError: nothing is trained yet.
    """
    stopwatch = Stopwatch()
    training = settings.pretrain if pretrained else settings.finetune
    run = run_directory(settings, training.name)
    settings = settings_of(run, settings, training)
    target = StoragePath(model_directory(settings))
    best = checkpoints.best(run, is_read=False)
    evaluation = Manifest.read(run / "evaluation")
    if evaluation and evaluation.inputs.get("outputs") != best.manifest.outputs:
        note(f"export: without the scores of {run / 'evaluation'}, of another checkpoint; `raylm evaluate` renews them")
        evaluation = None
    lineage = {
        "run": str(run),
        "checkpoint": best.directory.name,
        "weights": [entry["xxh3_128"] for entry in best.manifest.outputs],
        "metrics": evaluation.metrics if evaluation else _validated(best),
        "beam_size": settings.evaluate.beam_size,
    }
    earlier = Manifest.read(target)
    if earlier and earlier.inputs == lineage:
        note(f"export: {target} is up to date")
        return earlier
    (target / MANIFEST).delete()
    with tempfile.TemporaryDirectory(prefix="raylm-export-") as local:
        directory = Path(local)
        if save_model(run, directory).manifest.outputs != best.manifest.outputs:
            raise TrainingError(f"run {run}: has come to a better checkpoint meanwhile; export it once more")
        config = models.load_config(local)
        tokens = prepared_corpus(settings)
        sources = sources_of(run, tokens)
        length = sequence_length(tokens) if pretrained else None
        description = _describe(settings, config, lineage, sources["pairs"], length)
        if models.is_classifier(config):
            _frame_texts(directory, settings.finetune.max_source_tokens)
        elif models.architecture(config) != "encoder":
            _write_generation_config(directory, config, description["max_target_tokens"], settings.evaluate.beam_size)
        (directory / "raylm.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        card = model_card(settings.model, sources, best, description, models.architecture(config))
        (directory / "README.md").write_text(card)
        target.upload_files(directory)
        outputs = [{"name": file.name, "bytes": file.stat().st_size} for file in sorted(directory.iterdir())]
    return Manifest(
        stage="export",
        settings={"model": settings.model.model_dump(mode="json")},
        inputs=lineage,
        outputs=outputs,
        metrics={"validation_loss": best.validation_loss},
        wall_time_s=stopwatch.elapsed_s,
    ).write(target)


def _validated(best: Checkpoint) -> dict[str, Any]:
    """The numbers of a checkpoint's validation."""
    found = best.manifest.metrics
    return {name: found[name] for name in found if name.startswith("validation_") and name != "validation_loss"}


def _describe(
    settings: Settings,
    config: PretrainedConfig,
    lineage: dict[str, Any],
    pairs: list[dict[str, Any]],
    length: int | None,
) -> dict[str, Any]:
    """What the inference side needs to know: tasks, languages or labels, limits; and where the model is from.

    :param pairs: the sources of what was learned.
    :param length: of the sequences that a model without fine-tuning has read.
    """
    if length is not None:
        described = _pretrained(models.architecture(config), length)
    elif models.is_classifier(config):
        described = _labelling(settings, models.labels_of(config))
    else:
        described = _writing(settings, pairs)
    return {
        "raylm": __version__,
        **described,
        "lineage": {key: lineage[key] for key in ("run", "checkpoint", "weights")},
        "metrics": lineage["metrics"],
    }


def _writing(settings: Settings, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    def task_of(pair: dict[str, Any]) -> str:
        return SUMMARIZE.name if pair["type"] == "docstrings" else str(pair.get("task", TRANSLATE.name))

    learned = {task_of(pair) for pair in pairs}
    return {
        "tasks": [task for task in LEARNED if task in learned and task != CLASSIFY.name],
        "languages": sorted({pair["to"] for pair in pairs if pair.get("to") and task_of(pair) == TRANSLATE.name}),
        "max_source_tokens": settings.finetune.max_source_tokens,
        "max_target_tokens": settings.finetune.max_target_tokens,
    }


def _labelling(settings: Settings, labels: list[str]) -> dict[str, Any]:
    return {
        "tasks": [CLASSIFY.name],
        "languages": [],
        "labels": labels,
        "max_source_tokens": settings.finetune.max_source_tokens,
    }


def _pretrained(shape: models.Architecture, length: int) -> dict[str, Any]:
    """:param length: tokens of the sequences that were read; what lies beyond is nothing that was learned."""
    return {
        "tasks": [GENERATE.name] * (shape == "decoder"),
        "languages": [],
        "max_source_tokens": length,
        "max_target_tokens": length,
        "max_positions": length,
    }


def _frame_texts(directory: Path, max_tokens: int) -> None:
    """Let the tokenizer of a directory frame and cut texts as the classifier has learned them: with the end token last.

    Then `pipeline("text-classification")`, and whatever else knows nothing of raylm, gives it what it expects.
    """
    from tokenizers.processors import TemplateProcessing

    tokenizer = models.load_tokenizer(str(directory))
    opening, end = tokenizer("")["input_ids"], tokenizer.eos_token_id
    if end not in opening:
        names = tokenizer.convert_ids_to_tokens(opening)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*names, "$A", tokenizer.eos_token],
            special_tokens=[*zip(names, opening, strict=True), (tokenizer.eos_token, end)],
        )
    tokenizer.model_max_length = max_tokens
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(directory)


def _write_generation_config(directory: Path, config: PretrainedConfig, max_tokens: int, beam_size: int) -> None:
    from transformers import GenerationConfig

    tokenizer = models.load_tokenizer(str(directory))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=end,
        pad_token_id=pad,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        bad_words_ids=[[pad]] if pad != end else None,
        num_beams=beam_size,
        max_new_tokens=max_tokens,
    ).save_pretrained(directory)


# ------------------------------------------------------------------------------------- the model card


def model_card(
    model: ModelSettings,
    sources: dict[str, list[dict[str, Any]]],
    best: Checkpoint,
    description: dict[str, Any],
    shape: models.Architecture,
) -> str:
    """A model card in the hub's form: what it does, what it learned from, how it scores, how to use it."""
    tags = "".join(f"  - {task}\n" for task in description["tasks"])
    scores = ["| test set | score | model | baseline |", "|---|---|---|---|"]
    for name, result in description["metrics"].items():
        if isinstance(result, dict):
            for metric, value in result.items():
                if isinstance(value, float):
                    scores.append(
                        f"| {name} ({result['rows']} rows) | {metric} | {value} | {result['baseline'][metric]} |"
                    )
        elif isinstance(result, float):
            scores.append(f"| validation | {name.removeprefix('validation_').replace('_', ' ')} | {result:.4g} | |")
    is_classifier, is_pretrained = "labels" in description, "max_positions" in description
    pairs = [source for source in sources["pairs"] if (source.get("task") == CLASSIFY.name) == is_classifier]
    learned_from = sources["documents"] + pairs * (not is_pretrained)
    listed = "\n".join(f"- {json.dumps(source, ensure_ascii=False)}" for source in learned_from)
    made = f"A {model.family} model ({model.size})"
    if model.start_from:
        made = f"A model that started from {without_passwords(model.start_from)}"
    return f"""---
library_name: transformers
{"pipeline_tag: text-classification" + chr(10) if is_classifier else ""}tags:
{tags}---

# {model.name}

{made}, trained with raylm {__version__}. {_labels(description) if is_classifier else _prompts(description)} Sources are
read up to {description["max_source_tokens"]} tokens.

## Scores on held-out {"texts" if is_classifier or is_pretrained else "pairs"}

{chr(10).join(scores)}

Validation loss {best.validation_loss:.4f} nats per {"text" if is_classifier else "token"} at step {best.step}.

## Learned from

{listed}

## Use

```python
{_use(description, shape)}
```
"""


def _labels(description: dict[str, Any]) -> str:
    labels: list[str] = description["labels"]
    shown = ", ".join(f"`{label}`" for label in labels[:_SHOWN_LABELS]) + ", …" * (len(labels) > _SHOWN_LABELS)
    return f"It gives a text one of {len(labels):,} labels: {shown}."


def _prompts(description: dict[str, Any]) -> str:
    if GENERATE.name in description["tasks"]:
        return "It is pretrained, and writes on from a text."
    tokens = _prompt_tokens(description)
    if not tokens:
        return "It is pretrained, to be fine-tuned on labelled pairs or texts."
    return f"The first token says what is wanted: {', '.join(f'`{token}`' for token in tokens)}."


def _prompt_tokens(description: dict[str, Any]) -> list[str]:
    languages = [TRANSLATE.prompt_token(language) for language in description["languages"]]
    others = [TASKS[task].token for task in description["tasks"]]
    return [token for token in [*languages, *others] if token]


def _use(description: dict[str, Any], shape: models.Architecture) -> str:
    """Python that asks the model in a directory `path` about a `text`."""
    if "labels" in description:
        return """from transformers import pipeline

classify = pipeline("text-classification", model=path)
print(classify(text, truncation=True)[0]["label"])"""
    tokens = _prompt_tokens(description)
    if not tokens and shape != "decoder":
        return f"""from transformers import AutoTokenizer, {_HEADS[shape]}

model = {_HEADS[shape]}.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)"""
    answer = '[:, inputs["input_ids"].shape[1] :]' if shape == "decoder" else ""
    prompt = f"{tokens[0]!r} + text + tokenizer.eos_token" if tokens else "text"
    return f"""from transformers import {_HEADS[shape]}, AutoTokenizer

model = {_HEADS[shape]}.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = {prompt}
inputs = tokenizer(prompt, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
answer = model.generate(**inputs){answer}
print(tokenizer.batch_decode(answer, skip_special_tokens=True)[0])"""
