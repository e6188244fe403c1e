"""Parallel text from English into any language that Unicode CLDR describes: dates, times, amounts, units, names.

Every word comes from the Unicode Common Locale Data Repository (https://cldr.unicode.org) as Babel carries
it (Babel 2.18 carries CLDR 47; `babel.core.get_cldr_version()` says which one is installed). Nothing is
translated by hand, so `de`, `ja`, `ar` and `zh_Hant` work alike. Spaces and bidirectional marks stay as CLDR
has them.

A row is one to four fragments, joined by the "and" or the "or" list pattern of each language. Rows of the
test split differ from those of the train split by construction:

- values: a fragment with an open value (a date, an amount, …) belongs to the split that the hash of its
  English text says, so a test value is never seen in training, whatever language or seed;
- combinations: about a tenth of the sets of two or more kinds are seen in test rows only.

A test row has test values only; where it has no open value at all, its combination is a test-only one.
English lists stay unambiguous (no fragment holds " and " or " or ", none in a list of three or more holds a
comma, no two names are spelt alike), hence no English source is in both splits.
"""

import difflib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from random import Random
from typing import Any, Literal

from babel import Locale, UnknownLocaleError, dates, lists, numbers, units
from babel.localedata import locale_identifiers

Split = Literal["train", "test"]
Number = int | Decimal

ENGLISH = Locale("en")
TEST_ROW_PERCENT = 11  # of the rows that are no roll call: about 10 % of all
TEST_VALUE_PERCENT = 20
TEST_COMBINATION_PERCENT = 10
ROLL_CALL_EVERY = 8  # every 8th row is one name, taken in turn, so that a training set knows all of them
FRAGMENTS = {1: 30, 2: 44, 3: 22, 4: 4}  # how many -> weight
MAX_SOURCE_CHARS = 200
MIN_TERRITORIES = 100  # CLDR locales with fewer named territories are skeletons

# A text that counts none, one or two of something is always train: it alone shows a singular or a dual.
_FEW = re.compile(r"(in )?[012]\s")
_JOINED = re.compile(r" and | or ")


@dataclass(frozen=True)
class CldrPair:
    """One row: `source` in English, `target` in the other language, the kinds it is composed of, in order."""

    source: str
    target: str
    kinds: tuple[str, ...]
    split: Split


@dataclass(frozen=True)
class Kind:
    """A template: `write(locale, word, value)` gives its text, or "" where the locale has no data for it.

    `words` are the entries (codes) with weights of a closed vocabulary; `draw` gives the open value. A kind
    with neither is impossible, one without `draw` is closed. `comma`: its English text may hold ", ".
    """

    weight: int
    write: Callable[[Locale, Any, Any], str]
    draw: Callable[[Random], Any] | None = None
    words: dict[Any, int] | None = None
    comma: bool = False


# ---- open values -----------------------------------------------------------------------------------------


def _date(rng: Random) -> date:
    year = rng.randint(1980, 2035) if rng.random() < 0.7 else rng.randint(1900, 2100)
    return date(year, 1, 1) + timedelta(days=rng.randrange(365))


def _moment(rng: Random) -> datetime:
    return datetime.combine(_date(rng), _time(rng))


def _time(rng: Random) -> time:
    minute = rng.randrange(0, 60, 5) if rng.random() < 0.4 else rng.randrange(60)
    return time(rng.randrange(24), minute, rng.randrange(60))


def _hours(rng: Random) -> tuple[time, time]:
    start = rng.randrange(0, 1380, 5)
    end = rng.randrange(start + 5, 1440, 5)
    return time(*divmod(start, 60)), time(*divmod(end, 60))


def _days(rng: Random) -> tuple[date, date]:
    start = _date(rng)
    return start, start + timedelta(days=rng.choice((rng.randint(1, 20), rng.randint(1, 400))))


def _days_of_year(rng: Random) -> tuple[date, date]:
    day = rng.randrange(364)
    return date(2023, 1, 1) + timedelta(days=day), date(2023, 1, 1) + timedelta(days=rng.randint(day + 1, 364))


def _signed(rng: Random) -> int:
    return rng.choice((1, -1)) * rng.choice((rng.randint(1, 12), rng.randint(1, 90)))


def _magnitude(rng: Random, max_digits: int) -> int:
    """A log-uniform integer, a third of them round; exact integer arithmetic, so the same on any platform."""
    digits = rng.randint(1, max_digits)
    value = rng.randrange(10 ** (digits - 1), 10**digits)
    return value // 10 ** (digits - 2) * 10 ** (digits - 2) if digits > 2 and rng.random() < 0.33 else value


def _integer(rng: Random) -> int:
    return _magnitude(rng, 9)


def _decimal(rng: Random) -> Decimal:
    return Decimal(_magnitude(rng, 8)).scaleb(-rng.randint(1, 3))


def _amount(rng: Random) -> Number:
    whole = _magnitude(rng, 7)
    return whole if rng.random() < 0.5 else whole + Decimal(rng.randint(1, 99)).scaleb(-2)


def _measure(rng: Random) -> Number:
    whole = _magnitude(rng, 4)
    return whole if rng.random() < 0.7 else whole + Decimal(rng.randint(1, 9)).scaleb(-1)


def _degrees(rng: Random) -> Number:
    return rng.randint(-40, 120) if rng.random() < 0.6 else Decimal(rng.randint(-399, 1199)).scaleb(-1)


def _ratio(rng: Random) -> Decimal:
    return Decimal(rng.randint(1, 100)).scaleb(-2) if rng.random() < 0.4 else Decimal(rng.randint(1, 999)).scaleb(-3)


def _round(rng: Random) -> int:
    """At most three significant digits: the compact form of any language shows all of them."""
    return _magnitude(rng, 3) * 10 ** rng.randint(3, 9)


def _two_counts(rng: Random) -> tuple[int, int]:
    return rng.randint(1, 30), rng.randint(1, 30)


def _price(rng: Random) -> tuple[Number, str]:
    return _amount(rng), rng.choice(COMMON_CURRENCIES)


# ---- closed vocabularies: CLDR codes, common ones with a higher weight -------------------------------------

COMMON_CURRENCIES = tuple("USD EUR GBP JPY CNY CHF INR KRW AUD CAD BRL MXN RUB SEK NOK DKK PLN TRY ZAR".split())
COMMON_UNITS = tuple(
    "length-kilometer length-meter length-centimeter length-millimeter length-mile length-foot length-inch "
    "mass-kilogram mass-gram mass-milligram mass-tonne mass-pound volume-liter volume-milliliter "
    "volume-cubic-meter area-square-meter area-square-kilometer area-hectare speed-kilometer-per-hour "
    "speed-meter-per-second duration-year duration-month duration-week duration-day duration-hour "
    "duration-minute duration-second digital-byte digital-megabyte digital-gigabyte digital-terabyte "
    "power-watt power-kilowatt energy-kilowatt-hour energy-kilocalorie electric-volt electric-ampere".split()
)
_FIELDS = ("year", "month", "week", "day", "hour", "minute", "second")
_SECONDS = dict(dates.TIMEDELTA_UNITS)
_PER = ("length-meter", "mass-kilogram", "volume-liter", "duration-hour", "duration-day", "duration-week")
_PER_NUMERATORS = ("length-meter", "mass-kilogram", "mass-gram", "volume-liter", "digital-megabyte", "energy-joule")


def _weighted(codes: Sequence[str], common: Sequence[str], weight: int) -> dict[Any, int]:
    return {code: weight if code in common else 1 for code in sorted(codes)}


TERRITORIES = dict.fromkeys(
    sorted(c for c in ENGLISH.territories if re.fullmatch("[A-Z]{2}", c) and c not in {"XA", "XB", "ZZ"}), 1
)
LANGUAGES = _weighted(list(ENGLISH.languages), [i for i in locale_identifiers() if "_" not in i], 4)
# Money in use on a fixed day: the answer must not change with the calendar.
_TENDER = {c for t in TERRITORIES for c in numbers.get_territory_currencies(t, date(2025, 1, 1), date(2025, 1, 1))}
CURRENCIES = _weighted(sorted(_TENDER), COMMON_CURRENCIES, 8)
_KNOWN_UNITS = [u for u in ENGLISH._data["unit_patterns"] if not u.startswith("temperature-")]
UNITS = _weighted(_KNOWN_UNITS, COMMON_UNITS, 10)
COMPOUNDS = {(over, under): 1 for over in _PER_NUMERATORS for under in _PER if over != under}
DURATIONS = {p: 1 for p in zip(_FIELDS[:-1], ("month", "week", "day", "hour", "minute", "second"), strict=True)}


# ---- writing: one value in one locale ----------------------------------------------------------------------


def _skeleton(name: str) -> Callable[[Locale, Any, Any], str]:
    """Writes a date or time by a CLDR skeleton; `j` in it stands for the locale's own hour, 12 or 24."""

    def write(locale: Locale, word: Any, value: Any) -> str:
        skeleton = name.replace("j", _hour(locale))
        if skeleton not in locale.datetime_skeletons:
            return ""
        return dates.format_skeleton(skeleton, value, locale=locale, fuzzy=False)

    return write


def _interval(name: str) -> Callable[[Locale, Any, Any], str]:
    def write(locale: Locale, word: Any, value: Any) -> str:
        skeleton = name.replace("j", _hour(locale))
        if skeleton not in locale.interval_formats:
            return ""
        return dates.format_interval(*value, skeleton, locale=locale, fuzzy=False)

    return write


def _hour(locale: Locale) -> str:
    return "H" if "H" in locale.time_formats["short"].pattern else "h"


def _date_and_time(locale: Locale, word: Any, value: datetime) -> str:
    pattern = str(dates.get_datetime_format("long", locale=locale)).replace("'", "")
    clock = dates.format_time(value, "short", locale=locale)
    return pattern.replace("{0}", clock).replace("{1}", dates.format_date(value, "long", locale=locale))


def _relative(length: Literal["long", "short"]) -> Callable[[Locale, Any, Any], str]:
    def write(locale: Locale, unit: Any, count: int) -> str:
        return dates.format_timedelta(  # the threshold keeps the unit: 18 hours stay 18 hours
            count * _SECONDS[unit], unit, threshold=1e9, add_direction=True, format=length, locale=locale
        )

    return write


def _compact(length: str) -> Callable[[Locale, Any, Any], str]:
    def write(locale: Locale, word: Any, value: int) -> str:
        known: Literal["long", "short"] = "long" if length in locale.compact_decimal_formats != "short" else "short"
        if length == "short":
            known = "short"
        return numbers.format_compact_decimal(value, format_type=known, locale=locale, fraction_digits=2)

    return write
