"""What a model directory says of itself: its kind, tasks and languages, its limits, and the hash of its content."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import xxhash

from raylm.errors import ArtifactError
from raylm.models import check_model_directory
from raylm.settings import DecodeSettings
from raylm.storage import StoragePath
from raylm.tasks import ANSWER, CLASSIFY, TASKS, TRANSLATE, Task, language_token

Kind = Literal["encoder-decoder", "decoder", "classifier", "reader"]
"""A reader marks the answer to a question in its context."""

# By the end of the name of a model's class, as config.json says it.
_KINDS: dict[str, Kind] = {
    "ForConditionalGeneration": "encoder-decoder",
    "MTModel": "encoder-decoder",
    "ForCausalLM": "decoder",
    "LMHeadModel": "decoder",
    "ForSequenceClassification": "classifier",
    "ForQuestionAnswering": "reader",
}
_TASKS: dict[Kind, tuple[str, ...]] = {
    "encoder-decoder": tuple(name for name in TASKS if name != CLASSIFY.name),
    "decoder": tuple(name for name in TASKS if name != CLASSIFY.name),
    "classifier": (CLASSIFY.name,),
    "reader": (ANSWER.name,),
}
_LANGUAGE_CODED = ("m2m_100", "mbart", "nllb-moe")
_LANGUAGE_TOKEN = re.compile(r'">>([\w-]+)<<"')
_DEFAULT_POSITIONS = 512
_NO_LIMIT = 10**9  # transformers writes 10^30 where a tokenizer has none
_HASHED = (
    "config.json",
    "generation_config.json",
    "raylm.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
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
    kind: Kind
    tasks: tuple[str, ...]
    """Names of its tasks; of a model that was made elsewhere, those that its kind can be asked for."""
    is_ours: bool
    """Whether raylm made it, so that a task token stands before each text."""
    languages: tuple[str, ...]
    """Target languages."""
    source_language: str | None
    max_source_tokens: int
    """The longest input, task token and `</s>` included."""
    max_target_tokens: int
    max_positions: int
    """The longest sequence that it can compute at all; a decoder's input and answer together."""
    prefixes: dict[str, str]
    """Words before a text by the names of T5's tasks: `summarization`, `translation_en_to_de`."""
    chats: bool
    """Whether its tokenizer has a template for chats."""

    @property
    def name(self) -> str:
        return StoragePath(self.uri).name

    @property
    def where(self) -> str:
        """Its directory as people may see it, without passwords."""
        return str(StoragePath(self.uri))

    @property
    def is_language_coded(self) -> bool:
        """Whether its languages are chosen by codes, one of which its answers begin with."""
        return self.model_type in _LANGUAGE_CODED

    @classmethod
    def load(cls, path: str) -> ModelInfo:
        """The model of a directory on any storage; a remote one is copied to this machine's cache once.

        :raises ArtifactError: there is none, or none that writes, labels or marks texts.
        """
        directory = check_model_directory(_at_hand(path))
        config = _read_json(directory / "config.json")
        kind = _kind(path, config)
        card = _read_json(directory / "raylm.json") if (directory / "raylm.json").is_file() else None
        said = card or {"max_source_tokens": _longest_of_tokenizer(directory)}
        positions = int(config.get("max_position_embeddings") or config.get("n_positions") or _DEFAULT_POSITIONS)
        positions = min(said.get("max_positions") or positions, positions)
        try:
            return cls(
                uri=path,
                directory=directory,
                fingerprint=model_fingerprint(directory),
                model_type=config["model_type"],
                kind=kind,
                tasks=tuple(card["tasks"]) if card else _TASKS[kind],
                is_ours=card is not None,
                languages=tuple(said.get("languages") or ()),
                source_language=said.get("source_language"),
                max_source_tokens=min(int(said.get("max_source_tokens") or positions), positions),
                max_target_tokens=min(int(said.get("max_target_tokens") or positions), positions),
                max_positions=positions,
                prefixes={
                    name: values["prefix"]
                    for name, values in (config.get("task_specific_params") or {}).items()
                    if values.get("prefix")
                },
                chats=_has_chat_template(directory),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            file = "raylm.json or config.json" if card else "config.json"
            raise ArtifactError(f"model {path}: {file} is incomplete or malformed: {error!r}") from error

    def check_task(self, task: Task) -> None:
        """:raises ArtifactError: the model was not made for it."""
        if task.name not in self.tasks:
            raise ArtifactError(
                f"model {self.where}: cannot {task.name}; its tasks: {', '.join(self.tasks) or 'none'}"
                + ("" if self.is_ours else f" ({self.what} of type {self.model_type})")
            )

    @property
    def what(self) -> str:
        """Its kind with its article."""
        return f"an {self.kind}" if self.kind.startswith("e") else f"a {self.kind}"

    def limits(self, settings: DecodeSettings) -> tuple[int, int]:
        """The most tokens of an input, with all that a prompt adds, and of an answer."""
        target = min(settings.max_output_tokens, self.max_target_tokens)
        room = self.max_positions
        if self.kind == "decoder":  # whose answer stands behind what it reads
            target = min(target, max(room // 2, 1))
            room -= target
        return min(settings.max_input_tokens or self.max_source_tokens, room), target

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
        raise ArtifactError(f"model {self.where}: cannot {TRANSLATE.name} to '{to}'; its languages: {listed}")

    def language_tokens(self) -> frozenset[str]:
        """The names in the language tokens of a multilingual OPUS-MT model: `de` of `>>de<<`."""
        return _language_tokens(self.directory)

    def added_tokens(self) -> frozenset[str]:
        """The tokens beside the learned vocabulary: special ones, and language codes."""
        return _added_tokens(self.directory)


@lru_cache(maxsize=8)
def _language_tokens(directory: Path) -> frozenset[str]:
    files = [directory / "vocab.json", directory / "tokenizer.json"]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    of_tasks = {task.token for task in TASKS.values()}
    found = {name for text in texts for name in _LANGUAGE_TOKEN.findall(text)}
    return frozenset(name for name in found if language_token(name) not in of_tasks)


@lru_cache(maxsize=8)
def _added_tokens(directory: Path) -> frozenset[str]:
    from raylm.models import load_tokenizer

    tokenizer = load_tokenizer(str(directory))
    return frozenset({*tokenizer.get_added_vocab(), *getattr(tokenizer, "lang_token_to_id", ())})


def model_fingerprint(directory: Path) -> str:
    """The xxh3-128 of all that decides a model's answers, 16 hex digits of it."""
    digest = xxhash.xxh3_128()
    for file in sorted({file for pattern in _HASHED for file in directory.glob(pattern)}):
        digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as source:
            while block := source.read(8 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _kind(path: str, config: dict[str, Any]) -> Kind:
    """What a model's class makes of texts.

    :raises ArtifactError: nothing that a batch job or the service could give.
    """
    for name in config.get("architectures") or []:
        for end, kind in _KINDS.items():
            if name.endswith(end):
                return kind
    found = ", ".join(config.get("architectures") or []) or f"no architecture, type {config.get('model_type')!r}"
    ends = ", ".join(f"…{end}" for end in _KINDS)
    raise ArtifactError(f"model {path}: config.json says {found}; what raylm runs is one of {ends}")


def _longest_of_tokenizer(directory: Path) -> int | None:
    """The longest input that the tokenizer of a model made elsewhere cuts to; RoBERTa has more positions than that."""
    file = directory / "tokenizer_config.json"
    longest = _read_json(file).get("model_max_length") if file.is_file() else None
    return int(longest) if isinstance(longest, int | float) and 0 < longest < _NO_LIMIT else None


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and bool(_read_json(config).get("chat_template"))


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
