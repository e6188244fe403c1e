"""`raylm cluster …`: cluster files looked at before anything is launched; `raylm submit`: jobs on a running one."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raylm.cli.options import with_settings
from raylm.cli.session import ray_session
from raylm.cluster.file import CLOUDS, read
from raylm.errors import SettingsError
from raylm.progress import duration
from raylm.settings import Settings, find_cluster_file

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

TARGETS = (
    "crontab", "systemd", "airflow", "raycluster", "rayjob", "raycronjob", "rayservice", "k8s-cronjob", "prometheus",
    "grafana",
)  # fmt: skip

address_option = click.option(
    "--address", help="Of the dashboard. Default: $RAY_API_SERVER_ADDRESS, or that of --cluster, else this machine's."
)


@contextmanager
def _reached(cluster: str | None, address: str | None) -> Iterator[JobSubmissionClient]:
    """The Jobs API of a cluster: at an address, else through a tunnel to the head of a file that is named."""
    from raylm.cluster import jobs

    named = cluster or os.environ.get("RAYLM_CLUSTER")
    if address or os.environ.get("RAY_API_SERVER_ADDRESS") or not named:
        yield jobs.connect(address)
        return
    from raylm.cluster.tunnel import dashboard

    with dashboard(read(Path(named).expanduser())) as where:
        yield jobs.connect(where)


def _refuse_options(options: Sequence[str], script: str) -> None:
    """Refuse options that a script has to be given: it reads its settings itself, where it runs.

    :raises SettingsError: there are some.
    """
    if options:
        raise SettingsError(f"{options[0]}: is not for this command; write it behind {script}")


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


@cluster.command()
@click.argument("cloud", type=click.Choice(CLOUDS))
@click.option("--address", required=True, help="Of the cluster: host:port of its head.")
@click.option("--node-ip", help="This machine's address, as Ray has it. Default: what Ray finds.")
@click.option("--metadata", help="The address of the cloud's metadata service. Default: its usual one.")
@click.option(
    "--minutes-without-head",
    type=click.FloatRange(min=0, min_open=True),
    help="Shut the machine down where the head is away for so long.",
)
def watch(
    cloud: str, address: str, node_ip: str | None, metadata: str | None, minutes_without_head: float | None
) -> None:
    """On a machine of a cloud: drain it when that says that it will be taken away; end it with the cluster's head."""
    from ray.util import get_node_ip_address

    from raylm.cluster import notices

    machine = node_ip or get_node_ip_address()
    notices.watch(
        cloud,
        metadata or notices.PLACES[cloud],
        lambda seconds: notices.drain(address, machine, seconds),
        lambda text: click.echo(text, err=True),
        notices.Head(address, 60 * minutes_without_head) if minutes_without_head else None,
    )


@cluster.command()
@click.option("--authority", is_flag=True, help="Make what signs, where `ray up` is called; once for all machines.")
@click.option("--directory", type=click.Path(path_type=Path), default="~/.ray/tls", show_default=True)
@click.option("--node-ip", multiple=True, help="This machine's addresses. Default: the one that Ray finds.")
def certificate(authority: bool, directory: Path, node_ip: tuple[str, ...]) -> None:
    """Make this machine's certificate, and print what a shell sets for TLS between Ray's machines."""
    from raylm.cluster.certificates import make_authority, make_certificate

    place = directory.expanduser()
    if authority:
        make_authority(place)
        return
    from ray.util import get_node_ip_address

    environment = make_certificate(place, node_ip or [get_node_ip_address()])
    click.echo(f"export {shlex.join(f'{name}={value}' for name, value in environment.items())}")


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@address_option
@with_settings
def submit(
    settings: Settings,
    cluster: str | None,
    overlays: tuple[str, ...],
    overrides: tuple[str, ...],
    script: str,
    arguments: tuple[str, ...],
    address: str | None,
) -> None:
    """Run a script of jobs/ on a running cluster, and follow it to its end.

    A second call with the same words joins the job that runs. Options of this command stand before the script, those of
    the script behind it.
    """
    from raylm.cluster import jobs

    foreign = [f"--with {file}" for file in overlays]
    foreign += [f"--set {override}" for override in overrides if not re.match(r"\s*job\s*[.=]", override)]
    _refuse_options(foreign, script)

    def echo(text: str) -> None:
        click.echo(text, nl=False)

    with _reached(cluster, address) as client:
        ended = jobs.submit(client, script, arguments, settings.job, echo, lambda text: click.echo(text, err=True))
    sys.exit(ended.exit_code)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def up(file: Path) -> None:
    """Make the cluster of a file, once it has been checked, with a token that only you can read."""
    from raylm.cluster import launch

    launch.up(file)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def down(file: Path) -> None:
    """End the cluster of a file with all its machines."""
    from raylm.cluster import launch

    launch.down(file)


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(file: Path, script: str, arguments: tuple[str, ...]) -> None:
    """Make the cluster of a file, run a script of jobs/ on it, and end it, whatever becomes of the job."""
    from raylm.cluster import launch

    if script.startswith("-"):
        _refuse_options([shlex.join([script, *arguments[:1]])], "the script")
    ended = launch.run(
        file, script, arguments, lambda text: click.echo(text, nl=False), lambda text: click.echo(text, err=True)
    )
    sys.exit(ended.exit_code)


@click.command()
@click.option("--name", help="Of the directory below <storage>/jobs. Default: the time.")
@with_settings
def collect_logs(settings: Settings, name: str | None) -> None:
    """Keep the logs of all machines of the running cluster on storage, an archive of each."""
    from raylm.cluster.logs import collect
    from raylm.storage import StoragePath

    place = StoragePath(settings.storage) / "jobs" / (name or f"logs-{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}")
    with ray_session(join=True):
        collected = collect(place)
    for machine, reason in collected.missed.items():
        click.echo(f"{machine}: {reason}", err=True)
    click.echo(f"logs of {len(collected.machines)} machines: {place}")


@click.command()
@click.argument("submission_id")
@click.option("--cluster", type=click.Path(), help="Cluster YAML, to whose head a tunnel is opened.")
@address_option
def logs(submission_id: str, cluster: str | None, address: str | None) -> None:
    """Give out what a job prints, from its beginning to its end."""
    from raylm.cluster import jobs

    with _reached(cluster, address) as client:
        ended = jobs.follow(
            client, submission_id, lambda text: click.echo(text, nl=False), lambda text: click.echo(text, err=True)
        )
    sys.exit(ended.exit_code)


@click.command()
@address_option
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
@with_settings
def status(settings: Settings, cluster: str | None, address: str | None, as_json: bool) -> None:
    """Say which machines of a running cluster are up, what an hour of them costs, and which jobs there are."""
    from raylm.cluster.status import status as find
    from raylm.cluster.status import status_table

    with _reached(cluster, address) as client:
        found = find(client, settings.prices)
    click.echo(json.dumps(asdict(found), indent=2) if as_json else status_table(found))


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--to", "target", required=True, type=click.Choice(TARGETS), help="For which program.")
@click.option("--run", "command", default="nightly", show_default=True, help="With rayjob: a command of raylm.")
def render(file: Path | None, target: str, command: str) -> None:
    """Write a cluster file's schedule, the cluster itself, or what watches it, as another program wants it."""
    from raylm.cluster.render import render as text_of

    click.echo(text_of(find_cluster_file(file), target, command), nl=False)


@click.command()
@click.option("--now", type=click.DateTime(["%Y-%m-%dT%H:%M", "%Y-%m-%d"]), help="Take this for the time of day; UTC.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@with_settings
def nightly(settings: Settings, now: datetime | None, as_json: bool) -> None:
    """Do the batch jobs of the date that has ended, and those of earlier dates that have not been done."""
    from raylm.nightly import run_night

    with ExitStack() as stack:
        moment = (now or datetime.now(UTC)).replace(tzinfo=UTC)
        is_served = settings.nightly.through == "serve"
        summary = run_night(settings, moment, lambda: stack.enter_context(ray_session(with_service=is_served)))
    if as_json:
        click.echo(summary.to_json())
    else:
        for record in summary.records:
            told = record.reason or f"{record.rows:,} rows, {record.errors:,} with an error, {duration(record.seconds)}"
            click.echo(f"{record.date}  {record.job}  {record.status}: {told}")
        if not summary.records:
            click.echo("nothing to do: every date has been done")
    if summary.failed:
        sys.exit(1)
