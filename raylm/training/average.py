"""An exponential moving average of the weights (Polyak and Juditsky 1992), to validate and export in their place.

Each weight is averaged by one worker, in fp32, whatever the ZeRO stage. So an average is cut along weights and not
along workers, and a run that continues on another number of workers reads the files that it finds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from raylm.models import whole_shape

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

AVERAGE = "average"
"""Below a checkpoint: the averages of each rank, one safetensors file of fp32 values each."""
EVERY = 10
"""Steps between two updates: ZeRO-3 has to gather the weights for one."""


class WeightAverage:
    """The average of an engine's trained weights.

    :param decay: of a step: about the last `1 / (1 - decay)` steps count. It grows to this value from below, as the
        first weights are of no use: `min(decay, (1 + n) / (10 + n))` for the n-th update (as TensorFlow's).
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        import torch.distributed as dist

        self._decay = decay**EVERY
        self._rank, world_size = dist.get_rank(), dist.get_world_size()
        self._is_sharded = engine.zero_optimization_partition_weights()
        trained = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
        self._weights = [
            (name, trained[name], owner)
            for name, owner in deal({name: whole_shape(weight) for name, weight in trained.items()}, world_size).items()
        ]
        self._averages: dict[str, torch.Tensor] = {}
        for name, weight, owner in self._weights:
            with self._whole(weight):
                if owner == self._rank:
                    self._averages[name] = weight.detach().float().clone()

    def update(self, done: int) -> None:
        """Take in the weights after a step, every `EVERY` steps. A collective of all ranks.

        :param done: steps so far.
        """
        if done % EVERY:
            return
        updates = done // EVERY
        decay = min(self._decay, (1 + updates) / (10 + updates))
        for name, weight, owner in self._weights:
            with self._whole(weight):
                if owner == self._rank:
                    self._averages[name].lerp_(weight.detach().float(), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts, the model computes with the averages. A collective of all ranks."""
        kept = self._exchange(self._averages)
        try:
            yield
        finally:
            self._exchange(kept)

    def save(self, checkpoint: Path) -> None:
        """Write this rank's averages below a directory."""
        from safetensors.torch import save_file

        (checkpoint / AVERAGE).mkdir()
        save_file(self._averages, checkpoint / AVERAGE / f"rank-{self._rank:05d}.safetensors")

    def load(self, checkpoint: Path) -> None:
        """Read what any number of workers saved."""
        from safetensors import safe_open

        for file in _files(checkpoint):
            with safe_open(file, "pt") as saved:
                for name in self._averages.keys() & saved.keys():
                    self._averages[name].copy_(saved.get_tensor(name))

    @contextlib.contextmanager
    def _whole(self, weight: torch.nn.Parameter, writer: int | None = None) -> Iterator[None]:
        """While it lasts, each rank has the whole weight.

        :param writer: the rank that changes it, for all others.
        """
        import deepspeed
        import torch.distributed as dist

        with deepspeed.zero.GatheredParameters(weight, modifier_rank=writer, enabled=self._is_sharded):
            yield
        if writer is not None and not self._is_sharded:
            dist.broadcast(weight.data, src=writer)

    def _exchange(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put values into the model, each by its owner; what was there before."""
        kept = {}
        for name, weight, owner in self._weights:
            with self._whole(weight, writer=owner):
                if owner == self._rank:
                    kept[name] = weight.detach().clone()
                    weight.data.copy_(values[name])
        return kept


def deal(shapes: dict[str, tuple[int, ...]], ranks: int) -> dict[str, int]:
    """Who averages each weight: the largest first, each to the rank that has least so far."""
    load = [0] * ranks
    owners = {}
    for name, size in sorted(((n, math.prod(s)) for n, s in shapes.items()), key=lambda item: (-item[1], item[0])):
        owners[name] = load.index(min(load))
        load[owners[name]] += size
    return owners


def averaged_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averages of all ranks, fp32; empty where none were kept.

    :param checkpoint: a local directory.
    """
    from safetensors.torch import load_file

    return {name: value for file in _files(checkpoint) for name, value in load_file(file).items()}


def _files(checkpoint: Path) -> list[Path]:
    return sorted((checkpoint / AVERAGE).glob("*.safetensors"))
