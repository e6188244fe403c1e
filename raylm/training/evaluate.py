"""`raylm evaluate`: scores of the fine-tuned model on held-out pairs, always beside a baseline."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm import metrics, models
from raylm.errors import ArtifactError
from raylm.progress import Progress
from raylm.settings import Settings
from raylm.storage import PREDICTIONS, Manifest, Stopwatch, StoragePath
from raylm.tasks import CLASSIFY, SUMMARIZE, TASKS
from raylm.training.batches import Shards, TokenLists, pad_to
from raylm.training.labels import check_labels, label_counts
from raylm.training.objectives import Tokens, cut, padding_mask
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
    source_ids: list[Tokens]

    @property
    def name(self) -> str:
        return f"{self.task}-{self.to}" if self.to else self.task


def evaluate(settings: Settings) -> Manifest:
    """Scores for each task and language; predictions are kept beside the manifest in `<run>/evaluation/`.

    Text is generated as the exported model would: greedily or by beam search, up to `finetune.max_target_tokens`. A
    classifier is asked for its likeliest label.

    :raises ArtifactError: nothing is fine-tuned yet, the corpus has no test pairs, or one has an unknown label.
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
    is_classifier = models.is_classifier(model.config)
    test_sets = read_test_sets(tokens, settings.evaluate.rows_per_task, labelled=is_classifier)
    if is_classifier:
        check_labels(label_counts(tokens, "test"), models.labels_of(model.config), f"corpus {tokens}: pairs/test")

    scores: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    lines: list[str] = []
    with Progress("evaluate", sum(len(test.sources) for test in test_sets), "rows") as progress:
        done = 0
        for test in test_sets:

            def follow(rows: int, before: int = done) -> None:
                progress.update(before + rows)

            predictions = _answers(model, tokenizer, test, settings, follow)
            done += len(test.sources)
            names = TASKS[test.task].metrics
            method, baselines = baseline(test, tokens)
            scores[test.name] = {
                "rows": len(test.sources),
                **metrics.score(names, predictions, test.targets, test.to),
                "baseline": {"method": method, **metrics.score(names, baselines, test.targets, test.to)},
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


def read_test_sets(tokens: StoragePath, rows_per_task: int, labelled: bool) -> list[TestSet]:
    """The first test pairs of each task and language, in the shards' order, which is a random one.

    :param labelled: the texts to classify, or all but those.
    :raises ArtifactError: the corpus has none.
    """
    shards = Shards(tokens / "pairs" / "test")
    source_ids = TokenLists(shards, "source_ids")
    chosen: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for row, (task, to) in enumerate(
        zip(shards.table["task"].to_pylist(), shards.table["to"].to_pylist(), strict=True)
    ):
        if (task == CLASSIFY.name) == labelled and len(chosen[task, to]) < rows_per_task:
            chosen[task, to].append(row)
    if not chosen:
        kind = "labelled test texts" if labelled else "test pairs"
        raise ArtifactError(f"corpus {tokens}: has no {kind}; give one pair source `split: test`")
    sets = []
    for (task, to), rows in sorted(chosen.items(), key=lambda item: (item[0][0] == SUMMARIZE.name, str(item[0]))):
        table = shards.table.take(rows)
        texts = table["source"].to_pylist(), table["target"].to_pylist()
        sets.append(TestSet(task, to, *texts, [source_ids[row] for row in rows]))
    return sets


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    test: TestSet,
    settings: Settings,
    progress: Callable[[int], None],
) -> list[str]:
    tuning = settings.finetune
    source_ids = [cut(ids, tuning.max_source_tokens, tokenizer.eos_token_id) for ids in test.source_ids]
    if models.is_classifier(model.config):
        return classify(model, tokenizer, source_ids, progress)
    beams = settings.evaluate.beam_size
    return generate(model, tokenizer, source_ids, tuning.max_target_tokens, beams, progress)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source_ids: list[Tokens],
    max_new_tokens: int,
    beam_size: int,
    progress: Callable[[int], None],
) -> list[str]:
    """A text for each source, in their order; similar lengths are decoded together.

    :param progress: is told how many are done.
    """
    import torch

    texts = [""] * len(source_ids)
    is_decoder = models.architecture(model.config) == "decoder"
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    done = 0
    for batch in _length_batches(source_ids):
        input_ids, mask = padded([source_ids[i] for i in batch], pad, at_left=is_decoder)
        with torch.inference_mode():
            outputs = model.generate(
                input_ids=torch.from_numpy(input_ids),
                attention_mask=torch.from_numpy(mask),
                max_new_tokens=max_new_tokens,
                num_beams=beam_size,
                do_sample=False,
                bad_words_ids=[[pad]] if pad != end else None,
                eos_token_id=end,
                pad_token_id=pad,
            )
        answers = outputs[:, input_ids.shape[1] :] if is_decoder else outputs
        for i, text in zip(batch, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            texts[i] = text
        done += len(batch)
        progress(done)
    return texts


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source_ids: list[Tokens],
    progress: Callable[[int], None],
) -> list[str]:
    """The likeliest label of each source, in their order.

    :param progress: is told how many are done.
    """
    import torch

    names = models.labels_of(model.config)
    labels = [""] * len(source_ids)
    done = 0
    for batch in _length_batches(source_ids):
        input_ids, mask = padded([source_ids[i] for i in batch], tokenizer.pad_token_id)
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(mask)).logits
        for i, number in zip(batch, logits.argmax(dim=-1).tolist(), strict=True):  # (B, labels)
            labels[i] = names[number]
        done += len(batch)
        progress(done)
    return labels


def _length_batches(source_ids: list[Tokens]) -> Iterator[list[int]]:
    """The numbers of sources of similar lengths, the longest first, as many as fit into a budget of padded tokens."""
    order = sorted(range(len(source_ids)), key=lambda i: -len(source_ids[i]))
    start = 0
    while start < len(order):
        batch = order[start : start + max(_BATCH_TOKENS // len(source_ids[order[start]]), 1)]
        yield batch
        start += len(batch)


def padded(rows: list[Tokens], pad: int, at_left: bool = False) -> tuple[Tokens, Tokens]:
    """(B, T) ids and (B, T) attention mask.

    :param at_left: a decoder writes on behind the last position, which has to be a token of each row.
    """
    if at_left:
        reversed_ids, reversed_mask = padded([row[::-1] for row in rows], pad)
        return np.ascontiguousarray(reversed_ids[:, ::-1]), np.ascontiguousarray(reversed_mask[:, ::-1])
    input_ids = pad_to(rows, pad)
    return input_ids, padding_mask(rows, input_ids.shape[1])


def baseline(test: TestSet, tokens: StoragePath) -> tuple[str, list[str]]:
    """What someone without a model would answer, and what that is called: the source itself, its first sentence, or the
    label that most training texts have.

    :param tokens: the prepared corpus' directory.
    """
    if test.task == CLASSIFY.name:
        counts = label_counts(tokens, "train")
        majority = min(counts, key=lambda label: (-counts[label], label))
        return f"always '{majority}'", [majority] * len(test.sources)
    if test.task == SUMMARIZE.name:
        return "lead sentence", [lead_sentence(source) for source in test.sources]
    return "copy of the source", test.sources


def lead_sentence(text: str) -> str:
    """The first sentence of a text, at most its first line."""
    first_line = text.strip().splitlines()[0] if text.strip() else ""
    for mark in (". ", "。", "! ", "? "):
        head, found, _ = first_line.partition(mark)
        if found:
            return head + mark.strip()
    return first_line
