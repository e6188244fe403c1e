"""`raylm nightly`: each date once, whatever becomes of the nights."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from raylm import nightly
from raylm.cli import main
from raylm.errors import SettingsError
from raylm.inference.service.start import is_running, start_service, stop_service
from raylm.lease import Taken, held
from raylm.nightly import Record, due, run_night
from raylm.settings import NightlySettings, Settings
from raylm.storage import StoragePath

BERLIN = ZoneInfo("Europe/Berlin")


def values(place: Path, model: Path, **more: Any) -> dict[str, Any]:
    jobs = [
        {"name": "mail", "task": "translate", "input": f"{place}/in/{{date}}/*.parquet",
         "output": f"{place}/out/{{date}}", "model": str(model)},
    ]  # fmt: skip
    return {
        "storage": str(place / "storage"),
        "serve": {"port": 0, "decode": {"compute_type": "float32"}, "batch_wait_s": 0.0},
        "batch": {"workers": 1, "decode": {"compute_type": "float32"}},
        "nightly": {"timezone": "Europe/Berlin", "jobs": jobs, "through": "serve", **more},
    }


def deliver(place: Path, day: date, rows: int = 3) -> None:
    directory = place / "in" / day.isoformat()
    directory.mkdir(parents=True)
    texts = [f"{day} open the window {number}" for number in range(rows)]
    pq.write_table(pa.table({"id": range(rows), "text": texts}), directory / "mail.parquet")


def written(place: Path, day: date) -> list[int]:
    return list(pq.read_table(place / "out" / day.isoformat() / "mail.parquet")["id"].to_pylist())


@pytest.fixture(scope="module")
def service(ray_cluster: None, model_directory: Path) -> Iterator[None]:
    start_service(Settings.model_validate(values(Path("/"), model_directory)).serve, str(model_directory))
    yield
    if is_running():
        stop_service()


def at(day: date, hour: int = 2, minute: int = 30, fold: int = 0) -> datetime:
    """A time of Berlin's clocks; the second 2:30 of the night in which they go back has `fold` 1."""
    return datetime(day.year, day.month, day.day, hour, minute, tzinfo=BERLIN, fold=fold)


def test_thirty_nights_do_each_date_once(
    service: None, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cron fires at half past two, which comes twice in one of the nights; some nights are missed, two crash."""
    settings = Settings.model_validate(values(tmp_path, model_directory, catch_up=5))
    first, nights = date(2026, 10, 10), 30
    clocks_go_back, missed, crashed = date(2026, 10, 25), {3, 4, 5, 17}, {8, 20}
    finished: Counter[str] = Counter()
    run, write = nightly._run, StoragePath.write_json

    def counted(*arguments: Any) -> Record:
        record = run(*arguments)
        finished[record.date] += record.status == "done"
        return record

    class Crash(BaseException):
        pass

    def dies(self: StoragePath, content: Any) -> None:
        if self.name == "mail.json":  # the job is done, its record not yet there
            raise Crash
        write(self, content)

    monkeypatch.setattr(nightly, "_run", counted)
    for number in range(nights):
        today = first + timedelta(days=number + 1)
        deliver(tmp_path, today - timedelta(days=1))
        if number in missed:
            continue
        if number in crashed:
            with monkeypatch.context() as patch:
                patch.setattr(StoragePath, "write_json", dies)
                with pytest.raises(Crash):
                    run_night(settings, at(today))
            continue
        times = [at(today, fold=fold) for fold in ((0, 1) if today == clocks_go_back else (0,))]
        summaries = [run_night(settings, now) for now in times]
        assert not summaries[0].failed
        assert all(not again.records for again in summaries[1:])
    for number in range(nights):
        day = first + timedelta(days=number)
        assert written(tmp_path, day) == [0, 1, 2], day
        # A night that died behind its job finds it done, and only notes that.
        assert finished[day.isoformat()] == (2 if number in crashed else 1), day
    assert run_night(settings, at(first + timedelta(days=nights))).records == ()


def test_two_nights_at_once_do_not_overlap(service: None, model_directory: Path, tmp_path: Path) -> None:
    settings = Settings.model_validate(values(tmp_path, model_directory))
    deliver(tmp_path, date(2026, 11, 1))
    place = StoragePath(settings.storage) / "nightly"
    place.mkdir()
    with held(place / "lock.json", "{who}"), pytest.raises(Taken, match="another `raylm nightly` is at work.*process"):
        run_night(settings, at(date(2026, 11, 2)))
    assert not (tmp_path / "out").exists()
    [record] = run_night(settings, at(date(2026, 11, 2))).records
    assert (record.status, record.rows, record.date) == ("done", 3, "2026-11-01")


def test_a_job_that_fails_keeps_none_from_running_and_is_tried_again(
    service: None, model_directory: Path, tmp_path: Path
) -> None:
    content = values(tmp_path, model_directory)
    [job] = content["nightly"]["jobs"]
    broken = job | {"name": "broken", "columns": {"text": "body"}, "output": f"{tmp_path}/broken/{{date}}"}
    content["nightly"]["jobs"] = [broken, job]
    settings = Settings.model_validate(content)
    deliver(tmp_path, date(2026, 11, 1))
    failed, done = run_night(settings, at(date(2026, 11, 2))).records
    assert (failed.job, failed.status, done.job, done.status) == ("broken", "failed", "mail", "done")
    assert failed.reason and "body" in failed.reason
    noted = json.loads((tmp_path / "storage/nightly/2026-11-01/broken.json").read_text())
    assert noted["status"] == "failed" and noted["reason"] == failed.reason
    # The next night it is tried again, behind that night's own; what is not there yet is missing, and no failure.
    [missing, also_missing, again] = run_night(settings, at(date(2026, 11, 3))).records
    assert {missing.status, also_missing.status} == {"missing"}
    assert (again.date, again.job, again.status) == ("2026-11-01", "broken", "failed")
    deliver(tmp_path, date(2026, 11, 2))
    settings = Settings.model_validate(content | {"nightly": content["nightly"] | {"jobs": [job]}})
    [late] = run_night(settings, at(date(2026, 11, 4))).records[1:]
    assert (late.date, late.status) == ("2026-11-02", "done")


def test_the_command_tells_a_webhook_and_its_exit_code(service: None, model_directory: Path, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content = values(tmp_path, model_directory, webhook=f"http://127.0.0.1:{server.server_port}/")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": content}}))
    deliver(tmp_path, date(2026, 11, 1))
    command = ["nightly", "--cluster", str(cluster), "--now", "2026-11-02T01:30"]
    found = CliRunner().invoke(main, [*command, "--json"])
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert (told["done"], told["failed"], told["jobs"][0]["rows"]) == (1, 0, 3)
    assert heard == [told]
    again = CliRunner().invoke(main, command)
    assert (again.exit_code, again.output) == (0, "nothing to do: every date has been done\n")
    content["nightly"]["jobs"][0] |= {"name": "other", "to": "xx", "output": f"{tmp_path}/other/{{date}}"}
    cluster.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": content}}))
    failed = CliRunner().invoke(main, command)
    assert failed.exit_code == 1
    assert "2026-11-01  other  failed: " in failed.output
    server.shutdown()
    content["nightly"]["webhook"] = "http://127.0.0.1:9/"
    cluster.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": content}}))
    assert "nightly.webhook: the summary was not taken" in CliRunner().invoke(main, command).output


def test_a_service_is_started_for_the_night_and_ends_with_it(
    ray_cluster: None, model_directory: Path, tmp_path: Path
) -> None:
    if is_running():
        stop_service()  # that of the tests above
    settings = Settings.model_validate(values(tmp_path, model_directory))
    deliver(tmp_path, date(2026, 11, 1))
    [record] = run_night(settings, at(date(2026, 11, 2))).records
    assert record.status == "done", record.reason
    assert not is_running()


def test_a_service_that_does_not_come_up_is_the_failure_of_each_job(
    ray_cluster: None, model_directory: Path, tmp_path: Path
) -> None:
    assert not is_running()
    content = values(tmp_path, model_directory)
    content["nightly"]["jobs"][0]["model"] = str(tmp_path / "no-model")
    settings = Settings.model_validate(content)
    absent = run_night(settings, at(date(2026, 11, 2)))
    assert [record.status for record in absent.records] == ["missing"], "for which no service was started"
    deliver(tmp_path, date(2026, 11, 1))
    [record] = run_night(settings, at(date(2026, 11, 2))).records
    assert record.status == "failed" and record.reason and "no-model" in record.reason
    assert (tmp_path / "storage/nightly/2026-11-01/mail.json").is_file()


def test_input_that_cannot_be_read_is_a_failure_and_not_missing(
    ray_cluster: None, model_directory: Path, tmp_path: Path
) -> None:
    content = values(tmp_path, model_directory, through="actors")
    content["nightly"]["jobs"][0]["input"] = f"{tmp_path}/in/{{date}}/*"
    settings = Settings.model_validate(content)
    deliver(tmp_path, date(2026, 11, 1))
    (tmp_path / "in/2026-11-01/_SUCCESS").touch()  # as Spark leaves it
    (tmp_path / "in/2026-11-01/notes.txt").write_text("x")
    [record] = run_night(settings, at(date(2026, 11, 2))).records
    assert record.status == "failed" and record.reason and "notes.txt: unknown suffix" in record.reason
    (tmp_path / "in/2026-11-01/notes.txt").unlink()
    [record] = run_night(settings, at(date(2026, 11, 2))).records
    assert record.status == "done", record.reason


# ------------------------------------------------------------------------------------------------- dates


@pytest.mark.parametrize(
    ("now", "more", "recorded", "expected"),
    [
        (datetime(2026, 11, 2, 2, tzinfo=UTC), {}, [], ["2026-11-01"]),
        # It is tomorrow already in Berlin.
        (datetime(2026, 11, 1, 23, 30, tzinfo=UTC), {"timezone": "Europe/Berlin"}, [], ["2026-11-01"]),
        (datetime(2026, 11, 2, 2, tzinfo=UTC), {"lag_days": 0}, [], ["2026-11-02"]),
        (datetime(2026, 11, 4, 2, tzinfo=UTC), {}, ["2026-11-01"], ["2026-11-03", "2026-11-02", "2026-11-01"]),
        (datetime(2026, 11, 4, 2, tzinfo=UTC), {"catch_up": 1}, ["2026-10-01"], ["2026-11-03", "2026-11-02"]),
        (datetime(2026, 11, 3, 2, tzinfo=UTC), {"since": "2026-11-01"}, [], ["2026-11-02", "2026-11-01"]),
        (datetime(2026, 11, 3, 2, tzinfo=UTC), {"since": "2026-12-01"}, [], []),
    ],
)
def test_dates_that_are_due(
    now: datetime, more: dict[str, Any], recorded: list[str], expected: list[str], tmp_path: Path
) -> None:
    for day in recorded:
        (tmp_path / day).mkdir()
    (tmp_path / "lock.json").touch()
    found = due(NightlySettings.model_validate(more), now, StoragePath(str(tmp_path)))
    assert [day.isoformat() for day in found] == expected


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"input": "s3://in/today.parquet"}, r"a place with \{date\} in it"),
        ({"output": "s3://out/all"}, r"a place with \{date\} in it"),
        ({"name": "a job"}, "should match pattern"),
        ({"task": "sing"}, "translate"),
    ],
)
def test_jobs_that_could_not_run_are_refused(job: dict[str, Any], said: str) -> None:
    sound = {"name": "mail", "task": "translate", "input": "a/{date}", "output": "b/{date}"}
    Settings.model_validate({"nightly": {"jobs": [sound]}})
    with pytest.raises(ValueError, match=said):
        Settings.model_validate({"nightly": {"jobs": [sound | job]}})


def test_a_night_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nightly\.jobs is empty"):
        run_night(Settings(storage=str(tmp_path)), datetime.now(UTC))
    with pytest.raises(ValueError, match="a time zone such as Europe/Berlin"):
        NightlySettings(timezone="Berlin")
