"""`raylm cluster …`: cluster files looked at before anything is launched."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click


@click.group()
def cluster() -> None:
    """Look at cluster files."""


@cluster.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--strict", is_flag=True, help="Fail on warnings as well.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(files: tuple[Path, ...], strict: bool, as_json: bool) -> None:
    """Say what is wrong with cluster files: file, line, key, why, what would be right."""
    from raylm.cluster.check import check as find

    findings = find(files)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        for finding in findings:
            click.echo(str(finding))
        errors = sum(finding.is_error for finding in findings)
        checked = f"{len(files)} file{'s' * (len(files) > 1)}"
        click.echo(f"{checked}: {errors} errors, {len(findings) - errors} warnings")
    if any(finding.is_error or strict for finding in findings):
        sys.exit(1)


@cluster.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(file: Path, as_json: bool) -> None:
    """Say what a cluster file will run where: machines, workers, memory, spot share, hours, cost."""
    from raylm.cluster.plan import plan as find
    from raylm.cluster.plan import plan_table

    jobs = find(file)
    if as_json:
        rows = [asdict(job) | {"cost": job.cost} for job in jobs]
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        click.echo(plan_table(jobs))
