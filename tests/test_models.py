from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylm import models
from raylm.errors import ArtifactError
from raylm.settings import ModelSettings, Settings
from raylm.storage import StoragePath
from raylm.training.runs import run_directory
from raylm.training.trained import load_trained
from raylm.training.trainer import pretrain
from tests.training.runs import changed, losses

CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4,
          "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""What llama.cpp calls the weights of a layer."""


@pytest.fixture(scope="module")
def llama(corpus: StoragePath) -> tuple[Any, Any]:
    """A small decoder and its tokenizer, that of the corpus."""
    tokenizer = models.load_tokenizer(str(corpus / "tokenizer"))
    config = models.build_config(ModelSettings(family="llama", config=CONFIG), tokenizer)
    return models.build_model(config, seed=1).eval(), tokenizer


def write_gguf(file: Path, model: Any, tokenizer: Any) -> None:
    """A Llama as llama.cpp's converter writes it."""
    from gguf import GGUFWriter, TokenType

    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    special = tokenizer.get_added_vocab()
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)

    def rotated(weight: Any, heads: int) -> Any:
        """llama.cpp turns pairs of neighbouring values, transformers pairs of the two halves."""
        turned = weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        return np.ascontiguousarray(turned)

    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", rotated(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model_to_train(
    llama: tuple[Any, Any], small_settings: Settings, corpus: StoragePath, tmp_path: Path
) -> None:
    import torch

    model, tokenizer = llama
    file = tmp_path / "small.gguf"
    write_gguf(file, model, tokenizer)
    read = models.load_model(str(file)).eval()
    ids = torch.randint(0, 900, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(read(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    its, text = models.load_tokenizer(str(file)), "def größe(x): return '世界'"
    assert its.get_vocab().items() >= tokenizer.get_vocab().items()
    assert (its.eos_token, its.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert its.decode(its(text, add_special_tokens=False)["input_ids"]) == text

    values = {"name": "gguf", "workers": 2, "zero_stage": 3, "steps": 6, "log_every": 1, "learning_rate": 1e-9}
    settings = changed(small_settings, model={"start_from": str(file)}, pretrain=values)
    pretrain(settings)
    run = run_directory(settings, "gguf")
    assert len(losses(run)) == 6
    trained, _ = load_trained(run)
    with torch.no_grad():  # with such a rate, the weights stay what they were
        assert torch.allclose(trained(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"model .*broken\.gguf: cannot be loaded by transformers"):
        models.load_config(str(tmp_path / "broken.gguf"))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    """transformers would fill what it does not find with random numbers, and say so in a log."""
    from transformers import LlamaConfig

    LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"model .*: its weights are quantized \(gptq\)"):
        models.load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("bert", {}, "encoder"),
        ("bert", {"is_decoder": True}, "decoder"),
        ("camembert", {}, "encoder"),
        ("xlm-roberta", {}, "encoder"),
        ("modernbert", {}, "encoder"),
        ("big_bird", {}, "encoder"),
        ("llama", {}, "decoder"),
        ("qwen2", {}, "decoder"),
        ("gpt2", {}, "decoder"),
        ("gemma3_text", {}, "decoder"),
        ("bart", {}, "encoder-decoder"),
        ("t5", {}, "encoder-decoder"),
    ],
)
def test_the_shape_of_a_model_of_the_hub(kind: str, more: dict[str, Any], expected: str) -> None:
    from transformers import AutoConfig

    assert models.architecture(AutoConfig.for_model(kind, **more)) == expected


def test_where_positions_begin_and_windows_end() -> None:
    from transformers import AutoConfig

    assert models.first_position(AutoConfig.for_model("roberta")) == 2
    assert models.first_position(AutoConfig.for_model("bert")) == 0
    assert models.has_windows(AutoConfig.for_model("mistral"))
    assert models.has_windows(AutoConfig.for_model("gemma3_text"))
    assert not models.has_windows(AutoConfig.for_model("qwen2"))
    assert not models.has_windows(AutoConfig.for_model("llama"))
