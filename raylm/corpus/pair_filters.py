"""Quality rules for labelled pairs: which to keep, and for the others a reason that can be counted.

The rules about translations compare what both sides must have in common whatever their languages: lengths, numbers,
placeholders. Each gives the pair the benefit of the doubt, since a translator may reorder dates, regroup thousands or
number the arguments of a format.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from raylm.corpus.filters import width
from raylm.language import IDEOGRAPHS, identify, is_known, likeliest, primary, same_language
from raylm.settings import PairFilterSettings

_SHORT_WIDTH = 20.0


def reject_pair(
    source: str,
    target: str,
    rules: PairFilterSettings,
    *,
    translation: bool = True,
    source_language: str | None = None,
    target_language: str | None = None,
    generated: bool = False,
) -> str | None:
    """None for a pair worth keeping, otherwise the first reason against it.

    Reasons, in this order: `empty_source`, `empty_target` (under `min_chars`, if that is not 1), `too_long`,
    `length_ratio`, `identical`, `placeholders_differ`, `numbers_differ`, `excluded`, `wrong_language_source`,
    `wrong_language_target`.

    :param translation: False for a summary, of which only lengths and `exclude` are looked at.
    :param source_language: the code of the language that the source should be in, if it is known.
    :param target_language: likewise.
    :param generated: whether a program made the pair out of known parts: then it says what it should by construction,
        and only lengths and `exclude` are looked at.
    """
    source, target = source.strip(), target.strip()
    if len(source) < max(1, rules.min_chars):
        return "empty_source"
    if len(target) < max(1, rules.min_chars):
        return "empty_target"
    if max(len(source), len(target)) > rules.max_chars:
        return "too_long"
    if translation:
        shorter, longer = sorted((width(source), width(target)))
        if longer > _SHORT_WIDTH and longer > rules.max_length_ratio * shorter:
            return "length_ratio"
    compared = translation and not generated
    if compared and (reason := _against_contents(source, target, rules)) is not None:
        return reason
    if any(re.search(pattern, side) for pattern in rules.exclude for side in (source, target)):
        return "excluded"
    if compared and rules.languages:
        if source_language and _is_surely_other(source, source_language, target, target_language):
            return "wrong_language_source"
        if target_language and _is_surely_other(target, target_language, source, source_language):
            return "wrong_language_target"
    return None


def reject_labelled(text: str, label: str, rules: PairFilterSettings) -> str | None:
    """None for a labelled text worth keeping, otherwise the first reason against it.

    Reasons, in this order: `empty_source` (under `min_chars`, if that is not 1), `empty_target`, `too_long`,
    `excluded`. The label is a name: that it is there is all that is asked of it.
    """
    text = text.strip()
    if len(text) < max(1, rules.min_chars):
        return "empty_source"
    if not label.strip():
        return "empty_target"
    if len(text) > rules.max_chars:
        return "too_long"
    return "excluded" if any(re.search(pattern, text) for pattern in rules.exclude) else None


def _against_contents(source: str, target: str, rules: PairFilterSettings) -> str | None:
    if rules.identical and source == target and len(_WORD.findall(source)) > 1:
        return "identical"
    if rules.placeholders and _placeholders(source) != _placeholders(target):
        return "placeholders_differ"
    if rules.numbers and _numbers_differ(source, target):
        return "numbers_differ"
    return None


_WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W\d_{IDEOGRAPHS}]+")  # an ideograph is a word

# ---------------------------------------------------------------------------------------------- placeholders

_PLACEHOLDER = re.compile(
    r"%%"
    # A percent sign after a digit is a percentage: `100%ige`, `50%s`.
    r"|(?<!\d)%\((?P<python>\w+)\)[-+#0]*[\d.]*[a-zA-Z]"
    r"|(?<!\d)%(?:(?P<position>\d+)\$)?[-+#0']*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh|h|ll|l|L|q|j|z|t)?"
    r"(?P<printf>[ds]|[iouxXeEfFgGcp@](?![^\W\d_]{2}))"
    r"|(?<!\d)%L?(?P<qt>[1-9]\d?)(?![\d%$]|[.,]\d)"
    r"|(?P<named>%\{\w+\}|\$\([\w.]+\)|\$\{[\w.]+\}|\$\[[\w.]+\])"
    r"|\{(?P<brace>[A-Za-z_][\w.\[\]]*|\d*)(?:![rsa])?(?::[^{}\s]*)?\}"
    r"|<(?P<tag>/?[A-Za-z][\w:-]*)(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>"
)
_HTML_TAG = re.compile(
    "a|b|big|blockquote|body|br|code|div|em|font|h[1-6]|hr|html|i|img|kbd|li|ol|p|pre|s|small|span|strong|sub|sup|table"
    "|tbody|td|th|thead|tr|tt|u|ul"
)
_OF_TIMES = re.compile(
    "%[-_EO]?[HMYlRTB]"
)  # in these strftime and printf differ; how a date is written is up to a language


def _placeholders(text: str) -> Counter[str]:
    """The parts of a text that a program fills in or reads, and how often they are there.

    Only arguments taken in turn (`%s`, `{}`) are counted; what has a name may be used as often as a language needs.
    `%2$s` is an `%s`. `<file>` is a tag where it is closed, or HTML; otherwise it is a word in brackets.
    """
    if not ("%" in text or "{" in text or "$" in text or "<" in text):
        return Counter()
    found: Counter[str] = Counter()
    positions: set[str] = set()
    of_times = _OF_TIMES.search(text)
    for match in _PLACEHOLDER.finditer(text):
        kind = match.lastgroup
        if kind is None:
            continue
        value = match[kind]
        if kind == "printf":
            position = match["position"]
            if of_times or position in positions:
                continue
            if position is not None:
                positions.add(position)
            found["%" + ("d" if value in "diu" else value)] += 1
        elif kind == "tag":
            name = value.lower()
            if _HTML_TAG.fullmatch(name.strip("/")) or f"</{value.strip('/')}>" in text or "=" in match[0]:
                found[f"<{name}>"] = 1
        elif kind == "brace" and not value:
            found["{}"] += 1
        else:
            found[f"{kind} {value}"] = 1
    return found


# --------------------------------------------------------------------------------------------------- numbers

_RUN = re.compile(r"(?<![A-Za-z\d])\d+|\d+(?![A-Za-z\d])")  # but not the 18 of i18n
_JOINED = re.compile(r"(?<!\d)\d+(?:[.,'’:/-]\d+|[ \u00a0\u2009\u202f]\d{3}(?!\d))+")
# 100,000 is 10 万 or 100 k, 3 pm is 15:00.
_IN_OTHER_UNITS = re.compile(
    r"\d\s*(?:[万萬亿億兆千百]|(?:milli(?:on|ard)|billion|[кk]\b|mio\b|mrd\b|mld\b|[ap]\.?m\b))", re.IGNORECASE
)
_LATE_MONTH = re.compile(r"\b(?:oct|okt|ott|out|nov|d[eéi][cz])", re.IGNORECASE)


def _numbers_differ(source: str, target: str) -> bool:
    """Whether a number of two digits or more stands on one side alone.

    `2024-03-15` agrees with `15.3.2024`, since the runs of digits do; `1,234` with `1 234` and `1234`, since what
    separates digits does not count where the whole number is on both sides. The months of `12月` and the numbers of
    `第十二章` may be written in words.
    """
    if _IN_OTHER_UNITS.search(source) or _IN_OTHER_UNITS.search(target):
        return False
    runs = [{_digits(run) for run in _RUN.findall(side)} for side in (source, target)]
    if runs[0] == runs[1]:
        return False
    joined = [{match[0]: _digits(match[0]) for match in _JOINED.finditer(side)} for side in (source, target)]
    known = [own_runs.union(own.values()) for own_runs, own in zip(runs, joined, strict=True)]
    for here, there, other in ((0, 1, target), (1, 0, source)):
        explained = {
            _digits(run)
            for number, digits in joined[here].items()
            if digits in known[there]
            for run in _RUN.findall(number)
        }
        for digits in runs[here] - known[there] - explained:
            is_month = digits in ("10", "11", "12") and _LATE_MONTH.search(other)
            is_word = len(digits) == 2 and "十" in other
            if len(digits) > 1 and not is_month and not is_word:
                return True
    return False


def _digits(number: str) -> str:
    """The digits of a number as ASCII, without leading zeros and what stands between them."""
    if not number.isascii():
        number = "".join(str(unicodedata.decimal(sign)) for sign in number if sign.isdecimal())
    elif not number.isdecimal():
        number = "".join(filter(str.isdecimal, number))
    return number.lstrip("0")


# ------------------------------------------------------------------------------------------------- languages

# Between the languages of the two sides, fastText is right about nearly all texts of 20 letters. Of German and English
# sides 0.2 % are eight times likelier to be in the other one, and half of them are indeed untranslated; of swapped ones
# 96 % with less than 60 letters and 99.8 % with more. A third language needs more: short English may pass for French.
_MIN_LETTERS, _MIN_ODDS, _MIN_SCORE = 20, 8.0, 0.05
_MANY_LETTERS, _SURE = 40, 0.9
_GUESSES = 16
_CODE = re.compile(r"[\d_/\\=<>{}()\[\]@$%|*~^#&+]|\w[.:]\w|-\S*-|^-\w|[a-z][A-Z]")
_IDEOGRAPHS = re.compile(f"[{IDEOGRAPHS}]{{2}}")  # among file names, buttons and quotations
_LETTERS = re.compile(r"[^\W\d_]+")


def _is_surely_other(text: str, language: str, opposite: str, opposite_language: str | None) -> bool:
    """Whether the words of a text, without what looks like code, are in another language with hardly a doubt.

    :param opposite: the text of the other side: what is left untranslated is in its language.
    """
    text = _prose(text)
    letters = sum(map(width, _LETTERS.findall(text)))
    if letters < _MIN_LETTERS or (primary(language) in ("zh", "ja") and _IDEOGRAPHS.search(text)):
        return False
    guesses = likeliest(text, _GUESSES)
    found, score = guesses[0]
    if same_language(found, language) or not is_known(language):
        return False
    if letters >= _MANY_LETTERS and score >= _SURE:
        return True
    other = opposite_language or identify(_prose(opposite))[0]
    if same_language(other, language):
        return False
    of_other, of_own = (
        sum(score for code, score in guesses if same_language(code, wanted)) for wanted in (other, language)
    )
    of_own = max(of_own, guesses[-1][1] if len(guesses) == _GUESSES else 0)  # it may come next
    return of_other >= max(_MIN_SCORE, _MIN_ODDS * of_own)


def _prose(text: str) -> str:
    """The words that do not look like code; a Chinese sentence is one word here, whatever stands in it."""
    return " ".join(word for word in text.split() if not _CODE.search(word) or _IDEOGRAPHS.search(word))
