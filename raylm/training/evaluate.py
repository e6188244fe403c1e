"""`raylm evaluate`: scores of the fine-tuned model on held-out pairs, always beside a baseline."""

from __future__ import annotations

import json
from typing import Any

from raylm import metrics, models
from raylm.progress import Progress
from raylm.sentences import split_text
from raylm.settings import Settings
from raylm.storage import PREDICTIONS, Manifest, Stopwatch, StoragePath
from raylm.tasks import ANSWER, CLASSIFY, SUMMARIZE, TASKS
from raylm.training import checkpoint as checkpoints
from raylm.training.generation import HeldOut, answers, read_held_out
from raylm.training.labels import check_labels, label_counts
from raylm.training.runs import MODEL, corpus_fingerprint, prepared_corpus, run_directory, settings_of
from raylm.training.start import check_tokenizer
from raylm.training.trained import load_trained

_SAMPLES = 3


def evaluate(settings: Settings) -> Manifest:
    """Scores for each task and language; predictions are kept beside the manifest in `<run>/evaluation/`.

    Text is generated as the exported model would: greedily or by beam search, up to the run's `max_target_tokens`. A
    classifier is asked for its likeliest label.

    :raises ArtifactError: nothing is fine-tuned yet, the corpus has no test pairs, or one has an unknown label.
    """
    stopwatch = Stopwatch()
    run = run_directory(settings, settings.finetune.name)
    finetuning = settings_of(run, settings, settings.finetune).finetune
    tokens = prepared_corpus(settings)
    directory = run / "evaluation"
    checkpoint = checkpoints.best(run, is_read=False)
    key = {
        "checkpoint": checkpoint.directory.name,
        **settings.evaluate.model_dump(),
        "outputs": checkpoint.manifest.outputs,
        "corpus": corpus_fingerprint(tokens),
    }
    earlier = Manifest.read(directory)
    if earlier and earlier.inputs == key:
        return earlier
    model, checkpoint = load_trained(run)
    tokenizer = models.load_tokenizer((run / MODEL).address)
    check_tokenizer(tokens, tokenizer, (run / MODEL).address)
    is_classifier = models.is_classifier(model.config)
    test_sets = read_held_out(tokens, "test", settings.evaluate.rows_per_task, labelled=is_classifier)
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

            beams = settings.evaluate.beam_size
            predictions = answers(model, tokenizer, test.source_ids, finetuning, beams, follow)
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


def baseline(test: HeldOut, tokens: StoragePath) -> tuple[str, list[str]]:
    """What someone without a model would answer, and what that is called: the source itself, its first sentence, the
    sentence that has most of a question's words, or the label that most training texts have.

    :param tokens: the prepared corpus' directory.
    """
    if test.task == CLASSIFY.name:
        counts = label_counts(tokens, "train")
        majority = min(counts, key=lambda label: (-counts[label], label))
        return f"always '{majority}'", [majority] * len(test.sources)
    if test.task == SUMMARIZE.name:
        return "lead sentence", [lead_sentence(source) for source in test.sources]
    if test.task == ANSWER.name:
        return "sentence most like the question", [nearest_sentence(source) for source in test.sources]
    return "copy of the source", test.sources


def lead_sentence(text: str) -> str:
    """The first sentence of a text, at most its first line."""
    first_line = text.strip().splitlines()[0] if text.strip() else ""
    for mark in (". ", "。", "! ", "? "):
        head, found, _ = first_line.partition(mark)
        if found:
            return head + mark.strip()
    return first_line


def nearest_sentence(text: str) -> str:
    """The sentence of the context that has the most words of the question, the first of equals.

    :param text: both, as `raylm.tasks.ANSWER` puts them.
    """
    question, context = ANSWER.parted(text)
    asked = set(metrics.words(question))
    sentences = split_text(context).sentences or (context,)
    return max(sentences, key=lambda sentence: len(asked.intersection(metrics.words(sentence))))
