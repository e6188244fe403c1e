"""What all tests share: one Ray for the whole session, and the real text where it is present."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
DATA = Path(os.environ.get("RAYLM_DATA", REPOSITORY.parent / "shared" / "data"))

# No hub is asked for anything, and no earlier cluster of this machine is joined by accident.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAYLM_CLUSTER", None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of this session's own, with logical CPUs to spare so that helper actors never starve."""
    import ray

    # Ray's socket paths are limited to 107 bytes: the directory has to be near the root.
    with tempfile.TemporaryDirectory(prefix="raylm-", dir="/tmp") as directory:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=directory,
            object_store_memory=1 << 30,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real text; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"needs the real text of {DATA}; set RAYLM_DATA to its folder")
    return DATA
