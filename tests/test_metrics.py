from __future__ import annotations

import math

import pytest

from raylm import metrics


def test_perfect_and_empty_answers_have_the_extreme_scores() -> None:
    texts = ["Der Hund läuft schnell nach Hause.", "Heute ist Montag, der 5. Mai."]
    names = ("chrf", "bleu", "exact_match", "rougeL")
    perfect = metrics.score(names, texts, texts, "de")
    assert (perfect["chrf"], perfect["exact_match"], perfect["rougeL"]) == (100, 100, 100)
    assert perfect["bleu"] == pytest.approx(100)
    empty = metrics.score(names, ["", ""], texts, "de")
    assert (empty["chrf"], empty["bleu"], empty["exact_match"], empty["rougeL"]) == (0, 0, 0, 0)


def test_known_values() -> None:
    # ROUGE-L: the longest common subsequence has 3 of 4 and 3 of 6 words: F1 = 0.6
    assert metrics.rouge(["a b x c"], ["a b c d e f"])["rougeL"] == pytest.approx(60)
    assert metrics.exact_match(["a", "b", "c"], ["a", "x", "c"])["exact_match"] == pytest.approx(66.67)
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.perplexity(10_000) == math.inf


def test_chinese_is_scored_by_character() -> None:
    reference, prediction = ["今天天气很好"], ["今天天气不好"]
    assert metrics.rouge(prediction, reference)["rouge1"] == pytest.approx(100 * 5 / 6, abs=0.01)
    assert 0 < metrics.bleu(prediction, reference, "zh")["bleu"] < 100
    assert "tok:zh" in metrics.bleu(prediction, reference, "zh")["bleu_signature"]


def test_signatures_say_how_a_score_was_made() -> None:
    assert metrics.chrf(["a"], ["a"])["chrf_signature"].startswith("chrF2|nrefs:1|case:mixed")


def test_a_rare_label_weighs_as_much_as_a_common_one() -> None:
    references = ["a"] * 8 + ["b"] * 2
    always_a = metrics.score(("accuracy", "macro_f1"), ["a"] * 10, references)
    # F1 of a: 2·8 / (10 + 8); of b: none
    assert always_a == {"accuracy": 80.0, "macro_f1": pytest.approx(100 * (16 / 18) / 2, abs=0.01)}
    assert metrics.macro_f1(references, references) == {"macro_f1": 100.0}
    # a: 2·1 / (2 + 1), b: 2·1 / (1 + 2), c, which nobody expected: 0
    assert metrics.macro_f1(["a", "a", "b", "c"], ["a", "b", "b", "b"])["macro_f1"] == pytest.approx(
        100 * (2 / 3 + 2 / 4 + 0) / 3, abs=0.01
    )
    assert metrics.score(("accuracy", "macro_f1"), [], []) == {"accuracy": 0.0, "macro_f1": 0.0}


def test_answers_are_compared_by_their_words() -> None:
    # 2 of 3 and 2 of 2 words in common: 2·2 / (3 + 2)
    assert metrics.f1(["the quick brown fox"], ["Brown fox!"]) == {"f1": 80.0}
    assert metrics.f1(["b c", "", "x"], ["c b", "", "y"]) == {"f1": pytest.approx(200 / 3, abs=0.01)}
    # 4 of 4 and 4 of 5 characters
    assert metrics.f1(["天气很好"], ["天气很好吧。"]) == {"f1": pytest.approx(100 * 8 / 9, abs=0.01)}
    assert metrics.score(("f1", "exact_match"), ["The fox"], ["fox"]) == {"f1": 100.0, "exact_match": 0.0}
