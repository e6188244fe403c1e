"""One optimizer step over a global batch, its loss, and validation; each a collective of all workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylm.training.examples import Split
from raylm.training.guard import SpikeGuard
from raylm.training.objectives import MicroBatch
from raylm.training.throughput import ModelFlops
from raylm.training.zero import RATE_RATIO

if TYPE_CHECKING:
    import numpy as np
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine
    from numpy.typing import NDArray


@dataclass(frozen=True)
class StepResult:
    """Of the whole global batch."""

    loss_sum: float
    """In nats, over the target tokens of the micro-batches that were not left out."""
    target_tokens: int
    """Of these."""
    padded_tokens: int
    real_tokens: int
    flops: int | None
    """Of the model, forward and backward; None where nobody knows."""
    skipped: int
    """Micro-batches that were left out as spikes."""
    tally: tuple[int, ...]
    """What the ranks gave to be added up."""


def train_step(
    engine: DeepSpeedEngine,
    batch: list[MicroBatch],
    rate: float,
    label_smoothing: float,
    device: torch.device,
    guard: SpikeGuard,
    tally: Sequence[int] = (),
    flops: ModelFlops | None = None,
) -> StepResult:
    """One optimizer step over this rank's part of a global batch.

    The loss is the sum over the global batch's target tokens divided by their number, whatever rank and
    micro-batch they fell to: so its gradient does not depend on how the batch was dealt out.

    :param tally: numbers of this rank, to be added up over all ranks: their sums are exact below 2^53.
    :raises TrainingError: training has diverged.
    """
    import torch
    import torch.distributed as dist

    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_RATIO, 1.0)
    targets = [micro_batch.target_tokens for micro_batch in batch]
    padded = sum(micro_batch.padded_tokens for micro_batch in batch)
    real = sum(micro_batch.real_tokens for micro_batch in batch)
    cost = sum(_flops_of(micro_batch, flops) for micro_batch in batch) if flops else 0
    counted = [*targets, padded, real, cost, *tally]
    counts = torch.tensor(counted, dtype=torch.float64).to(device)
    dist.all_reduce(counts)
    whole = [int(count) for count in counts.tolist()]
    targets, (padded, real, cost, *sums) = whole[: len(batch)], whole[len(batch) :]
    # DeepSpeed divides by the micro-batches and averages over the ranks; both are undone here.
    scale = len(batch) * dist.get_world_size() / max(sum(targets), 1)
    losses = torch.zeros(len(batch), dtype=torch.float64, device=device)
    skipped = []
    for number, micro_batch in enumerate(batch):
        loss = token_loss(engine, micro_batch, label_smoothing, device)
        losses[number] = loss.detach()
        if guard.sigma is not None:
            dist.all_reduce(losses[number])
            if targets[number] and guard.is_spike(float(losses[number]) / targets[number]):
                skipped.append(number)
        engine.backward(loss * (0.0 if number in skipped else scale))
        engine.step()
    if guard.sigma is None:
        dist.all_reduce(losses)
        guard.is_spike(float(losses.sum()) / max(sum(targets), 1))
    losses[skipped] = 0.0
    trained = sum(count for number, count in enumerate(targets) if number not in skipped)
    return StepResult(float(losses.sum()), trained, padded, real, cost if flops else None, len(skipped), tuple(sums))


def _flops_of(micro_batch: MicroBatch, flops: ModelFlops) -> int:
    scored = micro_batch.scored
    return flops.of_batch(*micro_batch.shape, None if scored is None else len(scored))


def token_loss(engine: Any, micro_batch: MicroBatch, label_smoothing: float, device: torch.device) -> torch.Tensor:
    """Cross entropy in nats, summed over the target tokens, or labelled texts, of a micro-batch."""
    import torch

    from raylm.training.loss import summed_cross_entropy

    inputs, labels = micro_batch.tensors(device)
    model, scored = getattr(engine, "module", engine), micro_batch.scored
    # What is compiled would be compiled anew for each number of them.
    if scored is None or getattr(engine, "is_compiled", False):
        logits = engine(**inputs).logits  # (B, T, V), or of a classifier (B, labels)
    else:
        places = torch.from_numpy(scored).to(device)
        with _only_at(model.get_output_embeddings(), places):
            logits = engine(**inputs).logits  # (N, V)
        labels = labels.flatten().index_select(0, places)
    config = model.config
    pad, end = config.pad_token_id, config.eos_token_id
    # Padding is no answer. Leaving it out keeps its tied embedding at zero, the start that Marian decodes from.
    is_answer = micro_batch.labels.ndim == 1 or pad in (end if isinstance(end, list) else [end])
    excluded = None if is_answer or pad != logits.size(-1) - 1 else pad
    return summed_cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing, excluded)


@contextmanager
def _only_at(head: torch.nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Has an output head, of all layers the widest, compute the logits at some places alone.

    :param places: (N,) of the (B, T) positions, row after row.
    """
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, -2).index_select(0, places), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Validation:
    """Of the first global batches of a split."""

    loss: float
    """Mean cross entropy, in nats per target token."""
    bits_per_byte: float | None
    """The same in bits for each byte of UTF-8 text: comparable between tokenizers. None where bytes are not known."""


def validate(
    engine: DeepSpeedEngine,
    split: Split,
    batches: int,
    place: tuple[int, int, int],
    device: torch.device,
    token_bytes: NDArray[np.int64] | None = None,
) -> Validation:
    """How well the model does on the first global batches of a split. A collective of all ranks.

    :param batches: how many.
    :param token_bytes: (vocabulary,) bytes of text that each token stands for, where the targets are a whole text.
    """
    import torch
    import torch.distributed as dist

    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad():
        for step in range(batches):
            for micro_batch in split.micro_batches(step, *place):
                loss = token_loss(engine, micro_batch, 0.0, device)
                size = 0 if token_bytes is None else micro_batch.target_bytes(token_bytes)
                totals += torch.tensor([float(loss), micro_batch.target_tokens, size], dtype=torch.float64).to(device)
    engine.train()
    dist.all_reduce(totals)
    nats, tokens, size = totals.tolist()
    return Validation(nats / max(tokens, 1), nats / math.log(2) / size if size else None)
