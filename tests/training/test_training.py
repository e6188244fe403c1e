"""Training runs on real workers: Ray Train, DeepSpeed, gloo."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from raylm.errors import ArtifactError, SettingsError, TrainingError
from raylm.lease import Taken, held
from raylm.settings import Settings
from raylm.storage import Manifest, StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.job import TrainingJob
from raylm.training.record import DATA
from raylm.training.runs import run_directory
from raylm.training.trained import load_trained
from raylm.training.trainer import finetune, pretrain
from tests.training.runs import changed, gradient_norms, losses, train_jobs


@pytest.fixture(scope="module")
def pretrained(small_settings: Settings, corpus: StoragePath) -> Manifest:
    """A finished pretraining run on two workers under ZeRO-1."""
    return pretrain(changed(small_settings, pretrain={"workers": 2}))


def test_zero_stages_and_worker_counts_give_the_same_losses(small_settings: Settings, corpus: StoragePath) -> None:
    """Stages 0…3 and accumulated gradients, on one, two and four workers, from the same weights, in fp32: to 1e-4.

    All of them read the same in each step.
    """

    from raylm import models

    root = StoragePath(small_settings.storage) / "equal"
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    model = Path((root / "model").path)
    tokenizer.save_pretrained(model)
    models.build_config(small_settings.model, tokenizer).save_pretrained(model)
    jobs: dict[int, list[TrainingJob]] = {1: [], 2: [], 4: []}
    for workers in jobs:
        for stage in (0, 1, 2, 3) if workers < 4 else (2,):
            training = small_settings.pretrain.model_copy(
                update={
                    "zero_stage": stage,
                    "log_every": 1,
                    "steps": 10,
                    "learning_rate": 1e-3,
                    "warmup_steps": 4,
                    "gradient_clip": 0.25,
                    "checkpoint_every": 10,
                    "verify_data": True,
                }
            )
            run = str(root / f"zero{stage}-{workers}")
            jobs[workers].append(TrainingJob(training, run, str(corpus), str(model), None))
        accumulating = training.model_copy(update={"micro_batch_tokens": 256})
        jobs[workers].append(TrainingJob(accumulating, str(root / f"micro-{workers}"), str(corpus), str(model), None))

    for workers, group in jobs.items():
        train_jobs(workers, group, Path(root.path))

    reference, norms = losses(root / "zero0-1"), gradient_norms(root / "zero0-1")
    assert len(reference) == 10
    assert min(norms) > 0.25
    read = (root / "zero0-1" / DATA).read_jsonl()
    assert len({row["hash"] for row in read}) == 10
    assert reference[-1] < reference[0] - 0.05
    for workers, group in jobs.items():
        for job in group:
            found = losses(StoragePath(job.run))
            assert found == pytest.approx(reference, abs=1e-4), f"{job.run} on {workers} workers"
            assert gradient_norms(StoragePath(job.run)) == pytest.approx(norms, rel=1e-3), job.run
            assert (StoragePath(job.run) / DATA).read_jsonl() == read, f"{job.run} on {workers} workers"
            ends = checkpoints.checkpoints(StoragePath(job.run))[-1].validation_loss
            assert ends == pytest.approx(checkpoints.checkpoints(root / "zero0-1")[-1].validation_loss, abs=1e-4)


def test_a_run_leaves_checkpoints_metrics_and_a_manifest(small_settings: Settings, pretrained: Manifest) -> None:
    run = run_directory(small_settings, "pretrain")
    assert [c.step for c in checkpoints.checkpoints(run)] == [6, 12]
    assert {c.manifest.settings["computed_in"] for c in checkpoints.checkpoints(run)} == {"fp32"}
    assert pretrained.metrics["step"] == 12
    assert pretrained.metrics["workers"] == 2
    assert pretrained.metrics["validation_loss"] < losses(run)[0]
    assert list(Path(run.path).glob("tensorboard/events.*"))
    assert not Path(run.path, "ray").exists()


def test_a_finished_run_does_nothing_again(small_settings: Settings, pretrained: Manifest) -> None:
    again = pretrain(changed(small_settings, pretrain={"workers": 2}))
    assert again == pretrained


def test_a_run_refuses_other_settings(small_settings: Settings, pretrained: Manifest) -> None:
    with pytest.raises(TrainingError, match=r"training.learning_rate: 0.002 → 0.5.*choose another run name"):
        pretrain(changed(small_settings, pretrain={"learning_rate": 0.5}))


def test_more_workers_than_the_cluster_has_are_refused(small_settings: Settings, corpus: StoragePath) -> None:
    with pytest.raises(TrainingError, match="pretrain.workers is 400, the cluster has 4 CPUs"):
        pretrain(changed(small_settings, pretrain={"workers": 400, "name": "wide"}))


def test_a_run_is_trained_by_one_process_at_a_time(small_settings: Settings, pretrained: Manifest) -> None:
    """Each would remove the checkpoints of the other."""
    settings = changed(small_settings, pretrain={"workers": 2, "name": "alone"})
    run = run_directory(settings, "alone")
    said = rf"run {run}: is being trained by process {os.getpid()} on .*; wait for its end, or stop it"
    with held(run.mkdir() / "lock.json", ""), pytest.raises(Taken, match=said):
        pretrain(settings)
    assert not (run / "run.json").is_file()


def test_workers_that_fail_leave_their_whole_trace(small_settings: Settings, corpus: StoragePath) -> None:
    settings = changed(
        small_settings, corpus={"name": "torn"}, pretrain={"workers": 2, "name": "torn", "max_failures": 0}
    )
    torn = shutil.copytree(corpus.path, Path(corpus.path).with_name("torn"))
    for shard in (torn / "documents" / "train").glob("*.arrow"):
        shard.write_bytes(shard.read_bytes()[:1_000])
    run = run_directory(settings, "torn")
    with pytest.raises(TrainingError, match=rf"run {run}: workers failed: .*Arrow.* \(whole trace: {run}/error.txt\)"):
        pretrain(settings)
    trace = (run / "error.txt").local().read_text()
    assert "in open_split" in trace
    assert "in train_worker" in trace


def test_a_corpus_that_changes_meanwhile_ends_training(small_settings: Settings, pretrained: Manifest) -> None:
    run = run_directory(small_settings, "pretrain")
    model, tokens = (run / "model").path, f"{small_settings.storage}/tokens/default"
    job = TrainingJob(small_settings.pretrain, f"{run}-moved", tokens, model, None, corpus="what it was")
    with pytest.raises(Exception, match="was prepared anew while run .*-moved trains on it"):
        train_jobs(1, [job], Path(small_settings.storage))


def test_resuming_gives_the_losses_of_an_unbroken_run(small_settings: Settings, pretrained: Manifest) -> None:
    """From a damaged newest checkpoint to the one before it, then to the end."""
    unbroken = run_directory(small_settings, "pretrain")
    broken = run_directory(small_settings, "broken")
    shutil.copytree(unbroken.path, broken.path)
    (broken / "manifest.json").delete()
    newest = checkpoints.checkpoints(broken)[-1]
    victim = newest.directory / newest.manifest.outputs[0]["name"]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    said: list[str] = []
    assert checkpoints.newest_sound(broken, said.append).step == 6  # type: ignore[union-attr]
    assert "step-00000012 is damaged" in said[0]

    pretrain(changed(small_settings, pretrain={"workers": 2, "name": "broken"}))
    # Some steps of fp32's own rounding, which is another one where tensors lie elsewhere in memory.
    assert losses(broken) == pytest.approx(losses(unbroken), rel=1e-6)
    assert checkpoints.best(broken).validation_loss == pytest.approx(
        checkpoints.best(unbroken).validation_loss, rel=1e-6
    )


def test_an_unfinished_checkpoint_is_invisible(small_settings: Settings, pretrained: Manifest, tmp_path: Path) -> None:
    run = StoragePath(str(tmp_path / "run"))
    shutil.copytree(run_directory(small_settings, "pretrain").path, run.path)
    (run / "checkpoints/step-00000012/manifest.json").delete()
    assert [c.step for c in checkpoints.checkpoints(run)] == [6]
    (run / "checkpoints/step-00000006/manifest.json").delete()
    with pytest.raises(ArtifactError, match="no complete checkpoint"):
        checkpoints.best(run)


def test_an_objective_that_does_not_fit_the_model_is_refused(small_settings: Settings, corpus: StoragePath) -> None:
    with pytest.raises(SettingsError, match="objective 'causal' does not fit an encoder-decoder"):
        pretrain(changed(small_settings, pretrain={"objective": "causal", "name": "misfit"}))
    assert not run_directory(small_settings, "misfit").is_dir()  # so that the name is free for the right one


def test_finetuning_wants_a_pretrained_run(small_settings: Settings, corpus: StoragePath) -> None:
    with pytest.raises(ArtifactError, match="pretraining has not finished"):
        finetune(changed(small_settings, pretrain={"name": "absent"}))


@pytest.mark.parametrize(("family", "objective"), [("llama", "causal"), ("bert", "masked"), ("t5", "denoise")])
def test_every_family_learns_by_its_objective(
    small_settings: Settings, corpus: StoragePath, family: str, objective: str
) -> None:
    small = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1},
    }.get(family, {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64})
    manifest = pretrain(
        changed(
            small_settings,
            model={"family": family, "config": small},
            pretrain={
                "name": family,
                "workers": 1,
                "steps": 20,
                "log_every": 1,
                "learning_rate": 5e-3,
                "zero_stage": 0,
            },
        )
    )
    found = losses(run_directory(small_settings, family))
    assert manifest.metrics["step"] == 20
    assert sum(found[-3:]) < sum(found[:3]) - 0.5


def test_a_run_that_lost_patience_goes_on_with_more(small_settings: Settings, corpus: StoragePath) -> None:
    training = {
        "name": "patience", "workers": 1, "steps": 8, "validate_every": 2, "log_every": 100, "zero_stage": 0,
        "learning_rate": 1e-12, "early_stopping": 1,
    }  # fmt: skip
    settings = changed(small_settings, pretrain=training)
    stopped = pretrain(settings)
    assert stopped.metrics["stopped_early"] and stopped.metrics["step"] == 4
    assert len(losses(run_directory(settings, "patience"))) == 1  # though no hundred steps have passed
    assert pretrain(settings) == stopped
    assert pretrain(changed(settings, pretrain={"early_stopping": None})).metrics["step"] == 8


def test_finetune_evaluate_export(small_settings: Settings, pretrained: Manifest) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from raylm.training.evaluate import evaluate
    from raylm.training.export import export

    run = run_directory(small_settings, "finetune")
    with pytest.raises(ArtifactError, match="no complete checkpoint"):
        export(small_settings)
    tuned = finetune(small_settings)
    assert tuned.metrics["loss"] < losses(run)[0] - 0.5
    assert len(checkpoints.checkpoints(run)) <= small_settings.finetune.keep_last + 1

    scored = evaluate(small_settings)
    assert set(scored.metrics) == {"translate-de", "summarize", "validation_perplexity"}
    assert scored.metrics["translate-de"]["baseline"]["method"] == "copy of the source"
    assert scored.metrics["translate-de"]["baseline"]["chrf"] > 15
    assert "chrF2" in scored.metrics["translate-de"]["chrf_signature"]
    assert evaluate(small_settings) == scored

    # A run is described by what it was started with, whatever the settings have come to.
    other = changed(
        small_settings,
        corpus={"pairs": [{"type": "parquet", "path": "x", "source": "a", "target": "b", "to": "fr"}]},
        finetune={"max_target_tokens": small_settings.finetune.max_target_tokens + 8},
    )
    exported = export(other)
    assert export(small_settings) == exported
    assert exported.inputs["metrics"] == scored.metrics
    directory = f"{small_settings.storage}/models/default"
    model = AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(">>de<<Monday, 5 May 2025</s>", return_tensors="pt")
    decoder = torch.tensor([[tokenizer.pad_token_id, 300, 301]])
    trained, _ = load_trained(run)
    with torch.no_grad():
        after = model(input_ids=inputs["input_ids"], decoder_input_ids=decoder).logits
        before = trained(input_ids=inputs["input_ids"], decoder_input_ids=decoder).logits
    assert torch.allclose(after, before, atol=1e-4)
    # Marian decodes from a zero embedding, which CTranslate2 relies on.
    assert model.get_input_embeddings().weight[tokenizer.pad_token_id].abs().max() == 0
    described = json.loads(Path(directory, "raylm.json").read_text())
    assert described["languages"] == ["de"]
    assert described["max_target_tokens"] == small_settings.finetune.max_target_tokens
    card = Path(directory, "README.md").read_text()
    assert "| translate-de (20 rows) | chrf |" in card

    replace(scored, inputs=scored.inputs | {"outputs": []}).write(run / "evaluation")
    assert "translate-de" not in export(small_settings).inputs["metrics"]  # the scores of another checkpoint


def test_a_model_of_somebody_else_is_the_start(
    small_settings: Settings, corpus: StoragePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T5 with a tokenizer of its own, from a directory: corpus, pretraining and fine-tuning take both.

    The directory is named as one sees it from where the command runs.
    """
    from transformers import AutoTokenizer

    from raylm import models
    from raylm.corpus.prepare import prepare
    from raylm.settings import ModelSettings

    other = tmp_path / "other"
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    tokenizer.add_tokens(["quite", "another"])
    tokenizer.save_pretrained(other)
    small = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1}
    config = models.build_config(ModelSettings(family="t5", config=small), tokenizer)
    models.build_model(config, seed=3).save_pretrained(other)

    settings = changed(
        small_settings,
        corpus={"documents": [], "name": "other"},
        model={"start_from": "./other"},
        finetune={"start": "scratch", "name": "other", "steps": 12, "log_every": 1, "workers": 1},
    )
    monkeypatch.chdir(tmp_path)
    prepare(settings)
    prepared = AutoTokenizer.from_pretrained(f"{settings.storage}/tokens/other/tokenizer")
    assert prepared.get_vocab() == tokenizer.get_vocab()
    finetune(settings)
    run = run_directory(settings, "other")
    model, _ = load_trained(run)
    assert model.config.model_type == "t5"
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert losses(run)[-1] < losses(run)[0]
