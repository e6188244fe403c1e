"""Every `raylm` command of the README runs, in the README's order, with small settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from raylm.settings import Settings
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def commands() -> list[str]:
    """The lines of the README's shell blocks that call raylm, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("raylm ")]


def test_the_readme_shows_the_commands() -> None:
    shown = " ".join(commands())
    for command in ("quickstart", "prepare", "pretrain", "finetune", "evaluate", "export", "batch-translate",
                    "batch-summarize", "serve", "report", "settings"):  # fmt: skip
        assert f"raylm {command}" in shown


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
def test_make_knows_the_targets_of_the_readme(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL))
def test_the_settings_of_the_readme_are_valid(block: str) -> None:
    values = yaml.safe_load(block)
    Settings.model_validate(values["metadata"]["raylm"] if "metadata" in values else values)


def test_paths_of_the_readme_exist() -> None:
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (REPOSITORY / path).exists(), path


def test_the_readmes_commands_run(small_settings: Settings, ray_cluster: None, tmp_path: Path) -> None:
    """`quickstart` as on a laptop, with a Ray of its own; the others on one that runs already, as on a cluster."""
    values = small_settings.model_dump(mode="json") | {"storage": str(tmp_path / "raylm")}
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": values}}))
    texts = ["Monday, 5 May 2025", "12.5 kilometers", None, "Germany and France"]
    pq.write_table(pa.table({"id": range(4), "text": texts}), tmp_path / "input.parquet")
    token = Path("~/.ray/auth_token").expanduser()
    environment = os.environ | {
        "RAYLM_CLUSTER": str(cluster),
        **({"RAY_AUTH_TOKEN_PATH": str(token)} if token.exists() else {}),
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ran = 0
    for command in commands():
        if command.split()[1] in ("serve", "cluster", "render", "up", "submit", "status", "run", "down"):
            continue  # the first does not end by itself, the last need machines; all have tests of their own
        if "jobs/recipes/" in command:
            continue  # real text, for half an hour
        is_first = command.startswith("raylm quickstart")
        address = "local" if is_first else ray.get_runtime_context().gcs_address
        found = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment | {"RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=1_200,
            check=False,
        )
        assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"
        ran += 1
    assert ran > 8
    assert (tmp_path / "raylm" / "report.html").exists()
    assert (tmp_path / "quickstart" / "report.html").exists()
    for task in ("translate.translated", "summarize.summarized"):
        assert pq.read_metadata(tmp_path / "quickstart" / "batch" / f"{task}.parquet").num_rows > 10
    translated = pq.read_table(tmp_path / "input.translated.parquet").to_pylist()
    assert [row["id"] for row in translated] == [0, 1, 2, 3]
    assert all((row["translation"] is None) != (row["error"] is None) for row in translated)
    assert translated[2]["error"]
