"""Scores of answers against references: chrF, BLEU (sacreBLEU), ROUGE, exact match, F1, accuracy, perplexity."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from raylm.language import IDEOGRAPHS, KANA

SCORE = "score_"
"""What begins the keys of scores in a run's log, such as `score_chrf_translate_de`."""
_UNSPACED = re.compile(f"[{KANA}{IDEOGRAPHS}]")
"""A sign of a script that is written without spaces."""


def chrf(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus chrF2, 0…100 (Popović 2015), with sacreBLEU's signature."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    score = metric.corpus_score(list(predictions), [list(references)]).score
    return {"chrf": round(score, 2), "chrf_signature": f"chrF2|{metric.get_signature()}"}


def bleu(predictions: Sequence[str], references: Sequence[str], to: str | None = None) -> dict[str, Any]:
    """Corpus BLEU-4, 0…100 (Papineni et al. 2002; Post 2018), with sacreBLEU's signature.

    :param to: the language of the references; Chinese is split into characters, Japanese and Korean likewise.
    """
    from sacrebleu.metrics import BLEU

    language = (to or "").replace("_", "-").split("-")[0]
    tokenize = {"zh": "zh", "ja": "char", "ko": "char"}.get(language, "13a")
    metric = BLEU(tokenize=tokenize)
    score = metric.corpus_score(list(predictions), [list(references)]).score
    return {"bleu": round(score, 2), "bleu_signature": f"BLEU|{metric.get_signature()}"}


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Share of predictions equal to their reference, in percent."""
    return {"exact_match": _hits_percent(predictions, references)}


_ARTICLES = re.compile(r"\b(a|an|the)\b")


def f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Mean F1 of the words that an answer has in common with its reference, 0…100 (SQuAD, Rajpurkar et al. 2016).

    As there, case, punctuation and the articles of English do not count; text without spaces is compared by character.
    """
    shares = map(_common_share, predictions, references)
    return {"f1": round(100 * sum(shares) / max(len(references), 1), 2)}


def _common_share(prediction: str, reference: str) -> float:
    said, wanted = words(prediction), words(reference)
    if not said or not wanted:
        return float(said == wanted)
    return 2 * sum((Counter(said) & Counter(wanted)).values()) / (len(said) + len(wanted))


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and the articles of English; without spaces, its characters."""
    plain = "".join(c for c in text.casefold() if not unicodedata.category(c).startswith(("P", "S")))
    return _UNSPACED.sub(r" \g<0> ", _ARTICLES.sub(" ", plain)).split()


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Share of labels that are right, in percent."""
    return {"accuracy": _hits_percent(predictions, references)}


def _hits_percent(predictions: Sequence[str], references: Sequence[str]) -> float:
    hits = sum(a == b for a, b in zip(predictions, references, strict=True))
    return round(100 * hits / max(len(references), 1), 2)


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Mean F1 of all labels, 0…100: a rare label weighs as much as a common one.

    Labels are those that a prediction or a reference has, as for `f1_score(average="macro")` of scikit-learn. With
    F1 = 2·hits / (predicted + expected) no label divides by zero.
    """
    predicted, expected = Counter(predictions), Counter(references)
    hits = Counter(a for a, b in zip(predictions, references, strict=True) if a == b)
    labels = predicted.keys() | expected.keys()
    total = sum(2 * hits[label] / (predicted[label] + expected[label]) for label in sorted(labels))
    return {"macro_f1": round(100 * total / max(len(labels), 1), 2)}


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0…100 (Lin 2004), stemmed; CJK text is scored by character."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True, tokenizer=_RougeTokenizer())
    totals = dict.fromkeys(kinds, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        for kind, score in scorer.score(reference, prediction).items():
            totals[kind] += score.fmeasure
    return {kind: round(100 * total / max(len(references), 1), 2) for kind, total in totals.items()}


class _RougeTokenizer:
    """ROUGE's own tokens for alphabetic text, and single characters for scripts without spaces.

    The reference tokenizer deletes everything but a-z and 0-9, so that Chinese text would score nothing.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._default = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return list(self._default.tokenize(text))
        spaced = _UNSPACED.sub(r" \g<0> ", text.lower())
        tokens: list[str] = []
        for word in spaced.split():
            if word.isascii():
                tokens += self._default.tokenize(word)
            else:
                kept = "".join(c for c in word if c.isalnum())
                tokens += [kept] if kept else []
        return tokens


def perplexity(mean_loss: float) -> float:
    """exp of a mean cross entropy in nats per token; infinite where that overflows."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def score(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[str], to: str | None = None
) -> dict[str, Any]:
    """The named scores of predictions against references of the same length."""
    scores: dict[str, Any] = {}
    if "chrf" in names:
        scores |= chrf(predictions, references)
    if "bleu" in names:
        scores |= bleu(predictions, references, to)
    if "exact_match" in names:
        scores |= exact_match(predictions, references)
    if "f1" in names:
        scores |= f1(predictions, references)
    if "accuracy" in names:
        scores |= accuracy(predictions, references)
    if "macro_f1" in names:
        scores |= macro_f1(predictions, references)
    if any(name.startswith("rouge") for name in names):
        scores |= rouge(predictions, references)
    return scores
