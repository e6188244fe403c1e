"""`raylm export`: the fine-tuned model as a directory that `transformers` loads untouched."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import __version__, models
from raylm.progress import note
from raylm.settings import Settings, model_directory
from raylm.storage import MANIFEST, Manifest, Stopwatch, StoragePath
from raylm.tasks import CLASSIFY, SUMMARIZE, TRANSLATE
from raylm.training import checkpoint as checkpoints
from raylm.training.trainer import prepared_corpus, run_directory, save_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.training.checkpoint import Checkpoint

_SHOWN_LABELS = 20


def export(settings: Settings) -> Manifest:
    """The best checkpoint of the fine-tuning run in `<storage>/models/<name>`, with tokenizer and model card.

    :raises ArtifactError: nothing is fine-tuned yet.
    """
    stopwatch = Stopwatch()
    run = run_directory(settings, settings.finetune.name)
    target = StoragePath(model_directory(settings))
    best = checkpoints.best(run)
    evaluation = Manifest.read(run / "evaluation")
    lineage = {
        "run": str(run),
        "checkpoint": best.directory.name,
        "weights": [entry["xxh3_128"] for entry in best.manifest.outputs],
        "metrics": evaluation.metrics if evaluation else {},
    }
    earlier = Manifest.read(target)
    if earlier and earlier.inputs == lineage:
        note(f"export: {target} is up to date")
        return earlier
    (target / MANIFEST).delete()
    with tempfile.TemporaryDirectory(prefix="raylm-export-") as local:
        directory = Path(local)
        save_model(run, directory)
        config = models.load_config(local)
        if models.is_classifier(config):
            _frame_texts(directory, settings.finetune.max_source_tokens)
        else:
            _write_generation_config(directory, config, settings)
        description = _describe(settings, config, lineage)
        (directory / "raylm.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        (directory / "README.md").write_text(model_card(settings, best, description, models.architecture(config)))
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


def _describe(settings: Settings, config: PretrainedConfig, lineage: dict[str, Any]) -> dict[str, Any]:
    """What the inference side needs to know: tasks, languages or labels, limits; and where the model is from."""
    corpus = Manifest.read(prepared_corpus(settings))
    pairs = corpus.settings["corpus"]["pairs"] if corpus else []
    languages = sorted({pair["to"] for pair in pairs if pair.get("to")})
    summarizes = any(pair["type"] == "docstrings" or pair.get("task") == SUMMARIZE.name for pair in pairs)
    writing: dict[str, Any] = {
        "tasks": [TRANSLATE.name] * bool(languages) + [SUMMARIZE.name] * summarizes,
        "languages": languages,
        "max_source_tokens": settings.finetune.max_source_tokens,
        "max_target_tokens": settings.finetune.max_target_tokens,
    }
    labelling: dict[str, Any] = {
        "tasks": [CLASSIFY.name],
        "languages": [],
        "labels": models.labels_of(config),
        "max_source_tokens": settings.finetune.max_source_tokens,
    }
    return {
        "raylm": __version__,
        **(labelling if models.is_classifier(config) else writing),
        "lineage": {key: lineage[key] for key in ("run", "checkpoint", "weights")},
        "metrics": lineage["metrics"],
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


def _write_generation_config(directory: Path, config: PretrainedConfig, settings: Settings) -> None:
    from transformers import GenerationConfig

    tokenizer = models.load_tokenizer(str(directory))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    # What a decoder writes stands behind what it reads: a bound on both together would be none on the answer.
    length = "max_new_tokens" if models.architecture(config) == "decoder" else "max_length"
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=end,
        pad_token_id=pad,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        bad_words_ids=[[pad]] if pad != end else None,
        num_beams=settings.evaluate.beam_size,
        **{length: settings.finetune.max_target_tokens},
    ).save_pretrained(directory)


# ------------------------------------------------------------------------------------- the model card


def model_card(settings: Settings, best: Checkpoint, description: dict[str, Any], shape: models.Architecture) -> str:
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
    is_classifier = "labels" in description
    corpus = settings.model_dump(mode="json")["corpus"]
    pairs = [source for source in corpus["pairs"] if (source.get("task") == CLASSIFY.name) == is_classifier]
    sources = "\n".join(f"- {json.dumps(source, ensure_ascii=False)}" for source in corpus["documents"] + pairs)
    made = f"A {settings.model.family} model ({settings.model.size})"
    if settings.model.start_from:
        made = f"A model that started from {settings.model.start_from}"
    return f"""---
library_name: transformers
{"pipeline_tag: text-classification" + chr(10) if is_classifier else ""}tags:
{tags}---

# {settings.model.name}

{made}, trained with raylm {__version__}. {_labels(description) if is_classifier else _prompts(description)} Sources are
read up to {description["max_source_tokens"]} tokens.

## Scores on held-out {"texts" if is_classifier else "pairs"}

{chr(10).join(scores)}

Validation loss {best.validation_loss:.4f} nats per {"text" if is_classifier else "token"} at step {best.step}.

## Learned from

{sources}

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
    return f"The first token says what is wanted: {', '.join(f'`{token}`' for token in _prompt_tokens(description))}."


def _prompt_tokens(description: dict[str, Any]) -> list[str]:
    tokens = [TRANSLATE.prompt_token(language) for language in description["languages"]]
    return tokens + [SUMMARIZE.prompt_token()] * (SUMMARIZE.name in description["tasks"])


def _use(description: dict[str, Any], shape: models.Architecture) -> str:
    """Python that asks the model in a directory `path` about a `text`."""
    if "labels" in description:
        return """from transformers import pipeline

classify = pipeline("text-classification", model=path)
print(classify(text, truncation=True)[0]["label"])"""
    head = "AutoModelForCausalLM" if shape == "decoder" else "AutoModelForSeq2SeqLM"
    answer = '[:, inputs["input_ids"].shape[1] :]' if shape == "decoder" else ""
    return f"""from transformers import {head}, AutoTokenizer

model = {head}.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = {_prompt_tokens(description)[0]!r} + text + tokenizer.eos_token
inputs = tokenizer(prompt, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
answer = model.generate(**inputs){answer}
print(tokenizer.batch_decode(answer, skip_special_tokens=True)[0])"""
