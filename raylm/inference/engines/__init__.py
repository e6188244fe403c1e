"""Engines: loaded models that answer rows. CTranslate2 wherever it knows the model, vLLM for decoders on GPUs, PyTorch
for the rest."""

from __future__ import annotations

import importlib.util
from typing import Literal, Protocol

from raylm.errors import ArtifactError
from raylm.inference.answers import Decoder
from raylm.inference.engines.batching import Turn
from raylm.inference.engines.text import Device, Listen
from raylm.inference.model import ModelInfo
from raylm.settings import DecodeSettings

EngineName = Literal["ctranslate2", "vllm", "transformers"]


class Engine(Decoder, Protocol):
    """A loaded model."""

    model: ModelInfo
    settings: DecodeSettings

    def view(
        self, settings: DecodeSettings | None = None, turn: Turn | None = None, listen: Listen | None = None
    ) -> Engine:
        """The same loaded model for another caller; see `TextEngine.view`."""
        ...


def choose_engine(model: ModelInfo, settings: DecodeSettings, device: Device) -> EngineName:
    """Which engine runs a model: the one that is set, or the fastest that can.

    :raises ArtifactError: the one that is set cannot.
    """
    from raylm.inference.convert import is_convertible

    writes = model.kind in ("encoder-decoder", "decoder")
    wanted = settings.engine
    if wanted == "vllm" and (model.kind != "decoder" or device != "cuda"):
        raise ArtifactError(f"decode.engine: vllm runs decoders on GPUs; this is {model.what} on a {device}")
    if wanted == "ctranslate2" and not (writes and is_convertible(model)):
        raise ArtifactError(f"decode.engine: ctranslate2 does not know {model.what} of type {model.model_type}")
    if wanted != "auto":
        return wanted
    if model.kind == "decoder" and device == "cuda" and importlib.util.find_spec("vllm"):
        return "vllm"
    return "ctranslate2" if writes and is_convertible(model) else "transformers"


def check_engine(model: ModelInfo, settings: DecodeSettings, device: Device) -> None:
    """Refuse before workers are started what they would fail at, again and again.

    :raises ArtifactError: no engine can run the model as the settings want it.
    """
    name = choose_engine(model, settings, device)
    if name == "ctranslate2" and device == "cpu":  # of GPUs, this machine may have none
        from raylm.inference.engines.ctranslate import compute_type_for

        compute_type_for(settings, device)


def load_engine(
    model: ModelInfo, settings: DecodeSettings, device: Device = "cpu", threads: int = 1, gpus: int = 1
) -> Engine:
    """A model, loaded by the engine that suits it.

    :param threads: CPU threads of one batch.
    :param gpus: that one engine has, where it can share its model out to several.
    :raises ArtifactError: it cannot be loaded, or not as the settings want it.
    """
    name = choose_engine(model, settings, device)
    if name == "vllm":
        from raylm.inference.engines.vllm import VllmEngine

        return VllmEngine(model, settings, gpus)
    if name == "ctranslate2":
        from raylm.inference.engines.ctranslate import CTranslateEngine

        return CTranslateEngine(model, settings, device, threads)
    if model.kind == "reader":
        from raylm.inference.engines.reader import ReaderEngine

        return ReaderEngine(model, settings, device, threads)
    from raylm.inference.engines.pytorch import ClassifierEngine, GenerationEngine

    return (ClassifierEngine if model.kind == "classifier" else GenerationEngine)(model, settings, device, threads)
