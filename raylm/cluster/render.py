"""`raylm render`: one cluster file, written as each world wants it: cron, systemd, Airflow, Kubernetes, Prometheus."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import yaml

from raylm.cluster import kubernetes, monitoring
from raylm.cluster.file import CLOUDS, ClusterFile, read
from raylm.errors import SettingsError
from raylm.settings import Settings, load

_UNSTOPPED = """# The command alone is told to stop, and has time for ending all machines.
KillMode=mixed
TimeoutStopSec=30min
"""

_DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

ON_KUBERNETES: dict[str, Callable[[ClusterFile, Settings, str], list[kubernetes.Resource]]] = {
    "raycluster": lambda cluster, _, __: kubernetes.ray_cluster(cluster),
    "rayjob": kubernetes.ray_job,
    "raycronjob": lambda cluster, settings, _: kubernetes.ray_cron_job(cluster, settings),
    "rayservice": lambda cluster, settings, _: kubernetes.ray_service(cluster, settings),
    "k8s-cronjob": lambda cluster, settings, _: kubernetes.cron_job(cluster, settings),
}

MONITORING = {"prometheus": monitoring.prometheus, "grafana": monitoring.grafana}


def render(path: Path, target: str, command: str = "nightly") -> str:
    """A cluster file's schedule, or the cluster itself, as text for another program.

    :param target: `crontab`, `systemd`, `airflow`, or one of `ON_KUBERNETES` and `MONITORING`.
    :param command: of raylm, with its options: what a `rayjob` runs.
    :raises SettingsError: the file is none, or does not say what the target needs.
    """
    cluster, settings = read(path), load(path)
    if target in ON_KUBERNETES:
        if cluster.provider != "kuberay":
            raise SettingsError(f"{path}: provider.type is '{cluster.provider}'; --to {target} is for kuberay")
        resources = ON_KUBERNETES[target](cluster, settings, command)
        return str(yaml.safe_dump_all(resources, sort_keys=False, allow_unicode=True))
    if target in MONITORING:
        return MONITORING[target](cluster)
    if not settings.nightly.jobs:
        raise SettingsError(f"{path}: metadata.raylm.nightly.jobs is empty: there is nothing to schedule")
    return {"crontab": _crontab, "systemd": _systemd, "airflow": _airflow}[target](cluster, settings)


def nightly_command(cluster: ClusterFile) -> str:
    """What starts a night: on this machine, as a job of one's own machines, or on a cluster that is made for it."""
    file = str(cluster.path.absolute())
    if cluster.provider == "external":
        return shlex.join(["raylm", "nightly", "--cluster", file])
    if cluster.provider in CLOUDS:
        return shlex.join(["raylm", "run", file, "jobs/nightly.py"])
    return shlex.join(["raylm", "submit", "--cluster", file, "jobs/nightly.py"])


def _directory() -> str:
    """Where a schedule runs its command: here, as `job.working_dir` and relative paths are meant."""
    return str(Path.cwd())


def _crontab(cluster: ClusterFile, settings: Settings) -> str:
    nightly = settings.nightly
    command = f"cd {shlex.quote(_directory())} && {nightly_command(cluster)}"
    command = command.replace("%", r"\%")  # which cron would take for a line's end
    return (
        f"# {cluster.get('cluster_name')}: `crontab -e` takes these lines; the program has to be on cron's PATH.\n"
        "# cronie alone reads CRON_TZ; to others, as Debian's cron, the hour is in the machine's own time zone.\n"
        f"CRON_TZ={nightly.timezone}\n"
        f"{nightly.schedule} {command}\n"
    )


def _systemd(cluster: ClusterFile, settings: Settings) -> str:
    name = f"{cluster.get('cluster_name')}-nightly"
    return f"""# {name}.service, in ~/.config/systemd/user or /etc/systemd/system
[Unit]
Description=Batch jobs of the night
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
WorkingDirectory={_directory().replace("%", "%%")}
ExecStart=/usr/bin/env {nightly_command(cluster).replace("%", "%%")}
{_UNSTOPPED if cluster.provider in CLOUDS else ""}
# {name}.timer, beside it; `systemctl enable --now {name}.timer`
[Unit]
Description=Every night

[Timer]
OnCalendar={on_calendar(settings.nightly.schedule)} {settings.nightly.timezone}
Persistent=true

[Install]
WantedBy=timers.target
"""


def on_calendar(schedule: str) -> str:
    """A schedule of cron in the words of systemd: `30 2 * * 1-5` is `Mon..Fri *-*-* 02:30:00`.

    :raises SettingsError: days of the month and of the week are both named, which cron adds up and systemd intersects.
    """
    minute, hour, day, month, weekday = schedule.split()
    if day != "*" and weekday != "*":
        raise SettingsError(
            f"nightly.schedule: '{schedule}' names days of the month and of the week; systemd has no such schedule"
        )
    days = "" if weekday == "*" else f"{_named_days(weekday)} "
    return f"{days}*-{_field(month, 1)}-{_field(day, 1)} {_field(hour, 0)}:{_field(minute, 0)}:00"


def _field(text: str, lowest: int) -> str:
    """A field of cron in the words of systemd."""
    parts = []
    for part in text.split(","):
        span, slash, step = part.partition("/")
        if span == "*":
            parts.append(f"{lowest:02d}/{step}" if slash else "*")
        else:
            first, dash, last = span.partition("-")
            bounds = f"{int(first):02d}" + (f"..{int(last):02d}" if dash else "")
            parts.append(bounds + (f"/{step}" if slash else ""))
    return ",".join(parts)


def _named_days(text: str) -> str:
    if "/" in text:
        raise SettingsError(f"nightly.schedule: systemd has no steps of days of the week, found '{text}'")
    parts = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if int(first) == 0 and dash:  # cron's weeks begin on Sunday, systemd's on Monday
            parts.append("Sun")
            first = "1"
        if int(first) < int(last or first):
            parts.append(f"{_DAYS[int(first)]}..{_DAYS[int(last)]}")
        elif int(first) == int(last or first):
            parts.append(_DAYS[int(first)])
    return ",".join(parts)


def _airflow(cluster: ClusterFile, settings: Settings) -> str:
    nightly = settings.nightly
    name = f"{cluster.get('cluster_name')}_nightly".replace("-", "_")
    retries = settings.job.retries if cluster.provider == "external" else 0  # the others try again themselves
    return f'''"""Batch jobs of the night, for Airflow 2.4 or newer; put it into the folder of DAGs."""

import pendulum
from airflow import DAG
from airflow.operators.bash import BashOperator

with DAG(
    dag_id={name!r},
    schedule={nightly.schedule!r},
    start_date=pendulum.datetime(2026, 1, 1, tz={nightly.timezone!r}),
    catchup=False,  # raylm makes up for missed nights itself
    max_active_runs=1,
):
    BashOperator(
        task_id="nightly",
        bash_command={nightly_command(cluster)!r},
        cwd={_directory()!r},
        retries={retries},
    )
'''
