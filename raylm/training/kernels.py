"""Faster kernels: on GPUs those of `raylm[gpu]`, on CPUs attention that leaves out what a mask would hide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raylm import models

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

FLASH = "flash_attention_2"
"""What transformers calls FlashAttention 2 (Dao 2023)."""
BY_DOCUMENT = "raylm_by_document"
"""`attention_by_document`, as transformers knows it once `attention_for` has chosen it."""
_FLASH_CAPABILITY = (8, 0)
"""Of NVIDIA's GPUs since Ampere."""
_WITHOUT_POSITIONS = ("gpt_bigcode", "gptj", "gpt_neo")
"""Models whose attention is not told where documents begin."""


def attention_for(config: PretrainedConfig, objective: str, precision: str, device: torch.device) -> str | None:
    """How a model is to compute attention: by FlashAttention, document by document, or None for what transformers
    chooses.

    FlashAttention computes in 16 bits alone. Both take no mask that tells documents of one sequence apart: causal
    pretraining tells them where they begin instead, see `SelfSupervision`, which `masked` cannot.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    kind = models.model_class(config)._model_mapping[type(config)]
    if objective == "causal" and (config.model_type in _WITHOUT_POSITIONS or models.first_position(config)):
        return None
    if device.type == "cuda":
        is_able = precision != "fp32" and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
        is_told = objective != "masked" and kind._supports_flash_attn
        return FLASH if is_able and is_told and is_flash_attn_2_available() else None
    is_plain = not models.has_windows(config) and not getattr(config, "attn_logit_softcapping", None)
    if objective != "causal" or not is_plain or not kind._supports_attention_backend:
        return None
    _register_by_document()
    return BY_DOCUMENT


def _register_by_document() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(BY_DOCUMENT, attention_by_document)
    AttentionMaskInterface.register(BY_DOCUMENT, _mask_but_for_documents)


def attention_by_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of documents that lie one behind the other in one row, each computed apart.

    A mask over the whole row would have all pairs of positions computed and most of them thrown away. Anything but
    such a row is computed as transformers does it.

    :param query: (1, H, T, D), as are `key` and `value`, these with perhaps fewer heads.
    :param position_ids: (1, T), 0 where a document begins.
    :returns: (1, T, H, D), and no weights.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = query.shape[2]
    starts = _starts(position_ids, length) if attention_mask is None and key.shape[2] == length else []
    if len(starts) < 2:
        output: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
        return output, None
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], length], strict=True)]
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **options)[0] for part in parts], dim=1), None


def _starts(position_ids: torch.Tensor | None, length: int) -> list[int]:
    """Where documents begin in a row; none where there is no such row."""
    if position_ids is None or position_ids.shape != (1, length):
        return []
    starts: list[int] = (position_ids[0] == 0).nonzero().flatten().tolist()
    return starts if starts[:1] == [0] else []


def _mask_but_for_documents(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor | None:
    """None for a whole row without padding, whose documents `attention_by_document` finds by itself."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options
    )
    return mask


def fuse(model: PreTrainedModel, device: torch.device) -> None:
    """Put Liger's kernels (Hsu et al. 2024) into a model: norms, rotary positions, gated layers.

    The loss is raylm's own, which needs the logits.
    """
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.utils import is_liger_kernel_available

    if device.type == "cuda" and is_liger_kernel_available():
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
