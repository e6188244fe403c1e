"""A dry run beside what it foretells: what autograd keeps, what a process holds, batches, checkpoints; refusals."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from raylm.cli import main
from raylm.errors import ArtifactError, SettingsError, TrainingError
from raylm.settings import ModelSettings, PretrainSettings, Settings
from raylm.storage import Manifest, StoragePath
from raylm.training.estimate import Estimate, dry_run, estimate_table
from raylm.training.memory import BUCKET, LIVE, BatchShape, Memory, kept_bytes, loss_bytes, memory
from raylm.training.objectives import MicroBatch, SelfSupervision
from raylm.training.refusals import check_positions
from raylm.training.runs import fixed_settings
from raylm.training.start import tokenizer_of_size
from raylm.training.trainer import pretrain
from tests.training.runs import changed


def build(model: ModelSettings, vocab_size: int) -> tuple[Any, Any, str]:
    """A config, its tokenizer, and the objective of pretraining."""
    from raylm import models
    from raylm.training.objectives import objective_for

    tokenizer = tokenizer_of_size(vocab_size)
    config = models.build_config(model, tokenizer)
    return config, tokenizer, objective_for("auto", models.architecture(config))


def micro_batch(config: Any, tokenizer: Any, objective: str, sequences: int, length: int) -> MicroBatch:
    """What pretraining reads, of random tokens: packed sequences of two documents, the last of them one token short."""
    from raylm.training.examples import vocabulary_of

    vocabulary = vocabulary_of(config, tokenizer)
    rows = np.random.default_rng(1).integers(vocabulary.first_plain, vocabulary.pad, (sequences, length))
    rows[-1, -1] = vocabulary.pad
    lengths = [np.asarray([length // 2, length - length // 2])] * (sequences - 1)
    lengths.append(np.asarray([length // 2, length - length // 2 - 1]))
    maker = SelfSupervision(objective, vocabulary, 0.15, 3.0, "text")
    return maker.micro_batch(list(rows), lengths, [(1, row, 0) for row in range(sequences)])


def shape_of(batch: MicroBatch) -> BatchShape:
    target = batch.inputs.get("decoder_input_ids")
    return BatchShape(*batch.inputs["input_ids"].shape, 0 if target is None else target.shape[1])


# ---------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("marian", {}),
        ("marian", {"activation_function": "gelu", "dropout": 0.1}),
        ("marian", {"attention_dropout": 0.1}),
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "hidden_act": "relu"}),
        ("bert", {}),
        ("t5", {}),
        ("t5", {"feed_forward_proj": "relu"}),
    ],
)
def test_what_autograd_keeps_is_what_the_formula_says(family: str, overrides: dict[str, Any]) -> None:
    import torch

    from raylm import models

    config, tokenizer, objective = build(ModelSettings(family=family, config=overrides), 600)  # type: ignore[arg-type]
    model = models.build_model(config, seed=1).train()
    model.config.use_cache = False
    batch = micro_batch(config, tokenizer, objective, sequences=6, length=64)
    inputs, _ = batch.tensors(torch.device("cpu"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    expected, again = kept_bytes(model, shape_of(batch), 4, on_gpu=False)
    assert expected == pytest.approx(sum(kept.values()), rel=0.04)
    assert again == 0


# ----------------------------------------------------------------------------------------------- ZeRO


def held(zero_stage: int, workers: int, precision: str = "bf16") -> Memory:
    return memory(
        1_000_000, 0, (0, 0), 0, zero_stage, workers, precision, accumulates=False, on_gpu=False
    )  # fmt: skip


@pytest.mark.parametrize("workers", [1, 8])
def test_stages_hold_what_the_paper_says(workers: int) -> None:
    """Rajbhandari et al. 2020, figure 1: of each weight 2 + 2 + 12 bytes, with Adam and 16-bit numbers."""
    for stage, bytes_each in enumerate((16, 4 + 12 / workers, 2 + 14 / workers, 16 / workers)):
        found = held(stage, workers)
        assert found.weights + found.gradients + found.optimizer == bytes_each * 1_000_000
    assert held(0, workers, "fp32").optimizer == 8 * 1_000_000


def test_a_gpu_holds_whole_buckets_and_gathered_weights() -> None:
    def on_gpu(stage: int, workers: int, accumulates: bool = False) -> Memory:
        return memory(10**7, 0, (10**6, 0), 10**6, stage, workers, "bf16", accumulates, on_gpu=True)

    assert on_gpu(0, 1).peak < 2 * BUCKET < on_gpu(1, 1).peak
    assert on_gpu(1, 1, accumulates=True).peak >= on_gpu(1, 1).peak + 10**6  # the loss beside the bucket
    assert on_gpu(3, 2).buffers - on_gpu(3, 1).buffers == 2 * 10**7
    assert on_gpu(3, 64).weights == 2 * 10**7 // 64


def test_deepspeed_has_the_sizes_that_the_formulas_use() -> None:
    from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from raylm.training.zero import deepspeed_config

    config = DeepSpeedZeroConfig(**deepspeed_config(PretrainSettings(), 1, 1, "fp32")["zero_optimization"])
    assert config.reduce_bucket_size == MEMORY_OPT_ALLREDUCE_SIZE == BUCKET
    assert config.max_live_parameters == config.max_reuse_distance == LIVE
    assert config.contiguous_gradients and config.reduce_scatter and not config.overlap_comm


# ------------------------------------------------------------------------------------- a prepared corpus


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_batches_are_those_that_training_reads(small_settings: Settings, corpus: StoragePath, stage: str) -> None:
    from raylm import models
    from raylm.training.examples import open_split
    from raylm.training.job import TrainingJob

    settings = changed(small_settings, **{stage: {"workers": 2, "micro_batch_tokens": 300, "warmup_steps": 5}})
    estimate = dry_run(settings, stage)  # type: ignore[arg-type]
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    config = models.build_config(settings.model, tokenizer)
    split = open_split(TrainingJob(getattr(settings, stage), "", str(corpus), "", None), "train", config, tokenizer)
    read = [
        shape_of(batch)
        for step in range(20)
        for rank in range(2)
        for batch in split.micro_batches(step, rank, 2, estimate.layout.micro_batches)
    ]
    if stage == "pretrain":
        assert max(read, key=lambda shape: shape.padded_tokens) == estimate.layout.batch
        assert estimate.work.tokens_per_step == 1_024
        packed = Manifest.read(corpus).counts["rows"]["documents/train"]  # type: ignore[union-attr]
        assert estimate.work.epochs == pytest.approx(estimate.work.tokens / (64 * packed), rel=0.02)
    else:
        shapes = models.build_shapes(config)

        def size(shape: BatchShape) -> int:
            return kept_bytes(shapes, shape, 4, on_gpu=False)[0] + loss_bytes(shapes, shape, "fp32")

        assert max(map(size, read)) <= size(estimate.layout.batch) * 1.1
        assert estimate.layout.batch.source_tokens <= 96 and estimate.layout.batch.target_tokens <= 48
    assert estimate.model.parameters > estimate.model.trained_parameters  # Marian's positions are fixed


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def alone(small_settings: Settings, corpus: StoragePath, tmp_path: Path) -> Settings:
    """Settings with a storage that has the corpus, and no run that would tell a speed."""
    storage = tmp_path / "storage"
    storage.mkdir()
    (storage / "tokens").symlink_to(corpus.parent.local())
    return small_settings.model_copy(update={"storage": str(storage)})


@pytest.fixture
def cluster_file(alone: Settings, tmp_path: Path) -> str:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps({"metadata": {"raylm": alone.model_dump(mode="json")}}))
    return str(file)


def test_the_command_says_it_as_a_table_and_as_json(cluster_file: str, corpus: StoragePath) -> None:
    result = run("pretrain", "--dry-run", "--cluster", cluster_file, "--set", "pretrain.warmup_steps=5")
    assert result.exit_code == 0, result.output
    for part in (
        "pretrain: estimate",
        "marian tiny",
        "ZeRO stage 1, fp32",
        "activations",
        "epochs",
        "FLOPs",
        "unknown",
    ):
        assert part in result.stdout
    assert "told for one worker" in result.stdout
    arguments = ("--set", "pretrain.warmup_steps=5", "--set", "pretrain.workers=2", "--json")
    parsed = json.loads(run("pretrain", "--dry-run", "--cluster", cluster_file, *arguments).stdout)
    parts = parsed["memory"]
    names = ("weights", "gradients", "optimizer", "activations", "buffers")
    assert parts["total"] == sum(parts[name] for name in names)
    assert parts["peak"] <= parts["total"]
    assert (parsed["layout"]["workers"], parsed["model"]["objective"], parsed["notes"]) == (2, "denoise", [])


def test_a_dry_run_takes_seconds_and_starts_nothing(cluster_file: str, corpus: StoragePath) -> None:
    """As a person runs it. Seconds of CPU, and more than it takes by itself: this machine may be busy with others."""
    code = (
        "import sys; from raylm.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print([name for name in ('ray', 'deepspeed') if name in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run(
        [sys.executable, "-c", code, "finetune", "--dry-run", "--cluster", cluster_file, "--set",
         "finetune.warmup_steps=5"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.stdout.splitlines()[-1] == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert found.stderr == ""


def test_an_earlier_run_of_the_same_model_tells_the_time(alone: Settings, corpus: StoragePath) -> None:
    from raylm import models

    settings = changed(alone, pretrain={"warmup_steps": 5, "workers": 1, "name": "next"})
    assert dry_run(settings, "pretrain").time is None
    run_directory = StoragePath(settings.storage) / "runs" / "timed"
    config = models.build_config(settings.model, models.load_tokenizer(str(corpus / "tokenizer")))
    config.save_pretrained(Path((run_directory / "model").path))
    rows = [{"step": step, "tokens_per_s": speed} for step, speed in ((1, 100.0), (2, 2_000.0), (3, 2_000.0))]
    (run_directory / "metrics.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    try:
        estimate = dry_run(settings, "pretrain")
        computed = 12 * 16 * (58 + 65)  # steps, sequences, source and target
        assert estimate.time is not None
        assert estimate.time.predicted_s == pytest.approx(computed / 2_000, abs=0.05)
        assert estimate.time.measured_by == "run timed"
        assert "2,000 positions/s of run timed" in estimate_table(estimate)
        wider = changed(settings, model={"config": settings.model.config | {"d_model": 64}})
        assert dry_run(wider, "pretrain").time is None
    finally:
        run_directory.delete()


def test_a_range_of_workers_is_told_for_the_fewest(small_settings: Settings, corpus: StoragePath) -> None:
    settings = changed(small_settings, pretrain={"warmup_steps": 5, "workers": (2, 4)})
    estimate = dry_run(settings, "pretrain")
    assert estimate.layout.workers == 2
    assert "2 of 2 to 4 workers" in estimate.notes[0]


def test_what_is_not_prepared_is_taken_from_the_settings(tmp_path: Path) -> None:
    settings = Settings.model_validate({"storage": str(tmp_path), "pretrain": {"workers": 1}})
    estimate = dry_run(settings, "pretrain")
    assert estimate.work.epochs is None
    assert "is not prepared" in estimate.notes[0]
    assert list(tmp_path.iterdir()) == []
    # Marian tiny: embeddings, and in encoder and decoder attention, feed-forward layers and norms with their biases
    width, inner, attention = 144, 512, 4 * (144 * 144 + 144)
    feed_forward, norm = 2 * width * inner + width + inner, 2 * width
    expected = 4_000 * width + 3 * (attention + feed_forward + 2 * norm) + 2 * (2 * attention + feed_forward + 3 * norm)
    assert estimate.model.trained_parameters == expected
    finetuned = dry_run(settings, "finetune")
    assert finetuned.model.trained_parameters == expected
    assert any("has not finished" in note for note in finetuned.notes)


def test_adapters_labels_and_recomputed_activations_are_counted(tmp_path: Path) -> None:
    def finetuned(family: str, **values: Any) -> Estimate:
        training = {"workers": 1, "start": "scratch", **values}
        settings = {"storage": str(tmp_path), "model": {"family": family}, "finetune": training}
        return dry_run(Settings.model_validate(settings), "finetune")

    whole, adapters = finetuned("llama"), finetuned("llama", lora={"rank": 4})
    assert adapters.model.trained_parameters < 0.1 * whole.model.trained_parameters
    assert adapters.memory.optimizer == 12 * adapters.model.trained_parameters
    classifier = finetuned("bert")
    assert classifier.model.objective == "classify"
    config, tokenizer, _ = build(ModelSettings(family="bert"), 4_000)
    from raylm import models

    labelled = models.build_model(models.with_head(config, ["0", "1"], tokenizer.pad_token_id), seed=0)
    assert classifier.model.trained_parameters == models.parameter_count(labelled)
    again = finetuned("llama", activation_checkpointing=True)
    assert again.memory.peak < whole.memory.peak
    assert any("jemalloc" in note for note in again.notes) or again.memory.resident == again.memory.peak
    assert again.memory.weights == whole.memory.weights


def test_low_precision_without_a_gpu_is_a_note(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    settings = Settings.model_validate({"storage": str(tmp_path), "pretrain": {"workers": 1, "precision": "bf16"}})
    estimate = dry_run(settings, "pretrain")
    assert estimate.layout.precision == "bf16"
    assert any("pretrain.precision is bf16" in note for note in estimate.notes)


def test_too_little_memory_and_disk_are_notes(tmp_path: Path) -> None:
    values = {
        "storage": str(tmp_path),
        "model": {"family": "llama", "size": "large", "config": {"num_hidden_layers": 4_000}},
        "pretrain": {"workers": 1},
    }
    notes = dry_run(Settings.model_validate(values), "pretrain").notes
    assert any("a worker needs" in note for note in notes)
    assert any("checkpoints need" in note for note in notes)


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("stage", "overrides", "parts"),
    [
        ("pretrain", ["pretrain.objective=causal"], ["pretrain.objective", "'causal' does not fit", "'denoise'"]),
        ("pretrain", ["model.config={encoder_layer: 2}"], ["marian has no 'encoder_layer'", "'encoder_layers'"]),
        ("pretrain", ["model.config={d_model: wide}"], ["model.config", "d_model"]),
        ("pretrain", ["model.config={d_model: 150}"], ["model.config", "divisible", "150"]),
        ("pretrain", ["model={family: llama, config: {hidden_size: 150}}"], ["model.config", "150", "multiple"]),
        ("pretrain", ["model={family: llama, config: {num_key_value_heads: 3}}"], ["4 attention heads cannot share 3"]),
        ("pretrain", ["model={family: llama, config: {head_dim: 9}}"], ["model.config", "head_dim"]),
        ("pretrain", ["model.config={activation_function: rellu}"], ["model.config", "rellu"]),
        ("pretrain", ["pretrain.global_batch_tokens=100"], ["pretrain.global_batch_tokens is 100", "128 tokens"]),
        ("pretrain", ["pretrain.micro_batch_tokens=100"], ["pretrain.micro_batch_tokens is 100", "128 tokens"]),
        ("finetune", ["finetune.micro_batch_tokens=100"], ["finetune.micro_batch_tokens is 100", "384 tokens"]),
        ("pretrain", ["corpus.sequence_length=1024"], ["corpus.sequence_length", "1,025 positions", "1,024"]),
        ("finetune", ["finetune.max_source_tokens=2000"], ["finetune.max_source_tokens", "2,000", "1,024"]),
        ("finetune", ["finetune.max_target_tokens=2000"], ["finetune.max_target_tokens", "2,000", "1,024"]),
        ("finetune", ["finetune.task_weights={translat: 2}"], ["there is no task 'translat'", "translate"]),
        ("pretrain", ["model.start_from=/absent/model"], ["/absent/model", "no such directory"]),
        ("pretrain", ["model.start_from=./absent"], ["absent", "no such directory"]),
        ("finetune", ["finetune.objective=seq2seq", "model.family=bert"], ["'seq2seq' does not fit an encoder"]),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_refused_in_one_line(
    tmp_path: Path, stage: str, overrides: list[str], parts: list[str]
) -> None:
    plain = "{steps: 400, warmup_steps: 50}"
    settings = [f"storage={tmp_path}", "corpus.sequence_length=128", f"pretrain={plain}", f"finetune={plain}"]
    settings += ["finetune.start=scratch", *overrides]
    cluster = tmp_path / "c.yaml"
    cluster.write_text("metadata: {raylm: {}}")
    started = time.process_time()
    result = run(stage, "--dry-run", "--cluster", str(cluster), *(part for one in settings for part in ("--set", one)))
    assert time.process_time() - started < 5
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for part in ("raylm: error: ", *parts):
        assert part in lines[0]


def test_positions_count_from_behind_the_padding() -> None:
    """RoBERTa has two positions more than it reads."""
    from transformers import RobertaConfig

    config = RobertaConfig(max_position_embeddings=66, pad_token_id=1)
    check_positions(PretrainSettings(), config, (64, 0))
    with pytest.raises(SettingsError, match="corpus.sequence_length makes sequences of 65 positions, the model has 64"):
        check_positions(PretrainSettings(), config, (65, 0))


def test_a_corpus_of_another_tokenizer_is_refused(
    small_settings: Settings, corpus: StoragePath, tmp_path: Path
) -> None:
    """Also one of as many tokens, whose ids mean other texts; and not only by the dry run."""
    from raylm import models

    config, tokenizer, _ = build(ModelSettings(), 1_000)
    models.build_model(config, seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = changed(
        small_settings,
        model={"start_from": str(tmp_path), "config": {}},
        pretrain={"name": "other-tokenizer", "warmup_steps": 5},
    )
    for stage in (lambda: dry_run(settings, "pretrain"), lambda: pretrain(settings)):
        with pytest.raises(ArtifactError, match=f"another tokenizer than that of {tmp_path}: of its 1,000 tokens 9"):
            stage()
    assert not (StoragePath(settings.storage) / "runs" / "other-tokenizer" / "run.json").is_file()


def test_training_refuses_what_the_dry_run_refuses(small_settings: Settings, corpus: StoragePath) -> None:
    settings = changed(small_settings, model={"config": {"max_position_embeddings": 32}}, pretrain={"name": "refused"})
    for stage in (lambda: dry_run(settings, "pretrain"), lambda: pretrain(settings)):
        with pytest.raises(SettingsError, match=r"corpus.sequence_length makes sequences of \d+ positions, .* has 32"):
            stage()


def test_a_run_that_was_started_otherwise_is_refused(small_settings: Settings, corpus: StoragePath) -> None:
    settings = changed(small_settings, pretrain={"warmup_steps": 5, "name": "claimed"})
    place = StoragePath(settings.storage) / "runs" / "claimed"
    earlier = changed(settings, pretrain={"learning_rate": 0.5})
    (place / "run.json").write_json(fixed_settings(earlier, earlier.pretrain))
    try:
        with pytest.raises(TrainingError, match=r"training.learning_rate: 0.5 → 0.002"):
            dry_run(settings, "pretrain")
    finally:
        place.delete()


def test_a_changed_corpus_setting_is_a_note(small_settings: Settings, corpus: StoragePath) -> None:
    settings = changed(small_settings, corpus={"sequence_length": 32}, pretrain={"warmup_steps": 5})
    estimate = dry_run(settings, "pretrain")
    assert "sequence_length: 64 → 32" in estimate.notes[0]
    assert estimate.layout.batch.target_tokens == 65  # of the corpus that there is


# -------------------------------------------------------------------------------------------- measured


def measure(
    family: str, size: str, zero_stage: int, lengths: list[tuple[int, int]], accumulate: int, recomputes: bool
) -> None:
    """Print what real training steps hold, beside what was predicted, as JSON: a process of its own calls it.

    :param lengths: sequences and tokens of each micro-batch, the smallest first.
    """
    import torch
    import torch.distributed as dist

    from raylm import models
    from raylm.training.guard import SpikeGuard
    from raylm.training.memory import checkpoint_bytes
    from raylm.training.steps import train_step
    from raylm.training.throughput import peak_memory_gb
    from raylm.training.zero import born_sharded, build_engine, deepspeed_config, prepare_backend

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    directory = Path(os.environ["RAYLM_MEASURE"])
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    prepare_backend(cpu)
    settings = PretrainSettings(zero_stage=zero_stage)  # type: ignore[arg-type]

    def engine_of(model: ModelSettings) -> tuple[Any, Callable[[int, int], tuple[float, MicroBatch]]]:
        config, tokenizer, objective = build(model, 4_000)
        zero_config = deepspeed_config(settings, 1, accumulate, "fp32")
        with born_sharded(zero_config):
            made = models.build_model(config, seed=1).train()
        made.config.use_cache = False
        if recomputes:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        engine = build_engine(made, settings, zero_config, cpu)

        def step(sequences: int, length: int) -> tuple[float, MicroBatch]:
            batch = micro_batch(config, tokenizer, objective, sequences, length)
            done = train_step(engine, [batch] * accumulate, 1e-3, 0.0, cpu, SpikeGuard(None, "pretrain"))
            return done.loss_sum, batch

        return engine, step

    # What the libraries load at their first use is theirs, not the run's.
    small = {"marian": {"d_model": 16}, "llama": {"hidden_size": 16}}[family]
    engine, step = engine_of(ModelSettings(family=family, config=small))  # type: ignore[arg-type]
    step(1, 16)
    del engine, step

    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory_gb(cpu)
    assert before is not None
    model = ModelSettings(family=family, size=size)  # type: ignore[arg-type]
    engine, step = engine_of(model)
    with torch.device("meta"):
        shapes = models.build_model(build(model, 4_000)[0], seed=1)
    trained = models.parameter_count(shapes)
    frozen = sum(parameter.numel() for parameter in shapes.parameters()) - trained
    rows = []
    for sequences, length in lengths:
        for _ in range(2):
            loss, batch = step(sequences, length)
        after = peak_memory_gb(cpu)
        assert after is not None and np.isfinite(loss)
        shape = shape_of(batch)
        expected = memory(
            trained,
            frozen,
            kept_bytes(shapes, shape, 4, on_gpu=False, recomputes=recomputes),
            loss_bytes(shapes, shape, "fp32"),
            zero_stage,
            workers=1,
            precision="fp32",
            accumulates=accumulate > 1,
            on_gpu=False,
        )
        measured = (after - before) * 1e9
        rows.append(
            {"tokens": sequences * length, "measured": measured, "peak": expected.peak, "resident": expected.resident}
        )
    engine.save_checkpoint(str(directory / "saved"), tag="zero", save_latest=False)
    saved = sum(file.stat().st_size for file in (directory / "saved").rglob("*.pt"))
    expected_files = checkpoint_bytes(trained, frozen, zero_stage, "fp32")
    print(json.dumps({"before": before * 1e9, "peaks": rows, "saved": [saved, expected_files]}))  # noqa: T201


MARIAN = ("marian", "tiny", [(64, 32), (64, 128)], 1, False)
LLAMA = ("llama", "small", [(4, 128), (16, 128)], 1, False)
ACCUMULATING = ("llama", "small", [(2, 512)], 2, False)
RECOMPUTING = ("llama", "small", [(16, 128)], 1, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "size", "lengths", "accumulate", "recomputes", "allocator", "zero_stage"),
    # With glibc, how much freed memory a process under ZeRO-3 keeps is another number in every run.
    [(*case, "exact", stage) for case in (MARIAN, LLAMA) for stage in (0, 1, 2, 3)]
    + [(*ACCUMULATING, "exact", stage) for stage in (1, 3)]
    + [(*RECOMPUTING, "exact", stage) for stage in (0, 2)]
    + [(*LLAMA, "glibc", stage) for stage in (0, 2)],
)
def test_the_peak_is_what_a_process_really_takes(
    tmp_path: Path,
    family: str,
    size: str,
    lengths: list[tuple[int, int]],
    accumulate: int,
    recomputes: bool,
    allocator: str,
    zero_stage: int,
) -> None:
    """One worker in fp32 on a CPU: resident memory above what it was before the model was built.

    `exact`: freed blocks go back to the system at once, so that what is resident is what is held.
    """
    if sys.platform != "linux":
        pytest.skip("the peak of a process is read from /proc")
    arguments = (family, size, zero_stage, lengths, accumulate, recomputes)
    environment = {"RAYLM_MEASURE": str(tmp_path), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if allocator == "exact":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    found = subprocess.run(
        [sys.executable, "-c", f"from tests.training.test_estimate import measure; measure(*{arguments!r})"],
        capture_output=True, text=True, timeout=900, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2_000:]
    result = json.loads(found.stdout.splitlines()[-1])
    key, share = ("peak", 0.06) if allocator == "exact" else ("resident", 0.15)
    for peak in result["peaks"]:
        assert peak[key] == pytest.approx(peak["measured"], rel=share), result
    saved, expected = result["saved"]
    assert expected == pytest.approx(saved, rel=0.02)
