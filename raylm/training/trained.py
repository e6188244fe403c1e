"""The models that runs have come to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from raylm import models
from raylm.errors import ArtifactError
from raylm.settings.training import LoraSettings
from raylm.storage import StoragePath
from raylm.training import checkpoint as checkpoints
from raylm.training.average import averaged_weights
from raylm.training.runs import MODEL
from raylm.training.zero import whole_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_trained(run: StoragePath) -> tuple[PreTrainedModel, checkpoints.Checkpoint]:
    """The model of a run's best checkpoint, in fp32 on the CPU, and that checkpoint.

    :raises ArtifactError: the run has no sound checkpoint.
    """
    import torch

    best = checkpoints.best(run)
    config = models.load_config((run / MODEL).address)
    local = best.localize()
    try:
        weights, averages = whole_weights(local, best.manifest.settings["zero_stage"]), averaged_weights(local)
    finally:
        if not best.directory.is_local:
            shutil.rmtree(local, ignore_errors=True)
    model = models.build_model(config, seed=0)
    lora = best.manifest.settings.get("lora")
    if lora:
        model = models.with_lora(model, LoraSettings.model_validate(lora))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.load_state_dict(averages, strict=False)  # of what was trained, where they are kept
    model.tie_weights()
    # Tied weights are stored once, and fixed ones (sinusoidal positions) follow from the config.
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad or lora}
    lost = sorted(learned & set(missing))
    if lost or unexpected:
        raise ArtifactError(
            f"checkpoint {best.directory}: its weights do not fit the run's model: "
            f"missing {lost[:3]}, unexpected {sorted(unexpected)[:3]}"
        )
    model = models.merged(model.to(torch.float32)) if lora else model.to(torch.float32)
    model.config.use_cache = True
    return model.eval(), best


def save_model(run: StoragePath, directory: Path) -> checkpoints.Checkpoint:
    """Write a run's best checkpoint in Hugging Face layout: weights, config, tokenizer."""
    from transformers.utils import logging

    model, best = load_trained(run)
    logging.disable_progress_bar()  # for a file that is written in a second
    model.save_pretrained(directory)
    for file, _ in (run / MODEL).list():
        if file.name != "config.json":
            file.download(directory / file.name)
    return best
