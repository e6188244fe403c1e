"""raylm as its users run it: a command with settings, and a Ray of its own that ends with it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from raylm.settings import packaged_cluster_file
from tests.benchmarks.measure import REPOSITORY, Row, Session, run_benchmark

DATA = Path(os.environ.get("RAYLM_DATA", REPOSITORY.parent / "shared" / "data"))
TEXT = DATA / "text.en.tech.train.parquet"
CPUS = os.cpu_count() or 1


@contextmanager
def raylm_session(
    command: str | Sequence[str],
    settings: Mapping[str, Any] | None,
    cpus: int = CPUS,
    as_json: bool = True,
    where: Path | None = None,
) -> Iterator[Session]:
    """A command that runs, and prints its manifest as JSON at its end.

    :param command: its name, with arguments where it has some.
    :param settings: what stands under `metadata.raylm`; None: those of raylm's own cluster file.
    :param cpus: that its Ray has.
    :param as_json: false for a command that makes no manifest.
    :param where: its working directory, in the place of this process' own.
    """
    # Ray's socket paths are limited to 107 bytes: its directory has to be near the root.
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        cluster = packaged_cluster_file()
        if settings is not None:
            cluster = Path(directory) / "cluster.yaml"
            local = {"type": "local", "head_ip": "127.0.0.1"}
            cluster.write_text(yaml.safe_dump({"provider": local, "metadata": {"raylm": dict(settings)}}))
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": directory,
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": cpus}),
            "HF_HUB_OFFLINE": "1",
        }
        words = [command] if isinstance(command, str) else command
        line = [sys.executable, "-m", "raylm", *words, "--cluster", str(cluster), *["--json"] * as_json]
        session = Session(line, environment, Path(directory), where)
        try:
            yield session
        finally:
            session.kill()


def run_on_real_text(
    description: str, parts: Mapping[str, Callable[[float], list[Row]]], readme: Path | None = None
) -> int:
    """As `run_benchmark`, or 2 where the real text is absent."""
    if not TEXT.is_file():
        sys.stderr.write(f"needs the real text {TEXT}; set RAYLM_DATA to its folder\n")
        return 2
    return run_benchmark(description, parts, readme=readme)
