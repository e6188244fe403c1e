"""A byte-level tokenizer, BPE or unigram: trained on a sample, lossless for any Unicode, `<pad>` as its last id."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from raylm.errors import InputError
from raylm.settings import TokenizerSettings
from raylm.tasks import ANSWER_TOKEN, SUMMARY_TOKEN, language_token

UNKNOWN, BEGIN, END, MASK, PAD = "<unk>", "<s>", "</s>", "<mask>", "<pad>"
SENTINELS = tuple(f"<extra_id_{n}>" for n in range(64))

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_MAX_TOKEN_BYTES = {"bpe": 32, "unigram": 16}
_SCORE_DIGITS = 4
_NEVER = -1e6
"""A score that any other way to read a text beats."""

# GPT-4's split (cl100k): words with the sign or space before them, digits, runs of other signs, line ends. Two things
# are otherwise: marks belong to the letter before them, as in Hindi or Arabic, and what is written without spaces makes
# words of its own, without the punctuation and the Latin words beside it, as in DeepSeek's split.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_CJK_SIGNS = r"\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)(?!\p{L})"
    rf"|[{_UNSPACED}]+"
    rf"|[^\r\n\p{{L}}\p{{M}}\p{{N}}{_CJK_SIGNS}]?[\p{{L}}\p{{M}}&&[^{_UNSPACED}]]+"
    r"|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_tokens(languages: Sequence[str], further: Sequence[str] = ()) -> list[str]:
    """Every token that is no text, in the order of their ids, but for `<pad>`, which comes last of all."""
    tasks = [SUMMARY_TOKEN, ANSWER_TOKEN, *sorted({language_token(language) for language in languages})]
    tokens = dict.fromkeys([UNKNOWN, BEGIN, END, MASK, *tasks, *further, *SENTINELS])
    return [token for token in tokens if token not in ("", PAD)]


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings, languages: Sequence[str]) -> Tokenizer:
    """A tokenizer learned from texts: BPE (Sennrich et al. 2016) or a unigram language model (Kudo 2018), over bytes
    (Radford et al. 2019), so that nothing is unknown. The same texts give the same bytes.

    It has `vocab_size` ids; fewer only where the texts have no further piece that repeats.

    :param languages: the target languages that get a task token.
    :raises InputError: `vocab_size` has no room for the bytes and special tokens.
    """
    special = special_tokens(languages, settings.special_tokens)
    fewest = len(special) + len(_ALPHABET) + 1
    if settings.vocab_size < fewest:
        raise InputError(
            f"corpus.tokenizer.vocab_size: {settings.vocab_size} ids are too few for {len(_ALPHABET)} bytes and "
            f"{len(special) + 1} special tokens; {fewest} is the least"
        )
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN) if settings.kind == "bpe" else models.Unigram())
    split = Regex(_SPLIT.replace("DIGITS", "1" if settings.single_digits else "3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer: trainers.BpeTrainer | trainers.UnigramTrainer
    if settings.kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=settings.vocab_size - 1,
            special_tokens=special,
            initial_alphabet=_ALPHABET,
            show_progress=False,
            max_token_length=_MAX_TOKEN_BYTES["bpe"],
        )
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=settings.vocab_size - 1,
            special_tokens=special,
            initial_alphabet=_ALPHABET,
            show_progress=False,
            unk_token=UNKNOWN,
            max_piece_length=_MAX_TOKEN_BYTES["unigram"],
        )
    tokenizer.train_from_iterator(texts, trainer)
    if settings.kind == "unigram":
        tokenizer = _with_regular_scores(tokenizer, special)
    # Marian's loader in CTranslate2 cuts the last id off, which has to be the padding.
    tokenizer.add_special_tokens([AddedToken(PAD, special=True)])
    return tokenizer


def _with_regular_scores(tokenizer: Tokenizer, special: Sequence[str]) -> Tokenizer:
    """A unigram tokenizer with scores that are the same for the same texts.

    The trainer adds up in the order of a hash table that differs from run to run: the last bits of all scores differ,
    and bytes that no text has get the lowest score plus multiples of 0.0001 in that order. The pieces themselves do
    not: what is pruned is decided by whole counts.
    """
    state = json.loads(tokenizer.to_str())
    scores = {token: score for token, score in state["model"]["vocab"] if token not in special}
    if None in scores.values():
        raise InputError("corpus.tokenizer: there is no text to learn from")
    lowest = min(scores.values())
    unseen = lowest + 1e-4 * (len(_ALPHABET) + 1)
    regular = {
        token: round(lowest if len(token) == 1 and score < unseen else score, _SCORE_DIGITS)
        for token, score in scores.items()
    }
    pieces = sorted(regular.items(), key=lambda piece: (-piece[1], piece[0]))
    # The trainer's score for special tokens is that of certainty: as words of a text they would be read as themselves.
    state["model"]["vocab"] = [*((token, _NEVER) for token in special), *pieces]
    return Tokenizer.from_str(json.dumps(state))


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write the tokenizer as `transformers` loads it untouched."""
    from transformers import PreTrainedTokenizerFast  # seconds to import, and workers that tokenise need none of it

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
