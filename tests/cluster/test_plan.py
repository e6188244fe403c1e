"""`raylm cluster plan`: machines, memory, hours and cost by the file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from raylm.cli import main
from raylm.cluster.check import check
from raylm.cluster.machines import L4
from raylm.cluster.plan import MODEL_FLOPS_UTILISATION, StagePlan, plan
from raylm.settings import Settings
from raylm.training.estimate import dry_run

CLUSTERS = Path(__file__).parents[2] / "clusters"


def planned(path: Path, **ours: dict[str, Any]) -> list[StagePlan]:
    """The plan of the AWS file with other values in some sections."""
    values = yaml.safe_load((CLUSTERS / "aws.yaml").read_text())
    for section, update in ours.items():
        values["metadata"]["raylm"][section] |= update
    path.write_text(yaml.safe_dump(values))
    return plan(path)


def test_a_training_gets_spot_gpus_first(tmp_path: Path) -> None:
    jobs = planned(tmp_path / "cluster.yaml", pretrain={"workers": 20, "global_batch_tokens": 20 * 16_384})
    [pretrain] = [job for job in jobs if job.stage == "pretrain"]
    assert pretrain.machines == {"gpu-spot": 4, "gpu-on-demand": 1}
    assert (pretrain.workers, pretrain.spot, pretrain.gpu) == (20, 0.8, "L4")
    assert pretrain.hourly == pytest.approx(4 * 2.1 + 5.8 + 0.23)


def test_hours_and_cost_are_those_of_the_flops(tmp_path: Path) -> None:
    jobs = planned(tmp_path / "cluster.yaml")
    widest, narrowest = (job for job in jobs if job.stage == "pretrain")
    assert (widest.workers, narrowest.workers) == (16, 4)
    values = yaml.safe_load((CLUSTERS / "aws.yaml").read_text())["metadata"]["raylm"]
    settings = Settings.model_validate(values | {"storage": str(tmp_path / "nowhere")})
    flops = dry_run(settings, "pretrain").work.flops
    assert flops
    assert widest.seconds == pytest.approx(flops / (16 * L4.flops * MODEL_FLOPS_UTILISATION), rel=1e-6)
    assert narrowest.seconds == pytest.approx(4 * widest.seconds)
    assert widest.cost == pytest.approx((4 * 2.1 + 0.23) * widest.seconds / 3_600)
    # As much work on cheaper machines costs what the head costs longer.
    assert narrowest.cost is not None and widest.cost < narrowest.cost


def test_what_is_not_known_is_not_told(tmp_path: Path) -> None:
    jobs = planned(tmp_path / "cluster.yaml", model={"start_from": "someone/large"}, prices={"other": 1.0})
    trainings = [job for job in jobs if job.stage in ("pretrain", "finetune")]
    assert len(trainings) == 4
    assert all(job.memory is None and job.seconds is None and job.cost is None for job in trainings)
    prepare, batch = jobs[0], jobs[-1]
    assert prepare.machines == {"driver": 2, "cpu": 8} and prepare.seconds is None
    assert batch.machines == {"gpu-spot": 4, "gpu-on-demand": 2}
    [local] = {job.hourly for job in plan(CLUSTERS / "local.yaml")}
    assert local is None  # no prices


def test_machines_without_gpus_train_as_wide_as_they_will(tmp_path: Path) -> None:
    path, widths = tmp_path / "cluster.yaml", []
    for cpus in (2, 4, 16):  # of each of three machines
        values = yaml.safe_load((CLUSTERS / "local.yaml").read_text())
        for node_type in values["available_node_types"].values():
            node_type["resources"]["CPU"] = cpus
        path.write_text(yaml.safe_dump(values))
        widths.append([stage.workers for stage in plan(path) if stage.stage == "pretrain"])
    assert widths == [[1], [3], [4]]
    values["metadata"]["raylm"]["pretrain"]["stream"] = True
    values["available_node_types"]["head"]["resources"]["CPU"] = 0
    values["available_node_types"]["worker"]["resources"]["CPU"] = 8
    path.write_text(yaml.safe_dump(values))
    assert next(stage.workers for stage in plan(path) if stage.stage == "pretrain") == 3, "a CPU is left to Ray Data"
    values["available_node_types"]["head"]["resources"]["CPU"] = 16
    values["metadata"]["raylm"]["pretrain"]["global_batch_tokens"] = 34 * 32
    path.write_text(yaml.safe_dump(values))
    assert ["do not divide by 4 workers" in finding.why for finding in check([path])] == [True]


def test_the_command_prints_a_table_and_json() -> None:
    found = CliRunner().invoke(main, ["cluster", "plan", str(CLUSTERS / "gcp.yaml")], env={"COLUMNS": "160"})
    assert found.exit_code == 0, found.output
    assert "4 gpu-spot" in found.output and "of L4" in found.output
    rows = json.loads(CliRunner().invoke(main, ["cluster", "plan", "--json", str(CLUSTERS / "gcp.yaml")]).output)
    assert [row["stage"] for row in rows] == ["prepare", "pretrain", "pretrain", "finetune", "finetune", "batch"]
    assert rows[1]["cost"] == pytest.approx(rows[1]["hourly"] * rows[1]["seconds"] / 3_600)


def test_a_file_that_asks_for_nothing_known_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    for key, remedy in (("pretrian", "did you mean 'pretrain'?"), ("qqq", "take it out")):
        path.write_text(f"cluster_name: x\nmetadata: {{raylm: {{{key}: {{}}}}}}\n")
        found = CliRunner().invoke(main, ["cluster", "plan", str(path)])
        assert found.exit_code == 1
        assert f"metadata.raylm.{key}: unknown key; {remedy}\n" in found.output
