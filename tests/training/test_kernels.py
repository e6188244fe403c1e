"""Kernels that only a GPU has: when they are asked for, and that what they are told means the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from raylm import models
from raylm.training import kernels
from raylm.training.objectives import SelfSupervision, Vocabulary
from raylm.training.steps import token_loss

GPU, CPU = torch.device("cuda"), torch.device("cpu")
VOCABULARY = Vocabulary(size=100, pad=99, end=2, mask=3, decoder_start=99, sentinels=(), first_plain=4)
LLAMA = transformers.LlamaConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, pad_token_id=99
)


@pytest.mark.parametrize(
    ("config", "objective", "precision", "device", "expected"),
    [
        (LLAMA, "causal", "bf16", GPU, kernels.FLASH),
        (transformers.MarianConfig(), "denoise", "fp16", GPU, kernels.FLASH),
        (LLAMA, "causal", "fp32", GPU, None),
        (LLAMA, "causal", "bf16", CPU, None),
        (transformers.BertConfig(), "masked", "bf16", GPU, None),
        (transformers.T5Config(), "seq2seq", "bf16", GPU, None),
    ],
)
def test_flash_attention_is_for_what_it_can_do(
    monkeypatch: pytest.MonkeyPatch, config: Any, objective: str, precision: str, device: Any, expected: str | None
) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert kernels.attention_for(config, objective, precision, device) == expected
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    assert kernels.attention_for(config, objective, precision, device) is None


def test_liger_leaves_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", lambda _, told: asked.append(told))
    model = models.build_model(LLAMA, seed=1)
    kernels.fuse(model, CPU)
    assert asked == []
    kernels.fuse(model, GPU)
    assert asked == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_documents_in_one_row_are_those_that_a_mask_tells_apart() -> None:
    rows = list(np.random.default_rng(1).integers(4, 99, (3, 16)))
    rows[2][13:] = VOCABULARY.pad
    lengths = [np.asarray([5, 11]), np.asarray([16]), np.asarray([6, 7])]
    seeds = [(number,) for number in range(3)]
    masked, flat = (
        SelfSupervision("causal", VOCABULARY, 0.15, 3.0, is_flat=is_flat).micro_batch(rows, lengths, seeds)
        for is_flat in (False, True)
    )
    assert flat.inputs.keys() == {"input_ids", "position_ids"}
    assert flat.inputs["input_ids"].shape == (1, 48)
    assert flat.shape == masked.shape == (3, 16, 0)
    for name in ("target_tokens", "padded_tokens", "real_tokens"):
        assert getattr(flat, name) == getattr(masked, name)
    assert flat.hashes() == masked.hashes()
    assert flat.unlabelled().shape == flat.shape
    model = models.build_model(LLAMA, seed=1).eval()
    model.config.use_cache = False  # as in training: with a cache, transformers does not look for documents
    with torch.no_grad():
        one, other = (token_loss(model, batch, 0.0, CPU) for batch in (masked, flat))
    assert float(one) == pytest.approx(float(other), rel=1e-5)
