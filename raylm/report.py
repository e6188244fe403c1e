"""All manifests below a directory as one self-contained HTML page."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any

from rich.text import Text

from raylm import __version__
from raylm.errors import ArtifactError
from raylm.progress import duration
from raylm.storage import MANIFEST, METRICS, PREDICTIONS, Manifest, StoragePath
from raylm.summary import (
    SCORES,
    below,
    drop_reasons,
    manifest_facts,
    percent,
    reason_line,
    rendered,
    score_rows,
    score_sets,
    size,
    stage_table,
    text_facts,
)

PAGE = "report.html"
STAGES = ("prepare", "pretrain", "finetune", "evaluate", "export", "batch-translate", "batch-summarize")
"""In the order of the road."""

_MOST_SAMPLES = 30
_SHOWN_SAMPLES = 6
_SHOWN_LANGUAGES = 8
_MOST_POINTS = 2_000


def write_report(root: str, html: str | None = None) -> str:
    """A summary of all artifacts below a directory, after writing a page about them.

    :param html: where the page goes; default: `report.html` in the directory.
    :raises ArtifactError: there is no artifact.
    """
    found = find_artifacts(StoragePath(root))
    page = StoragePath(html) if html else StoragePath(root) / PAGE
    page.write_bytes(render_page(found).encode())
    lines = stage_table([(a.manifest, a.progress, [a.name]) for a in found.artifacts])
    lines += [Text(f"passed over: {reason}", style="yellow") for reason in found.unreadable]
    return rendered([*lines, Text(f"page: {page}")])


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
        return (self.place / METRICS).read_jsonl()

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """An evaluation's first predictions of each test set, with their sources and references."""
        by_task: dict[str, list[dict[str, Any]]] = {}
        for row in (self.place / PREDICTIONS).read_jsonl() or self.manifest.samples:
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
        name = below(root, str(place)).removesuffix(".raylm") if place.path != root.path else place.name
        found.append(Artifact(place, name, manifest, sum(sizes)))
    if not found:
        raise ArtifactError(
            f"report: no manifest.json below {root}; run `raylm quickstart` or `raylm prepare` first,"
            " or name the directory that their artifacts are in"
        )
    order = {stage: number for number, stage in enumerate(STAGES)}
    found.sort(key=lambda artifact: (order.get(artifact.manifest.stage, len(order)), artifact.name))
    return Found(root, found, unreadable)


# ------------------------------------------------------------------------------------------ the page


def render_page(found: Found) -> str:
    """The whole page as HTML; the same artifacts give the same text."""
    import jinja2
    import yaml
    from markupsafe import Markup

    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
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
        text_facts=text_facts,
        reason_line=reason_line,
        funnel=funnel,
        reasons=reasons,
        splits=splits,
        lengths=lengths,
        languages=languages,
        sample_groups=sample_groups,
        score_sets=score_sets,
        score_rows=score_rows,
        score_names=SCORES,
        charts=lambda artifact: [(what, Markup(svg)) for what, svg in run_charts(artifact)],
        shown_samples=_SHOWN_SAMPLES,
    )


# ------------------------------------------------------------------------------------------ the corpus


@dataclass(frozen=True)
class Bar:
    """A row of a table with bars: a count and its share of a whole, which is as long as all the bar's room.

    :param before: how much of the room is empty before the bar.
    :param full: what fills the room, where that is not the whole.
    """

    label: str
    count: int
    whole: int
    kind: str = ""
    before: int = 0
    full: int | None = None

    @property
    def share(self) -> str:
        return percent(self.count, self.whole)

    @property
    def style(self) -> str:
        """Where the bar lies; one that begins at the very end can still be seen."""
        room = (self.whole if self.full is None else self.full) or 1
        left, width = (f"{100 * number / room:.2f}%" for number in (self.before, self.count))
        return (f"margin-left: min({left}, 100% - 2px); " if self.before else "") + f"width: {width}"


def funnel(manifest: Manifest) -> list[Bar]:
    """Rows read, lost and kept; a loss lies where the rows left after it end."""
    counts = manifest.counts
    read, unreadable, kept = counts["read"], counts.get("rejected", 0), counts["kept"]
    readable = read - unreadable
    bars = [Bar("read", read, read)]
    if unreadable:
        bars += [Bar("unreadable", unreadable, read, "dropped", before=readable), Bar("readable", readable, read)]
    return [*bars, Bar("dropped", readable - kept, read, "dropped", before=kept), Bar("kept", kept, read, "model")]


def reasons(manifest: Manifest) -> list[Bar]:
    """Why rows were dropped, of all rows read; the commonest reason fills its room."""
    counted = drop_reasons(manifest.counts)
    return [Bar(reason, n, manifest.counts["read"], "dropped", full=counted[0][1]) for reason, n in counted]


def splits(manifest: Manifest) -> list[tuple[int, Bar]]:
    """Each split's rows, and its tokens of all."""
    rows, tokens = manifest.counts["rows"], manifest.counts["tokens"]
    return [(rows[split], Bar(split, tokens[split], sum(tokens.values()))) for split in rows]


def lengths(bins: list[list[int]]) -> list[Bar]:
    """A histogram of texts by their characters, from the lower bounds of its bins, which are powers of two."""
    counts = [count for _, count in bins]
    total, full = sum(counts), max(counts, default=0)
    labels = [f"{low:,}–{2 * low - 1:,}" if low > 1 else "1" for low, _ in bins]
    return [Bar(label, count, total, "model", full=full) for label, count in zip(labels, counts, strict=True)]


def languages(counts: dict[str, int]) -> list[Bar]:
    """The commonest languages, and all others together."""
    common = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    others = common[_SHOWN_LANGUAGES:] if len(common) > _SHOWN_LANGUAGES + 1 else []
    shown = common[: len(common) - len(others)]
    if others:
        shown.append((f"{len(others)} others", sum(count for _, count in others)))
    total = sum(counts.values())
    return [Bar(code or "not said", count, total, "model") for code, count in shown]


def sample_groups(manifest: Manifest) -> list[tuple[str, str, int, list[str]]]:
    """Texts kept and texts dropped for each reason: that reason, `kept` or `dropped`, how many there were, a few."""
    counts, samples = manifest.counts, manifest.statistics.get("samples", {})
    names = sorted((name for name in samples if samples[name]), key=lambda n: (n != "kept", -counts.get(n, 0), n))
    return [
        (name.replace(".", ": ").replace("_", " "), name.partition(".")[0], counts.get(name, 0), samples[name])
        for name in names
    ]


# ------------------------------------------------------------------------------------ the course of a run


# Colours that stand in the SVG until the page's own, which follow the reader's colour scheme, replace them.
_COLOURS = {f"#01020{number}": f"var(--{name})" for number, name in enumerate(("text", "line", "model", "other"))}
_TEXT, _LINE, *_SERIES = _COLOURS
_NICE = (1, 2, 5, 10)


_Series = tuple[str, list[dict[str, Any]], str]  # label, rows, the key of the rows' value


def run_charts(artifact: Artifact) -> list[tuple[str, str]]:
    """A run's loss, speed and learning rate over its steps: what each chart shows, and its SVG."""
    logged = _thinned([row for row in artifact.progress if "loss" in row])
    validated = _thinned([row for row in artifact.progress if "validation_loss" in row])
    if not logged:
        return []
    charts: dict[str, list[_Series]] = {
        "loss (nats per token)": [("training", logged, "loss"), ("validation", validated, "validation_loss")],
        "tokens/s": [("", logged, "tokens_per_s")],
        "learning rate": [("", logged, "learning_rate")],
    }
    drawn = []
    for what, series in charts.items():
        first, last = (row[series[0][2]] for row in (logged[0], logged[-1]))
        svg = _chart(f"{artifact.name} {what}", series, what, 4.3 if len(series) > 1 else 2.15)
        drawn.append((f"{what} over steps, from {first:,.4g} to {last:,.4g}", svg))
    return drawn


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evenly chosen rows, as many as a chart can show, always with the last one."""
    return rows[:: -max(-(-len(rows) // _MOST_POINTS), 1)][::-1]


def _chart(salt: str, series: list[_Series], y_label: str, height_inches: float) -> str:
    """Lines over steps as an SVG element that scales with the page.

    :param salt: makes the ids of this chart its own among all of the page.
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
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue().partition("<svg")[2]
    svg = re.sub(r' (?:width|height)="[^"]*pt"', "", f"<svg{svg}", count=2)  # the page says how wide
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # only what is referred to needs an id
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return svg.strip()
