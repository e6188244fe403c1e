"""The course of a training run as SVG charts, in the colours of the page that they stand in."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from raylm.metrics import SCORE

MOST_POINTS = 500
"""Of a line; a chart is not much wider in pixels."""

# Colours that stand in the SVG until the page's own, which follow the reader's colour scheme, replace them.
_COLOURS = {f"#01020{number}": f"var(--{name})" for number, name in enumerate(("text", "line", "model", "other"))}
_TEXT, _LINE, *_SERIES = _COLOURS
_NICE = (1, 2, 5, 10)
_FEW_POINTS = 25

Point = tuple[int, float]
"""A step, and a value at it."""


@dataclass(frozen=True)
class Chart:
    """What a chart shows of a run's metrics.

    :param label: of the values, with their unit.
    :param lines: the label of each line and the key of its values; a line without values is not drawn.
    :param scale: what values are multiplied with.
    """

    label: str
    lines: tuple[tuple[str, str], ...]
    height_inches: float = 2.15
    from_zero: bool = True
    scale: float = 1.0


CHARTS = (
    Chart(
        "loss (nats per token)",
        (("training", "loss"), ("validation", "validation_loss")),
        height_inches=4.3,
        from_zero=False,
    ),
    Chart("bits per byte of validation text", (("", "validation_bits_per_byte"),), from_zero=False),
    Chart("tokens/s", (("with padding", "tokens_per_s"), ("without padding", "real_tokens_per_s"))),
    Chart("learning rate", (("", "learning_rate"),)),
    Chart("gradient norm", (("", "gradient_norm"),)),
    Chart("MFU (%)", (("", "mfu"),), scale=100),
)


def run_charts(name: str, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A run's course over its steps: what each chart shows, and its SVG; only charts that there are values for.

    :param name: makes the ids of the charts their own among all of the page.
    :param rows: of the run's metrics, oldest first.
    """
    drawn = []
    for chart in (*CHARTS, *(Chart(_said(key), (("", key),)) for key in scores(rows))):
        lines = [(label, points(rows, key, chart.scale)) for label, key in chart.lines]
        lines = [(label, found) for label, found in lines if found]
        if lines:
            (_, first), (_, last) = lines[0][1][0], lines[0][1][-1]
            what = f"{chart.label} over steps, from {first:,.4g} to {last:,.4g}"
            drawn.append((what, _svg(f"{name} {chart.label}", chart, lines)))
    return drawn


def scores(rows: list[dict[str, Any]]) -> list[str]:
    """The keys of what validation says of answers, such as `score_chrf_translate_de`."""
    return sorted({key for row in rows for key in row if key.startswith(SCORE)})


def _said(score: str) -> str:
    _, metric, *task = score.split("_")
    return f"{metric} of validation rows: {' '.join(task)}"


def points(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> list[Point]:
    """The finite values of a key that some rows have, as many as a chart can show."""
    found = [(row["step"], scale * row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return thinned([(step, value) for step, value in found if math.isfinite(value)])


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many of some points: the ends, and of each stretch between them the lowest and the highest.

    So the outline of a line stays: no spike is lost, however long the run.

    :param most: at least 4.
    """
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    inner = len(points) - 2
    kept = [points[0]]
    for start, stop in pairwise(1 + inner * number // stretches for number in range(stretches + 1)):
        lowest = min(range(start, stop), key=lambda index: points[index][1])
        highest = max(range(start, stop), key=lambda index: points[index][1])
        kept += [points[index] for index in sorted({lowest, highest})]
    return [*kept, points[-1]]


def _svg(salt: str, chart: Chart, lines: list[tuple[str, list[Point]]]) -> str:
    """Lines over steps as an SVG element that scales with the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11, "axes.spines.top": False}
    style |= {"axes.spines.right": False, "axes.edgecolor": _LINE, "axes.labelcolor": _TEXT, "text.color": _TEXT}
    style |= {"xtick.color": _TEXT, "ytick.color": _TEXT, "grid.color": _LINE, "figure.constrained_layout.use": True}
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.4, chart.height_inches))
        axes = figure.subplots()
        for (label, found), colour in zip(lines, _SERIES, strict=False):
            marker = "o" if len(found) < _FEW_POINTS else ""
            axes.plot(*zip(*found, strict=True), color=colour, label=label, marker=marker, markersize=4, linewidth=1.8)
        axes.set(xlabel="step", ylabel=chart.label)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True, steps=_NICE))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(round(chart.height_inches + 1.5), steps=_NICE))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1_000 else f"{value:g}")
        axes.grid(axis="y", linewidth=0.6)
        if len(lines) > 1:
            # Above the chart: in a low one there may be no room beside the lines.
            axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(lines), borderaxespad=0)
        if chart.from_zero:
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
