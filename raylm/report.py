"""What the manifests say, for a person: a short text for the terminal and one self-contained HTML page."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from raylm import __version__
from raylm.errors import ArtifactError
from raylm.progress import duration
from raylm.storage import MANIFEST, Manifest, StoragePath

PAGE = "report.html"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.jsonl"
STAGES = ("prepare", "pretrain", "finetune", "evaluate", "export", "batch-translate", "batch-summarize")
"""In the order of the road."""

# What an artifact of a stage is called: the folder below the storage, the settings that hold its name.
_FOLDERS = {
    "prepare": ("tokens", "corpus"),
    "pretrain": ("runs", "pretrain"),
    "finetune": ("runs", "finetune"),
    "export": ("models", "model"),
}
_SCORES = {
    "chrf": "chrF",
    "bleu": "BLEU",
    "exact_match": "exact match %",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
_MINOR_SCORES = ("ROUGE-1", "ROUGE-2")
_MOST_FACTS = 12
_MOST_PLACES = 3
_MOST_SAMPLES = 30
_SHOWN_SAMPLES = 6
_MOST_POINTS = 2_000


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
    return _rendered(lines)


def write_report(root: str, html: str | None = None) -> str:
    """A summary of all artifacts below a directory, after writing a page about them.

    :param html: where the page goes; default: `report.html` in the directory.
    :raises ArtifactError: there is no artifact.
    """
    found = find_artifacts(StoragePath(root))
    page = StoragePath(html) if html else StoragePath(root) / PAGE
    page.write_bytes(render_page(found).encode())
    lines = _summary([(a.manifest, a.progress, [a.name]) for a in found.artifacts])
    lines += [Text(f"passed over: {reason}", style="yellow") for reason in found.unreadable]
    return _rendered([*lines, Text(f"page: {page}")])


def quickstart_summary(manifests: list[Manifest], report_path: str) -> str:
    """The end of `raylm quickstart`: what each stage gave and where it is, a few samples, the page.

    :param report_path: the page, which lies in the storage's root.
    """
    storage = StoragePath(report_path).parent
    run, rows = "", []
    for manifest in manifests:
        run = _folder(manifest) if manifest.stage == "finetune" else run
        place = f"{run}/evaluation" if manifest.stage == "evaluate" else _folder(manifest)
        places = [_below(storage, path) for path in _output_paths(manifest)] or [place]
        rows.append((manifest, _json_lines(storage / place / METRICS), places))
    lines = _summary(rows)
    for title, stage in (("translations", "batch-translate"), ("summaries", "batch-summarize")):
        samples = [sample for manifest in manifests if manifest.stage == stage for sample in manifest.samples]
        if samples:
            lines.append(Text(title, style="bold"))
            lines += [_sample_line(sample["source"], sample["output"]) for sample in samples[:3]]
            lines.append(Text())
    return _rendered([*lines, Text(f"everything is below {storage}"), Text(f"page: {report_path}")])


def manifest_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What there is to say of an artifact besides its time and place, as labels and values."""
    counts, metrics = manifest.counts, manifest.metrics
    if manifest.stage == "prepare":
        read, kept = counts["read"], counts["kept"]
        dropped = ", ".join(f"{reason} {number:,}" for reason, number in drop_reasons(manifest))
        return [
            ("read", f"{read:,} rows, {size(manifest.inputs['bytes'])} at {metrics['mb_per_s']} MB/s"),
            ("kept", f"{kept:,} rows ({percent(kept, read)})"),
            ("dropped", f"{read - kept:,} rows ({percent(read - kept, read)})" + f": {dropped}" * bool(dropped)),
            ("tokens", f"{metrics['tokens']:,}"),
        ]
    if manifest.stage in ("pretrain", "finetune"):
        perplexity = metrics["validation_perplexity"]
        return [
            ("steps", f"{metrics['step']:,}, the best checkpoint at {metrics['best_step']:,}"),
            ("loss", f"{metrics['loss']:.4f} nats per token"),
            ("validation", f"{metrics['validation_loss']:.4f} nats per token, perplexity {perplexity:,.2f}"),
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
        speed = f"{metrics['rows_per_s']:,.1f} rows/s, {metrics['output_tokens_per_s']:,.0f} tokens/s"
        facts = [
            ("rows", f"{counts['rows']:,}: {counts['answered']:,} answered, {counts['truncated']:,} truncated"),
            ("errors", f"{counts['errors']:,}" + f": {reasons}" * bool(reasons)),
            ("speed", speed),
        ]
        if reused := metrics.get("chunks_reused"):
            facts.append(("reused", f"{reused:,} of {_counted(metrics['chunks'], 'chunk')}"))
        return facts
    return [(name, f"{value:,}") for name, value in metrics.items() if isinstance(value, int | float)]


def drop_reasons(manifest: Manifest) -> list[tuple[str, int]]:
    """Why rows were dropped in preparation, the commonest reason first."""
    dropped = Counter(
        {
            name.removeprefix("dropped.").replace("_", " "): number
            for name, number in sorted(manifest.counts.items())
            if name.startswith("dropped.") and number
        }
    )
    return dropped.most_common()


def score_sets(manifest: Manifest) -> list[tuple[str, dict[str, Any]]]:
    """The test sets of an evaluation with their scores."""
    return [(name, result) for name, result in manifest.metrics.items() if isinstance(result, dict)]


def score_rows(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Each score of a test set: its name, the model's, the baseline's."""
    named = [key for key, value in result.items() if key in result["baseline"] and isinstance(value, int | float)]
    return [(_SCORES.get(key, key), result[key], result["baseline"][key]) for key in named]


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
        return f"loss {start}{metrics['loss']:.2f}, {metrics['tokens_per_s']:,.0f} tokens/s"
    if manifest.stage == "evaluate":
        return "\n".join(f"{task}: {_score_line(result)}" for task, result in score_sets(manifest))
    if manifest.stage.startswith("batch-"):
        return f"{counts['rows']:,} rows, {counts['errors']:,} with errors, {metrics['rows_per_s']:,.1f} rows/s"
    return ", ".join(f"{label} {value}" for label, value in manifest_facts(manifest)[:2])


def _summary(rows: list[tuple[Manifest, list[dict[str, Any]], list[str]]]) -> list[RenderableType]:
    """A table of manifests, each with the metrics of its run and the places of its artifact."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("result", overflow="fold")
    table.add_column("time", no_wrap=True, justify="right")
    for manifest, progress, places in rows:
        result = Text(_result(manifest, progress))
        for place in places[:_MOST_PLACES]:
            result.append(f"\n{place}", style="dim")
        if len(places) > _MOST_PLACES:
            result.append(f"\nand {len(places) - _MOST_PLACES} more", style="dim")
        table.add_row(manifest.stage, result, duration(manifest.wall_time_s))
    table.add_section()
    table.add_row("total", "", duration(sum(manifest.wall_time_s for manifest, _, _ in rows)))
    methods = [r["baseline"]["method"] for m, _, _ in rows if m.stage == "evaluate" for _, r in score_sets(m)]
    if methods:
        return [table, Text(f"in brackets, the baseline's score: {', '.join(dict.fromkeys(methods))}\n")]
    return [table]


def _rendered(parts: Sequence[RenderableType]) -> str:
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
    left_room = min(left.cell_len, max(room // 2, room - right.cell_len))
    left.truncate(left_room, overflow="ellipsis")
    right.truncate(room - left.cell_len, overflow="ellipsis")
    return Text.assemble("  ", left, (" → ", "dim"), right)


def _place(manifest: Manifest) -> str | None:
    """Where an artifact is, as far as its manifest tells."""
    if paths := _output_paths(manifest):
        return paths[0] if len(paths) == 1 else f"{StoragePath(paths[0]).parent} ({len(paths)} files)"
    folder = _folder(manifest)
    inside = manifest.inputs.get("run" if manifest.stage == "export" else "tokens")
    return str(StoragePath(inside).parent.parent / folder) if inside else folder or None


def _folder(manifest: Manifest) -> str:
    """An artifact's directory below the storage; empty where its stage has none of a fixed name."""
    folder, section = _FOLDERS.get(manifest.stage, ("", ""))
    return f"{folder}/{manifest.settings[section]['name']}" if folder else ""


def _output_paths(manifest: Manifest) -> list[str]:
    return [entry["path"] for entry in manifest.outputs if "path" in entry]


def _below(directory: StoragePath, path: str) -> str:
    return path.removeprefix(f"{str(directory).rstrip('/')}/")


def _is_estimate(manifest: Manifest) -> bool:
    return bool(manifest.settings.get("dry_run"))


# ------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its directory, its name below the report's root, the bytes it takes."""

    place: StoragePath
    name: str
    manifest: Manifest
    bytes: int

    @cached_property
    def progress(self) -> list[dict[str, Any]]:
        """The rows of a training run's metrics."""
        return _json_lines(self.place / METRICS)

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """An evaluation's first predictions of each test set, with their sources and references."""
        by_task: dict[str, list[dict[str, Any]]] = {}
        for row in _json_lines(self.place / PREDICTIONS) or self.manifest.samples:
            rows = by_task.setdefault(row["task"], [])
            if len(rows) < _MOST_SAMPLES:
                rows.append(row)
        return by_task


@dataclass(frozen=True)
class Found:
    """All artifacts below a root in the order of the road, and which manifests could not be read."""

    root: StoragePath
    artifacts: list[Artifact]
    unreadable: list[str] = field(default_factory=list)

    def of(self, *stages: str) -> list[Artifact]:
        """The artifacts whose stage is one of some, or begins with one that ends in `-`."""
        exact, begins = set(stages), tuple(stage for stage in stages if stage.endswith("-"))
        return [a for a in self.artifacts if a.manifest.stage in exact or a.manifest.stage.startswith(begins)]


def find_artifacts(root: StoragePath) -> Found:
    """Every artifact with a manifest below a directory; checkpoints belong to their runs and are left out.

    :raises ArtifactError: there is none.
    """
    listed = root.list(recursive=True) if root.is_dir() else []
    found, unreadable = [], []
    for file, _ in listed:
        place = file.parent
        if file.name != MANIFEST or place.parent.name == "checkpoints":
            continue
        try:
            manifest = Manifest.read(place)
        except ArtifactError as error:
            unreadable.append(str(error))
            continue
        if manifest is None or manifest.stage == "checkpoint":
            continue
        inside = f"{place.path.rstrip('/')}/"
        sizes = [info.size or 0 for _, info in listed if info.path.startswith(inside) and info.base_name != PAGE]
        if manifest.stage.startswith("batch-"):  # what it wrote stands outside of the manifest's directory
            sizes = [entry["bytes"] for entry in manifest.outputs]
        name = _below(root, str(place)).removesuffix(".raylm") if place.path != root.path else place.name
        found.append(Artifact(place, name, manifest, sum(sizes)))
    if not found:
        raise ArtifactError(
            f"report: no manifest.json below {root}; run `raylm quickstart` or `raylm prepare` first,"
            " or name the directory that their artifacts are in"
        )
    order = {stage: number for number, stage in enumerate(STAGES)}
    found.sort(key=lambda artifact: (order.get(artifact.manifest.stage, len(order)), artifact.name))
    return Found(root, found, unreadable)


def _json_lines(file: StoragePath) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; none where there is no file."""
    return [json.loads(line) for line in file.read_bytes().splitlines() if line.strip()] if file.is_file() else []


# ------------------------------------------------------------------------------------------ the page


def render_page(found: Found) -> str:
    """The whole page as HTML; the same artifacts give the same text."""
    import jinja2
    import yaml
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": duration,
        "size": size,
        "number": "{:,}".format,
        "date": lambda text: text[:16].replace("T", " "),
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
    }
    template = environment.from_string((files("raylm") / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        found=found,
        version=__version__,
        facts=manifest_facts,
        drop_reasons=drop_reasons,
        score_sets=score_sets,
        score_rows=score_rows,
        score_names=_SCORES,
        percent=percent,
        charts=lambda artifact: [(what, Markup(svg)) for what, svg in run_charts(artifact)],
        shown_samples=_SHOWN_SAMPLES,
    )


def run_charts(artifact: Artifact) -> list[tuple[str, str]]:
    """A run's loss, speed and learning rate over its steps: what each chart shows, and its SVG."""
    logged = _thinned([row for row in artifact.progress if "loss" in row])
    validated = _thinned([row for row in artifact.progress if "validation_loss" in row])
    if not logged:
        return []
    losses = [("training", logged, "loss"), ("validation", validated, "validation_loss")]
    charts = [("loss (nats per token)", losses, 4.3), ("tokens/s", [("", logged, "tokens_per_s")], 2.15)]
    charts.append(("learning rate", [("", logged, "learning_rate")], 2.15))
    drawn = []
    for what, series, height in charts:
        first, last = (row[series[0][2]] for row in (logged[0], logged[-1]))
        svg = _chart(f"{artifact.name} {what}", series, what, height)
        drawn.append((f"{what} over steps, from {first:,.4g} to {last:,.4g}", svg))
    return drawn


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evenly chosen rows, as many as a chart can show, always with the last one."""
    return rows[:: -(len(rows) // _MOST_POINTS + 1)][::-1]


# Colours that stand in the SVG until the page's own, which follow the reader's colour scheme, replace them.
_PAGE_COLOURS = {
    "#010203": "var(--text)",
    "#010204": "var(--line)",
    "#010205": "var(--model)",
    "#010206": "var(--other)",
}
_TEXT, _LINE, *_SERIES = _PAGE_COLOURS
_NICE = (1, 2, 5, 10)


def _chart(
    salt: str,
    series: Sequence[tuple[str, list[dict[str, Any]], str]],
    y_label: str,
    height_inches: float,
) -> str:
    """Lines over steps as an SVG element that scales with the page.

    :param salt: makes the ids of this chart its own among all of the page.
    :param series: label, rows, and the key of the rows' value.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11, "axes.spines.top": False}
    style |= {"axes.spines.right": False, "axes.edgecolor": _LINE, "axes.labelcolor": _TEXT, "text.color": _TEXT}
    style |= {"xtick.color": _TEXT, "ytick.color": _TEXT, "grid.color": _LINE, "figure.constrained_layout.use": True}
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.4, height_inches))
        axes = figure.subplots()
        for (label, rows, key), colour in zip(series, _SERIES, strict=False):
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            marker = "o" if len(rows) < 25 else ""
            axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4, linewidth=1.8)
        axes.set(xlabel="step", ylabel=y_label)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True, steps=_NICE))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(round(height_inches + 1.5), steps=_NICE))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1_000 else f"{value:g}")
        axes.grid(axis="y", linewidth=0.6)
        if len(series) > 1:
            axes.legend(frameon=False)
        else:
            axes.set_ylim(bottom=0)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # only what is referred to needs an id
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    for placeholder, colour in _PAGE_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return svg.strip()


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
