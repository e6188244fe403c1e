"""What the benchmarks share: repeats side by side, rows with goals, a table and JSON, peers and their environments.

A peer is a script below `peers/` that takes one JSON object as its argument, does the work, and prints as its last line
a JSON object with the `seconds` that it took inside, imports left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parents[2]
PEERS = Path(__file__).parent / "peers"
REPEATS = 3
_SAMPLES_PER_S = 10
_BEGIN, _END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


class BenchmarkError(Exception):
    """Something that was to be measured did not run; the text is for a person, and becomes a row."""


# ------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound of a row's `value` or `ratio`."""

    of: Literal["value", "ratio"]
    relation: Literal[">=", "<="]
    bound: float

    def holds(self, value: float | None) -> bool:
        return value is not None and (value >= self.bound if self.relation == ">=" else value <= self.bound)

    def __str__(self) -> str:
        return f"{self.of} {self.relation} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table and one object of the JSON."""

    name: str
    value: float | None
    """The median; None: it could not be measured."""
    unit: str
    peer: str | None = None
    """What `value` is compared with, and why that could not be measured where it could not."""
    peer_value: float | None = None
    ratio: float | None = None
    """How many times better than the peer: the median of the rounds' ratios."""
    spread: float | None = None
    """Of the rounds: of their ratios where there is a peer, else of their values."""
    goal: str | None = None
    holds: bool = True


def single(name: str, values: Sequence[float], unit: str, goal: Goal | None = None) -> Row:
    """A row of repeated values without a peer."""
    value = statistics.median(values)
    return Row(name, value, unit, spread=_spread(values), goal=_said(goal), holds=goal is None or goal.holds(value))


def beside(
    name: str,
    values: Sequence[float],
    unit: str,
    peer: str,
    peer_values: Sequence[float] | BenchmarkError,
    goal: Goal | None = None,
    smaller_is_better: bool = False,
) -> Row:
    """A row of values beside a peer's of the same rounds; a peer that could not run makes a row that does not hold."""
    value = statistics.median(values)
    if isinstance(peer_values, BenchmarkError):
        return Row(name, value, unit, f"{peer}: {peer_values}", spread=_spread(values), goal=_said(goal), holds=False)
    better = zip(peer_values, values, strict=True) if smaller_is_better else zip(values, peer_values, strict=True)
    ratios = [over / under for over, under in better if under]
    ratio = statistics.median(ratios) if len(ratios) == len(values) else None
    holds = goal is None or goal.holds(ratio if goal.of == "ratio" else value)
    return Row(
        name, value, unit, peer, statistics.median(peer_values), ratio, _spread(ratios or values), _said(goal), holds
    )


def failed(name: str, error: BenchmarkError) -> Row:
    """The row of what could not be measured at all."""
    return Row(f"{name}: {error}", None, "", holds=False)


def _spread(values: Sequence[float]) -> float | None:
    """Largest less smallest over the median."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if len(values) > 1 and middle else None


def _said(goal: Goal | None) -> str | None:
    return None if goal is None else str(goal)


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, list[Any] | BenchmarkError]:
    """What each of several ways gives, round by round, so that what else the machine does meets all alike.

    Each round begins with another way. One that fails is left out from then on, and its error given instead.
    """
    results: dict[str, list[Any] | BenchmarkError] = {name: [] for name in runs}
    names = list(runs)
    for number in range(repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            so_far = results[name]
            if isinstance(so_far, list):
                try:
                    so_far.append(runs[name]())
                except BenchmarkError as error:
                    results[name] = error
    return results


def succeeded(results: list[Any] | BenchmarkError) -> list[Any]:
    """The results of a way without which there is nothing to compare.

    :raises BenchmarkError: it failed.
    """
    if isinstance(results, BenchmarkError):
        raise results
    return results


def mapped(results: list[Any] | BenchmarkError, value: Callable[[Any], float]) -> list[float] | BenchmarkError:
    """One number of each result, or the error."""
    return results if isinstance(results, BenchmarkError) else [value(result) for result in results]


# -------------------------------------------------------------------------------------- the command line


def run_benchmark(
    description: str,
    parts: Mapping[str, Callable[[float], list[Row]]],
    arguments: Sequence[str] | None = None,
    readme: Path | None = None,
) -> int:
    """0 where every row holds, else 1, after printing the table and writing the JSON.

    :param parts: what can be measured, by name: functions of the scale that give rows.
    :param readme: the file with a table that `--readme` renews.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--only", nargs="+", choices=parts, metavar="NAME", help=f"some of: {', '.join(parts)}")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the work, to try a change out")
    if readme:
        parser.add_argument("--readme", action="store_true", help=f"put the table into {readme.name}")
    asked = parser.parse_args(arguments)
    if readme and asked.readme and not _is_marked(readme):
        parser.error(f"{readme}: has no place for the table, between {_BEGIN} and {_END}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows: list[Row] = []
    for name in asked.only or parts:
        start = time.perf_counter()
        try:
            rows += parts[name](asked.scale)
        except BenchmarkError as error:
            rows.append(failed(name, error))
        Console(stderr=True).print(f"{name}: {time.perf_counter() - start:.0f} s")
        if asked.json:  # after each part: what was measured is not lost with what comes after
            asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    console.print(table(rows))
    if readme and asked.readme:
        renew_table(readme, rows)
    return 0 if all(row.holds for row in rows) else 1


def table(rows: Sequence[Row]) -> Table:
    """The rows for a person."""
    shown = Table("what", "value", "peer", "ratio", "spread", "goal", "holds")
    for row in rows:
        peer = "" if row.peer is None else f"{_quantity(row.peer_value, row.unit)} {row.peer}"
        holds = "" if row.goal is None and row.holds else ("yes" if row.holds else "NO")
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        shown.add_row(row.name, _quantity(row.value, row.unit), peer, ratio, _scatter(row), row.goal or "", holds)
    return shown


def renew_table(file: Path, rows: Sequence[Row]) -> None:
    """Put the rows in the place of the table between the marks of a Markdown file."""
    before, begin, rest = file.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    file.write_text(f"{before}{begin}\n{markdown(rows)}\n{end}{after}")


def _is_marked(file: Path) -> bool:
    return _END in file.read_text().partition(_BEGIN)[2]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""
    lines = ["| work | raylm | beside | ratio | spread |", "|---|---:|---|---:|---:|"]
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer}: {_quantity(row.peer_value, row.unit)}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        missed = "" if row.holds else f" (goal: {row.goal})"
        cells = (row.name, _quantity(row.value, row.unit), peer, f"{ratio}{missed}".strip(), _scatter(row))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _scatter(row: Row) -> str:
    """The spread in whole percent."""
    return "" if row.spread is None else f"{100 * row.spread:.0f} %"


def _quantity(value: float | None, unit: str) -> str:
    """A value with its unit, to three digits; a `share` in percent."""
    if value is None:
        return "–"
    if unit == "share":
        value, unit = 100 * value, "%"
    return f"{value:,.0f} {unit}".strip() if abs(value) >= 1_000 else f"{value:.3g} {unit}".strip()


# ------------------------------------------------------------------------------------------------ peers


def peer_python(requirements: Path = PEERS / "requirements.txt") -> Path:
    """The interpreter of an environment that holds just these requirements; it is made where it is not there.

    :raises BenchmarkError: it cannot be made.
    """
    text = f"{sys.version_info[:2]}\n{requirements.read_text()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raylm" / "benchmarks"
    home = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        _checked([sys.executable, "-m", "venv", home], f"the environment {home} cannot be made")
        install: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--requirement",
            requirements,
        ]
        _checked(install, f"{requirements.name} cannot be installed")
        complete.touch()
    return python


def run_script(python: Path | str, script: str, **asked: Any) -> dict[str, Any]:
    """What a script below `peers/` printed last.

    :param python: the running interpreter, with which the script imports the very raylm that is measured, or another.
    :raises BenchmarkError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="raylm-peer-") as directory:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": directory, "TMPDIR": directory}
        environment.pop("PYTHONPATH", None)
        if str(python) == sys.executable:
            environment["PYTHONPATH"] = str(REPOSITORY)
        command = [str(python), str(PEERS / script), json.dumps(asked)]
        output = _checked(command, f"{script} failed", environment)
    return dict(json.loads(output.splitlines()[-1]))


def peer(script: str, **asked: Any) -> dict[str, Any]:
    """What a script gave in the peers' environment.

    :raises BenchmarkError: there is none, or the script failed.
    """
    return run_script(peer_python(), script, **asked)


def _checked(command: Sequence[str | Path], trouble: str, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise BenchmarkError(f"{trouble}: {last_line(done.stderr)}")
    return done.stdout


def last_line(text: str) -> str:
    """What a person is told of the output of a process that failed."""
    return (text.strip().splitlines() or ["it said nothing"])[-1][:300]


# -------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True, slots=True)
class Finished:
    stdout: str
    seconds: float
    peak_bytes: int
    """The most memory that any one process had to itself (its proportional set size), seen ten times a second."""


class Session:
    """A command with all that it starts: one session of the kernel's, which ends as a whole."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], directory: Path, where: Path | None = None
    ) -> None:
        self._start = time.perf_counter()
        self._peak_bytes = 0
        self._output, self._errors = directory / "stdout", directory / "stderr"
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, env=environment, cwd=where, stdout=output, stderr=errors, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, watched: bool = False) -> Finished:
        """What the command gave.

        :param watched: look at the memory of its processes meanwhile.
        :raises BenchmarkError: it failed.
        """
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        if watched:
            watcher.start()
        code = self._process.wait()
        seconds = time.perf_counter() - self._start
        ended.set()
        if watched:
            watcher.join()
        self.kill()
        if code:
            raise BenchmarkError(f"exit code {code}: {last_line(self._errors.read_text(errors='replace'))}")
        return Finished(self._output.read_text(), seconds, self._peak_bytes)

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(1 / _SAMPLES_PER_S):
            for pid in self.pids():
                self._peak_bytes = max(self._peak_bytes, _proportional_bytes(pid))

    def pids(self) -> list[int]:
        """The processes of the session that live, whatever group they have put themselves into."""
        found = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
        return [pid for pid in found if _session_of(pid) == self._process.pid]

    def kill(self, timeout_s: float = 30) -> None:
        """End the command's group, then what of the session is left, with SIGKILL; return when nothing is.

        :raises BenchmarkError: something survives.
        """
        deadline = time.monotonic() + timeout_s
        if self.running:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        while left := self.pids():
            if time.monotonic() > deadline:
                raise BenchmarkError(f"processes {left} outlive SIGKILL")
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _session_of(pid: int) -> int | None:
    """The session of a living process (proc(5), stat)."""
    try:
        state, _, _, session, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(session)


def _proportional_bytes(pid: int) -> int:
    """A process's memory, with pages that several share divided among them (proc(5), smaps_rollup)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
