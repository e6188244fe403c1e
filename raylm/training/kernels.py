"""Faster kernels for GPUs, of the packages of `raylm[gpu]`: where they are installed and the model has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylm import models

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

FLASH = "flash_attention_2"
"""What transformers calls FlashAttention 2 (Dao 2023)."""


def attention_for(config: PretrainedConfig, objective: str, precision: str, device: torch.device) -> str | None:
    """How a model is to compute attention: by FlashAttention, or None for what transformers chooses.

    It computes in 16 bits alone, and takes no mask that tells documents of one sequence apart: causal pretraining tells
    it where they begin instead, see `SelfSupervision`, which `masked` cannot.
    """
    from transformers.utils import is_flash_attn_2_available

    is_told = objective != "masked" and models.model_class(config)._model_mapping[type(config)]._supports_flash_attn
    return FLASH if device.type == "cuda" and precision != "fp32" and is_told and is_flash_attn_2_available() else None


def fuse(model: PreTrainedModel, device: torch.device) -> None:
    """Put Liger's kernels (Hsu et al. 2024) into a model: norms, rotary positions, gated layers.

    The loss is raylm's own, which needs the logits.
    """
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.utils import is_liger_kernel_available

    if device.type == "cuda" and is_liger_kernel_available():
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
