"""How good a model's answers are while it trains: a sample of the validation pairs, answered by all workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylm import metrics, models
from raylm.settings import FinetuneSettings
from raylm.storage import StoragePath
from raylm.tasks import TASKS
from raylm.training.generation import answers, read_held_out

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


class Scorer:
    """Answers `finetune.scored_rows` validation pairs of each task and language.

    :param tokens: the prepared corpus' directory.
    :raises ArtifactError: it has no such pairs.
    """

    def __init__(
        self,
        tokens: StoragePath,
        settings: FinetuneSettings,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self._settings, self._tokenizer = settings, tokenizer
        labelled = models.is_classifier(config)
        self._sets = read_held_out(tokens, "validation", settings.scored_rows, labelled)

    def scores(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """The most telling score of each task and language, as `score_chrf_translate_de`. A collective of all ranks."""
        import torch
        import torch.distributed as dist

        rank, world_size = dist.get_rank(), dist.get_world_size()
        in_step = engine.zero_optimization_partition_weights()
        # Workers that hold the weights together answer together; else each answers its share.
        first, every = (0, 1) if in_step else (rank, world_size)
        scores = {}
        engine.eval()
        # Each length of a text would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            for held_out in self._sets:
                mine = held_out.source_ids[first::every]
                texts = answers(engine.module, self._tokenizer, mine, self._settings, in_step=in_step)
                shares: list[list[str]] = [[]] * world_size
                dist.all_gather_object(shares, texts)
                whole = [""] * len(held_out.targets)
                for number, share in enumerate(shares[:every]):
                    whole[number::every] = share
                name = TASKS[held_out.task].metrics[0]
                found = metrics.score((name,), whole, held_out.targets, held_out.to)
                scores[f"{metrics.SCORE}{name}_{held_out.name}".lower().replace("-", "_")] = found[name]
        engine.train()
        return scores
