"""CONTRIBUTING.md's first change, made as it says in a copy of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout of one's own, without what is not kept in it."""
    place = tmp_path / "raylm"
    for name in ("raylm", "tests", "clusters", "jobs"):
        shutil.copytree(REPOSITORY / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(REPOSITORY / name, place / name)
    return place


def in_copy(place: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=place, env=os.environ | {"PYTHONPATH": str(place)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_first_change_works(copy: Path) -> None:
    [change] = re.findall(r"```diff\n(.*?)```", (copy / "CONTRIBUTING.md").read_text(), re.DOTALL)
    added = [line for line in change.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert sum(line.strip("+ ") != "" for line in added) <= 10
    (copy / "first.diff").write_text(change)
    in_copy(copy, "git", "apply", "first.diff")
    in_copy(copy, sys.executable, "-m", "tests.test_cli")
    named = ("tests/corpus/test_filters.py", "tests/test_cli.py")
    said = in_copy(copy, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *named, "-k", "curly or frozen")
    assert re.search(r"\b[2-9] passed", said), said
