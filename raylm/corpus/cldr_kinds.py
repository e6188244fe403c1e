"""The kinds of text that CLDR can write in any of its languages: values, names, and the patterns around them."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from random import Random
from typing import Any, Literal

from babel import Locale, dates, numbers, units
from babel.localedata import locale_identifiers

ENGLISH = Locale("en")


@dataclass(frozen=True)
class Kind:
    """A template: a word of a closed vocabulary, an open value, or a word with a value, in any locale."""

    weight: int
    write: Callable[[Locale, Any, Any], str | None]  # of locale, word, value
    draw: Callable[[Random], Any] | None = None  # an open value
    words: dict[Any, int] | None = None  # CLDR code -> weight
    comma: bool = False  # whether its English text may hold ", "

    def text(self, locale: Locale, word: Any, value: Any) -> str:
        """The text, or "" where the locale has no data for it."""
        try:
            return self.write(locale, word, value) or ""
        except (KeyError, NotImplementedError):  # the latter: an interval by parts of the day
            return ""


# ---- open values: skewed to what is common; integer arithmetic only, so the same on any platform -----------


def _date(rng: Random) -> date:
    year = rng.randint(1980, 2035) if rng.random() < 0.7 else rng.randint(1900, 2100)
    return date(year, 1, 1) + timedelta(days=rng.randrange(365))


def _time(rng: Random) -> time:
    minute = rng.randrange(0, 60, 5) if rng.random() < 0.4 else rng.randrange(60)
    return time(rng.randrange(24), minute, rng.randrange(60))


def _moment(rng: Random) -> datetime:
    return datetime.combine(_date(rng), _time(rng))


def _hours(rng: Random) -> tuple[time, time]:
    start = rng.randrange(0, 1380, 5)
    return time(*divmod(start, 60)), time(*divmod(rng.randrange(start + 5, 1440, 5), 60))


def _days(rng: Random) -> tuple[date, date]:
    start = _date(rng)
    return start, start + timedelta(days=rng.choice((rng.randint(1, 20), rng.randint(1, 400))))


def _days_of_year(rng: Random) -> tuple[date, date]:
    first, last = sorted(rng.sample(range(365), 2))
    return date(2023, 1, 1) + timedelta(days=first), date(2023, 1, 1) + timedelta(days=last)


def _number(rng: Random, digits: int, decimals: int) -> int | Decimal:
    """A log-uniform number of up to `digits` digits, a third of them round, half with decimals, if any."""
    size = rng.randint(1, digits)
    low: int = 10 ** (size - 1)
    whole = rng.randrange(low, 10 * low)
    if size > 2 and rng.random() < 0.33:
        whole -= whole % (low // 10)
    if not decimals or rng.random() < 0.5:
        return whole
    return whole + Decimal(rng.randint(1, 99 if decimals == 2 else 9)).scaleb(-decimals)


def _signed(rng: Random) -> int:
    return rng.choice((1, -1)) * rng.randint(1, 60)


def _integer(rng: Random) -> int | Decimal:
    return _number(rng, 9, 0)


def _amount(rng: Random) -> int | Decimal:
    return _number(rng, 7, 2)


def _measure(rng: Random) -> int | Decimal:
    return _number(rng, 4, 1)


def _round(rng: Random) -> int:
    """At most three significant digits, which the compact form of any language shows; no power of ten, for
    which Babel takes the wrong plural form in French and Italian."""
    mantissa = int(_number(rng, 3, 0))
    return (2 * mantissa if mantissa in {1, 10, 100} else mantissa) * int(10 ** rng.randint(3, 9))


# ---- closed vocabularies: CLDR codes, common ones with a higher weight -------------------------------------


def _weighted(codes: Sequence[str], common: Sequence[str], weight: int) -> dict[Any, int]:
    return {code: weight if code in common else 1 for code in sorted(codes)}


COMMON_CURRENCIES = """USD EUR GBP JPY CNY CHF INR KRW AUD CAD BRL MXN RUB SEK NOK DKK PLN TRY
    ZAR""".split()  # noqa: SIM905
COMMON_UNITS = """length-kilometer length-meter length-centimeter length-millimeter length-mile length-foot
    length-inch mass-kilogram mass-gram mass-milligram mass-tonne mass-pound volume-liter volume-milliliter
    volume-cubic-meter area-square-meter area-square-kilometer area-hectare speed-kilometer-per-hour
    speed-meter-per-second duration-year duration-month duration-week duration-day duration-hour
    duration-minute duration-second
    digital-byte digital-megabyte digital-gigabyte digital-terabyte power-watt power-kilowatt
    energy-kilowatt-hour energy-kilocalorie electric-volt electric-ampere""".split()  # noqa: SIM905
LOCALES = sorted(locale_identifiers())
TERRITORIES = {c: 1 for c in sorted(ENGLISH.territories) if re.fullmatch("(?!XA|XB|ZZ)[A-Z]{2}", c)}
LANGUAGES = _weighted(list(ENGLISH.languages), [i for i in LOCALES if "_" not in i], 4)
VARIETIES = [i.split("_") for i in LOCALES if re.fullmatch("[a-z]{2,3}_[A-Z]{2}", i)]
# Money in use on a fixed day: the answer must not change with the calendar.
_DAY = date(2025, 1, 1)
_TENDER = {c for t in TERRITORIES for c in numbers.get_territory_currencies(t, _DAY, _DAY)}
CURRENCIES = _weighted(sorted(_TENDER), COMMON_CURRENCIES, 8)
_OTHER_KINDS = re.compile("temperature-|concentr-percent")
UNITS = _weighted([u for u in ENGLISH._data["unit_patterns"] if not _OTHER_KINDS.match(u)], COMMON_UNITS, 10)
_SECONDS = dict(dates.TIMEDELTA_UNITS)
FIELDS = dict.fromkeys(_SECONDS, 1)
DURATIONS = dict.fromkeys(itertools.pairwise(["year", "month", "day", "hour", "minute", "second"]), 1)
_PER = ("length-meter", "mass-kilogram", "volume-liter", "duration-hour", "duration-day", "duration-week")
_COUNTED = ("length-meter", "mass-kilogram", "mass-gram", "volume-liter", "digital-megabyte", "energy-joule")
PRICES = dict.fromkeys(_PER, 1)
RATES = {(over, under): 1 for over in _COUNTED for under in _PER if over != under}


# ---- writing where one call of Babel is not enough ---------------------------------------------------------


def _hour(locale: Locale) -> str:
    """The skeleton letter of the locale's own clock: 24 or 12 hours."""
    return "H" if "H" in locale.time_formats["short"].pattern else "h"


def _skeleton(skeleton: str) -> Callable[[Locale, Any, Any], str]:
    """Writes by a CLDR skeleton; `j` in it stands for the locale's own hour."""
    return lambda locale, _, value: dates.format_skeleton(
        skeleton.replace("j", _hour(locale)), value, locale=locale, fuzzy=False
    )


def _interval(skeleton: str) -> Callable[[Locale, Any, Any], str]:
    return lambda locale, _, value: dates.format_interval(
        *value, skeleton.replace("j", _hour(locale)), locale=locale, fuzzy=False
    )


def _date_and_time(locale: Locale, _: None, value: datetime) -> str:
    pattern = str(dates.get_datetime_format("long", locale=locale)).replace("'", "")
    clock = dates.format_time(value, "short", locale=locale)
    return pattern.replace("{0}", clock).replace("{1}", dates.format_date(value, "long", locale=locale))


def _relative(length: Literal["long", "short"]) -> Callable[[Locale, Any, Any], str]:
    """Writes "in 18 hours" or "18 hours ago"; the high threshold keeps the unit."""
    return lambda locale, unit, count: dates.format_timedelta(
        count * _SECONDS[unit], unit, threshold=1e9, add_direction=True, format=length, locale=locale
    )


def _compact(length: Literal["long", "short"]) -> Callable[[Locale, Any, Any], str]:
    def write(locale: Locale, _: None, value: int) -> str:
        known = length if length in locale.compact_decimal_formats else "short"  # as CLDR's root says
        text: str = numbers.format_compact_decimal(value, format_type=known, locale=locale, fraction_digits=2)
        return text

    return write


def _money(style: Literal["standard", "name"]) -> Callable[[Locale, Any, Any], str]:
    def write(locale: Locale, currency: str, value: int | Decimal) -> str:
        if style == "name" and currency not in locale.currencies:
            return ""
        if numbers.get_currency_precision(currency) == 0:
            value = int(value)
        cents = style == "standard" or isinstance(value, Decimal)  # "CHF 5.00", but "5 Swiss francs"
        text: str = numbers.format_currency(value, currency, locale=locale, format_type=style, currency_digits=cents)
        return text

    return write


def _unit_length(locale: Locale, unit: str, length: str) -> Literal["long", "short"]:
    """`length`, or short where the locale writes both alike, as Chinese; KeyError where it has no pattern."""
    patterns = locale._data["unit_patterns"][unit]
    if length == "long" and "other" in patterns.get("long", {}):
        return "long"
    return "short" if patterns["short"]["other"] else "long"


def _unit(length: Literal["long", "short"]) -> Callable[[Locale, Any, Any], str]:
    return lambda locale, unit, value: units.format_unit(value, unit, _unit_length(locale, unit, length), locale=locale)


def _unit_name(locale: Locale, unit: str, _: None) -> str | None:
    names: dict[str, str] = locale._data["unit_display_names"][unit]
    return names.get("long") or names.get("short")


def _rate(locale: Locale, word: tuple[str, str], value: int | Decimal) -> str:
    over, under = word
    length = _unit_length(locale, over, "long")
    if _unit_length(locale, under, "long") != length:
        return ""
    return str(units.format_compound_unit(value, over, denominator_unit=under, length=length, locale=locale))


def _price(locale: Locale, under: str, value: tuple[int | Decimal, str]) -> str:
    amount, currency = value
    money, length = _money("standard")(locale, currency, amount), _unit_length(locale, under, "long")
    return str(units.format_compound_unit(money, denominator_unit=under, length=length, locale=locale))


def _duration(locale: Locale, word: tuple[str, str], value: tuple[int, int]) -> str:
    parts = [_unit("long")(locale, f"duration-{u}", n) for u, n in zip(word, value, strict=True)]
    return join(parts, "unit", locale)


def _variety(locale: Locale, _: None, value: tuple[str, str]) -> str | None:
    """A language with a territory where it is spoken, "German (Austria)"."""
    return Locale(*value).get_display_name(locale) if value[1] in locale.territories else None


def join(parts: Sequence[str], style: Literal["standard", "or", "unit"], locale: Locale) -> str:
    """A list by the locale's patterns. `babel.lists.format_list` repeats or loses items where a locale states
    only a part of a style (Arabic, Spanish and Hebrew for units); here each missing pattern is inherited."""
    styles = ("unit", "unit-short", "standard") if style == "unit" else (style, "standard")
    stated = [locale.list_patterns[s] for s in styles if s in locale.list_patterns]
    text = parts[0]
    for i, part in enumerate(parts[1:], start=2):
        place = "2" if len(parts) == 2 else "start" if i == 2 else "end" if i == len(parts) else "middle"
        text = next(patterns[place] for patterns in stated if place in patterns).format(text, part)
    return text


# ---- the table of kinds; lo: locale, w: word, v: value -----------------------------------------------------

# fmt: off
KINDS = {
    "date_medium": Kind(4, lambda lo, w, v: dates.format_date(v, "medium", locale=lo), _date, comma=True),
    "date_long": Kind(7, lambda lo, w, v: dates.format_date(v, "long", locale=lo), _date, comma=True),
    "date_full": Kind(6, lambda lo, w, v: dates.format_date(v, "full", locale=lo), _date, comma=True),
    "date_numeric": Kind(3, _skeleton("yMd"), _date),
    "month_day": Kind(5, _skeleton("MMMMd"), _date),
    "month_year": Kind(4, _skeleton("yMMMM"), _date),
    "quarter_year": Kind(2, _skeleton("yQQQQ"), _date),
    "date_interval": Kind(4, _interval("yMMMd"), _days, comma=True),
    "day_interval": Kind(3, _interval("MMMd"), _days_of_year),
    "time": Kind(4, lambda lo, w, v: dates.format_time(v, "short", locale=lo), _time),
    "time_seconds": Kind(2, lambda lo, w, v: dates.format_time(v, "medium", locale=lo), _time),
    "time_interval": Kind(3, _interval("jm"), _hours),
    "weekday_time": Kind(3, _skeleton("Ejm"), _moment),
    "datetime_medium": Kind(3, lambda lo, w, v: dates.format_datetime(v, "medium", locale=lo), _moment,
                            comma=True),
    "datetime_long": Kind(5, _date_and_time, _moment, comma=True),
    "relative": Kind(6, _relative("long"), _signed, FIELDS),
    "relative_short": Kind(2, _relative("short"), _signed, FIELDS),
    "duration": Kind(5, _duration, lambda rng: (rng.randint(1, 30), rng.randint(1, 30)), DURATIONS,
                     comma=True),
    "integer": Kind(2, lambda lo, w, v: numbers.format_decimal(v, locale=lo), _integer),
    "decimal": Kind(2, lambda lo, w, v: numbers.format_decimal(v, locale=lo), lambda rng: _number(rng, 5, 2)),
    "percent": Kind(3, lambda lo, w, v: numbers.format_percent(v, locale=lo, decimal_quantization=False),
                    lambda rng: Decimal(_number(rng, 2, 1)).scaleb(-2)),
    "scientific": Kind(1, lambda lo, w, v: numbers.format_scientific(v, locale=lo), _integer),
    "compact_long": Kind(4, _compact("long"), _round),
    "compact_short": Kind(2, _compact("short"), _round),
    "currency": Kind(6, _money("standard"), _amount, CURRENCIES),
    "currency_name": Kind(9, _money("name"), _amount, CURRENCIES),
    "currency_compact": Kind(2, lambda lo, w, v: numbers.format_compact_currency(
        v, w, locale=lo, fraction_digits=2), _round, CURRENCIES),
    "price": Kind(4, _price, lambda rng: (_amount(rng), rng.choice(COMMON_CURRENCIES)), PRICES),
    "rate": Kind(3, _rate, _measure, RATES),
    "unit_long": Kind(11, _unit("long"), _measure, UNITS),
    "unit_short": Kind(5, _unit("short"), _measure, UNITS),
    "temperature": Kind(2, _unit("long"), lambda rng: rng.randint(-40, 120),
                        {"temperature-celsius": 4, "temperature-fahrenheit": 1}),
    "language_variety": Kind(5, _variety, lambda rng: rng.choice(VARIETIES)),
    "month": Kind(2, lambda lo, w, v: dates.get_month_names("wide", "stand-alone", locale=lo)[w],
                  words=dict.fromkeys(range(1, 13), 1)),
    "weekday": Kind(2, lambda lo, w, v: dates.get_day_names("wide", "stand-alone", locale=lo)[w],
                    words=dict.fromkeys(range(7), 1)),
    "territory": Kind(9, lambda lo, w, v: lo.territories[w], words=TERRITORIES),
    "language": Kind(6, lambda lo, w, v: lo.languages[w], words=LANGUAGES),
    "money": Kind(3, lambda lo, w, v: lo.currencies[w], words=CURRENCIES),
    "unit": Kind(3, _unit_name, words=UNITS),
}
# fmt: on
