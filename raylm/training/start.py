"""What a run would begin with, before any weights: its config and its tokenizer, known without a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylm import models
from raylm.errors import ArtifactError, SettingsError, did_you_mean
from raylm.settings import FinetuneSettings, PretrainSettings, Settings
from raylm.storage import Manifest, StoragePath
from raylm.training.runs import MODEL, run_directory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Start:
    """What a run would begin with, before any weights.

    :param name: how a person calls the model.
    :param notes: what is hardly meant.
    """

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    notes: tuple[str, ...] = ()


def find_start(settings: Settings, training: PretrainSettings | FinetuneSettings, tokens: StoragePath | None) -> Start:
    """Config and tokenizer of the run: those of the pretrained run, of `model.start_from`, or of a preset.

    :param tokens: the prepared corpus, if there is one.
    :raises RaylmError: what the settings name is not there, or `transformers` does not take it.
    """
    notes: list[str] = []
    parent = run_directory(settings, settings.pretrain.name)
    if isinstance(training, FinetuneSettings) and training.start == "pretrain":
        if Manifest.read(parent) is None:
            notes.append(f"{parent} has not finished: taken as the model that it would train")
        if (parent / MODEL / "config.json").is_file():
            place = (parent / MODEL).address
            tokenizer = models.load_tokenizer(place)
            if tokens:
                check_tokenizer(tokens, tokenizer, place)
            return Start(f"run {parent.name}", models.load_config(place), tokenizer, tuple(notes))
    path = settings.model.start_from
    if path is None:
        tokenizer = _corpus_tokenizer(settings, tokens)
        name = f"{settings.model.family} {settings.model.size}"
        return Start(name, _preset(settings, tokenizer), tokenizer, tuple(notes))
    if settings.model.config:
        notes.append("model.config has no effect on a model that model.start_from names")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:  # never an id of a hub, which would be asked for it
        models.check_model_directory(path)
    tokenizer = models.load_tokenizer(path)
    if tokens:
        check_tokenizer(tokens, tokenizer, path)
    return Start(path, models.load_config(path), tokenizer, tuple(notes))


def check_tokenizer(tokens: StoragePath, tokenizer: PreTrainedTokenizerFast, model: str) -> None:
    """:raises ArtifactError: the ids of a corpus are not those of a model's tokenizer, which may know more."""
    ours, theirs = models.load_tokenizer((tokens / "tokenizer").address).get_vocab(), tokenizer.get_vocab()
    other = sum(theirs.get(token) != number for token, number in ours.items())
    if other:
        raise ArtifactError(
            f"corpus {tokens}: was prepared with another tokenizer than that of {model}: of its {len(ours):,} tokens"
            f" {other:,} have another id or none; `raylm prepare --set corpus.tokenizer.start_from={model}` prepares it"
            " with the model's"
        )


def _corpus_tokenizer(settings: Settings, tokens: StoragePath | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the corpus; before there is one, the one it is to be, or one with as many ids."""
    if tokens:
        return models.load_tokenizer((tokens / "tokenizer").address)
    if settings.corpus.tokenizer.start_from:
        return models.load_tokenizer(settings.corpus.tokenizer.start_from)
    return tokenizer_of_size(settings.corpus.tokenizer.vocab_size)


def tokenizer_of_size(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with so many ids and the special tokens of a prepared one, `<pad>` last: it can size a model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<mask>", "<extra_id_0>"]
    others = [f"<{number}>" for number in range(vocab_size - len(special) - 1)]
    ids = {token: number for number, token in enumerate([*special, *others, "<pad>"])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.add_special_tokens([*special, "<pad>"])
    names = dict(zip(("unk_token", "bos_token", "eos_token", "mask_token"), special, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **names)


def _preset(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The config of a preset with the overrides of `model.config`.

    :raises SettingsError: one is unknown, or not what `transformers` takes.
    """
    plain = models.build_config(settings.model.model_copy(update={"config": {}}), tokenizer)
    known = plain.to_dict().keys() | plain.attribute_map.keys() | {"rope_theta", "attn_implementation"}
    for key in settings.model.config:
        if key not in known and not hasattr(plain, key):
            raise SettingsError(f"model.config: {plain.model_type} has no '{key}'{did_you_mean(key, known)}")
    try:
        return models.build_config(settings.model, tokenizer)
    except Exception as error:  # its validators raise errors of many kinds
        raise SettingsError(refusal(error)) from error


def refusal(error: Exception) -> str:
    """What `transformers` has against `model.config`: its last line, without the kind of error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"model.config: transformers does not take it: {lines[-1].strip().removeprefix('ValueError: ')}"
