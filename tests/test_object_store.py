"""The whole road with everything on an object store: corpus, runs, checkpoints, models, batches."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from raylm import storage
from raylm.cli import main
from raylm.errors import StoreError
from raylm.settings import Settings
from raylm.storage import StoragePath
from raylm.tasks import TRANSLATE
from raylm.training import checkpoint as checkpoints
from raylm.training.runs import run_directory
from raylm.training.telemetry import read_metrics
from raylm.training.trainer import finetune, pretrain
from tests.training.runs import changed, losses


@pytest.mark.slow
def test_from_text_to_translations_on_s3(small_settings: Settings, object_store: str, ray_cluster: None) -> None:
    from raylm.corpus.prepare import prepare
    from raylm.inference.batch import run_batch
    from raylm.training.evaluate import evaluate
    from raylm.training.export import export

    settings = changed(small_settings, pretrain={"workers": 2}, finetune={"workers": 2, "ema_decay": 0.9})
    settings = settings.model_copy(update={"storage": object_store.format("raylm")})
    prepare(settings)
    pretrain(settings.model_copy(update={"pretrain": settings.pretrain.model_copy(update={"steps": 6})}))
    pretrained = pretrain(settings)  # continues from a checkpoint in the store
    run = run_directory(settings, "pretrain")
    assert [found.step for found in checkpoints.checkpoints(run)] == [6, 12]
    assert all(found.fault() is None for found in checkpoints.checkpoints(run))
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, 13))
    assert pretrained.metrics["step"] == 12
    tuned = finetune(settings)
    assert losses(run_directory(settings, "finetune"))[-1] < losses(run_directory(settings, "finetune"))[0] - 0.5
    assert evaluate(settings).metrics["translate-de"]["rows"] == 20
    exported = export(settings)
    for manifest in (pretrained, tuned, exported):
        assert "secret" not in json.dumps([manifest.inputs, manifest.outputs, manifest.directory])

    rows = StoragePath(object_store.format("in.parquet"))
    with rows.writing() as stream:
        pq.write_table(pa.table({"text": ["Monday", "5 May 2025"]}), stream)
    done = run_batch(settings, TRANSLATE, rows.uri, output=object_store.format("out.parquet"), to="de")
    assert done.counts["rows"] == 2


def test_a_store_that_lets_nobody_in_is_named(object_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StoragePath(object_store.format("closed/file.txt"))
    file.write_bytes(b"text")
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # it knows no user
    for look in (file.is_file, file.parent.list, file.read_bytes):
        with pytest.raises(StoreError, match=r"^s3://corpus/closed.*: cannot be looked at: When .*AWS Error") as caught:
            look()
        assert "secret" not in str(caught.value) and "get the right to read it" in str(caught.value)
        assert isinstance(caught.value, OSError), "which what tries again waits for"
    found = CliRunner().invoke(main, ["report", "--set", f"storage={file.parent.uri}"])
    assert found.exit_code == 1
    assert found.stderr.startswith("raylm: error: s3://corpus/closed") and found.stderr.count("\n") == 1


def test_an_object_is_published_whole_or_not_at_all(object_store: str) -> None:
    file = StoragePath(object_store.format("deep/file.txt"))
    file.write_bytes(b"old")
    with pytest.raises(RuntimeError), file.writing() as stream:
        stream.write(b"new, but")
        raise RuntimeError("interrupted")
    assert file.read_bytes() == b"old"
    fresh = StoragePath(object_store.format("deep/fresh.txt"))
    with pytest.raises(RuntimeError), fresh.writing() as stream:
        stream.write(b"a part")
        raise RuntimeError("interrupted")
    assert not fresh.is_file()
    with fresh.writing() as stream:
        stream.write(b"x" * (20 << 20))  # of several parts
    assert fresh.info().size == 20 << 20


def test_copies_that_nobody_asks_for_are_not_kept(
    object_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old, used, new = (StoragePath(object_store.format(f"copied/{name}.txt")) for name in ("old", "used", "new"))
    for file in (old, used, new):
        file.write_bytes(file.name.encode())
    forgotten, kept = old.at_hand(), used.at_hand()
    for copy in (forgotten, kept):
        os.utime(copy.parent, (0, 0))
    used.at_hand()
    storage._forget_unused.cache_clear()  # as in another process
    assert new.at_hand().read_text() == "new.txt"
    assert kept.exists() and not forgotten.parent.exists()
    assert old.at_hand().read_text() == "old.txt", "it is copied again"
