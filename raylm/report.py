"""All manifests below a directory as one self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any

from rich.text import Text

from raylm import __version__
from raylm.errors import ArtifactError
from raylm.plots import run_charts
from raylm.progress import duration
from raylm.storage import MANIFEST, METRICS, PREDICTIONS, Manifest, StoragePath
from raylm.summary import (
    SCORES,
    below,
    course_facts,
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
from raylm.tasks import TASKS

PAGE = "report.html"
STAGES = ("prepare", "pretrain", "finetune", "evaluate", "export", *(f"batch-{task}" for task in TASKS))
"""In the order of the road."""

_MOST_SAMPLES = 30
_SHOWN_SAMPLES = 6
_SHOWN_LANGUAGES = 8


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
        course_facts=course_facts,
        charts=lambda artifact: [(what, Markup(svg)) for what, svg in run_charts(artifact.name, artifact.progress)],
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
