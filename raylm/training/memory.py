"""The memory of a worker, counted tensor by tensor as PyTorch's autograd and DeepSpeed 0.19.8 hold them.

Without what the interpreter and its libraries take themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from raylm import models

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, and what it reduces at once without ZeRO, in elements."""
LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters` and `stage3_max_reuse_distance`, in elements."""
HOLES = 1.2
"""Resident over held memory of a process on a CPU. PyTorch aligns its tensors to 64 bytes, and glibc's `posix_memalign`
does not give a freed block below 32 MB to a request of the same size (sourceware bug 14581). Measured with glibc 2.36
under stages 0 to 2, where 0.25 to 1.8 GB were held: 1.11 to 1.35; with jemalloc 1.01 to 1.07. `_leaves_holes` says what
is worse."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4
_ADAM = 2 * _FP32
"""Of a weight: two moments (Kingma and Ba 2015), fp32 in every precision."""

# How many tensors of the inner width the activation of a feed-forward layer keeps: its output, which the next product
# reads; its input, but for ReLU; and what is between them, where transformers writes the function in PyTorch.
_KEPT_BY_ACTIVATION = {"relu": 1, "gelu_new": 5}
_KEPT_BY_FUSED_ACTIVATION = 2
_KEPT_BY_GATE = 2
"""The values that the activation is multiplied with, and the product."""


@dataclass(frozen=True)
class BatchShape:
    """The padded lengths of a micro-batch.

    :param source_tokens: of each sequence; of a model with one stack, all it reads.
    :param target_tokens: what the decoder beside an encoder reads.
    :param scored_tokens: positions of all sequences whose logits are computed; None: all that a model writes at.
    """

    sequences: int
    source_tokens: int
    target_tokens: int = 0
    scored_tokens: int | None = None

    @property
    def padded_tokens(self) -> int:
        return self.sequences * (self.source_tokens + self.target_tokens)


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    :param activations: what the backward pass needs of the forward pass, and the loss's copies of the logits.
    :param buffers: in which DeepSpeed gathers gradients and, under ZeRO-3, weights.
    :param total: the sum of all these.
    :param offloaded: of these, what lies in the machine's memory or on its disk instead of with the worker.
    :param peak: the most that the worker holds at once: gradients and their buffers come as activations go.
    :param resident: what that takes of a machine's memory; of a GPU's, the same.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    total: int
    offloaded: int
    peak: int
    resident: int


@dataclass(frozen=True)
class Stack:
    """An encoder or a decoder, by what its activations grow with.

    :param attention_width: of all heads together.
    :param norms: layers that normalise the model's width, wherever they stand.
    :param is_rms: they are written in PyTorch, as transformers does with RMS norms, instead of being one operation.
    :param kept_inner: tensors of the inner width that a feed-forward layer keeps.
    :param is_cross: each layer looks at an encoder as well.
    :param is_fused: attention is one operation that keeps no scores.
    :param is_masked: self-attention is given a mask.
    """

    layers: int
    width: int
    heads: int
    attention_width: int
    inner_width: int
    norms: int
    is_rms: bool
    kept_inner: int
    is_cross: bool
    is_fused: bool
    is_masked: bool
    has_dropout: bool
    has_attention_dropout: bool


def stack_bytes(stack: Stack, batch: BatchShape, element: int, on_gpu: bool) -> int:
    """Bytes that autograd keeps of a stack's forward pass.

    Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section 4.1) add up what
    a layer keeps to 34 sbh + 5 a s² b bytes, of 16-bit numbers with dropout. The same sum here, with what differs:
    numbers have `element` bytes; dropout keeps its noise only where there is any (one byte on a GPU, a number on a
    CPU); of the scores, fused attention (Dao et al. 2022) keeps their log-sum-exp, and the mask as numbers; the
    feed-forward layer has its own width and perhaps a gate; norms may be RMS norms; a layer may look at an encoder.

    :param batch: source tokens are this stack's; with `is_cross`, the encoder's, and target tokens this stack's.
    :param element: bytes of a number.
    """
    own = batch.target_tokens if stack.is_cross else batch.source_tokens
    positions, seen = batch.sequences * own, batch.sequences * batch.source_tokens
    sublayers = stack.layers * (3 if stack.is_cross else 2)
    # A norm keeps its input, its output for the layer behind it, and an RMS norm what it scales; its input in fp32.
    norm = _FP32 + 2 * element if stack.is_rms else 2 * element
    elements = stack.layers * (
        4 * stack.attention_width + stack.kept_inner * stack.inner_width
    )  # query, key, value, out
    if stack.norms == sublayers:
        elements += stack.width  # the embeddings go into attention as they are
    if stack.has_dropout:
        elements += (sublayers + 1) * stack.width // (element if on_gpu else 1)
    kept = positions * (norm * stack.norms * stack.width + element * elements)

    pairs = positions * own if stack.is_masked or not stack.is_fused else 0
    if stack.is_cross:
        kept += element * stack.layers * 2 * stack.attention_width * (positions + seen)
        pairs += positions * batch.source_tokens
    if stack.is_fused:
        attentions = stack.layers * (2 if stack.is_cross else 1)
        return kept + attentions * _FP32 * stack.heads * positions + stack.layers * element * pairs
    copies = 3 if stack.has_attention_dropout else 1  # probabilities; noise and what it leaves of them
    return kept + stack.layers * element * copies * stack.heads * pairs


def stacks(model: PreTrainedModel, on_gpu: bool) -> list[Stack]:
    """The stacks of a model: its only one, or encoder and decoder.

    :param on_gpu: there, fused attention knows dropout.
    """
    config = model.config
    names = [name for name, _ in model.named_modules()]
    has_bias = any(name.endswith("relative_attention_bias") for name in names)  # learned: no fused attention takes it
    is_gated = any(name.endswith(("gate_proj", "gate_up_proj", "wi_1")) for name in names)
    activation = _value(
        config, "activation_function", "dense_act_fn", "hidden_act", "hidden_activation", default="gelu"
    )
    kept_inner = _KEPT_BY_ACTIVATION.get(activation, _KEPT_BY_FUSED_ACTIVATION) + _KEPT_BY_GATE * is_gated
    dropout = _value(config, "dropout", "dropout_rate", "hidden_dropout_prob", "resid_pdrop", default=0.0)
    attention_dropout = _value(
        config, "attention_dropout", "dropout_rate", "attention_probs_dropout_prob", "attn_pdrop", default=0.0
    )
    encoder = set(model.get_encoder().modules()) if config.is_encoder_decoder else set()
    found = []
    for side in ("encoder", "decoder") if config.is_encoder_decoder else ("",):
        heads = _value(config, f"{side}_attention_heads", "num_attention_heads")
        norms = [
            module
            for module in model.modules()
            if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
            and (not encoder or (module in encoder) == (side == "encoder"))
            and module.weight.numel() == config.hidden_size  # queries and keys may have norms of their own, small ones
        ]
        found.append(
            Stack(
                layers=_value(config, f"{side}_layers", f"num_{side}_layers", "num_hidden_layers"),
                width=config.hidden_size,
                heads=heads,
                attention_width=heads * _value(config, "head_dim", "d_kv", default=config.hidden_size // heads),
                inner_width=_value(
                    config, f"{side}_ffn_dim", "d_ff", "intermediate_size", "n_inner", default=4 * config.hidden_size
                ),
                norms=len(norms),
                is_rms=any(type(norm).__name__.endswith(("RMSNorm", "T5LayerNorm")) for norm in norms),
                kept_inner=kept_inner,
                is_cross=side == "decoder",
                is_fused=not has_bias and (on_gpu or not attention_dropout),
                is_masked=side != "decoder",  # its mask is a flag of the fused operation
                has_dropout=bool(dropout),
                has_attention_dropout=bool(attention_dropout),
            )
        )
    return found


def kept_bytes(
    model: PreTrainedModel, batch: BatchShape, element: int, on_gpu: bool, recomputes: bool = False
) -> tuple[int, int]:
    """Bytes that the backward pass needs of the forward pass, without the loss's, and those it computes again.

    With `recomputes` (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), only the inputs of layers
    are kept, and one layer at a time is computed again.
    """
    whole = stacks(model, on_gpu)
    if not recomputes:
        return sum(stack_bytes(stack, batch, element, on_gpu) for stack in whole), 0
    kept = again = 0
    for stack in whole:
        own = batch.target_tokens if stack.is_cross else batch.source_tokens
        sublayers = 3 if stack.is_cross else 2
        around = replace(stack, layers=0, norms=stack.norms - sublayers * stack.layers)
        kept += element * stack.layers * stack.width * batch.sequences * own
        kept += stack_bytes(around, batch, element, on_gpu)
        again = max(again, stack_bytes(replace(stack, layers=1, norms=sublayers), batch, element, on_gpu))
    return kept, again


def loss_bytes(model: PreTrainedModel, batch: BatchShape, precision: str) -> int:
    """Bytes of the logits, whose gradient takes their place; of fp16 ones, it stands beside them in fp32.

    A model that adds a bias to its logits holds them twice for a moment.
    """
    if models.is_classifier(model.config):
        return 0  # a row of a few labels for each text
    scored = batch.scored_tokens
    if scored is None:
        scored = batch.sequences * (batch.target_tokens or batch.source_tokens)
    copies = 2 if hasattr(model, "final_logits_bias") else 1
    held = BYTES[precision] * copies + (_FP32 if precision == "fp16" else 0)
    return held * scored * int(model.config.vocab_size)


def memory(
    trained: int,
    frozen: int,
    activations: tuple[int, int],
    loss: int,
    zero_stage: int,
    workers: int,
    precision: str,
    accumulates: bool,
    on_gpu: bool,
    offload: Literal["none", "optimizer", "all"] = "none",
    averages: bool = False,
) -> Memory:
    """What one worker holds (Rajbhandari et al. 2020, "ZeRO", section 5), in the way that DeepSpeed 0.19.8 does it.

    Its optimizers of stages 1 to 3 keep fp32 weights of their own, in fp32 as well. Gradients of stages 1 and 2 are
    copied to a bucket of `BUCKET` elements, which lives as long as a backward pass, and from there to a worker's share,
    which is copied once more for the optimizer. Of a bucket, a CPU gives only the pages that are written to.

    :param trained: weights that are trained; `frozen` the others.
    :param activations: as `kept_bytes` tells them; `loss` are the loss's, gone when the backward pass reaches weights.
    :param accumulates: a step has several micro-batches, so there are gradients while a forward pass runs.
    :param offload: what lies elsewhere: the optimizer's state, or with ZeRO-3 also the weights.
    :param averages: a moving average of the weights is kept, counted as weights.
    """
    kept, again = activations
    element = BYTES[precision]
    share = trained // workers if zero_stage else trained
    filled = element * min(trained, BUCKET)
    bucket = element * BUCKET if on_gpu else filled
    master = 0 if zero_stage == 0 and precision == "fp32" else _FP32
    weights, optimizer = element * (trained + frozen), (master + _ADAM) * share
    gradients = element * (share if zero_stage >= 2 else trained)
    standing, late = accumulates * gradients, 0  # beside a forward pass; from the start of a backward pass on
    # What is reduced is put together first: all of it, but for stages 1 and 2 with nobody to reduce it with.
    joined = filled if workers > 1 or zero_stage in (0, 3) else 0
    if zero_stage == 0:
        buffers, end = joined, gradients + max(joined, master * trained)
    elif zero_stage == 1:
        buffers, end = bucket + joined, max(bucket, gradients) + element * share + joined
        late = bucket if on_gpu else 0
        if accumulates:  # the bucket stays from a step's first micro-batch to its last
            standing, late = standing + late, 0
    elif zero_stage == 2:
        buffers, end = bucket + joined, bucket + gradients + joined + standing
        late = bucket if on_gpu else 0
    else:
        # Weights are gathered when a layer first needs them and stay for its backward pass; one worker has them all.
        gathered = element * min(trained + frozen, LIVE) if workers > 1 else 0
        weights, buffers = weights // workers, bucket + joined + gathered
        standing = gradients + bucket + gathered
        end = standing + max(joined, _FP32 * share)
    if again:
        end += kept  # what is computed again holds its inputs as long as the graph of the loss is there
    offloaded = {"none": 0, "optimizer": optimizer, "all": optimizer + weights}[offload]
    peak = weights + optimizer - offloaded + max(standing + kept + max(loss, late + again), end)
    if not on_gpu and zero_stage < 3:  # where a model is first made, in fp32; stages 1 and 2 lay it out anew
        peak = max(peak, _FP32 * (trained + frozen) + (element * trained if zero_stage else 0))
    average = averages * _FP32 * (trained // workers)
    weights, peak = weights + average, peak + average
    total = weights + gradients + optimizer + kept + again + loss + buffers
    resident = peak if on_gpu else round(HOLES * peak)
    return Memory(weights, gradients, optimizer, kept + again + loss, buffers, total, offloaded, peak, resident)


def checkpoint_bytes(trained: int, frozen: int, zero_stage: int, precision: str, averages: bool = False) -> int:
    """Bytes of a checkpoint, all workers' files together: weights, and the optimizer's state with its own weights.

    Stage 0 has none of these in fp32, and stage 3 only these.

    :param averages: a moving average of the weights is kept.
    """
    master = 0 if zero_stage == 0 and precision == "fp32" else _FP32
    saved = frozen if zero_stage == 3 else trained + frozen
    return BYTES[precision] * saved + (master + _ADAM + averages * _FP32) * trained


def _value(config: PretrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of some values of a config that it has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)
