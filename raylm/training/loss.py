"""Cross entropy that leaves its gradient where the logits were: a step's largest tensor exists once, not thrice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from raylm.training.objectives import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits that are worked on at once: on a CPU as many as its cache holds."""


def summed_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, excluded: int | None = None
) -> Tensor:
    """Cross entropy in nats, summed over the labels that are not `IGNORE`: a scalar in fp32.

    The same as `torch.nn.functional.cross_entropy` over the classes but `excluded`. The logits are overwritten.

    :param logits: (N, V), of any floating type.
    :param labels: (N,).
    :param label_smoothing: of Szegedy et al. 2016: so much of each target's weight is spread over all classes.
    :param excluded: a class that is no answer to anything.
    """
    return _SummedCrossEntropy.apply(logits, labels, label_smoothing, excluded)


class _SummedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """The gradient of a logit is its probability less its target weight; it is known as soon as the loss is."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float, excluded: int | None) -> Tensor:
        rows, classes = logits.shape
        counted = classes - (excluded is not None)
        # fp16 could not hold what the loss scale has not been multiplied with yet.
        gradient = torch.empty_like(logits, dtype=torch.float32) if logits.dtype == torch.float16 else logits.detach()
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        step = max(_CHUNK_ELEMENTS.get(logits.device.type, 1 << 26) // classes, 1)
        for start in range(0, rows, step):
            chunk = logits.detach()[start : start + step].float()  # (R, V); fp32 logits themselves, else a copy
            label = labels[start : start + step, None].clamp(min=0)
            weight = (labels[start : start + step, None] != IGNORE).float()
            target = (1 - smoothing) * chunk.gather(1, label)
            if smoothing:
                everything = chunk.sum(1, keepdim=True)
                everything -= 0 if excluded is None else chunk[:, excluded, None]
                target += smoothing / counted * everything
            if excluded is not None:
                chunk[:, excluded] = -torch.inf
            largest = chunk.amax(1, keepdim=True)
            chunk.sub_(largest).exp_()
            partition = chunk.sum(1, keepdim=True)
            total += (weight * (partition.log() + largest - target)).sum()
            if not ctx.needs_input_grad[0]:
                continue
            chunk.mul_(weight / partition)
            if smoothing:
                chunk.sub_(weight * (smoothing / counted))
                if excluded is not None:
                    chunk[:, excluded] = 0
            chunk.scatter_add_(1, label, (smoothing - 1) * weight)
            if chunk.data_ptr() != gradient[start].data_ptr():
                gradient[start : start + step] = chunk
        ctx.gradient, ctx.dtype = gradient, logits.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = ctx.gradient.mul_(upstream).to(ctx.dtype)
        ctx.gradient = None
        return gradient, None, None, None
