"""A byte-level BPE tokenizer: trained on a sample, lossless for any Unicode, `<pad>` as its last id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raylm.tasks import SUMMARY_TOKEN, language_token

UNKNOWN, BEGIN, END, MASK, PAD = "<unk>", "<s>", "</s>", "<mask>", "<pad>"
SENTINELS = tuple(f"<extra_id_{n}>" for n in range(64))

# GPT-4's split (cl100k) with single digits: words with their leading space, digits one by one, runs of other
# signs, line ends. Digits alone let a model copy and reorder numbers that it never saw.
_SPLIT = Regex(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_tokens(languages: Sequence[str]) -> list[str]:
    """Every token that is no text, in the order of their ids, but for `<pad>`, which comes last of all."""
    tasks = [SUMMARY_TOKEN, *sorted({language_token(language) for language in languages})]
    return [UNKNOWN, BEGIN, END, MASK, *tasks, *SENTINELS]


def train_tokenizer(texts: Iterable[str], vocab_size: int, languages: Sequence[str]) -> Tokenizer:
    """A tokenizer learned from texts (byte-level BPE: Sennrich et al. 2016, Radford et al. 2019).

    :param vocab_size: all ids: bytes, merges, special tokens and `<pad>`.
    :param languages: the target languages that get a task token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_SPLIT, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=special_tokens(languages),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=32,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Marian's loader in CTranslate2 cuts the last id off, which has to be the padding.
    tokenizer.add_special_tokens([AddedToken(PAD, special=True)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write the tokenizer as `transformers` loads it untouched."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        mask_token=MASK,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    ).save_pretrained(directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)


def text_encoder(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, reading special tokens inside a text as the plain characters they are."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    return plain
