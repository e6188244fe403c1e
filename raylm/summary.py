"""What manifests say, as a short text for the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from raylm.progress import duration
from raylm.storage import METRICS, Manifest, StoragePath

SCORES = {
    "chrf": "chrF",
    "bleu": "BLEU",
    "exact_match": "exact match %",
    "f1": "F1",
    "accuracy": "accuracy %",
    "macro_f1": "macro-F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
_SAMPLES = {
    "batch-translate": "translations",
    "batch-summarize": "summaries",
    "batch-classify": "labels",
    "batch-generate": "texts that go on",
    "batch-answer": "answers",
}
_MINOR_SCORES = ("ROUGE-1", "ROUGE-2")
_MOST_FACTS = 12
_MOST_REASONS = 5
_MOST_PLACES = 3


# ---------------------------------------------------------------------------------------- for the terminal


def manifest_table(manifest: Manifest) -> str:
    """What a command prints at its end: stage, time, what came out, where it is."""
    facts = manifest_facts(manifest)
    if len(facts) > _MOST_FACTS:
        facts = [*facts[: _MOST_FACTS - 1], ("…", f"{len(facts) - _MOST_FACTS + 1} more")]
    if place := _place(manifest):
        facts.append(("artifact", place))
    title = f"{manifest.stage}: {'estimate' if _is_estimate(manifest) else duration(manifest.wall_time_s)}"
    width = max((cell_len(label) for label, _ in facts), default=0)
    lines: list[RenderableType] = [Text(title, style="bold")]
    for label, value in facts:
        lines.append(Text.assemble((f"  {label:<{width}}", "cyan"), "  ", value))
    return rendered(lines)


def quickstart_summary(manifests: list[Manifest], page: StoragePath) -> str:
    """The end of `raylm quickstart`: what each stage gave and where it is, a few samples, the page.

    :param page: that of the report, which lies in the storage's root.
    """
    storage = page.parent
    rows = []
    for manifest in manifests:
        directory = storage / below(storage, manifest.directory)  # which says no passwords
        places = [below(storage, path) for path in _output_paths(manifest) or [manifest.directory]]
        rows.append((manifest, (directory / METRICS).read_jsonl(), places))
    lines = stage_table(rows)
    for manifest in manifests:
        if manifest.stage.startswith("batch-") and manifest.samples:
            lines.append(Text(_SAMPLES[manifest.stage], style="bold"))
            lines += [_sample_line(sample["source"], sample["output"]) for sample in manifest.samples[:3]]
            lines.append(Text())
    return rendered([*lines, Text(f"everything is below {storage}"), Text(f"page: {page}")])


def manifest_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What there is to say of an artifact besides its time and place, as labels and values."""
    counts, metrics = manifest.counts, manifest.metrics
    if manifest.stage == "prepare":
        read, kept, unreadable = counts["read"], counts["kept"], counts.get("rejected", 0)
        dropped, reasons = read - kept - unreadable, reason_line(counts)
        facts = [("read", f"{read:,} rows, {size(manifest.inputs['bytes'])} at {metrics['mb_per_s']} MB/s")]
        if unreadable:
            facts.append(("unreadable", f"{unreadable:,} rows ({percent(unreadable, read)}), see rejected/rows.jsonl"))
        facts += [
            ("kept", f"{kept:,} rows ({percent(kept, read)})"),
            ("dropped", f"{dropped:,} rows ({percent(dropped, read)})" + f": {reasons}" * bool(reasons)),
        ]
        return facts + text_facts(manifest)
    if manifest.stage in ("pretrain", "finetune"):
        loss, perplexity = metrics["validation_loss"], metrics["validation_perplexity"]
        return [
            ("steps", f"{metrics['step']:,}, the best checkpoint at {metrics['best_step']:,}"),
            ("loss", f"{metrics['loss']:.4f} nats per token"),
            ("validation", f"{loss:.4f} nats per token, perplexity {perplexity:,.2f}"),
            ("speed", f"{metrics['tokens_per_s']:,.0f} tokens/s, {_counted(metrics['workers'], 'worker')}"),
            ("model", f"{metrics['parameters']:,} parameters"),
        ]
    if manifest.stage == "evaluate":
        rows = sum(result["rows"] for _, result in score_sets(manifest))
        return [
            ("rows", f"{rows:,} held out; in brackets: the baseline"),
            ("perplexity", f"{metrics['validation_perplexity']:,.2f} on validation rows"),
            *((task, f"{_score_line(r)}: {r['baseline']['method']}") for task, r in score_sets(manifest)),
        ]
    if manifest.stage == "export":
        return [
            ("size", f"{size(sum(entry['bytes'] for entry in manifest.outputs))} in {len(manifest.outputs)} files"),
            ("validation", f"{metrics['validation_loss']:.4f} nats per token"),
        ]
    if _is_estimate(manifest):
        return [
            ("rows", f"{counts['rows']:,} in {_counted(counts['chunks'], 'chunk')}"),
            ("tokens", f"{counts['source_tokens']:,} read, {counts['output_tokens']:,} written"),
            ("time", f"{duration(metrics['predicted_s'])}, {_counted(manifest.settings['workers'], 'worker')}"),
            ("told from", f"{_counted(metrics['sample_rows'], 'row')} in {metrics['sample_s']:.1f} s"),
        ]
    if manifest.stage.startswith("batch-"):
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in counts["error_reasons"].items())
        facts = [
            ("rows", f"{counts['rows']:,}: {counts['answered']:,} answered, {counts['truncated']:,} truncated"),
            ("errors", f"{counts['errors']:,}" + f": {reasons}" * bool(reasons)),
            ("speed", f"{metrics['rows_per_s']:,.1f} rows/s, {metrics['output_tokens_per_s']:,.0f} tokens/s"),
        ]
        if (price := metrics.get("cost")) is not None:
            facts.append(("cost", f"{price:,.2f}"))
        if reused := metrics.get("chunks_reused"):
            facts.append(("reused", f"{reused:,} of {_counted(metrics['chunks'], 'chunk')}"))
        return facts
    return [(name, f"{value:,}") for name, value in metrics.items() if isinstance(value, int | float)]


def text_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What preparation did to the text of the rows that it kept, and which of its steps took how long."""
    counts, metrics = manifest.counts, manifest.metrics
    facts = []
    if masked := _commonest(counts, "masked."):
        facts.append(("masked", ", ".join(f"{kind} {number:,}" for kind, number in masked)))
    if gone := counts.get("paragraphs_dropped"):
        facts.append(("paragraphs", f"{gone:,} dropped that stood in the corpus before"))
    if truncated := counts.get("truncated_documents"):
        limit = manifest.settings["corpus"]["pack"]["max_document_tokens"]
        facts.append(("truncated", f"{_counted(truncated, 'document')} to {limit:,} tokens"))
    padding = metrics.get("padding")
    facts.append(("tokens", f"{metrics['tokens']:,}" + (f", {percent(padding, 1)} padding" if padding else "")))
    if steps := [f"{step} {duration(taken)}" for step, taken in metrics.get("seconds", {}).items() if round(taken)]:
        facts.append(("time", ", ".join(steps)))
    return facts


def course_facts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """How a run used its machines, from the rows of its metrics; what older rows do not say is left out.

    Speeds and shares are those of the median row: a run's first rows are slow, and a machine may be busy for a while.
    """
    facts = []
    if utilisation := _values(rows, "mfu"):
        facts.append(("utilisation", f"{percent(median(utilisation), 1)} of the measured matmul peak"))
    if padding := [1 - row["real_tokens_per_s"] / row["tokens_per_s"] for row in rows if row.get("real_tokens_per_s")]:
        facts.append(("padding", f"{percent(median(padding), 1)} of the positions computed"))
    if steps := _values(rows, "step_s"):
        waiting = percent(median(_values(rows, "data_wait") or [0.0]), 1)
        facts.append(("step", f"{median(steps):.3g} s, of which {waiting} waiting for data"))
        checkpoints, validation = (duration(sum(_values(rows, key))) for key in ("checkpoint_s", "validation_s"))
        facts.append(("paused", f"{checkpoints} for checkpoints, {validation} for validation"))
    if memory := _values(rows, "memory_gb"):
        facts.append(("memory", f"{max(memory):.2f} GB at most, of the first worker"))
    return facts


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    """What the rows that have a key say."""
    return [row[key] for row in rows if key in row]


def drop_reasons(counts: dict[str, Any]) -> list[tuple[str, int]]:
    """Why rows were dropped in preparation, the commonest reason first."""
    return _commonest(counts, "dropped.")


def reason_line(counts: dict[str, Any]) -> str:
    """The commonest reasons for which rows were dropped, with their numbers, in a line."""
    reasons = drop_reasons(counts)
    if others := reasons[_MOST_REASONS:]:
        reasons = [*reasons[:_MOST_REASONS], (_counted(len(others), "other reason"), sum(n for _, n in others))]
    return ", ".join(f"{reason} {number:,}" for reason, number in reasons)


def _commonest(counts: dict[str, Any], prefix: str) -> list[tuple[str, int]]:
    """What is counted under names with a prefix, said without it, the largest number first, nothing that is 0."""
    named = [(name.removeprefix(prefix).replace("_", " "), n) for name, n in counts.items() if name.startswith(prefix)]
    return sorted(((name, n) for name, n in named if n), key=lambda row: (-row[1], row[0]))


def score_sets(manifest: Manifest) -> list[tuple[str, dict[str, Any]]]:
    """The test sets of an evaluation with their scores."""
    return [(name, result) for name, result in manifest.metrics.items() if isinstance(result, dict)]


def score_rows(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Each score of a test set: its name, the model's, the baseline's."""
    named = [key for key, value in result.items() if key in result["baseline"] and isinstance(value, int | float)]
    return [(SCORES.get(key, key), result[key], result["baseline"][key]) for key in named]


def _score_line(result: dict[str, Any]) -> str:
    rows = [row for row in score_rows(result) if row[0] not in _MINOR_SCORES]
    return ", ".join(f"{name} {model:.1f} ({baseline:.1f})" for name, model, baseline in rows)


def _result(manifest: Manifest, progress: list[dict[str, Any]]) -> str:
    """The gist of an artifact in a line, or in one for each test set."""
    metrics, counts = manifest.metrics, manifest.counts
    if manifest.stage == "prepare":
        return f"{counts['kept']:,} of {counts['read']:,} rows kept, {metrics['tokens']:,} tokens"
    if manifest.stage in ("pretrain", "finetune"):
        losses = [row["loss"] for row in progress if "loss" in row]
        start = f"{losses[0]:.2f} → " if losses else ""
        utilisation = _values(progress, "mfu")
        used = f", MFU {percent(median(utilisation), 1)}" if utilisation else ""
        return f"loss {start}{metrics['loss']:.2f}, {metrics['tokens_per_s']:,.0f} tokens/s{used}"
    if manifest.stage == "evaluate":
        return "\n".join(f"{task}: {_score_line(result)}" for task, result in score_sets(manifest))
    if manifest.stage.startswith("batch-"):
        return f"{counts['rows']:,} rows, {counts['errors']:,} with errors, {metrics['rows_per_s']:,.1f} rows/s"
    return ", ".join(f"{label} {value}" for label, value in manifest_facts(manifest)[:2])


def stage_table(rows: list[tuple[Manifest, list[dict[str, Any]], list[str]]]) -> list[RenderableType]:
    """A table of manifests, each with the metrics of its run and the places of its artifact."""
    table = Table("stage", "result", "time", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    table.columns[1].overflow, table.columns[2].justify = "fold", "right"
    for manifest, progress, places in rows:
        shown = places[:_MOST_PLACES] + [f"and {len(places) - _MOST_PLACES} more"] * (len(places) > _MOST_PLACES)
        result = Text.assemble(_result(manifest, progress), *((f"\n{place}", "dim") for place in shown))
        table.add_row(manifest.stage, result, duration(manifest.wall_time_s))
    table.add_section()
    table.add_row("total", "", duration(sum(manifest.wall_time_s for manifest, _, _ in rows)))
    methods = [r["baseline"]["method"] for m, _, _ in rows if m.stage == "evaluate" for _, r in score_sets(m)]
    note = Text(f"in brackets, the baseline's score: {', '.join(dict.fromkeys(methods))}\n")
    return [table, note] if methods else [table]


def rendered(parts: Sequence[RenderableType]) -> str:
    """Lines as wide as the terminal, coloured where there is one; a path stays in one piece."""
    console = Console(
        width=_terminal_width(), force_terminal=sys.stdout.isatty(), highlight=False, markup=False, emoji=False
    )
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _terminal_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _sample_line(source: str, output: str) -> Text:
    """Source and output side by side in one line; what is too long ends in `…`."""
    left, right = (Text("".join(c for c in " ".join(text.split()) if c.isprintable())) for text in (source, output))
    room = max(_terminal_width() - 5, 20)
    left.truncate(max(room // 2, room - right.cell_len), overflow="ellipsis")
    right.truncate(room - left.cell_len, overflow="ellipsis")
    return Text.assemble("  ", left, (" → ", "dim"), right)


def _place(manifest: Manifest) -> str:
    """Where an artifact is: its files outside of the manifest's directory, else that directory."""
    if paths := _output_paths(manifest):
        return paths[0] if len(paths) == 1 else f"{StoragePath(paths[0]).parent} ({len(paths)} files)"
    return manifest.directory


def _output_paths(manifest: Manifest) -> list[str]:
    return [entry["path"] for entry in manifest.outputs if "path" in entry]


def below(directory: StoragePath, path: str) -> str:
    return path.removeprefix(f"{str(directory).rstrip('/')}/")


def _is_estimate(manifest: Manifest) -> bool:
    return bool(manifest.settings.get("dry_run"))


# ------------------------------------------------------------------------------------------- numbers


def size(count: float) -> str:
    """Bytes as a person says them: `640 B`, `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1_000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1_000
    return f"{count:,.1f} TB"


def percent(part: float, whole: float) -> str:
    """A share as a person says it; what is there is never said to be nothing."""
    share = 100 * part / whole if whole else 0.0
    return "< 0.1 %" if 0 < share < 0.05 else f"{share:.1f} %"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
