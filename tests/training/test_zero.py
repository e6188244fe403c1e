from __future__ import annotations

import pytest

from raylm.settings import FinetuneSettings, PretrainSettings
from raylm.training.zero import deepspeed_config, resolve_precision, stage_of


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_config_is_one_that_deepspeed_takes(stage: int) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = PretrainSettings(zero_stage=stage, gradient_clip=0.5)
    config = deepspeed_config(settings, world_size=4, micro_batches=3, precision="bf16")
    assert DeepSpeedZeroConfig(**config["zero_optimization"]).stage == max(stage, 1)
    assert config["train_batch_size"] == (
        4 * config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    )
    assert config["gradient_clipping"] == 0.5
    plain = deepspeed_config(settings, world_size=4, micro_batches=3, precision="fp32")
    assert plain["gradient_clipping"] == (0.5 if stage else 0)  # clipped by raylm


@pytest.mark.parametrize(
    ("precision", "bf16", "fp16"), [("fp32", False, False), ("bf16", True, False), ("fp16", False, True)]
)
def test_precision_turns_on_one_format(precision: str, bf16: bool, fp16: bool) -> None:
    config = deepspeed_config(FinetuneSettings(), 1, 1, precision)
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (bf16, fp16)


def test_auto_precision_is_bf16_only_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    # What an older GPU emulates is no reason to compute in it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_precision("auto", torch.device("cuda")) == "fp32"
    assert resolve_precision("fp16", torch.device("cpu")) == "fp16"


@pytest.mark.parametrize(("precision", "expected"), [("fp32", 0), ("bf16", 1), ("fp16", 1)])
def test_16_bits_have_an_optimizer_that_keeps_fp32_weights(precision: str, expected: int) -> None:
    settings = PretrainSettings(zero_stage=0)
    assert stage_of(settings, precision) == expected
    assert deepspeed_config(settings, 1, 1, precision)["zero_optimization"]["stage"] == expected
    assert stage_of(PretrainSettings(zero_stage=2), precision) == 2


@pytest.mark.parametrize(
    ("offload", "expected"),
    [
        ("none", {}),
        ("optimizer", {"offload_optimizer": "cpu"}),
        ("all", {"offload_optimizer": "cpu", "offload_param": "cpu"}),
    ],
)
def test_offloading_is_what_deepspeed_understands(offload: str, expected: dict[str, str]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = PretrainSettings.model_validate({"zero_stage": 3, "offload": offload})
    found = DeepSpeedZeroConfig(**deepspeed_config(settings, 2, 1, "bf16")["zero_optimization"])
    for name in ("offload_optimizer", "offload_param"):
        place = getattr(found, name)
        assert (str(place.device) if place else None) == expected.get(name)


def test_offloading_needs_a_stage_that_can() -> None:
    with pytest.raises(ValueError, match="offload: all needs zero_stage 3 or more, it is 2"):
        PretrainSettings(zero_stage=2, offload="all")
