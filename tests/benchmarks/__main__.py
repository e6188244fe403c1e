"""`python -m tests.benchmarks`, or `make bench`: what of all rooms can be measured within an hour, in one table.

Each room measures the same, and more, at full length: `python -m tests.benchmarks.training`. With `--readme` the table
takes the place of the one in README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

from tests.benchmarks import corpus, inference, quickstart, training
from tests.benchmarks.commands import run_on_real_text
from tests.benchmarks.measure import REPOSITORY, Row

ROOMS: dict[str, tuple[ModuleType, dict[str, float]]] = {
    "quickstart": (quickstart, {"imports": 1, "first-rows": 1, "first-step": 1, "road": 1}),
    "corpus": (corpus, {"quality": 0.5, "signatures": 1, "pipeline": 0.3, "bad-row": 1}),
    "training": (training, {"overhead": 0.4, "pretraining": 0.5, "finetuning": 0.25, "faults": 0.1}),
    "inference": (inference, {"engines": 0.6, "naive": 0.3, "kills": 0.2, "serve": 0.5}),
}
"""What is measured of each room, and at which share of its full length."""


def parts() -> dict[str, Callable[[float], list[Row]]]:
    """By room and name: functions of the scale that give rows."""
    found = {}
    for room, (module, shares) in ROOMS.items():
        for name, share in shares.items():
            found[f"{room}.{name}"] = partial(_scaled, module.PARTS[name], share)
    return found


def _scaled(part: Callable[[float], list[Row]], share: float, scale: float) -> list[Row]:
    return part(share * scale)


if __name__ == "__main__":
    sys.exit(run_on_real_text(__doc__.splitlines()[0], parts(), REPOSITORY / "README.md"))
