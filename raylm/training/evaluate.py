"""`raylm evaluate`: scores of the fine-tuned model on held-out pairs, always beside a baseline."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm import metrics, models
from raylm.errors import ArtifactError
from raylm.progress import Progress
from raylm.settings import Settings
from raylm.storage import PREDICTIONS, Manifest, Stopwatch, StoragePath
from raylm.tasks import SUMMARIZE, TASKS
from raylm.training.batches import Shards, TokenLists, pad_to
from raylm.training.trainer import MODEL, load_trained, prepared_corpus, run_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_BATCH_TOKENS = 8_192
_SAMPLES = 3


@dataclass(frozen=True)
class TestSet:
    """Held-out pairs of one task and language."""

    task: str
    to: str | None
    sources: list[str]
    targets: list[str]
    source_ids: list[np.ndarray[Any, np.dtype[np.int64]]]

    @property
    def name(self) -> str:
        return f"{self.task}-{self.to}" if self.to else self.task


def evaluate(settings: Settings) -> Manifest:
    """Scores for each task and language; predictions are kept beside the manifest in `<run>/evaluation/`.

    Text is generated as the exported model would: greedily or by beam search, up to `finetune.max_target_tokens`.

    :raises ArtifactError: nothing is fine-tuned yet, or the corpus has no test pairs.
    """
    stopwatch = Stopwatch()
    run = run_directory(settings, settings.finetune.name)
    tokens = prepared_corpus(settings)
    directory = run / "evaluation"
    model, checkpoint = load_trained(run)
    key = {
        "checkpoint": checkpoint.directory.name,
        **settings.evaluate.model_dump(),
        "outputs": checkpoint.manifest.outputs,
    }
    earlier = Manifest.read(directory)
    if earlier and earlier.inputs == key:
        return earlier
    tokenizer = models.load_tokenizer(str(run / MODEL))
    test_sets = read_test_sets(tokens, settings.evaluate.rows_per_task)

    scores: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    lines: list[str] = []
    with Progress("evaluate", sum(len(test.sources) for test in test_sets), "rows") as progress:
        done = 0
        for test in test_sets:
            predictions = generate(
                model,
                tokenizer,
                [ids[: settings.finetune.max_source_tokens] for ids in test.source_ids],
                settings.finetune.max_target_tokens,
                settings.evaluate.beam_size,
                lambda rows, before=done: progress.update(before + rows),
            )
            done += len(test.sources)
            names = TASKS[test.task].metrics
            baselines = [baseline(test.task, source) for source in test.sources]
            scores[test.name] = {
                "rows": len(test.sources),
                **metrics.score(names, predictions, test.targets, test.to),
                "baseline": {
                    "method": "lead sentence" if test.task == SUMMARIZE.name else "copy of the source",
                    **metrics.score(names, baselines, test.targets, test.to),
                },
            }
            rows = zip(test.sources, test.targets, predictions, strict=True)
            records = [
                {"task": test.name, "source": source, "target": target, "prediction": prediction}
                for source, target, prediction in rows
            ]
            samples += records[:_SAMPLES]
            lines += [json.dumps(record, ensure_ascii=False) for record in records]
    (directory / PREDICTIONS).write_bytes(("\n".join(lines) + "\n").encode())
    return Manifest(
        stage="evaluate",
        settings={"evaluate": settings.evaluate.model_dump(mode="json")},
        inputs=key,
        outputs=[{"name": PREDICTIONS, "rows": len(lines)}],
        metrics={**scores, "validation_perplexity": checkpoint.manifest.metrics["validation_perplexity"]},
        samples=samples,
        wall_time_s=stopwatch.elapsed_s,
    ).write(directory)


def read_test_sets(tokens: StoragePath, rows_per_task: int) -> list[TestSet]:
    """The first test pairs of each task and language, in the shards' order, which is a random one.

    :raises ArtifactError: the corpus has none.
    """
    shards = Shards(tokens / "pairs" / "test")
    source_ids = TokenLists(shards, "source_ids")
    chosen: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for row, (task, to) in enumerate(
        zip(shards.table["task"].to_pylist(), shards.table["to"].to_pylist(), strict=True)
    ):
        if len(chosen[task, to]) < rows_per_task:
            chosen[task, to].append(row)
    if not chosen:
        raise ArtifactError(f"corpus {tokens}: has no test pairs; give one pair source `split: test`")
    sets = []
    for (task, to), rows in sorted(chosen.items(), key=lambda item: (item[0][0] == SUMMARIZE.name, str(item[0]))):
        table = shards.table.take(rows)
        texts = table["source"].to_pylist(), table["target"].to_pylist()
        sets.append(TestSet(task, to, *texts, [source_ids[row] for row in rows]))
    return sets


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source_ids: list[np.ndarray[Any, np.dtype[np.int64]]],
    max_new_tokens: int,
    beam_size: int,
    progress: Any,
) -> list[str]:
    """A text for each source, in their order; similar lengths are decoded together."""
    import torch

    texts = [""] * len(source_ids)
    order = sorted(range(len(source_ids)), key=lambda i: -len(source_ids[i]))
    done = 0
    while done < len(order):
        batch = order[done : done + max(_BATCH_TOKENS // len(source_ids[order[done]]), 1)]
        inputs = pad_to([source_ids[i] for i in batch], tokenizer.pad_token_id)
        lengths = np.asarray([[len(source_ids[i])] for i in batch])
        with torch.inference_mode():
            outputs = model.generate(
                input_ids=torch.from_numpy(inputs),
                attention_mask=torch.from_numpy((np.arange(inputs.shape[1]) < lengths).astype(np.int64)),
                max_new_tokens=max_new_tokens,
                num_beams=beam_size,
                do_sample=False,
                bad_words_ids=[[tokenizer.pad_token_id]],
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        for i, text in zip(batch, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True):
            texts[i] = text
        done += len(batch)
        progress(done)
    return texts


def baseline(task: str, source: str) -> str:
    """What someone without a model would answer: the source itself, or its first sentence."""
    if task != SUMMARIZE.name:
        return source
    first_line = source.strip().splitlines()[0] if source.strip() else ""
    for mark in (". ", "。", "! ", "? "):
        head, found, _ = first_line.partition(mark)
        if found:
            return head + mark.strip()
    return first_line
