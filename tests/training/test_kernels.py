"""Kernels: when they are asked for, and that what they are told means the same."""

from __future__ import annotations

import copy
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
VOCABULARY = Vocabulary(size=100, pad=99, end=2, mask=3, decoder_start=99, sentinels=(), first_plain=4, plain_stop=99)
LLAMA = transformers.LlamaConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, pad_token_id=99
)


@pytest.mark.parametrize(
    ("config", "objective", "precision", "device", "expected"),
    [
        (LLAMA, "causal", "bf16", GPU, kernels.FLASH),
        (transformers.MarianConfig(), "denoise", "fp16", GPU, kernels.FLASH),
        (LLAMA, "causal", "fp32", GPU, None),
        (LLAMA, "causal", "bf16", CPU, kernels.BY_DOCUMENT),
        (LLAMA, "seq2seq", "fp32", CPU, None),
        (transformers.MistralConfig(sliding_window=64), "causal", "fp32", CPU, None),
        (transformers.BertConfig(), "masked", "bf16", GPU, None),
        (transformers.T5Config(), "seq2seq", "bf16", GPU, None),
        (transformers.GPTBigCodeConfig(), "causal", "bf16", GPU, None),
        (transformers.GPTBigCodeConfig(), "causal", "fp32", CPU, None),
    ],
)
def test_attention_is_computed_by_what_can_do_it(
    monkeypatch: pytest.MonkeyPatch, config: Any, objective: str, precision: str, device: Any, expected: str | None
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert kernels.attention_for(config, objective, precision, device) == expected
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    assert kernels.attention_for(config, objective, precision, device) == (expected if device == CPU else None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    assert kernels.attention_for(config, objective, precision, device) == (expected if device == CPU else None)


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
    with torch.no_grad():
        one, other = (token_loss(model_with(None), batch, 0.0, CPU) for batch in (masked, flat))
        apart = token_loss(model_with(kernels.attention_for(LLAMA, "causal", "fp32", CPU)), flat, 0.0, CPU)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert float(one) == pytest.approx(float(apart), rel=1e-5)


def model_with(attention: str | None) -> Any:
    config = copy.deepcopy(LLAMA)
    config._attn_implementation = attention
    model = models.build_model(config, seed=1).eval()
    model.config.use_cache = False  # as in training: with a cache, transformers does not look for documents
    return model


def test_attention_by_document_has_the_gradients_of_a_mask_and_never_mixes_documents() -> None:
    attention = kernels.attention_for(LLAMA, "causal", "fp32", CPU)
    ids = torch.from_numpy(np.random.default_rng(1).integers(4, 99, (1, 48)))
    lengths = [5, 11, 16, 16]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    mask = (documents[:, None] == documents) & torch.ones(48, 48, dtype=torch.bool).tril()
    whole, apart = model_with(None), model_with(attention)
    found = apart(input_ids=ids, position_ids=positions).logits
    expected = whole(input_ids=ids, position_ids=positions, attention_mask=mask[None, None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for logits in (found, expected):
        logits.square().sum().backward()
    for (name, one), other in zip(apart.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
    edited = ids.clone()
    edited[0, 5:16] = 7
    again = apart(input_ids=edited, position_ids=positions).logits
    assert torch.equal(again[0, 16:], found[0, 16:]) and torch.equal(again[0, :5], found[0, :5])
    assert not torch.equal(again[0, 5:16], found[0, 5:16])


def test_a_model_that_attends_by_document_generates_as_any_other() -> None:
    """With a cache, with padding, one row and several."""
    apart = model_with(kernels.attention_for(LLAMA, "causal", "fp32", CPU))
    whole = model_with(None)
    ids = torch.from_numpy(np.random.default_rng(2).integers(4, 98, (3, 12)))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for rows in (slice(0, 1), slice(0, 3)):
        asked = {"input_ids": ids[rows], "attention_mask": mask[rows], "max_new_tokens": 8, "do_sample": False}
        one, other = (model.generate(**asked, use_cache=True, eos_token_id=None) for model in (apart, whole))
        assert torch.equal(one, other)


def test_windows_of_a_model_end_at_its_documents() -> None:
    """Where layers see a window alone, the model itself tells documents apart, of their positions."""
    config = transformers.MistralConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=99, sliding_window=4,
    )  # fmt: skip
    model = models.build_model(config, seed=1).eval()
    rows = list(np.random.default_rng(1).integers(4, 99, (2, 16)))
    lengths = [np.asarray([7, 9]), np.asarray([16])]
    packed = SelfSupervision("causal", VOCABULARY, 0.15, 3.0, has_mask=not models.has_windows(config))
    inputs, _ = packed.micro_batch(rows, lengths, [(0,), (1,)]).tensors(CPU)
    assert set(inputs) == {"input_ids", "position_ids"}
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits
        parts = (torch.from_numpy(part)[None] for part in (rows[0][:7], rows[0][7:], rows[1]))
        alone = [model(part, use_cache=False).logits[0] for part in parts]
    torch.testing.assert_close(together[0], torch.cat(alone[:2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], alone[2], rtol=1e-4, atol=1e-5)
