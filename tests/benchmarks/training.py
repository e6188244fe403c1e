"""`python -m tests.benchmarks.training`: how fast, how well and how safely raylm trains, beside Trainer and bare loops.

Everything is trained on real text. raylm runs through its command line, in groups of workers that Ray Train makes; its
speed is what it logs itself, without the steps of its first windows. The peers compute with the same torch and
transformers, the same tokens and the same first weights. Fine-tuning for twenty minutes each, and runs that are killed
twenty times, make this two hours and a half; `--only` measures a part.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from raylm.settings import FinetuneSettings, PretrainSettings
from raylm.storage import StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.telemetry import read_metrics
from tests.benchmarks.commands import CPUS, DATA, TEXT, raylm_session, run_on_real_text
from tests.benchmarks.measure import Goal, Row, beside, interleaved, mapped, run_script, single, succeeded
from tests.training.runs import damage, losses

PAIRS = DATA / "translate.en-de.docs.train.parquet"
HELD_OUT = DATA / "translate.en-de.docs.validation.parquet"
_HELD_OUT_ROWS = 936
_MINUTES = 20
_RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates that raylm and Trainer are tried with, for so many steps; each then trains at its best."""
_TRIAL_STEPS = 2_000
_WARMUP = 20
_KILLS = 20
_KILLED_AT_START = 0.2
"""The share of kills that come before a run has got anywhere."""
_FAULTS = 100
_NEVER = 10**6
"""Steps."""

# A two million parameter Marian learns to translate in minutes by many small steps.
_TRANSLATION: dict[str, Any] = {
    "start": "scratch", "global_batch_tokens": 1_200, "micro_batch_tokens": 1_200, "learning_rate": 2e-3,
    "schedule": "linear", "warmup_steps": 200, "min_learning_rate_ratio": 0.0, "max_source_tokens": 128,
    "validation_batches": 1, "zero_stage": 0, "seed": 1,
}  # fmt: skip


def translation_corpus() -> dict[str, Any]:
    pairs = {"type": "parquet", "source": "src", "target": "tgt", "to": "de"}
    return {
        "pairs": [pairs | {"path": str(PAIRS)}, pairs | {"path": str(HELD_OUT), "split": "test"}],
        "tokenizer": {"vocab_size": 4_000},
    }


def text_corpus(sequence_length: int) -> dict[str, Any]:
    return {
        "documents": [{"type": "parquet", "path": str(TEXT)}],
        "tokenizer": {"vocab_size": 4_000},
        "sequence_length": sequence_length,
    }


@contextmanager
def prepared(corpus: Mapping[str, Any], **sections: Any) -> Iterator[dict[str, Any]]:
    """The settings of a storage with that corpus in it."""
    with tempfile.TemporaryDirectory(prefix="raylm-benchmark-") as place:
        settings = {"storage": place, "corpus": dict(corpus), **sections}
        raylm("prepare", settings)
        yield settings


def raylm(command: str, settings: Mapping[str, Any], **section: Any) -> dict[str, Any]:
    """The manifest of a finished command."""
    values = {**settings, command: {**settings.get(command, {}), **section}} if section else settings
    with raylm_session(command, values) as session:
        return dict(json.loads(session.wait().stdout))


def run_of(settings: Mapping[str, Any], name: str) -> StoragePath:
    return StoragePath(settings["storage"]) / "runs" / name


def trained(settings: Mapping[str, Any], section: str, warmup: int = _WARMUP, **training: Any) -> dict[str, float]:
    """What a run logged: the medians of its windows after the first steps."""
    raylm(section, settings, **training)
    rows = [row for row in read_metrics(run_of(settings, training["name"])) if "loss" in row and row["step"] > warmup]
    names = ("tokens_per_s", "real_tokens_per_s", "mfu", "step_s")
    return {name: statistics.median(row[name] for row in rows) for name in names}


def _untrained(settings: Mapping[str, Any], section: str, training: Mapping[str, Any], name: str) -> str:
    """The config and the tokenizer that peers take: the `model` of a run of one step."""
    short = {"steps": 1, "log_every": 1, "validate_every": 1, "checkpoint_every": 1, "warmup_steps": 0}
    raylm(section, settings, **{**training, **short, "name": name})
    return str(run_of(settings, name) / "model")


def full_settings(section: str, **training: Any) -> dict[str, Any]:
    kind = FinetuneSettings if section == "finetune" else PretrainSettings
    return kind.model_validate(training).model_dump(mode="json")


def names(prefix: str) -> Iterator[str]:
    """A name for each run, as one that is finished is not run again."""
    return (f"{prefix}-{number}" for number in range(1_000))


# -------------------------------------------------------------------------------------- beside bare loops


def measure_overhead(scale: float) -> list[Row]:
    """What the loop costs: raylm beside PyTorch on one worker and beside DeepSpeed's engine on two."""
    steps = max(round(100 * scale), 2 * _WARMUP)
    training = {
        "steps": steps, "start": "scratch", "global_batch_tokens": 4_096, "micro_batch_tokens": 4_096, "log_every": 10,
        "validate_every": steps, "checkpoint_every": steps, "validation_batches": 1, "zero_stage": 1, "seed": 1,
    }  # fmt: skip
    rows: list[Row] = []
    with prepared(translation_corpus()) as settings:
        name = names("overhead")

        def ours(workers: int) -> dict[str, float]:
            return trained(settings, "finetune", **training, workers=workers, name=next(name))

        model = _untrained(settings, "finetune", training, next(name))
        asked = {
            "section": "finetune", "settings": training, "warmup": _WARMUP,
            "model": model, "tokens": f"{settings['storage']}/tokens/default",
        }  # fmt: skip
        for workers, loop, peer, bound in ((1, "torch", "PyTorch", 0.95), (2, "deepspeed", "DeepSpeed", 0.97)):
            bare = partial(run_script, sys.executable, "bare_loop.py", **asked, workers=workers, loop=loop)
            found = interleaved({"raylm": partial(ours, workers), "bare": bare})
            rows.append(
                beside(
                    f"fine-tuning on {workers} worker{'s' * (workers > 1)}, padded tokens",
                    [result["tokens_per_s"] for result in succeeded(found["raylm"])],
                    "tokens/s",
                    f"a bare loop of {peer}",
                    mapped(found["bare"], lambda result: float(result["tokens_per_s"])),
                    Goal("ratio", ">=", bound),
                )
            )
    return rows


# ------------------------------------------------------------------------------------------ beside Trainer


class _Finetuning:
    """raylm and Seq2SeqTrainer on the same pairs, with the same model and the same number of pairs a step."""

    def __init__(self, settings: Mapping[str, Any], steps: int) -> None:
        self.settings, self._steps, self._names = settings, steps, names("speed")
        self._model = _untrained(settings, "finetune", _TRANSLATION, next(self._names))
        self._pairs = _pairs_a_step(settings, self._model)

    def ours(self) -> dict[str, float]:
        values = {"validate_every": self._steps, "checkpoint_every": self._steps, "log_every": 20}
        return trained(self.settings, "finetune", **_TRANSLATION, **values, steps=self._steps, name=next(self._names))

    def theirs(
        self, sampling: str = "group_by_length", steps: int | None = None, rate: float | None = None, **asked: Any
    ) -> dict[str, Any]:
        values = _TRANSLATION | ({"learning_rate": rate} if rate else {})
        training = full_settings("finetune", **values, name="peer", steps=steps or self._steps)
        return run_script(
            sys.executable, "with_trainer.py", work="pairs", settings=training, model=self._model,
            tokens=f"{self.settings['storage']}/tokens/default", cpus=CPUS, warmup=_WARMUP, batch_size=self._pairs,
            sampling=sampling, **asked,
        )  # fmt: skip


@contextmanager
def _finetuning(scale: float) -> Iterator[_Finetuning]:
    with prepared(translation_corpus(), evaluate={"rows_per_task": _HELD_OUT_ROWS}) as settings:
        yield _Finetuning(settings, max(round(300 * scale), 4 * _WARMUP))


def measure_finetuning(scale: float) -> list[Row]:
    """The speed of fine-tuning on pairs."""
    with _finetuning(scale) as pairs:
        found = interleaved({"raylm": pairs.ours, "sorted": pairs.theirs, "default": partial(pairs.theirs, "random")})
    return [
        beside(
            "fine-tuning en-de, real tokens",
            [run["real_tokens_per_s"] for run in succeeded(found["raylm"])],
            "tokens/s",
            f"Seq2SeqTrainer, {peer}",
            mapped(found[key], lambda result: float(result["tokens_per_s"])),
            Goal("ratio", ">=", bound),
        )
        for key, peer, bound in (("sorted", "group_by_length", 1.6), ("default", "its default sampler", 3.0))
    ]


def measure_translation(scale: float) -> list[Row]:
    """How well models translate after the same time, each trained at the best of some learning rates."""
    with _finetuning(scale) as pairs:
        settings = pairs.settings
        # How many steps there are is to be known before, for the learning rate.
        found = interleaved({"raylm": pairs.ours, "sorted": pairs.theirs})
        ours_s, peer_s = (statistics.median(run["step_s"] for run in succeeded(found[key])) for key in found)
        trial_steps = round(_TRIAL_STEPS * scale)

        def trained_at(rate: float, steps: int, name: str) -> dict[str, Any]:
            values = _TRANSLATION | {"learning_rate": rate, "name": name, "steps": steps}
            raylm("finetune", settings, **values, log_every=100, validate_every=1_000, checkpoint_every=1_000)
            return values

        def scored(values: Mapping[str, Any]) -> dict[str, float]:
            return dict(raylm("evaluate", {**settings, "finetune": values})["metrics"]["translate-de"])

        def best(trial: Callable[[float], float]) -> float:
            tried = {rate: trial(rate) for rate in _RATES}
            return max(tried, key=tried.__getitem__)

        our_rate = best(lambda rate: scored(trained_at(rate, trial_steps, f"trial-{rate:g}"))["chrf"])
        their_rate = best(lambda rate: float(pairs.theirs(steps=trial_steps, rate=rate, rows=_HELD_OUT_ROWS)["chrf"]))
        start = time.perf_counter()
        values = trained_at(our_rate, round(60 * _MINUTES * scale / ours_s), "translation")
        took = time.perf_counter() - start  # Ray's start and all checkpoints included
        ours = scored(values)
        theirs = pairs.theirs(steps=round(took / peer_s), rate=their_rate, rows=_HELD_OUT_ROWS, seconds=took)
    peer = f"Seq2SeqTrainer, group_by_length, learning rate {their_rate:g}"
    what = f"of {_HELD_OUT_ROWS} held-out sentences after {took / 60:.1f} minutes, learning rate {our_rate:g}"
    return [
        beside(f"chrF {what}", [ours["chrf"]], "", peer, [theirs["chrf"]], Goal("ratio", ">=", 1)),
        single(f"chrF {what}", [ours["chrf"]], "", Goal("value", ">=", 44)),
        beside(f"BLEU {what}", [ours["bleu"]], "", peer, [theirs["bleu"]]),
    ]


def _pairs_a_step(settings: Mapping[str, Any], model: str) -> int:
    """How many pairs raylm reads in a step, on average: what Trainer's batches have."""
    from raylm import models
    from raylm.training.examples import open_split
    from raylm.training.job import TrainingJob

    training = FinetuneSettings.model_validate(_TRANSLATION)
    job = TrainingJob(training, "", f"{settings['storage']}/tokens/default", model, None)
    split = open_split(job, "train", models.load_config(model), models.load_tokenizer(model))
    return round(statistics.mean(len(split.order.batch(step).indices) for step in range(200)))


def measure_pretraining(scale: float) -> list[Row]:
    """The speed of causal pretraining with a Llama, and how much of the machine it uses."""
    steps, warmup = max(round(16 * scale), 8), 4
    training = {
        "steps": steps, "global_batch_tokens": 4_096, "micro_batch_tokens": 4_096, "learning_rate": 1e-3, "seed": 1,
        "log_every": 2, "validate_every": steps, "checkpoint_every": steps, "validation_batches": 1,
        "schedule": "linear", "zero_stage": 0,
    }  # fmt: skip
    length = 1_024  # what the model can read
    sequences = training["global_batch_tokens"] // length
    with prepared(text_corpus(length), model={"family": "llama", "size": "small"}) as settings:
        name = names("llama")

        def ours() -> dict[str, float]:
            before = _matmul_peak()
            found = trained(settings, "pretrain", warmup, **training, name=next(name))
            return found | {"peak": max(before, _matmul_peak())}

        model = _untrained(settings, "pretrain", training, next(name))

        def trainer(packed: bool) -> dict[str, Any]:
            return run_script(
                sys.executable, "with_trainer.py", work="documents", packed=packed, sampling="random", cpus=CPUS,
                warmup=warmup, settings=full_settings("pretrain", name="peer", **training),
                batch_size=sequences, tokens=f"{settings['storage']}/tokens/default", model=model,
            )  # fmt: skip

        found = interleaved({"raylm": ours, "packed": partial(trainer, True), "padded": partial(trainer, False)})
        ours_found = succeeded(found["raylm"])
        flops = _flops_of(model, sequences, length)
        utilisation = [flops / run["step_s"] / run["peak"] for run in ours_found]
        speed = [result["real_tokens_per_s"] for result in ours_found]
        return [
            beside(
                "pretraining a Llama, real tokens",
                speed,
                "tokens/s",
                f"Trainer, {peer}",
                mapped(found[key], lambda result: float(result["tokens_per_s"])),
                goal,
            )
            for key, peer, goal in (
                ("padded", "documents padded by its collator", Goal("ratio", ">=", 1.5)),
                ("packed", "documents packed by run_clm.py", None),
            )
        ] + [
            single(
                "pretraining a Llama, model FLOPs utilisation of the measured matmul peak",
                utilisation,
                "share",
                Goal("value", ">=", 0.6),
            ),
        ]


def _matmul_peak() -> float:
    """FLOP/s of this machine now: what else runs on it comes and goes."""
    import torch

    from raylm.training.throughput import measure_peak

    torch.set_num_threads(CPUS)
    return measure_peak(torch.device("cpu"), torch.float32)


def _flops_of(model: str, sequences: int, length: int) -> float:
    """Of a training step of a model, forward and backward."""
    from raylm import models
    from raylm.training.throughput import model_flops

    cost = model_flops(models.build_shapes(models.load_config(model)))
    assert cost is not None
    return float(cost.of_batch(sequences, length))


# ------------------------------------------------------------------------------------------------- faults

SMALL_MODEL = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
_SAFE: dict[str, Any] = {
    "workers": 2, "global_batch_tokens": 2_048, "schedule": "constant", "learning_rate": 1e-3, "precision": "fp32",
    "log_every": 1, "validate_every": _NEVER, "validation_batches": 1, "warmup_steps": 5,
}  # fmt: skip


def measure_endurance(scale: float) -> list[Row]:
    """Training that is killed at random times, beside the same training left alone."""
    kills = max(round(_KILLS * scale), 1)
    chance = random.Random(4)
    rows = []
    with prepared(text_corpus(256), model={"config": SMALL_MODEL}) as settings:
        for stage in (1, 2, 3):
            steps, apart = endured(settings, stage, kills, chance)
            what = f"ZeRO-{stage}: {kills} kill -9, {steps} steps, largest difference of a loss"
            rows.append(single(what, [apart], "nats", Goal("value", "<=", 1e-6)))
    return rows


def endured(settings: Mapping[str, Any], stage: int, kills: int, chance: random.Random) -> tuple[int, float]:
    """The steps of a training that was killed so often, with all its processes, and the largest difference of a loss
    from the same training left alone."""
    training = _SAFE | {"zero_stage": stage, "checkpoint_every": 25}
    killed, alone = f"killed-{stage}", f"alone-{stage}"
    run = run_of(settings, killed)
    for _ in range(kills):
        before = _reached(run)
        values = {**settings, "pretrain": training | {"name": killed, "steps": _NEVER}}
        with raylm_session("pretrain", values) as session:
            if chance.random() < _KILLED_AT_START:
                time.sleep(chance.uniform(1, 12))
            else:
                while session.running and _reached(run) == before:
                    time.sleep(0.1)
                time.sleep(chance.uniform(0, 3))
            session.kill()
    steps = _reached(run) + 50
    for name in (killed, alone):
        raylm("pretrain", settings, **training, name=name, steps=steps)
    pairs = zip(losses(run_of(settings, killed)), losses(run_of(settings, alone)), strict=True)
    return steps, max(abs(one - other) for one, other in pairs)


def _reached(run: StoragePath) -> int:
    """The step of a run's newest checkpoint."""
    return max((found.step for found in checkpoints.checkpoints(run)), default=0)


def measure_widths(scale: float) -> list[Row]:
    """Training that goes from two workers to one and back, beside the same training on two."""
    part = max(round(40 * scale), 5)
    rows = []
    with prepared(text_corpus(256), model={"config": SMALL_MODEL}) as settings:
        for stage in (1, 2, 3):
            training = _SAFE | {"zero_stage": stage, "checkpoint_every": part, "name": f"changing-{stage}"}
            for number, workers in enumerate((2, 1, 2), start=1):
                raylm("pretrain", settings, **training | {"workers": workers, "steps": number * part})
            raylm("pretrain", settings, **training | {"name": f"whole-{stage}", "steps": 3 * part})
            changing, whole = (losses(run_of(settings, f"{run}-{stage}")) for run in ("changing", "whole"))
            apart = max(abs(a - b) for a, b in zip(changing, whole, strict=True))
            what = f"ZeRO-{stage}: 2 to 1 to 2 workers, {3 * part} steps, largest difference of a loss"
            rows.append(single(what, [apart], "nats", Goal("value", "<=", 1e-5)))
    return rows


def measure_faults(scale: float) -> list[Row]:
    """Checkpoints with files that are cut short, missing, changed by a bit or never written."""
    faults = max(round(_FAULTS * scale), 4)
    chance = random.Random(5)
    loaded = 0
    with prepared(text_corpus(256), model={"config": SMALL_MODEL}) as settings:
        raylm("pretrain", settings, **_SAFE, zero_stage=2, name="faults", steps=20, checkpoint_every=10)
        run = run_of(settings, "faults")
        for number in range(faults):
            with tempfile.TemporaryDirectory(prefix="raylm-faults-") as copy:
                shutil.copytree(run.local() / "checkpoints", Path(copy) / "checkpoints")
                kind = ("truncate", "drop", "flip", "die")[number % 4]
                damage(Path(copy) / "checkpoints/step-00000020", kind, chance)
                found = checkpoints.newest_sound(StoragePath(copy), lambda _: None)
                loaded += found is None or found.step != 10
    return [single(f"damaged checkpoints loaded, of {faults}", [loaded], "", Goal("value", "<=", 0))]


PARTS = {
    "overhead": measure_overhead,
    "pretraining": measure_pretraining,
    "finetuning": measure_finetuning,
    "translation": measure_translation,
    "endurance": measure_endurance,
    "widths": measure_widths,
    "faults": measure_faults,
}


if __name__ == "__main__":
    sys.exit(run_on_real_text(__doc__.splitlines()[0], PARTS))
