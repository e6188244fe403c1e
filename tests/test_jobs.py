"""The scripts that `ray job submit` runs; `tests/cluster` submits them."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from raylm.cli import main
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
