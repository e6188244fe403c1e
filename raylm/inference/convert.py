"""The CTranslate2 form of a model: made once, kept beside it or in this machine's cache."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from raylm.errors import ArtifactError
from raylm.inference.model import ModelInfo
from raylm.storage import cache_directory

_CONVERTIBLE = {
    "encoder-decoder": ("bart", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "umt5"),
    "decoder": (
        "bloom", "codegen", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gptj",
        "llama", "mistral", "opt", "phi", "phi3", "qwen2", "qwen3",
    ),
}  # fmt: skip
"""What CTranslate2 has a converter for, told without importing PyTorch."""


def is_convertible(model: ModelInfo) -> bool:
    """Whether CTranslate2 knows a model's type."""
    return model.model_type in _CONVERTIBLE.get(model.kind, ())


def converted_model(model: ModelInfo, quantization: str) -> Path:
    """The CTranslate2 form of a model, made once for each state of the model and kept beside it.

    Where the model's directory is read-only it is kept in this machine's cache. Any number of processes may
    ask at once: one converts and renames, the others wait for it.

    :raises ArtifactError: CTranslate2 cannot convert it.
    """
    name = f"{quantization}-{model.fingerprint}"
    homes = (model.directory / "ctranslate2", cache_directory() / "ctranslate2")
    for home in homes:
        if (home / name / "model.bin").is_file():
            return home / name
    for home in homes:
        if _is_writable(home):
            return _convert_into(home, name, model, quantization)
    raise ArtifactError(f"no place to keep the converted model: neither {homes[0]} nor {homes[1]} is writable")


def _convert_into(home: Path, name: str, model: ModelInfo, quantization: str) -> Path:
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / name).is_dir():
            work = Path(tempfile.mkdtemp(prefix=".convert-", dir=home))
            try:
                _convert(model, quantization, work / "model")
                _rename_or_discard(work / "model", home / name)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return home / name


def _convert(model: ModelInfo, quantization: str, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoConfig
    from transformers.utils import logging

    config = AutoConfig.from_pretrained(model.directory)
    if model.model_type == "marian":
        _check_marian(model, config)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        TransformersConverter(str(model.directory)).convert(str(target), quantization=quantization)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(
            f"model {model.where}: CTranslate2 cannot convert it: {reason}; decode.engine=transformers runs it without"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _check_marian(model: ModelInfo, config: Any) -> None:
    """CTranslate2's loader cuts the last id off and starts from a zero embedding, whatever the start."""
    if config.pad_token_id != config.vocab_size - 1 or config.decoder_start_token_id != config.pad_token_id:
        raise ArtifactError(
            f"model {model.where}: a Marian needs <pad> as its last id ({config.vocab_size - 1}) and decoder start;"
            f" found pad {config.pad_token_id}, start {config.decoder_start_token_id}"
        )


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return os.access(directory, os.W_OK)
    except OSError:
        return False


def _rename_or_discard(made: Path, target: Path) -> None:
    """Give a finished directory its name; where another process was first, its equal one stays."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
