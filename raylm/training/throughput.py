"""How much of a machine a training run uses: FLOPs of a model, FLOP/s of a device, memory.

Model FLOPs utilisation (MFU) is Chowdhery et al. 2022 (PaLM), appendix B: the FLOPs that the model's matrix products
need, whatever else is computed (recomputed activations, say), over what the device could do in that time. The peak
is measured here, not read from a data sheet: so an MFU says how far a run is from this machine's own best matmul.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raylm import models

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_PEAK_SECONDS = 1.0
_PEAK_SIZES = (256, 512, 1_024, 2_048, 4_096, 8_192)
_SIZE_SECONDS = 0.1
_LEAST_RUNS = 2

# These see one position of a sequence: nothing beside the layers that see them all.
_CLASSIFIER_HEAD = re.compile(r"\b(pooler|pre_classifier|classifier|score)\b")
# Cross-attention makes its keys and values of the encoder's output: these matrices of the decoder see source tokens.
_CROSS_KEYS_VALUES = re.compile(r"\.(encoder_attn|EncDecAttention|crossattention)\b.*\.(k|v|k_proj|v_proj|key|value)\b")


@dataclass(frozen=True)
class ModelFlops:
    """The FLOPs of a model's forward and backward pass, by what they grow with.

    An encoder-decoder reads S source tokens and T target tokens for each sequence; other models read S tokens.

    :param per_source_token: 6 for each weight of the matrices that a source token goes through (2 for the product of
        the forward pass, 4 for the two of the backward pass; a frozen matrix needs only one of those). A look-up in an
        embedding multiplies nothing; the output projection does, also where it is tied to the embedding.
    :param per_target_token: the same for target tokens.
    :param self_source: of each pair of source positions in self-attention: 12 L H Q, with L layers of H heads of
        width Q. Pairs that a mask hides count, as in the paper.
    :param self_target: the same of target positions.
    :param cross: of each pair of a target and a source position.
    :param per_scored_token: of each position whose logits are computed, in the output projection.
    """

    per_source_token: int
    per_target_token: int = 0
    self_source: int = 0
    self_target: int = 0
    cross: int = 0
    per_scored_token: int = 0

    def of_batch(self, sequences: int, source_tokens: int, target_tokens: int = 0, scored: int | None = None) -> int:
        """FLOPs of a batch, padding included.

        :param source_tokens: S, the positions of each sequence; `target_tokens` is T.
        :param scored: positions of the batch whose logits are computed; by default all that a model writes at.
        """
        scored = sequences * (target_tokens or source_tokens) if scored is None else scored
        each = self.per_source_token * source_tokens + self.per_target_token * target_tokens
        each += self.self_source * source_tokens**2 + self.self_target * target_tokens**2
        each += self.cross * source_tokens * target_tokens
        return sequences * each + self.per_scored_token * scored


def model_flops(model: PreTrainedModel) -> ModelFlops | None:
    """What training a Hugging Face model costs; None for one that is more than attention and dense matrices.

    Mixtures of experts, convolutions and state-space layers are none of this formula's: better no MFU than a wrong one.
    """
    config = model.config
    is_dense = all(len(models.whole_shape(parameter)) <= 2 for parameter in model.parameters())
    if not is_dense or not getattr(config, "num_attention_heads", None) or getattr(config, "num_experts_per_tok", None):
        return None
    matrices = list(_matrices(model))
    if models.is_classifier(config):
        matrices = [matrix for matrix in matrices if not _CLASSIFIER_HEAD.search(matrix[0])]
    head = model.get_output_embeddings()
    scored = sum(flops for _, module, flops in matrices if module is head)
    total = sum(flops for _, _, flops in matrices) - scored
    encoder_width, decoder_width = attention_widths(config)
    if not config.is_encoder_decoder:
        return ModelFlops(total, self_source=12 * encoder_width, per_scored_token=scored)
    encoder = set(model.get_encoder().modules())
    source = sum(flops for name, m, flops in matrices if m in encoder or _CROSS_KEYS_VALUES.search(name))
    return ModelFlops(source, total - source, 12 * encoder_width, 12 * decoder_width, 12 * decoder_width, scored)


def attention_widths(config: PretrainedConfig) -> tuple[int, int]:
    """L H Q of the encoder, or of a model's only stack, and of the decoder: layers, heads, width of a head."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    decoder_layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None) or layers
    return layers * width, decoder_layers * width


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module, int]]:
    """The modules that multiply by a matrix: name, module, and the FLOPs that it costs a token in training."""
    import torch

    for name, module in model.named_modules():
        # Its own: a layer with an adapter shows the weight of the plain layer inside of it, too.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and not isinstance(module, torch.nn.Embedding):
            shape = models.whole_shape(weight)
            if len(shape) == 2:
                yield name, module, (6 if weight.requires_grad else 4) * shape[0] * shape[1]


# -------------------------------------------------------------------------------------------- the device


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some square matrix products in a precision, found within a second.

    The products grow until the next would not fit in that time. Small ones are tried often: where others compute as
    well, one of them runs undisturbed. On a CPU they take as many threads as training does.
    """
    best = 0.0
    end = time.perf_counter() + _PEAK_SECONDS
    for size in _PEAK_SIZES:
        flops = 2 * size**3
        left = end - time.perf_counter()
        if best and (1 + _LEAST_RUNS) * flops / best > left:
            break
        best = max(best, flops / _matmul_seconds(size, device, dtype, min(_SIZE_SECONDS, left)))
    return best


def _matmul_seconds(size: int, device: torch.device, dtype: torch.dtype, tried_s: float) -> float:
    """The time of the fastest product of two square matrices.

    :param tried_s: for how long to try, after one product to warm up.
    """
    import torch

    # A generator of its own: how many sizes there are depends on the clock, and dropout must not.
    generator = torch.Generator(device).manual_seed(0)
    # Random values: a GPU multiplies zeros faster than anything that a model holds.
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    times: list[float] = []
    while len(times) <= _LEAST_RUNS or sum(times[1:]) < tried_s:
        _finish(device)
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        _finish(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _finish(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def group_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of all workers together, measured at the same time, as they train. A collective of all workers."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    total = torch.tensor(measure_peak(device, dtype), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the matrices are none of the model's memory
    return float(total)


def dtype_of(precision: str) -> torch.dtype:
    """The data type of the matrix products in a precision of `raylm.training.zero`."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def peak_memory_gb(device: torch.device) -> float | None:
    """The most memory that this process has held, in 10^9 bytes: tensors on a GPU, else resident pages.

    None where the operating system does not tell.
    """
    import torch

    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 1e9
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    return int(found[1]) * 1_024 / 1e9 if found else None
