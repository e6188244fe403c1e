"""`raylm export`: the fine-tuned model as a directory that `transformers` loads untouched."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import __version__
from raylm.progress import note
from raylm.settings import Settings, model_directory
from raylm.storage import MANIFEST, Manifest, Stopwatch, StoragePath
from raylm.tasks import SUMMARIZE, TRANSLATE
from raylm.training import checkpoint as checkpoints
from raylm.training.trainer import prepared_corpus, run_directory, save_model

if TYPE_CHECKING:
    from raylm.training.checkpoint import Checkpoint


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
        _write_generation_config(directory, settings)
        description = _describe(settings, lineage)
        (directory / "raylm.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        (directory / "README.md").write_text(model_card(settings, best, description))
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


def _describe(settings: Settings, lineage: dict[str, Any]) -> dict[str, Any]:
    """What the inference side needs to know: tasks, languages, limits; and where the model is from."""
    corpus = Manifest.read(prepared_corpus(settings))
    pairs = corpus.settings["corpus"]["pairs"] if corpus else []
    languages = sorted({pair["to"] for pair in pairs if pair.get("to")})
    summarizes = any(pair["type"] == "docstrings" or pair.get("task") == SUMMARIZE.name for pair in pairs)
    return {
        "raylm": __version__,
        "tasks": [TRANSLATE.name] * bool(languages) + [SUMMARIZE.name] * summarizes,
        "languages": languages,
        "max_source_tokens": settings.finetune.max_source_tokens,
        "max_target_tokens": settings.finetune.max_target_tokens,
        "lineage": {key: lineage[key] for key in ("run", "checkpoint", "weights")},
        "metrics": lineage["metrics"],
    }


def _write_generation_config(directory: Path, settings: Settings) -> None:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(directory)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        bad_words_ids=[[config.pad_token_id]],
        max_length=settings.finetune.max_target_tokens,
        num_beams=settings.evaluate.beam_size,
    ).save_pretrained(directory)


def model_card(settings: Settings, best: Checkpoint, description: dict[str, Any]) -> str:
    """A model card in the hub's form: what it does, what it learned from, how it scores, how to use it."""
    languages = description["languages"]
    tags = "".join(f"  - {task}\n" for task in description["tasks"])
    scores = ["| test set | score | model | baseline |", "|---|---|---|---|"]
    for name, result in description["metrics"].items():
        if isinstance(result, dict):
            for metric, value in result.items():
                if isinstance(value, float):
                    scores.append(
                        f"| {name} ({result['rows']} rows) | {metric} | {value} | {result['baseline'][metric]} |"
                    )
    prompts = ", ".join(f"`{TRANSLATE.prompt_token(language)}`" for language in languages)
    if SUMMARIZE.name in description["tasks"]:
        prompts = ", ".join(filter(None, [prompts, f"`{SUMMARIZE.prompt_token()}`"]))
    example = TRANSLATE.prompt_token(languages[0]) if languages else SUMMARIZE.prompt_token()
    sources = "\n".join(
        f"- {json.dumps(source, ensure_ascii=False)}"
        for source in settings.model_dump(mode="json")["corpus"]["documents"]
        + settings.model_dump(mode="json")["corpus"]["pairs"]
    )
    return f"""---
library_name: transformers
tags:
{tags}---

# {settings.model.name}

A {settings.model.family} model ({settings.model.size}), trained with raylm {__version__}. The first token says what is
wanted: {prompts}. Sources are read up to {description["max_source_tokens"]} tokens.

## Scores on held-out pairs

{chr(10).join(scores)}

Validation loss {best.validation_loss:.4f} nats per token at step {best.step}.

## Learned from

{sources}

## Use

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer({example!r} + text + tokenizer.eos_token, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])
```
"""
