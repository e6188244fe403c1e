"""Sections that say what `raylm prepare` reads, keeps and writes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from raylm.settings.section import Section, ShareOrNumber


def _is_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
    return text


Pattern = Annotated[str, AfterValidator(_is_pattern)]
"""A regular expression of Python's `re`."""
Share = Annotated[float, Field(ge=0, le=1)]


# ---------------------------------------------------------------------------------------------- sources


class FileSource(Section):
    """Documents in files.

    One row of `parquet`, `jsonl`, `csv` (also `.tsv`) and `datasets` (what Hugging Face `save_to_disk` writes) is one
    document, one paragraph block of a `text` file, one whole `markdown` or `html` file. `.gz` and `.zst` files are
    decompressed.
    """

    type: Literal["parquet", "jsonl", "csv", "datasets", "text", "markdown", "html"]
    path: str
    """A file, a directory, or a glob; local, or any URI that pyarrow opens (`s3://…`, `gs://…`)."""
    column: str = "text"
    """The column with the document, for types that have columns."""
    markup: Literal["none", "markdown", "html"] = "none"
    """How the text of a column is marked up; it becomes plain text. HTML needs `pip install raylm[html]`."""
    split_into: Literal["document", "paragraph", "sentence"] = "document"
    """What becomes a document of the corpus: the whole, its paragraphs, or its sentences."""
    validation: bool = False
    """True: every document of this source goes to the validation split."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in the training tokens, relative to the other sources' weights; unset: all there is."""
    epochs: float = Field(default=1.0, gt=0)
    """How often its documents are seen; with `weight`, how often at the most. 0.5 takes every second one."""


class DocstringsSource(Section):
    """Documentation strings of installed Python packages, read without importing them."""

    type: Literal["docstrings"]
    packages: tuple[str, ...] = ("stdlib", "numpy", "torch", "ray", "transformers")
    """Import names; `stdlib` is the standard library."""
    weight: float | None = Field(default=None, gt=0)
    """As for files."""
    epochs: float = Field(default=1.0, gt=0)
    """As for files."""


DocumentSource = Annotated[FileSource | DocstringsSource, Field(discriminator="type")]


class PairFileSource(Section):
    """Labelled pairs in files: columns of a row, two aligned `text` files, the messages of a gettext catalog."""

    type: Literal["parquet", "jsonl", "csv", "datasets", "text", "gettext"]
    path: str
    """A file, a directory, or a glob; local, or any URI that pyarrow opens. `gettext` reads `.po` and `.mo`."""
    target_path: str | None = None
    """For `text`: the file whose line n is the target of line n of `path`."""
    source: str = "source"
    """The column with the input text; for `answer` with the question."""
    context: str | None = None
    """For `answer`: the column with the text that says the answer. All questions about one are in the same split."""
    target: str = "target"
    """The column with the wanted output; for `classify` the label, a text or a whole number."""
    task: Literal["translate", "summarize", "answer", "classify"] = "translate"
    to: str | None = None
    """The target language, such as `de`; needed for `translate`."""
    source_language: str | None = None
    """The source's language, such as `en`: lets the pair filters find sources in another language."""
    split: Literal["train", "validation", "test"] | None = None
    """Puts the whole source into one split; otherwise a hash of each pair decides."""

    @model_validator(mode="after")
    def _complete(self) -> PairFileSource:
        if self.task == "translate" and not self.to:
            raise ValueError("task 'translate' needs the target language: add `to: de`")
        if self.task == "answer" and (self.context is None or self.type in ("text", "gettext")):
            raise ValueError(
                "task 'answer' reads three columns of parquet, jsonl, csv or datasets, such as"
                " {source: question, context: text, target: answer}"
            )
        if self.task != "answer" and self.context is not None:
            raise ValueError(f"task '{self.task}' reads no context: take `context` out, or say `task: answer`")
        if self.task == "classify" and self.to:
            raise ValueError("task 'classify' answers with labels, not in a language: take `to` out")
        if (self.type == "text") != (self.target_path is not None):
            raise ValueError("`target_path` names the second of two aligned `text` files: give both or none")
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


class EvaluationSource(Section):
    """Texts that training must not have seen."""

    type: Literal["parquet", "jsonl", "csv", "datasets", "text"]
    path: str
    """A file, a directory, or a glob; local, or any URI that pyarrow opens."""
    columns: tuple[str, ...] = ("text",)
    """The columns to keep out, each a text of its own, for types that have columns."""


# ------------------------------------------------------------------------------------- what is done to text


class CleanSettings(Section):
    """How text is made regular before filters see it. Unicode, mojibake, control characters always are."""

    markup: bool = True
    """Take reST and HTML tags out of documents; the words they mark up stay."""
    boilerplate: bool = True
    """Drop lines that web pages carry beside their text: cookie notices, "enable JavaScript", "share this"."""
    repeated_lines: bool = False
    """Keep only the first of equal lines of a document."""
    urls: Literal["keep", "mask", "remove"] = "keep"
    """`mask` writes <URL>."""
    cjk: bool = True
    """Chinese, Japanese: full-width letters and digits become ASCII, spaces between ideographs go, and punctuation
    between ideographs becomes full-width."""
    remove_punctuation: bool = False
    """For classification corpora."""
    remove_stop_words: bool = False
    """For classification corpora: English and Chinese function words go; negations stay."""


class FilterSettings(Section):
    """Which documents are dropped, each with a counted reason."""

    min_chars: int = Field(default=40, ge=0)
    """Shortest document, in letter widths: a Chinese, Japanese or Korean character counts 2.5."""
    max_chars: int = Field(default=200_000, ge=1)
    """Longest document, in characters; beyond are logs and dumps."""
    min_letter_ratio: Share = 0.6
    """Letters of any script over characters that are not space (after Gopher's words with a letter)."""
    max_digit_ratio: Share = 0.25
    """Digits over characters that are not space: tables, logs."""
    max_uppercase_ratio: Share = 0.5
    """Uppercase letters over letters, in scripts that have case."""
    max_symbol_ratio: float = Field(default=0.1, ge=0)
    """Number signs and ellipses over words (Gopher: 0.1), where most of the text is in a script with spaces."""
    max_bullet_line_ratio: Share = 0.9
    """Lines that begin with a bullet, over all (Gopher: 0.9). Like all rules about lines, for two lines or more."""
    max_ellipsis_line_ratio: Share = 0.3
    """Lines that end with an ellipsis, over all (Gopher: 0.3)."""
    max_duplicate_line_ratio: Share = 0.3
    """Lines that repeat an earlier one, over all (Gopher: 0.30)."""
    max_duplicate_line_char_ratio: Share = 0.2
    """Characters in such lines, over all (Gopher: 0.20)."""
    repeated_ngrams: bool = False
    """Drop what repeats phrases: the shares of Gopher's table A1 for 2- to 10-grams, in documents of 50 words or more;
    characters stand for words in scripts without spaces. For web pages: of manuals it drops one in twelve, most of them
    good, as reference prose repeats itself."""
    max_mean_word_chars: float = Field(default=10.0, gt=0)
    """Mean length of words, where most of the text is in a script written with spaces (Gopher: 3 to 10)."""
    max_compression: float = Field(default=8.0, gt=1)
    """UTF-8 bytes over bytes after zlib: text that says one thing over and over, in any script."""
    min_stop_words: int = Field(default=0, ge=0)
    """Fewest different function words (Gopher: 2) of a document of 50 words or more whose language has a list."""
    placeholder_text: bool = True
    """Drop pages with "lorem ipsum" (C4)."""
    languages: tuple[str, ...] = ()
    """Languages to keep, such as `[en, zh]`; empty: all."""
    min_language_score: Share = 0.5
    """How sure the language identification has to be, with `languages`."""
    exclude: tuple[Pattern, ...] = ()
    """Regular expressions; a document in which one is found is dropped."""
    require: tuple[Pattern, ...] = ()
    """Regular expressions; a document in which one is not found is dropped."""


class PairFilterSettings(Section):
    """Which labelled pairs are dropped, each with a counted reason."""

    min_chars: int = Field(default=1, ge=0)
    """Shortest side, in characters."""
    max_chars: int = Field(default=2_000, ge=1)
    """Longest side, in characters."""
    max_length_ratio: float = Field(default=4.0, ge=1)
    """Of a translation: the wider side over the other, in letter widths, where a side is wider than 20."""
    identical: bool = True
    """Drop translations whose sides are the same text of two words or more."""
    languages: bool = True
    """Drop translations with a side that is surely in another language than the source says it is."""
    numbers: bool = True
    """Drop translations in which a number of two digits or more stands on one side alone."""
    placeholders: bool = True
    """Drop translations whose sides differ in placeholders: `%s`, `{name}`, `$(var)`, `<b>`."""
    exclude: tuple[Pattern, ...] = ()
    """Regular expressions; a pair in which one is found on either side is dropped."""


PiiKind = Literal["email", "phone", "ip", "credit_card", "iban", "api_key"]


class PiiSettings(Section):
    """What is done about personal data and secrets, counted by kind."""

    action: Literal["keep", "mask", "drop"] = "keep"
    """`mask` writes <EMAIL>, <PHONE>, …; `drop` drops the row."""
    kinds: tuple[PiiKind, ...] = ("email", "phone", "ip", "credit_card", "iban", "api_key")


class DedupSettings(Section):
    """Which copies are dropped. Exact copies always are: texts equal but for case, width and spaces."""

    fuzzy: bool = True
    """Drop documents nearly equal to a longer (or earlier) one: MinHash proposes pairs, a comparison of all shingles
    decides."""
    measure: Literal["jaccard", "containment"] = "jaccard"
    """Common shingles over all shingles of both, or over those of the smaller one."""
    threshold: float = Field(default=0.8, gt=0, le=1)
    """How alike two documents have to be."""
    shingle_words: int = Field(default=5, ge=1)
    """Words of a shingle; an ideograph is a word."""
    bands: int = Field(default=20, ge=1)
    """Bands of the locality-sensitive hashing: a pair is proposed where one agrees."""
    rows_per_band: int = Field(default=6, ge=1)
    """MinHash values of a band. 20 bands of 6 find 99.8 % of pairs with a Jaccard of 0.8, 99.99 % at 0.85."""
    keep: Literal["longest", "first"] = "longest"
    """Which copy stays: the longest, or the one whose source comes first in the YAML, then by file and row."""
    paragraphs: bool = False
    """Also drop paragraphs that stood in the corpus before, in any document."""
    min_paragraph_chars: int = Field(default=80, ge=1)
    """Shorter paragraphs may repeat."""
    pairs: Literal["pair", "source", "target"] = "pair"
    """What must be unique among labelled pairs."""


class DecontaminateSettings(Section):
    """Which texts are kept out of training because they are for testing."""

    against: tuple[EvaluationSource, ...] = ()
    """The evaluation sets."""
    ngram_words: int = Field(default=13, ge=3)
    """A row that shares so many words in a row with an evaluation text is dropped (GPT-3: 13); of shorter evaluation
    texts, a row that is the same text."""


# ----------------------------------------------------------------------------------------- tokens and shards


class TokenizerSettings(Section):
    """The tokenizer that `raylm prepare` trains, or takes."""

    kind: Literal["bpe", "unigram"] = "bpe"
    """Both byte-level: nothing is unknown. `unigram` takes minutes for each few megabytes of the sample."""
    start_from: str | None = None
    """An existing tokenizer instead: a directory, such as `<storage>/tokens/<other>/tokenizer`, or a hub id."""
    vocab_size: int = Field(default=4_000, ge=512)
    """All ids, special tokens included."""
    sample_mb: float = Field(default=24, gt=0)
    """Megabytes of text to train on: rows at random, so of each source in proportion to its size, but documents at most
    half of it where there are pairs. With `pretrain.stream`, about as much of each source of documents."""
    single_digits: bool = True
    """Digits one by one, so that a model can copy and reorder numbers that it never saw; otherwise groups of three."""
    special_tokens: tuple[str, ...] = ()
    """Further tokens that are never split."""
    languages: tuple[str, ...] = ("de", "fr", "es", "it", "pt", "nl", "pl", "ru", "ar", "ja", "ko", "zh")
    """Languages that get a task token besides those of the pair sources, for fine-tuning later."""


class PackSettings(Section):
    """How documents share sequences."""

    strategy: Literal["best_fit", "concatenate"] = "best_fit"
    """`best_fit` cuts few documents; `concatenate` cuts wherever a sequence ends."""
    max_padding: float = Field(default=0.01, ge=0, le=1)
    """For `best_fit`: beyond this share of padding, documents are cut to fill the gaps."""
    max_document_tokens: int | None = Field(default=None, ge=1)
    """Documents are truncated to so many tokens, and counted; unset: none is."""


class CorpusSettings(Section):
    """What `raylm prepare` reads, keeps and writes."""

    name: str = "default"
    """Names the artifact: `<storage>/tokens/<name>`."""
    documents: tuple[DocumentSource, ...] = ()
    """Monolingual text, for pretraining."""
    pairs: tuple[PairSource, ...] = ()
    """Labelled pairs, for fine-tuning and evaluation."""
    clean: CleanSettings = CleanSettings()
    filters: FilterSettings = FilterSettings()
    pair_filters: PairFilterSettings = PairFilterSettings()
    pii: PiiSettings = PiiSettings()
    dedup: DedupSettings = DedupSettings()
    decontaminate: DecontaminateSettings = DecontaminateSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    pack: PackSettings = PackSettings()
    sequence_length: int = Field(default=128, ge=16)
    """Tokens of one packed sequence."""
    validation: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents and of pairs held out for validation, chosen by a hash of their content."""
    shard_mb: float = Field(default=16, gt=0)
    """Megabytes of cleaned text that end up in one shard; a worker needs some ten times as much memory. In a corpus of
    more than four gigabytes shards hold more, with the root of its size: 16 times as much of a terabyte."""
    keep_dropped: bool = False
    """Write dropped rows with their reasons below `dropped/`."""
    keep_work: bool = True
    """Keep what the steps wrote, so that a changed setting redoes only what depends on it; costs about half of the
    corpus's size on disk."""
    max_rejected: ShareOrNumber = 0.01
    """The most rows that cannot be read, as a share (`0.01`, `1%`) or a number (`20`), before the job fails."""
