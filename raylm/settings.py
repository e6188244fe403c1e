"""What `metadata.raylm` of a cluster YAML may say: the models, how a file is found, read and overridden.

A value is looked for in this order: `--set key=value`, `--with overlay.yaml` (the last one first), the cluster
file, the default written here. Defaults live in this module alone.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raylm.errors import SettingsError

BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the whole cluster file on the head node."""


class Section(BaseModel):
    """A section of the settings: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------- corpus


class FileSource(Section):
    """Documents in files: one row (parquet, jsonl, csv) or one paragraph block (text) is one document."""

    type: Literal["parquet", "jsonl", "csv", "text"]
    path: str
    """A file, a directory, or a glob; local, or any URI that pyarrow opens (`s3://…`, `gs://…`)."""
    column: str = "text"
    """The column with the document; not used for `text` files, where blank lines part documents."""
    validation: bool = False
    """True: every document of this source goes to the validation split."""


class DocstringsSource(Section):
    """Documentation strings of installed Python packages, read without importing them."""

    type: Literal["docstrings"]
    packages: tuple[str, ...] = ("stdlib", "numpy", "torch", "ray", "transformers")
    """Import names; `stdlib` is the standard library."""


DocumentSource = Annotated[FileSource | DocstringsSource, Field(discriminator="type")]


class PairFileSource(Section):
    """Labelled pairs in files: two columns of each row."""

    type: Literal["parquet", "jsonl", "csv"]
    path: str
    """A file, a directory, or a glob; local, or any URI that pyarrow opens."""
    source: str = "source"
    """The column with the input text."""
    target: str = "target"
    """The column with the wanted output."""
    task: Literal["translate", "summarize"] = "translate"
    to: str | None = None
    """The target language, such as `de`; needed for `translate`."""
    split: Literal["train", "validation", "test"] | None = None
    """Puts the whole source into one split; otherwise a hash of each pair decides."""

    @model_validator(mode="after")
    def _translation_has_a_language(self) -> PairFileSource:
        if self.task == "translate" and not self.to:
            raise ValueError("task 'translate' needs the target language: add `to: de`")
        return self


class CldrSource(Section):
    """English-to-any-language pairs of dates, numbers, units, names and lists, made from Unicode CLDR."""

    type: Literal["cldr"]
    to: str = "de"
    """The target language: any that Babel has CLDR data for (`de`, `fr`, `es`, `zh`, `ja`, …)."""
    rows: int = Field(default=120_000, ge=100)
    """How many pairs to make; about a tenth of them are test pairs."""
    seed: int = 1


class DocstringSummariesSource(Section):
    """Docstring bodies with their first lines as summaries."""

    type: Literal["docstrings"]
    packages: tuple[str, ...] = ("stdlib", "numpy", "torch", "ray", "transformers")


PairSource = Annotated[PairFileSource | CldrSource | DocstringSummariesSource, Field(discriminator="type")]


class FilterSettings(Section):
    """Which documents are dropped, each with a counted reason."""

    min_chars: int = Field(default=40, ge=0)
    """Shortest document, in letter widths: a Chinese, Japanese or Korean character counts 2.5."""
    max_chars: int = Field(default=200_000, ge=1)
    """Longest document, in characters; beyond are logs and dumps."""
    min_letter_ratio: float = Field(default=0.6, ge=0, le=1)
    """Letters of any script over characters that are not space (after Gopher's words with a letter)."""
    max_digit_ratio: float = Field(default=0.25, ge=0, le=1)
    """Digits over characters that are not space: tables, logs."""
    max_duplicate_line_ratio: float = Field(default=0.3, ge=0, le=1)
    """Lines that repeat an earlier one, over all (Gopher: 0.30)."""
    max_duplicate_line_char_ratio: float = Field(default=0.2, ge=0, le=1)
    """Characters in such lines, over all (Gopher: 0.20)."""
    max_mean_word_chars: float = Field(default=10.0, gt=0)
    """Mean length of words, where most of the text is in a script written with spaces (Gopher: 3 to 10)."""
    max_compression: float = Field(default=8.0, gt=1)
    """UTF-8 bytes over bytes after zlib: text that says one thing over and over, in any script."""


class PairFilterSettings(Section):
    """Which labelled pairs are dropped, each with a counted reason."""

    min_chars: int = Field(default=1, ge=0)
    """Shortest side, in characters."""
    max_chars: int = Field(default=2_000, ge=1)
    """Longest side, in characters."""
    max_length_ratio: float = Field(default=4.0, ge=1)
    """Of a translation: the wider side over the other, in letter widths, where a side is wider than 20."""


class TokenizerSettings(Section):
    """The byte-level BPE tokenizer that `raylm prepare` trains."""

    vocab_size: int = Field(default=4_000, ge=512)
    """All ids, special tokens included."""
    sample_mb: float = Field(default=24, gt=0)
    """Megabytes of text to train on, taken evenly from all sources."""
    languages: tuple[str, ...] = ("de", "fr", "es", "it", "pt", "nl", "pl", "ru", "ar", "ja", "ko", "zh")
    """Languages that get a task token besides those of the pair sources, for fine-tuning later."""


class CorpusSettings(Section):
    """What `raylm prepare` reads, keeps and writes."""

    name: str = "default"
    """Names the artifact: `<storage>/tokens/<name>`."""
    documents: tuple[DocumentSource, ...] = ()
    """Monolingual text, for pretraining."""
    pairs: tuple[PairSource, ...] = ()
    """Labelled pairs, for fine-tuning and evaluation."""
    filters: FilterSettings = FilterSettings()
    pair_filters: PairFilterSettings = PairFilterSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    sequence_length: int = Field(default=128, ge=16)
    """Tokens of one packed sequence."""
    validation: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents and of pairs held out for validation, chosen by a hash of their content."""
    shard_mb: float = Field(default=64, gt=0)
    """Megabytes of input that end up in one shard; decides the number of shards."""


# ---------------------------------------------------------------------------------------------- model


class ModelSettings(Section):
    """The model to build, or to start from."""

    name: str = "default"
    """Names the finished artifact: `<storage>/models/<name>`."""
    family: Literal["marian", "llama", "bert", "t5"] = "marian"
    size: Literal["tiny", "small", "base", "large"] = "tiny"
    start_from: str | None = None
    """A Hugging Face id or a directory; its architecture, weights and tokenizer replace family and size."""
    config: dict[str, Any] = {}
    """Values of the Hugging Face config to override, such as `{encoder_layers: 6}`."""


# ------------------------------------------------------------------------------------------- training


class TrainingSettings(Section):
    """What pretraining and fine-tuning share."""

    section: ClassVar[str]
    """What the section is called in the YAML."""

    name: str
    """Names the run: `<storage>/runs/<name>`."""
    steps: int = Field(default=400, ge=1)
    """Optimizer steps."""
    global_batch_tokens: int = Field(default=4_096, ge=32)
    """Padded tokens of one optimizer step over all workers."""
    micro_batch_tokens: int = Field(default=4_096, ge=16)
    """The most padded tokens that one worker holds at once; gradients accumulate to the global batch."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """The peak."""
    schedule: Literal["wsd", "cosine", "linear", "inverse_sqrt", "constant"] = "wsd"
    warmup_steps: int = Field(default=50, ge=0)
    decay_ratio: float = Field(default=0.25, ge=0, le=1)
    """For `wsd`: the last share of the steps, in which the rate falls to its minimum."""
    min_learning_rate_ratio: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    epsilon: float = Field(default=1e-6, gt=0)
    """Adam's. Well above the rounding noise of gradients that are zero in theory, which 1e-8 would amplify."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest norm of the global gradient; 0 turns clipping off."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the GPU has it, else fp32."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """`auto`: one for each GPU of the cluster, or without GPUs one for each CPU, four at most."""
    seed: int = 1
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=100, ge=1)
    validation_batches: int = Field(default=16, ge=1)
    """Global batches of one validation."""
    checkpoint_every: int = Field(default=200, ge=1)
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay, besides the best one."""
    max_failures: int = Field(default=3, ge=0)
    """How often lost workers are replaced, continuing from the newest checkpoint."""
    compile: bool = False
    """`torch.compile` the model: pays on long runs only."""


class PretrainSettings(TrainingSettings):
    """Self-supervised training on the packed documents."""

    section = "pretrain"

    name: str = "pretrain"
    objective: Literal["auto", "denoise", "causal", "masked"] = "auto"
    """`auto`: what suits the model: `denoise` (encoder-decoder), `causal` (decoder), `masked` (encoder)."""
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    """Share of tokens that `denoise` and `masked` hide."""
    mean_span_tokens: float = Field(default=3.0, ge=1)
    """Mean length of a hidden span, for `denoise`."""
    denoise_target: Literal["text", "spans"] = "text"
    """What `denoise` writes: the whole text (as BART, learned soonest) or only the hidden spans (as T5, cheaper)."""


class FinetuneSettings(TrainingSettings):
    """Supervised training on the labelled pairs; all tasks together give one model."""

    section = "finetune"

    name: str = "finetune"
    objective: Literal["seq2seq"] = "seq2seq"
    start: Literal["pretrain", "scratch"] = "pretrain"
    """`pretrain`: from the best checkpoint of the pretraining run."""
    max_source_tokens: int = Field(default=256, ge=8)
    """Longer sources are cut to this many tokens, and counted."""
    max_target_tokens: int = Field(default=128, ge=8)
    task_weights: dict[str, float] = {}
    """How often a task's pairs are seen in an epoch, such as `{summarize: 0.5}`; 1 where not named."""


class EvaluateSettings(Section):
    """Scores on the held-out pairs, beside a baseline."""

    rows_per_task: int = Field(default=500, ge=1)
    beam_size: int = Field(default=1, ge=1)


# --------------------------------------------------------------------------------- batch and service


class DecodeSettings(Section):
    """How text is generated: shared by batch jobs, evaluation and the service."""

    beam_size: int = Field(default=1, ge=1)
    length_penalty: float = 1.0
    max_output_tokens: int = Field(default=256, ge=1)
    max_input_tokens: int | None = Field(default=None, ge=1)
    """Longer segments are cut and flagged `truncated`; default: what the model was made for."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    batch_tokens: int = Field(default=4_096, ge=1)
    """Padded source tokens of one engine batch."""
    compute_type: Literal["auto", "int8", "float16", "bfloat16", "float32"] = "auto"
    """`auto`: int8 on CPUs, float16 on GPUs."""


class BatchSettings(Section):
    """`raylm batch-translate`, `batch-summarize`."""

    decode: DecodeSettings = DecodeSettings()
    chunk_rows: int = Field(default=512, ge=1)
    """Rows of one unit of work: what a crash can cost a worker."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Engine actors; `auto`: one for each GPU, else one for each CPU, no more than there are chunks."""


class ServeSettings(Section):
    """`raylm serve`."""

    host: str = "127.0.0.1"
    port: int = Field(default=8_000, ge=0, le=65_535)
    decode: DecodeSettings = DecodeSettings()
    replicas: int = Field(default=1, ge=1)
    max_batch_texts: int = Field(default=64, ge=1)
    """The most texts of concurrent requests that are decoded together."""
    batch_wait_s: float = Field(default=0.01, ge=0)
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests beyond this wait nowhere: they are answered 429 at once."""
    max_request_texts: int = Field(default=1_024, ge=1)


class Settings(Section):
    """Everything under `metadata.raylm`."""

    storage: str = "~/raylm-storage"
    """Where artifacts live: a local directory on one machine, any pyarrow URI on a cluster."""
    corpus: CorpusSettings = CorpusSettings()
    model: ModelSettings = ModelSettings()
    pretrain: PretrainSettings = PretrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    batch: BatchSettings = BatchSettings()
    serve: ServeSettings = ServeSettings()


def model_directory(settings: Settings) -> str:
    """Where `raylm export` writes the finished model."""
    return f"{settings.storage.rstrip('/')}/models/{settings.model.name}"


# -------------------------------------------------------------------------------------------- loading


def packaged_cluster_file() -> Path:
    """The `clusters/local.yaml` that belongs to this installation or checkout."""
    here = Path(__file__).parent
    installed = here / "local.yaml"
    return installed if installed.exists() else here.parent / "clusters" / "local.yaml"


def find_cluster_file(cluster: str | os.PathLike[str] | None = None) -> Path:
    """The file a command reads: the argument, `$RAYLM_CLUSTER`, the head node's copy, the packaged one.

    :raises SettingsError: the named file does not exist.
    """
    for named, origin in ((cluster, "--cluster"), (os.environ.get("RAYLM_CLUSTER"), "$RAYLM_CLUSTER")):
        if named:
            path = Path(named).expanduser()
            if not path.is_file():
                raise SettingsError(f"{origin}: there is no file {path}")
            return path
    bootstrap = BOOTSTRAP_CONFIG.expanduser()
    return bootstrap if bootstrap.is_file() else packaged_cluster_file()


def load(
    cluster: str | os.PathLike[str] | None = None,
    overlays: Sequence[str | os.PathLike[str]] = (),
    overrides: Sequence[str] = (),
) -> Settings:
    """The settings of a cluster file with overlays and `key=value` overrides laid over it.

    :raises SettingsError: a file is missing or not YAML, a key is unknown, a value is of the wrong kind.
    """
    cluster_file = find_cluster_file(cluster)
    document = _read_yaml(cluster_file)
    metadata = document.get("metadata") or {}
    merged = (metadata.get("raylm") if isinstance(metadata, dict) else None) or {}
    _validate(merged, f"{cluster_file}: metadata.raylm")
    for overlay in overlays:
        path = Path(overlay).expanduser()
        if not path.is_file():
            raise SettingsError(f"--with: there is no file {path}")
        content = _read_yaml(path)
        merged = _merge(merged, content)
        _validate(merged, str(path))
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
        _validate(merged, f"--set {override}")
    return _validate(merged, str(cluster_file))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `metadata.raylm`, for editors that complete YAML."""
    return Settings.model_json_schema()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Each value that differs between two resolved settings, as `path: old → new`."""
    for key in sorted(old.keys() | new.keys()):
        before, after, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{path}.")
        elif before != after:
            yield f"{path}: {before} → {after}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: holds a {type(document).__name__}; a mapping of keys is expected")
    return document


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {override}: write key=value, such as pretrain.steps=200")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override}: the value is not YAML") from error
    # YAML 1.1 reads `2e-3` as text; no setting wants such a text where a number would do.
    if isinstance(parsed, str) and parsed and parsed[0] in "0123456789.+-":
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    nested: Any = parsed
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _validate(values: dict[str, Any], origin: str) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            nearest = _nearest_key(first["loc"])
            hint = f"; did you mean '{nearest}'?" if nearest else ""
            raise SettingsError(f"{origin}: unknown key '{path}'{hint}") from None
        raise SettingsError(f"{origin}: {path}: {first['msg']}, found {first['input']!r}") from None


def _nearest_key(location: tuple[int | str, ...]) -> str | None:
    """The known key nearest to the last part of a location, among those of the section it stands in."""
    schema = json_schema()
    node: Any = schema
    for part in location[:-1]:
        node = _step_into(schema, node, part)
        if node is None:
            return None
    candidates = list(_resolve(schema, node).get("properties", {}))
    matches = difflib.get_close_matches(str(location[-1]), candidates, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def _step_into(schema: dict[str, Any], node: dict[str, Any], part: int | str) -> dict[str, Any] | None:
    node = _resolve(schema, node)
    if isinstance(part, int):
        items: dict[str, Any] | None = node.get("items")
        return items
    if part in node.get("properties", {}):
        found: dict[str, Any] = node["properties"][part]
        return found
    tagged = node.get("discriminator", {}).get("mapping", {}).get(part)
    return {"$ref": tagged} if tagged else None
