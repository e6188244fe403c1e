"""Answers that are likely none, told by what they look like: a flag beside each, for a person to look at."""

from __future__ import annotations

import re

from raylm.inference.answers import Row
from raylm.inference.prompts import Prompt
from raylm.language import IDEOGRAPHS, KANA, is_known, likeliest, same_language
from raylm.tasks import CLASSIFY, TRANSLATE

EMPTY, COPIED, REPEATS, WRONG_LANGUAGE = "empty", "copied", "repeats", "wrong_language"

_SIGNS = f"{KANA}{IDEOGRAPHS}\uac00-\ud7af"  # single jamo are written to laugh
_UNIT = re.compile(rf"[{_SIGNS}]|[^\W\d_{_SIGNS}]+|\d+")
"""A word, or a sign of a script that writes words without spaces."""
_LONGEST_LOOP = 12
_ROUNDS = 4
_LEAST_UNITS = 4
_LEAST_SURE = 0.5


def flags(prompt: Prompt, row: Row, output: str) -> list[str]:
    """What is odd about an answer, of `empty`, `copied`, `repeats` and `wrong_language`.

    - `empty`: it has neither letter nor digit, though its source has.
    - `copied`: a translation is its source, of four words or more: fewer may be a name.
    - `repeats`: some words come four times one after the other, and do not in the source: decoding went in circles.
    - `wrong_language`: a translation of four words or more is most likely not in the language asked for.
    """
    if prompt.task == CLASSIFY.name:
        return []
    sources = [text for text in row if text]
    found = []
    units = _units(output)
    if not units and any(_units(text) for text in sources):
        found.append(EMPTY)
    if _loops(units) and not any(_loops(_units(text)) for text in sources):
        found.append(REPEATS)
    if prompt.task == TRANSLATE.name and len(units) >= _LEAST_UNITS:
        if units == _units(sources[0]):
            found.append(COPIED)
        elif prompt.to and _is_of_another_language(output, prompt.to):
            found.append(WRONG_LANGUAGE)
    return found


def _units(text: str) -> list[str]:
    return _UNIT.findall(text.casefold())


def _loops(units: list[str]) -> bool:
    """Whether a run of units comes some times in a row."""
    for length in range(1, min(_LONGEST_LOOP, len(units) // _ROUNDS) + 1):
        same = 0
        for one, other in zip(units, units[length:], strict=False):
            same = same + 1 if one == other else 0
            if same >= length * (_ROUNDS - 1):
                return True
    return False


def _is_of_another_language(text: str, wanted: str) -> bool:
    if not is_known(wanted):
        return False
    guesses = likeliest(text, 2)
    if not guesses or guesses[0][1] < _LEAST_SURE:
        return False
    return not any(same_language(code, wanted) for code, _ in guesses)
