"""FLOPs of a model beside what torch counts, the peak of a device, memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from raylm import models
from raylm.settings.training import LoraSettings
from raylm.training.objectives import MicroBatch
from raylm.training.throughput import (
    ModelFlops,
    attention_widths,
    dtype_of,
    group_peak,
    measure_peak,
    model_flops,
    peak_memory_gb,
)


def shape(inputs: dict[str, Any]) -> tuple[int, int, int]:
    return MicroBatch(inputs, np.zeros((1, 1), np.int64)).shape


VOCABULARY = {"vocab_size": 96, "pad_token_id": 95, "eos_token_id": 0, "bos_token_id": 0}
MARIAN = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 95,
}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4}
T5 = {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "marian": transformers.MarianConfig(**VOCABULARY, **MARIAN),
    "llama": transformers.LlamaConfig(**VOCABULARY, **LLAMA, tie_word_embeddings=False),
    "llama tied": transformers.LlamaConfig(**VOCABULARY, **LLAMA, head_dim=16, tie_word_embeddings=True),
    "bert": transformers.BertConfig(**VOCABULARY, **BERT),
    "t5": transformers.T5Config(**VOCABULARY, **T5, feed_forward_proj="gated-gelu", decoder_start_token_id=95),
    "gpt2": transformers.GPT2Config(**VOCABULARY, n_embd=32, n_layer=2, n_head=4),
}
SEQUENCES, SOURCE, TARGET = 3, 40, 24


def built(name: str) -> Any:
    config = CONFIGS[name]
    # On a CPU torch does not count scaled_dot_product_attention; plain matrix products it counts.
    config._attn_implementation = "eager"
    return models.build_model(config, seed=0)


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.ones(SEQUENCES, SOURCE, dtype=torch.int64)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.ones(SEQUENCES, TARGET, dtype=torch.int64)
    return inputs


def counted(model: Any) -> int:
    """FLOPs of a forward and backward pass, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(**inputs_of(model)).logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model = built(name)
    flops = model_flops(model)
    assert flops is not None
    arrays = {key: tensor.numpy() for key, tensor in inputs_of(model).items()}
    # The rotary embedding of a Llama is a product too, of a thousandth of the whole.
    assert flops.of_batch(*shape(arrays)) == pytest.approx(counted(model), rel=0.01)


def test_frozen_matrices_need_no_gradient_of_their_own() -> None:
    model = built("llama")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.requires_grad = False
    flops = model_flops(model)
    assert flops is not None
    assert flops.of_batch(SEQUENCES, SOURCE) == pytest.approx(counted(model), rel=0.01)


def test_adapters_are_counted_beside_the_frozen_weights() -> None:
    """As many layers as make the first one's, whose input needs no gradient, a small part."""
    config = transformers.MarianConfig(**VOCABULARY, **MARIAN | {"encoder_layers": 8, "decoder_layers": 8})
    config._attn_implementation = "eager"
    model = models.with_lora(models.build_model(config, seed=0), LoraSettings(rank=4))
    flops = model_flops(model)
    assert flops is not None
    assert flops.of_batch(SEQUENCES, SOURCE, TARGET) == pytest.approx(counted(model), rel=0.04)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_head_of_a_classifier_sees_one_position(name: str) -> None:
    config = models.with_head(CONFIGS[name], ["no", "yes"], pad_token_id=95)
    config._attn_implementation = "eager"
    model = models.build_model(config, seed=0)
    flops = model_flops(model)
    assert flops is not None
    assert flops.of_batch(SEQUENCES, SOURCE) == pytest.approx(counted(model), rel=0.01)


def test_a_decoder_costs_what_the_paper_says() -> None:
    """6 N + 12 L H Q T for each token (Chowdhery et al. 2022, appendix B); norms are vectors, no part of a product."""
    model = built("llama tied")
    flops = model_flops(model)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    layers, heads, width, length = 3, 4, 16, 128
    assert flops is not None
    assert flops.of_batch(1, length) == length * (6 * matrices + 12 * layers * heads * width * length)


def test_source_and_target_tokens_cost_differently() -> None:
    flops = model_flops(built("marian"))
    assert flops is not None
    assert attention_widths(CONFIGS["marian"]) == (3 * 32, 2 * 32)
    assert attention_widths(CONFIGS["t5"]) == (3 * 48, 2 * 48)
    encoder = 3 * (4 * 32 * 32 + 2 * 32 * 48)
    keys_values = 2 * 2 * 32 * 32  # of cross-attention, made of the encoder's output
    decoder = 2 * (4 * 32 * 32 + 2 * 32 * 32 + 2 * 32 * 80)
    assert (flops.per_source_token, flops.per_target_token) == (6 * (encoder + keys_values), 6 * decoder)
    assert flops.per_scored_token == 6 * 96 * 32
    assert flops.of_batch(2, 10, 5) == 2 * flops.of_batch(1, 10, 5)
    assert flops.of_batch(2, 10, 5, scored=3) == flops.of_batch(2, 10, 5) - 7 * 6 * 96 * 32


def test_no_utilisation_is_claimed_for_what_the_formula_does_not_know() -> None:
    experts = transformers.MixtralConfig(**VOCABULARY, **LLAMA, num_local_experts=4)
    assert model_flops(models.build_model(experts, seed=0)) is None


def test_widths_of_a_batch_come_from_its_arrays() -> None:
    flops = ModelFlops(1, 100, 0, 0, 0)
    source, target = np.zeros((2, 7)), np.zeros((2, 3))
    assert flops.of_batch(*shape({"input_ids": source})) == 14
    assert flops.of_batch(*shape({"input_ids": source, "decoder_input_ids": target})) == 14 + 600


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_peak_is_found_within_its_time(precision: str) -> None:
    state = torch.get_rng_state()
    started = time.process_time()
    peak = measure_peak(torch.device("cpu"), dtype_of(precision))
    taken = time.process_time() - started
    assert taken < 5 * torch.get_num_threads(), "a second of each thread, or of one that shares its CPU"
    assert torch.equal(torch.get_rng_state(), state), "dropout would depend on the speed of the machine"
    # No product that a user could run is much faster than the best.
    left = torch.randn(1_024, 1_024, dtype=dtype_of(precision))
    started = time.perf_counter()
    left @ left
    assert 2 * 1_024**3 / (time.perf_counter() - started) < 3 * peak


def test_peak_of_a_group_is_the_sum(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert group_peak(torch.device("cpu"), torch.float32) > 1e8
    finally:
        torch.distributed.destroy_process_group()


def test_memory_is_the_peak_of_this_process() -> None:
    held = psutil.Process().memory_info().rss / 1e9
    peak = peak_memory_gb(torch.device("cpu"))
    assert peak is not None
    assert peak >= held
    assert peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024 / 1e9 * 1.05
