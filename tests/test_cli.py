"""The command line: its names are frozen, its errors are one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from raylm.cli import main
from raylm.settings import Settings

FROZEN = Path(__file__).parent / "frozen_interface.json"


def interface() -> dict[str, Any]:
    """Every command with its parameters, and every key of the settings with its default."""

    def commands(group: click.Group, prefix: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, command in sorted(group.commands.items()):
            if isinstance(command, click.Group):
                found |= commands(command, f"{prefix}{name} ")
            else:
                found[f"{prefix}{name}"] = sorted("/".join(parameter.opts) for parameter in command.params)
        return found

    def keys(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, dict) and value:
                found |= keys(value, f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = value
        return found

    assert isinstance(main, click.Group)
    return {"commands": commands(main, ""), "settings": keys(Settings().model_dump(mode="json"), "")}


def test_commands_and_settings_are_frozen() -> None:
    """A change here is one that users notice: run `python -m tests.test_cli` and say it in the CHANGELOG."""
    assert interface() == json.loads(FROZEN.read_text())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("raylm: error: ")
    for part in parts:
        assert part in lines[0]


def test_an_unknown_key_is_one_line(tmp_path: Path) -> None:
    cluster = tmp_path / "c.yaml"
    cluster.write_text("metadata: {raylm: {pretrain: {stepz: 1}}}")
    assert_one_line_error(run("pretrain", "--cluster", str(cluster)), str(cluster), "'pretrain.stepz'", "'steps'")
    assert_one_line_error(run("export", "--cluster", str(tmp_path / "absent.yaml")), "there is no file")
    assert_one_line_error(run("export", "--set", "storag=/tmp"), "'storag'", "'storage'")


def test_a_file_that_is_missing_is_not_blamed_on_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = f"{tmp_path}/absent.yaml"
    commands = (
        ["run", absent, "jobs/prepare.py"],
        ["render", "--to", "crontab", absent],
        ["export", "--cluster", absent],
    )
    for command in commands:
        assert run(*command).stderr == f"raylm: error: there is no file {absent}\n"
    monkeypatch.setenv("RAYLM_CLUSTER", absent)
    assert run("export").stderr == f"raylm: error: $RAYLM_CLUSTER: there is no file {absent}\n"


def test_options_of_a_script_are_refused_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # with no token, which the command would show from then on
    (tmp_path / "more.yaml").write_text("pretrain: {steps: 7}")
    away = ("--address", "http://127.0.0.1:9")
    for option in (("--set", "pretrain.steps=7"), ("--with", f"{tmp_path}/more.yaml")):
        told = (f"{' '.join(option)}: is not for this command", "write it behind jobs/pretrain.py")
        assert_one_line_error(run("submit", *away, *option, "jobs/pretrain.py"), *told)
    own = run("submit", *away, "--set", "job.retries=2", "jobs/pretrain.py", "--set", "pretrain.steps=7")
    assert_one_line_error(own, "there is no cluster at http://127.0.0.1:9")
    late = run("run", f"{tmp_path}/more.yaml", "--set", "pretrain.steps=7", "jobs/pretrain.py")
    assert_one_line_error(late, "--set pretrain.steps=7: is not for this command; write it behind the script")


def test_stages_that_lack_their_input_say_what_to_run(tmp_path: Path) -> None:
    storage = f"storage={tmp_path}"
    assert_one_line_error(run("evaluate", "--set", storage), "not prepared", "raylm prepare")
    assert_one_line_error(run("export", "--set", storage), "no complete checkpoint")
    assert_one_line_error(run("report", "--set", storage), str(tmp_path))


def test_settings_show_and_schema() -> None:
    shown = yaml.safe_load(run("settings", "show", "--set", "pretrain.steps=7").stdout)
    assert Settings.model_validate(shown).pretrain.steps == 7
    schema = json.loads(run("settings", "schema").stdout)
    assert "pretrain" in schema["properties"]


def test_help_names_every_command() -> None:
    output = run("--help").output
    for command in interface()["commands"]:
        assert command.split()[0] in output


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"RAY_ADDRESS": "local", "HOME": str(tmp_path)}


def test_a_failing_command_exits_with_one_and_no_trace(tmp_path: Path, environment: dict[str, str]) -> None:
    """As a person runs it: another process, a Ray of its own."""
    found = subprocess.run(
        [sys.executable, "-m", "raylm", "prepare", "--set", f"storage={tmp_path}", "--set",
         "corpus.documents=[{type: parquet, path: absent.parquet}]"],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stdout == ""
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(f"raylm: error: corpus.documents[0].path: {Path.cwd()}/absent.parquet: no such file")
    assert "Traceback" not in found.stderr
    # Ray's own token would make every later `ray start` of this person ask for it.
    assert not (tmp_path / ".ray" / "auth_token").exists()
    assert (tmp_path / ".cache" / "raylm" / "ray_token").stat().st_mode & 0o777 == 0o600


def test_the_address_of_a_ray_that_is_gone_is_told(tmp_path: Path, environment: dict[str, str]) -> None:
    left = tmp_path / "ray" / "ray_current_cluster"
    left.parent.mkdir()
    left.write_text("127.0.0.1:9")
    del environment["RAY_ADDRESS"]
    found = subprocess.run(
        [sys.executable, "-m", "raylm", "prepare", "--set", f"storage={tmp_path}"], capture_output=True, text=True,
        timeout=120, env=environment | {"RAY_TMPDIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert found.returncode == 1 and "Traceback" not in found.stderr
    said = f"raylm: error: there is no running Ray at 127.0.0.1:9, which the last `ray start` has left in {left}: "
    assert said in found.stderr and "RAY_ADDRESS=local raylm" in found.stderr


@pytest.mark.parametrize("command", ["prepare", "pretrain", "finetune"])
def test_a_storage_that_cannot_be_written_is_one_line(tmp_path: Path, ray_cluster: None, command: str) -> None:
    (tmp_path / "file").write_text("")
    corpus = "corpus={documents: [{type: docstrings, packages: [email]}], tokenizer: {vocab_size: 600}}"
    result = run(command, "--set", f"storage={tmp_path}/file/below", "--set", corpus)
    assert result.exit_code == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"raylm: error: cannot make the directory {tmp_path}/file/below")
    assert last.endswith(("Not a directory", "File exists"))


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(interface(), indent=1, ensure_ascii=False) + "\n")
