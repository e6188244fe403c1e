from __future__ import annotations

import pytest

from raylm.settings import FinetuneSettings, PretrainSettings
from raylm.training.zero import deepspeed_config, resolve_precision


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_config_is_one_that_deepspeed_takes(stage: int) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = PretrainSettings(zero_stage=stage, gradient_clip=0.5)
    config = deepspeed_config(settings, world_size=4, micro_batches=3, precision="bf16")
    assert DeepSpeedZeroConfig(**config["zero_optimization"]).stage == stage
    assert config["train_batch_size"] == (
        4 * config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    )
    assert config["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("precision", "bf16", "fp16"), [("fp32", False, False), ("bf16", True, False), ("fp16", False, True)]
)
def test_precision_turns_on_one_format(precision: str, bf16: bool, fp16: bool) -> None:
    config = deepspeed_config(FinetuneSettings(), 1, 1, precision)
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (bf16, fp16)


def test_auto_precision_is_bf16_only_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert resolve_precision("auto", torch.device("cuda")) == "fp32"
    assert resolve_precision("fp16", torch.device("cpu")) == "fp16"
