"""Hugging Face models and tokenizers: built from presets by family and size, or loaded from an id or a directory."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raylm.errors import ArtifactError, SettingsError, first_line
from raylm.settings import ModelSettings
from raylm.settings.training import LoraSettings
from raylm.storage import StoragePath, without_passwords

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Architecture = Literal["encoder-decoder", "decoder", "encoder"]

# (width, layers, feed-forward width, heads); an encoder-decoder has so many layers in each of the two, at `tiny` one
# less in the decoder. Widths are multiples of 16 from `small` on, as tensor cores want them.
_SIZES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (144, 3, 512, 4),
    "small": (256, 6, 1_024, 8),
    "base": (512, 6, 2_048, 8),
    "large": (1_024, 12, 4_096, 16),
}
_TINY_DECODER_LAYERS = 2
MAX_POSITIONS = 1_024
GGUF = ".gguf"
"""How the file of a model of llama.cpp ends."""
_POSITIONS_BEHIND_PADDING = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "data2vec-text"),
    *("mpnet", "longformer", "ibert", "esm"),
)
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def build_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The Hugging Face config of a preset, for a tokenizer whose `<pad>` is its last id.

    No dropout by default: a run over fresh text does not overfit, and dropout costs a third on CPUs. Every value
    can be overridden through `model.config`.
    """
    import transformers

    width, layers, ffn, heads = _SIZES[settings.size]
    decoder_layers = _TINY_DECODER_LAYERS if settings.size == "tiny" else layers
    vocabulary: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    classes: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
        "marian": (
            transformers.MarianConfig,
            {
                "d_model": width,
                "encoder_layers": layers,
                "decoder_layers": decoder_layers,
                "encoder_ffn_dim": ffn,
                "decoder_ffn_dim": ffn,
                "encoder_attention_heads": heads,
                "decoder_attention_heads": heads,
                "activation_function": "relu",
                "max_position_embeddings": MAX_POSITIONS,
                "scale_embedding": True,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "activation_dropout": 0.0,
                "share_encoder_decoder_embeddings": True,
                "tie_word_embeddings": True,
                "init_std": 0.04,
                "decoder_start_token_id": tokenizer.pad_token_id,
                "forced_eos_token_id": None,
            },
        ),
        "llama": (
            transformers.LlamaConfig,
            {
                "hidden_size": width,
                "num_hidden_layers": layers + decoder_layers if settings.size == "tiny" else 2 * layers,
                "intermediate_size": ffn,
                "num_attention_heads": heads,
                "num_key_value_heads": max(heads // 2, 1),
                "max_position_embeddings": MAX_POSITIONS,
                "tie_word_embeddings": True,
                "initializer_range": width**-0.5,
            },
        ),
        "bert": (
            transformers.BertConfig,
            {
                "hidden_size": width,
                "num_hidden_layers": layers,
                "intermediate_size": ffn,
                "num_attention_heads": heads,
                "max_position_embeddings": MAX_POSITIONS,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
        ),
        "t5": (
            transformers.T5Config,
            {
                "d_model": width,
                "d_kv": width // heads,
                "d_ff": ffn,
                "num_layers": layers,
                "num_decoder_layers": decoder_layers,
                "num_heads": heads,
                "dropout_rate": 0.0,
                "feed_forward_proj": "gated-gelu",
                "decoder_start_token_id": tokenizer.pad_token_id,
            },
        ),
    }
    config_class, values = classes[settings.family]
    return config_class(**(vocabulary | values | settings.config))


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The `transformers` auto class that gives a config its head: seq2seq, causal or masked language model, labels."""
    import transformers

    classes: dict[Architecture | Literal["classifier"], type[PreTrainedModel]] = {
        "classifier": transformers.AutoModelForSequenceClassification,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
        "decoder": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModelForMaskedLM,
    }
    return classes["classifier" if is_classifier(config) else architecture(config)]


def architecture(config: PretrainedConfig) -> Architecture:
    """Which of the three shapes of transformer a config describes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    # BERT and its like may be decoders, too, where their config says so.
    if config.model_type in DECODERS and (config.model_type not in ENCODERS or getattr(config, "is_decoder", False)):
        return "decoder"
    return "encoder"


def first_position(config: PretrainedConfig) -> int:
    """The number of a text's first position: RoBERTa and its like count from behind the padding's."""
    return int(config.pad_token_id) + 1 if config.model_type in _POSITIONS_BEHIND_PADDING else 0


def has_windows(config: PretrainedConfig) -> bool:
    """Whether some layers see no further than a window."""
    layers = getattr(config, "layer_types", None) or ()
    return bool(getattr(config, "sliding_window", None)) or "sliding_attention" in layers


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a config is that of a model that gives a text one of its labels."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def labels_of(config: PretrainedConfig) -> list[str]:
    """The labels of a classifier in the order of their numbers."""
    return [config.id2label[number] for number in range(config.num_labels)]


def with_head(config: PretrainedConfig, labels: Sequence[str], pad_token_id: int) -> PretrainedConfig:
    """The config of a classifier, or of a language model where there are no labels.

    What a config says in `architectures`, as every config of the hub does, decides the head that its models get.

    :param labels: in the order of their numbers; a classifier that knows exactly these keeps the order that it has.
    :param pad_token_id: a decoder finds the last token of a text by it.
    :raises SettingsError: `transformers` has no classifier of this kind.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    config = copy.deepcopy(config)
    if not labels:
        config.architectures = None
        return config
    if config.model_type not in CLASSIFIERS:
        raise SettingsError(f"finetune.objective: transformers has no classifier of the kind '{config.model_type}'")
    if not (is_classifier(config) and set(labels_of(config)) == set(labels)):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    config.architectures = [CLASSIFIERS[config.model_type]]
    config.problem_type = "single_label_classification"
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id
    return config


def build_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model with fresh weights that depend on the config and the seed alone: whole, or in shards for ZeRO-3."""
    import torch
    from transformers.initialization import no_init_weights
    from transformers.integrations import is_deepspeed_zero3_enabled

    torch.manual_seed(seed)
    if is_deepspeed_zero3_enabled():
        return _with_fixed_positions(model_class(config).from_config(config))
    # As it builds a sharded one: layers do not draw weights of their own before those of the model are drawn.
    with no_init_weights():
        model = model_class(config).from_config(config)
    model.init_weights()
    return _with_fixed_positions(model)


def build_shapes(config: PretrainedConfig, lora: LoraSettings | None = None) -> PreTrainedModel:
    """A model with the shapes of its parameters and without their values, on torch's meta device."""
    import torch

    with torch.device("meta"):
        model = build_model(config, seed=0)
        return with_lora(model, lora) if lora else model


def located(path: str) -> str:
    """Where a model is, for processes with another working directory as well; the id of a hub stays one."""
    place = Path(path).expanduser()
    return str(place.absolute()) if "://" not in path and place.exists() else path


def load_config(path: str) -> PretrainedConfig:
    """The config of a model.

    :param path: a directory in Hugging Face layout or a GGUF file, on any storage, or an id of a hub.
    :raises ArtifactError: it is none of these.
    """
    from transformers import AutoConfig

    with _opened(path) as (place, options):
        config: PretrainedConfig = AutoConfig.from_pretrained(place, **options)
    quantized = config.__dict__.pop("quantization_config", None)
    if quantized and not options:  # the weights of a GGUF file are read as plain ones
        how = quantized.get("quant_method", "some method") if isinstance(quantized, dict) else quantized
        raise ArtifactError(
            f"model {without_passwords(path)}: its weights are quantized ({how}); take those that it was quantized from"
        )
    return config


def load_model(path: str, config: PretrainedConfig | None = None, seed: int = 0) -> PreTrainedModel:
    """A pretrained model in fp32, with the head that its config asks for.

    :param path: as for `load_config`.
    :param config: says which head, and what labels; by default the model's own.
    :param seed: of the weights of a head that is new.
    :raises ArtifactError: there is no such model.
    """
    import torch

    config = config or load_config(path)
    # A classifier of other labels has a head of another size, which the new one replaces.
    wanted = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": is_classifier(config)}
    torch.manual_seed(seed)
    with _opened(path) as (place, options):
        model = model_class(config).from_pretrained(place, **wanted, **options)
    if options:  # transformers takes it for quantized, and would neither train nor save it
        read, model = model, model_class(config).from_config(config)
        model.load_state_dict(read.state_dict())
    return _with_fixed_positions(model)


def _with_fixed_positions(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its sinusoidal positions kept out of training, also after loading, which forgets that.

    They are not saved either: trained ones would be lost.
    """
    for module in model.modules():
        if type(module).__name__.endswith("SinusoidalPositionalEmbedding"):
            for parameter in module.parameters():
                parameter.requires_grad = False
    return model


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model or of a prepared corpus, with an end and a padding token.

    BERT's texts end with `[SEP]`, and what has no padding (Llama) is padded with its end.

    :param path: as for `load_config`.
    :raises ArtifactError: there is none.
    """
    from transformers import AutoTokenizer

    with _opened(path) as (place, options):
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(place, **options)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64]:
    """(vocabulary,) bytes of UTF-8 text that each token stands for, 0 for special ones.

    Tokens of byte-level tokenizers (GPT-2's) have one character for each byte; others (SentencePiece's) write a space
    as `▁` and single bytes as `<0x0A>`.
    """
    import numpy as np

    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    is_byte_level = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()

    def size(token: str) -> int:
        if is_byte_level:
            return len(token)
        return 1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace("▁", " ").encode())

    return np.asarray([0 if number in special else size(token) for number, token in enumerate(tokens)], np.int64)


def check_model_directory(path: str | os.PathLike[str]) -> Path:
    """The directory of a finished model, or its only file (GGUF).

    :raises ArtifactError: it is missing, or lacks a config or weights.
    """
    directory = Path(path).expanduser()
    if directory.suffix == GGUF and directory.is_file():
        return directory
    if not directory.is_dir():
        raise ArtifactError(f"model {directory}: there is no such directory")
    if not (directory / "config.json").is_file():
        raise ArtifactError(f"model {directory}: not a model directory, config.json is missing")
    weights = [*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]
    if not weights:
        raise ArtifactError(
            f"model {directory}: not a model directory, there are no weights, *.safetensors or pytorch_model*.bin"
        )
    return directory


def with_lora(model: PreTrainedModel, lora: LoraSettings) -> PreTrainedModel:
    """The model with frozen weights and trainable adapters beside its linear layers (Hu et al. 2021).

    It is called as before. The head of a classifier, which may be new, is trained as a whole.

    :raises SettingsError: the model has no layers of the wanted names.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = "all-linear" if lora.target_modules == "auto" else list(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type=TaskType.SEQ_CLS if is_classifier(model.config) else None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        import torch

        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        raise SettingsError(
            f"finetune.lora.target_modules: {list(lora.target_modules)} fits no layer of a {model.config.model_type}; "
            f"its linear layers are called {', '.join(sorted(linear))}"
        ) from error


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model that computes what a model `with_lora` does: adapters added to the weights, all trainable."""
    plain = model.merge_and_unload()
    for parameter in plain.parameters():
        parameter.requires_grad = True
    return _with_fixed_positions(plain)


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also where ZeRO-3 has left this worker a part of it, which is flat."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_count(model: PreTrainedModel) -> int:
    """Trainable values, tied weights counted once, ZeRO-3's parted ones whole."""
    return sum(math.prod(whole_shape(p)) for p in model.parameters() if p.requires_grad)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What `from_pretrained` is told of a model: a directory or an id, and which file in it where it is a GGUF file.

    :raises ArtifactError: it cannot read what is there.
    """
    where = without_passwords(path)
    try:
        place = str(StoragePath(path).at_hand()) if "://" in path else located(path)
        if place.endswith(GGUF):
            directory, _, file = place.rpartition("/")
            yield directory or ".", {"gguf_file": file}
        else:
            yield place, {}
    except ImportError as error:
        if path.endswith(GGUF):
            raise ArtifactError(f"model {StoragePath(path)}: to read it, `pip install 'raylm[gguf]'`") from error
        raise ArtifactError(f"model {where}: needs a package that is not here: {first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"model {where}: cannot be loaded by transformers: {first_line(error)}") from error
