"""What a model directory says of itself: its tasks and languages, its limits, and the hash of its content."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from raylm.errors import ArtifactError
from raylm.models import check_model_directory
from raylm.storage import StoragePath
from raylm.tasks import Task

# What CTranslate2 converts and needs no language code in the decoder.
_MODEL_TYPES = ("marian", "t5", "mt5", "bart", "pegasus")
_LANGUAGE_CODED = ("m2m_100", "mbart", "nllb-moe")
_DEFAULT_POSITIONS = 512
_HASHED = (
    "config.json",
    "generation_config.json",
    "raylm.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.spm",
    "*.model",
)


def absolute(uri: str) -> str:
    """The same place for processes with another working directory; a slash at the end stays."""
    if "://" in uri:
        return uri
    return str(Path(uri).expanduser().absolute()) + ("/" if uri.endswith("/") else "")


@dataclass(frozen=True)
class ModelInfo:
    """A finished model, checked and ready to be loaded by an engine."""

    uri: str
    """As the user named it."""
    directory: Path
    """Where it is on this machine."""
    fingerprint: str
    """A hash over config, weights, tokenizer and `raylm.json`, 16 hex digits."""
    model_type: str
    tasks: tuple[str, ...] | None
    """Names of its tasks; None for a model that was made elsewhere and does not say."""
    languages: tuple[str, ...]
    """Target languages."""
    source_language: str | None
    max_source_tokens: int
    """The longest encoder input, task token and `</s>` included."""
    max_target_tokens: int
    max_positions: int
    """The longest sequence that it can compute at all."""

    @property
    def name(self) -> str:
        return StoragePath(self.uri).name

    @property
    def where(self) -> str:
        """Its directory as people may see it, without passwords."""
        return str(StoragePath(self.uri))

    @property
    def is_ours(self) -> bool:
        """Whether raylm made it, so that a task token stands before each text."""
        return self.tasks is not None

    @classmethod
    def load(cls, path: str) -> ModelInfo:
        """The model of a directory on any storage; a remote one is copied to this machine's cache once.

        :raises ArtifactError: there is none, or none that can translate or summarise.
        """
        directory = check_model_directory(_at_hand(path))
        config = _read_json(directory / "config.json")
        _check_architecture(path, config)
        card = _read_json(directory / "raylm.json") if (directory / "raylm.json").is_file() else None
        positions = int(config.get("max_position_embeddings") or config.get("n_positions") or _DEFAULT_POSITIONS)
        said = card or {}
        try:
            return cls(
                uri=path,
                directory=directory,
                fingerprint=model_fingerprint(directory),
                model_type=config["model_type"],
                tasks=None if card is None else tuple(card["tasks"]),
                languages=tuple(said.get("languages") or ()),
                source_language=said.get("source_language"),
                max_source_tokens=min(int(said.get("max_source_tokens") or positions), positions),
                max_target_tokens=min(int(said.get("max_target_tokens") or positions), positions),
                max_positions=positions,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"model {path}: raylm.json is incomplete or malformed: {error!r}") from error

    def prompt_token(self, task: Task, to: str | None = None, source_language: str | None = None) -> str | None:
        """The token that asks this model for a task; None for a model made elsewhere without such tokens.

        :param to: the target language; may be left out where the model has a single one.
        :raises ArtifactError: the model was not made for the task or the language.
        """
        if self.tasks is not None and task.name not in self.tasks:
            raise ArtifactError(f"model {self.where}: cannot {task.name}; its tasks: {', '.join(self.tasks)}")
        if source_language and self.source_language and source_language != self.source_language:
            raise ArtifactError(
                f"model {self.where}: translates from '{self.source_language}', not from '{source_language}'"
            )
        if task.name != "translate":
            return task.prompt_token() if self.is_ours else None
        if not self.is_ours:
            return task.prompt_token(to) if to and self._knows(task.prompt_token(to)) else None
        language = self.target_language(to)
        return task.prompt_token(language)

    def target_language(self, to: str | None) -> str:
        """The language to translate to: the one asked for, or the only one.

        :raises ArtifactError: the model has other languages, or several to choose from.
        """
        listed = ", ".join(self.languages) or "none"
        if to is None and len(self.languages) == 1:
            return self.languages[0]
        if to is None:
            raise ArtifactError(f"model {self.where}: name a target language with --to; its languages: {listed}")
        for language in self.languages:
            if language.replace("_", "-").lower() == to.replace("_", "-").lower():
                return language
        raise ArtifactError(f"model {self.where}: cannot translate to '{to}'; its languages: {listed}")

    def _knows(self, token: str) -> bool:
        """Whether a model made elsewhere has a language token, as multilingual OPUS-MT models do."""
        vocabularies = [self.directory / "vocab.json", self.directory / "tokenizer.json"]
        quoted = json.dumps(token)
        return any(file.is_file() and quoted in file.read_text(encoding="utf-8") for file in vocabularies)


def model_fingerprint(directory: Path) -> str:
    """The xxh3-128 of all that decides a model's answers, 16 hex digits of it."""
    digest = xxhash.xxh3_128()
    for file in sorted({file for pattern in _HASHED for file in directory.glob(pattern)}):
        digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as source:
            while block := source.read(8 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _check_architecture(path: str, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    supported = ", ".join(_MODEL_TYPES)
    if model_type in _LANGUAGE_CODED:
        raise ArtifactError(
            f"model {path}: '{model_type}' chooses its language by a code in the decoder, which is not"
            f" supported; supported encoder-decoders: {supported}"
        )
    if model_type in _MODEL_TYPES:
        return
    kind = "an encoder-decoder of a kind" if config.get("is_encoder_decoder") else "a decoder or encoder alone,"
    raise ArtifactError(
        f"model {path}: '{model_type}' is {kind} that cannot translate or summarise here;"
        f" supported encoder-decoders: {supported}"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{file}: holds a {type(value).__name__}; an object is expected")
    return value


def _at_hand(path: str) -> Path:
    place = StoragePath(path)
    if not place.is_local and not place.is_dir():
        raise ArtifactError(f"model {place}: there is no such directory")
    return place.at_hand()
