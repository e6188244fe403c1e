"""The scripts that `ray job submit` runs; `tests/cluster` submits them."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from raylm.cli import main
from raylm.settings import load
from tests.conftest import REPOSITORY

JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_job_is_a_short_runnable_script_with_its_command(job: Path) -> None:
    text = job.read_text()
    assert text.startswith("#!/usr/bin/env python\n")
    assert os.access(job, os.X_OK)
    assert len(text.splitlines()) <= 40
    documentation = ast.get_docstring(ast.parse(text)) or ""
    assert "ray job submit --working-dir . " in documentation
    assert f"jobs/{job.name}" in documentation
    assert job.stem.replace("_", "-") in main.commands  # type: ignore[attr-defined]


def test_every_stage_has_its_job() -> None:
    assert {job.stem for job in JOBS} == {
        "prepare", "pretrain", "finetune", "evaluate", "export", "serve", "nightly", "collect_logs",
        "batch_translate", "batch_summarize", "batch_generate", "batch_classify", "batch_answer",
    }  # fmt: skip


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "jobs" / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_is_settings_to_lay_over_others(recipe: Path) -> None:
    """Its names are its own, so that several share a storage; its head shows the command."""
    found = load(overlays=[recipe])
    assert {found.corpus.name, found.model.name} == {recipe.stem}
    assert found.pretrain.name.startswith(recipe.stem)
    assert not found.corpus.pairs or found.finetune.name.startswith(recipe.stem)
    assert f"raylm quickstart --with jobs/recipes/{recipe.name} --out {recipe.stem}" in recipe.read_text()
    assert all(source.path.startswith("data/") for source in (*found.corpus.documents, *found.corpus.pairs))  # type: ignore[union-attr]
