"""The house: which way imports point, and what importing raylm costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "raylm"

# From the ground up: a module may import from its own floor's room and from the floors below it.
FLOORS = [
    {"errors"},
    {"settings", "storage", "progress", "prices", "capacity", "lease", "auth"},
    {"tasks", "models", "metrics", "sentences", "language"},
    {"summary", "plots"},
    {"corpus", "training", "inference", "report"},
    {"quickstart", "cluster", "nightly"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "raylm" else set()
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("raylm.") and name != "raylm.__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    for other in imported(path) - {here}:
        floor = FLOORS[FLOOR[here]]
        same_floor_is_fine = here in FLOORS[1] | FLOORS[2]
        assert FLOOR[other] < FLOOR[here] or (same_floor_is_fine and other in floor), f"{here} imports {other}"


def test_no_import_cycle() -> None:
    edges: dict[str, set[str]] = {}
    for path in modules():
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        edges[name] = {
            target
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("raylm")
            for target in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for target in edges.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_only_the_command_line_starts_ray() -> None:
    for path in modules():
        if room(path) != "cli":
            text = path.read_text()
            assert "ray.init(" not in text, path
            assert "ray.shutdown(" not in text, path


@pytest.mark.parametrize("statement", ["import raylm", "import raylm.cli", "import raylm.report"])
def test_imports_stay_light(statement: str) -> None:
    heavy = ("torch", "ray", "transformers", "deepspeed")
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
