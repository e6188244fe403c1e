"""What all tests share: one Ray for the whole session, and the real text where it is present."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from pyarrow import fs

from raylm.settings import Settings
from raylm.storage import StoragePath

REPOSITORY = Path(__file__).parent.parent
DATA = Path(os.environ.get("RAYLM_DATA", REPOSITORY.parent / "shared" / "data"))

# What raylm keeps for a machine is kept apart from the person's who runs the tests.
_CACHE = tempfile.TemporaryDirectory(prefix="raylm-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# The same examples each time, however busy the machine; `--hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")

# No hub is asked for anything, and no earlier cluster of this machine is joined by accident.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAYLM_CLUSTER", None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of this session's own, with logical CPUs to spare so that helper actors never starve."""
    import ray

    # Ray's socket paths are limited to 107 bytes: the directory has to be near the root. Ray's processes end after
    # `shutdown`, and may write while it is removed.
    with tempfile.TemporaryDirectory(prefix="raylm-", dir="/tmp", ignore_cleanup_errors=True) as directory:
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


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The URI of a bucket on an S3 service of this process, to be completed with a key: `s3://…@corpus/{}?…`."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://someone:secret@corpus/{options}&allow_bucket_creation=true")
    filesystem.create_dir("corpus")
    yield f"s3://someone:secret@corpus/{{}}{options}"
    server.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of one megabyte; the test is skipped where this process may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small filesystem")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="session")
def small_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings under which every stage takes seconds: text of this machine, a model of a few thousand weights."""
    return Settings.model_validate(
        {
            "storage": str(tmp_path_factory.mktemp("storage")),
            "corpus": {
                "documents": [{"type": "docstrings", "packages": ["email", "asyncio"]}],
                "pairs": [
                    {"type": "cldr", "to": "de", "rows": 3_000},
                    {"type": "docstrings", "packages": ["email", "asyncio", "numpy"]},
                ],
                "tokenizer": {"vocab_size": 1_000, "sample_mb": 1, "languages": []},
                "sequence_length": 64,
                "validation": 0.05,
                "shard_mb": 4,
            },
            "model": {
                "config": {
                    "d_model": 32,
                    "encoder_layers": 1,
                    "decoder_layers": 1,
                    "encoder_ffn_dim": 64,
                    "decoder_ffn_dim": 64,
                }
            },
            "pretrain": {
                "steps": 12,
                "global_batch_tokens": 1_024,
                "log_every": 1,
                "checkpoint_every": 6,
                "validation_batches": 2,
            },
            "finetune": {
                "steps": 30,
                "global_batch_tokens": 2_048,
                "checkpoint_every": 10,
                "validation_batches": 2,
                "max_source_tokens": 96,
                "max_target_tokens": 48,
                "task_weights": {"summarize": 0.5},
            },
            "evaluate": {"rows_per_task": 20},
        }
    )


@pytest.fixture(scope="session")
def corpus(small_settings: Settings, ray_cluster: None) -> StoragePath:
    """The prepared corpus of `small_settings`."""
    from raylm.corpus.prepare import prepare

    prepare(small_settings)
    return StoragePath(small_settings.storage) / "tokens" / "default"
