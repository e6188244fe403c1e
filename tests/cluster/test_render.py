"""`raylm render`: what Kubernetes, cron, systemd and Airflow are given is what they take."""

from __future__ import annotations

import gzip
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from raylm.cli import main
from raylm.cluster.render import on_calendar, render
from raylm.errors import SettingsError
from raylm.settings import Settings, Topology
from tests.cluster.panels import metrics_of
from tests.conftest import DATA

CLUSTERS = Path(__file__).parents[2] / "clusters"
KUBERAY = CLUSTERS / "kuberay.yaml"
DEFINITIONS = {
    "RayCluster": "rayclusters",
    "RayJob": "rayjobs",
    "RayCronJob": "raycronjobs",
    "RayService": "rayservices",
}


def strict(schema: Any) -> Any:
    """A schema of Kubernetes' that refuses fields it does not name, as an API server in strict mode does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    is_object = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    return closed


@cache
def definition(kind: str) -> Any:
    """KubeRay's own description of a kind of resource; the test is skipped where it is absent."""
    file = DATA / "kuberay-crds" / f"{DEFINITIONS[kind]}.yaml.gz"
    if not file.is_file():
        pytest.skip(f"needs {file}; set RAYLM_DATA to its folder")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the definitions are megabytes
    versions = yaml.load(gzip.decompress(file.read_bytes()), loader)["spec"]["versions"]
    [schema] = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object"}
    return strict(schema)


def rendered(target: str, *options: str, path: Path = KUBERAY) -> list[Any]:
    found = CliRunner().invoke(main, ["render", "--to", target, *options, str(path)])
    assert found.exit_code == 0, found.output
    return list(yaml.safe_load_all(found.output))


@pytest.mark.parametrize(
    ("target", "kind"),
    [("raycluster", "RayCluster"), ("rayjob", "RayJob"), ("raycronjob", "RayCronJob"), ("rayservice", "RayService")],
)
def test_kuberay_takes_what_is_rendered(target: str, kind: str) -> None:
    settings, resource = rendered(target)
    assert (resource["kind"], resource["metadata"]["namespace"]) == (kind, "raylm")
    schema = definition(kind)
    jsonschema.Draft7Validator(schema).validate(resource)
    # The check can fail: a misspelt field is refused.
    resource["spec"]["speck"] = 1
    assert not jsonschema.Draft7Validator(schema).is_valid(resource)
    assert settings["kind"] == "ConfigMap"
    carried = yaml.safe_load(settings["data"]["cluster.yaml"])
    assert carried == yaml.safe_load(KUBERAY.read_text())
    assert Settings.model_validate(carried["metadata"]["raylm"]).nightly.jobs[0].name == "mail"


def test_pods_are_what_the_node_types_say() -> None:
    _, resource = rendered("raycluster")
    spec = resource["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"] == {"version": "v2", "idleTimeoutSeconds": 300}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert list(groups) == ["driver", "cpu", "gpu-spot", "gpu-on-demand"]
    assert json.loads(json.loads(groups["driver"]["rayStartParams"]["resources"])) == {"driver": 4}
    spot = groups["gpu-spot"]
    assert (spot["minReplicas"], spot["maxReplicas"], spot["priority"]) == (0, 8, 10)
    assert spot["labels"] == {"ray.io/market-type": "spot"}
    pod = spot["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "24", "memory": "96Gi", "nvidia.com/gpu": "2"}
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["serviceAccountName"] == "raylm"
    assert {"name": "RAYLM_CLUSTER", "value": "/etc/raylm/cluster.yaml"} in container["env"]
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    # The head's group has the name by which a job tells that the file is that of its cluster.
    topology = Topology.of(yaml.safe_load(KUBERAY.read_text()))
    assert topology and topology.head == "headgroup"
    assert sum(int(machine.get("GPU", 0)) for machine in topology.machines) == 24


def test_a_job_runs_what_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    values = yaml.safe_load(KUBERAY.read_text())
    values["provider"]["gcsFaultToleranceOptions"] = {"backend": "rocksdb", "storage": {"size": "2Gi"}}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    _, job = rendered("rayjob", "--run", "pretrain --set pretrain.steps=10", path=path)
    spec = job["spec"]
    assert spec["entrypoint"] == "python -m raylm pretrain --set pretrain.steps=10"
    assert job["metadata"]["name"].startswith("raylm-pretrain-")
    assert job["metadata"]["name"] != rendered("rayjob", "--run", "pretrain", path=path)[1]["metadata"]["name"]
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"]) == (2, True)
    assert json.loads(spec["entrypointResources"]) == {"driver": 1}
    assert spec["rayClusterSpec"]["gcsFaultToleranceOptions"]["storage"] == {"size": "2Gi"}
    jsonschema.Draft7Validator(definition("RayJob")).validate(job)


def test_nights_come_when_the_settings_say() -> None:
    _, night = rendered("raycronjob")
    assert (night["spec"]["schedule"], night["spec"]["timeZone"]) == ("30 2 * * *", "Europe/Berlin")
    assert night["spec"]["jobTemplate"]["entrypoint"] == "python -m raylm nightly"
    _, plain = rendered("k8s-cronjob")
    assert (plain["apiVersion"], plain["spec"]["concurrencyPolicy"]) == ("batch/v1", "Forbid")
    assert plain["spec"]["timeZone"] == "Europe/Berlin"
    [container] = plain["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    command = ["raylm", "submit", "--address", "http://raylm-head-svc:8265", "jobs/nightly.py"]
    assert container["command"] == command
    [token] = [variable for variable in container["env"] if variable["name"] == "RAY_AUTH_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "raylm", "key": "auth_token"}


def test_a_service_hosts_the_model_of_the_settings() -> None:
    _, service = rendered("rayservice")
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["args"]["gpus"] is True
    assert application["args"]["model"] == "gs://my-bucket/raylm/models/default"
    assert application["import_path"] == "raylm.inference.service.start:build"
    assert application["args"]["serve"]["host"] == "0.0.0.0"


# ------------------------------------------------------------------------------------------ elsewhere


@pytest.fixture
def aws(tmp_path: Path) -> Path:
    values = yaml.safe_load((CLUSTERS / "aws.yaml").read_text())
    job = {"name": "mail", "task": "translate", "input": "s3://in/{date}/", "output": "s3://out/{date}/", "to": "de"}
    values["metadata"]["raylm"] |= {
        "nightly": {"schedule": "30 2 * * 1-5", "timezone": "Europe/Berlin", "jobs": [job]},
        "job": {"retries": 2},
    }
    path = tmp_path / "100 %.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_cron_takes_its_lines(aws: Path) -> None:
    comment, warning, zone, line = render(aws, "crontab").splitlines()
    assert comment.startswith("#") and zone == "CRON_TZ=Europe/Berlin"
    assert warning.startswith("# cronie alone reads CRON_TZ; ") and "the machine's own time zone" in warning
    assert line.startswith("30 2 * * 1-5 ")
    command = line.removeprefix("30 2 * * 1-5 ").replace(r"\%", "%")  # as cron undoes it
    assert shlex.split(command) == ["cd", str(Path.cwd()), "&&", "raylm", "run", str(aws), "jobs/nightly.py"]


def test_systemd_takes_its_units(aws: Path) -> None:
    text = render(aws, "systemd")
    assert "OnCalendar=Mon..Fri *-*-* 02:30:00 Europe/Berlin\nPersistent=true" in text
    assert "100 %%.yaml" in text
    assert f"WorkingDirectory={Path.cwd()!s}" in text


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("30 2 * * *", "*-*-* 02:30:00"),
        ("0 */6 * * *", "*-*-* 00/6:00:00"),
        ("15,45 1-3 1 * *", "*-*-01 01..03:15,45:00"),
        ("0 4 * 1,7 *", "*-01,07-* 04:00:00"),
        ("0 4 * * 0,6", "Sun,Sat *-*-* 04:00:00"),
        ("0 4 * * 0-2", "Sun,Mon..Tue *-*-* 04:00:00"),
        ("0 4 * * 5-7", "Fri..Sun *-*-* 04:00:00"),
        ("0 4 * * 0-1", "Sun,Mon *-*-* 04:00:00"),
        ("0 4 */10 * *", "*-*-01/10 04:00:00"),
    ],
)
def test_schedules_of_cron_are_said_in_systemds_words(schedule: str, expected: str) -> None:
    assert on_calendar(schedule) == expected


def test_airflow_takes_a_program(aws: Path) -> None:
    text = render(aws, "airflow")
    compile(text, "dag.py", "exec")
    assert "schedule='30 2 * * 1-5'" in text and "tz='Europe/Berlin'" in text
    assert "retries=0" in text, "`raylm run` tries again itself"
    assert f"cwd={str(Path.cwd())!r}" in text


def test_on_this_machine_a_night_needs_no_cluster(tmp_path: Path) -> None:
    values = yaml.safe_load((CLUSTERS / "local.yaml").read_text())
    job = {"name": "mail", "task": "translate", "input": "in/{date}/", "output": "out/{date}/"}
    values["metadata"]["raylm"]["nightly"] = {"jobs": [job]}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    command = f"cd {Path.cwd()!s} && raylm nightly --cluster {path}"
    assert render(path, "crontab").splitlines()[-1] == f"30 2 * * * {command}"


def test_what_cannot_be_rendered_says_why(aws: Path) -> None:
    with pytest.raises(SettingsError, match=r"provider.type is 'aws'; --to rayjob is for kuberay"):
        render(aws, "rayjob")
    with pytest.raises(SettingsError, match=r"nightly.jobs is empty"):
        render(CLUSTERS / "local.yaml", "crontab")
    with pytest.raises(SettingsError, match="days of the month and of the week"):
        on_calendar("0 4 1 * 1")


# ------------------------------------------------------------------------------------------ Prometheus, Grafana


def test_prometheus_is_told_where_the_machines_are() -> None:
    [job] = yaml.safe_load(render(CLUSTERS / "aws.yaml", "prometheus"))["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    monitor = yaml.safe_load(render(KUBERAY, "prometheus"))
    assert monitor["kind"] == "PodMonitor"
    assert monitor["metadata"]["namespace"] == yaml.safe_load(KUBERAY.read_text())["provider"]["namespace"]
    namespaces = {resource["metadata"]["namespace"] for resource in yaml.safe_load_all(render(KUBERAY, "raycluster"))}
    assert namespaces == {monitor["metadata"]["namespace"]}
    assert monitor["spec"]["selector"]["matchExpressions"] == [{"key": "ray.io/cluster", "operator": "Exists"}]
    with pytest.raises(SettingsError, match=r"local.yaml: machines that are processes"):
        render(CLUSTERS / "local.yaml", "prometheus")


def test_the_dashboard_draws_every_panel_once_and_none_over_another() -> None:
    dashboard = json.loads(render(CLUSTERS / "aws.yaml", "grafana"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) == 23
    drawn = [panel for panel in panels if panel["type"] == "timeseries"]
    assert all(panel["targets"] and panel["datasource"]["uid"] == "${source}" for panel in drawn)


def test_ray_has_the_metrics_of_machines() -> None:
    """Those of trainings and of the service are seen where they run."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    assert metrics_of("Machines") <= {f"ray_{name}" for name in METRICS_GAUGES}
