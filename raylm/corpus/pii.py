"""Personal data and secrets in text, found by form and check digits, and masked.

Pure functions, linear in the text's length. What has a check is checked: Luhn's digit and the issuer of a card, the
remainder of an IBAN, the country code and length of a phone number, the range of an address. What remains of bare
digits is taken for a phone number only where its form or a word before it says so: a false mask costs more than a
missed one in technical prose, which is full of numbers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from raylm.language import IDEOGRAPHS
from raylm.settings.corpus import PiiKind

Span = tuple[int, int]
"""Where something begins and ends."""

_MAX_ROUNDS = 8  # ordinary text needs two, the second of which finds nothing


def mask(text: str, kinds: Sequence[PiiKind]) -> tuple[str, dict[str, int]]:
    """The text with `<EMAIL>`, `<PHONE>`, … in place of what was found, and how often each kind was.

    Masking masked text changes nothing.
    """
    counts: dict[str, int] = {}
    for _ in range(_MAX_ROUNDS):
        before = text
        for kind, spans in _FINDERS.items():
            if kind in kinds:
                text, found = _replaced(text, spans(text), f"<{kind.upper()}>")
                if found:
                    counts[kind] = counts.get(kind, 0) + found
        # What is masked no longer hides what stands beside it.
        if text is before:
            break
    return text, counts


def _replaced(text: str, spans: Iterator[Span], by: str) -> tuple[str, int]:
    pieces: list[str] = []
    done = found = 0
    for start, end in spans:
        pieces += [text[done:start], by]
        done = end
        found += 1
    return ("".join([*pieces, text[done:]]), found) if found else (text, 0)


# --------------------------------------------------------------------------------------------------- secrets

# What services write before their keys makes them findable (the rules of gitleaks and of GitHub's secret scanning).
# The first of each is looked for in the text before the pattern is.
_KEYS = tuple(
    (needle, re.compile(rf"{prefix}{rest}(?![A-Za-z0-9_-])"))
    for needle, prefix, rest in (
        ("AKIA", r"AKIA(?<![A-Za-z0-9_-]AKIA)", r"[A-Z0-9]{16}"),  # AWS
        ("ASIA", r"ASIA(?<![A-Za-z0-9_-]ASIA)", r"[A-Z0-9]{16}"),
        ("AIza", r"AIza(?<![A-Za-z0-9_-]AIza)", r"[A-Za-z0-9_-]{35}"),  # Google
        *((name, rf"{name}(?<![A-Za-z0-9_-]{name})", r"[A-Za-z0-9]{36,251}") for name in ("ghp_", "gho_", "ghs_")),
        ("github_pat_", r"github_pat_(?<![A-Za-z0-9_-]github_pat_)", r"[A-Za-z0-9_]{82}"),
        ("glpat-", r"glpat-(?<![A-Za-z0-9_-]glpat-)", r"[A-Za-z0-9_-]{20,300}"),  # GitLab
        ("hf_", r"hf_(?<![A-Za-z0-9_-]hf_)", r"[A-Za-z]{34}"),  # Hugging Face
        ("_live_", r"[sr]k_live_(?<![A-Za-z0-9_-].k_live_)", r"[A-Za-z0-9]{10,247}"),  # Stripe
        ("_test_", r"[sr]k_test_(?<![A-Za-z0-9_-].k_test_)", r"[A-Za-z0-9]{10,247}"),
        # OpenAI, Anthropic: what has no digit or no capital is a class of a style sheet
        ("sk-", r"sk-(?<![A-Za-z0-9_-]sk-)(?=[A-Za-z_-]*+[0-9])(?=[a-z0-9_-]*+[A-Z])", r"[A-Za-z0-9_-]{20,250}"),
        ("xox", r"xox[abeoprs]-(?<![A-Za-z0-9_-]xox.-)", r"[A-Za-z0-9-]{10,250}"),  # Slack
        # a JSON Web Token (RFC 7519): header, payload, signature; the first two are base64url of what begins with {"
        ("eyJ", r"eyJ(?<![A-Za-z0-9_-]eyJ)", r"[A-Za-z0-9_-]{10,}+\.eyJ[A-Za-z0-9_-]{10,}+\.[A-Za-z0-9_-]*+"),
    )
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"[^-]*+(?:-(?!----)[^-]*+)*+"
    r"-----END (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
)


def _api_keys(text: str) -> Iterator[Span]:
    patterns = [pattern for needle, pattern in _KEYS if needle in text]
    if "PRIVATE KEY" in text:
        patterns.append(_PRIVATE_KEY)
    end = 0
    for span in sorted(match.span() for pattern in patterns for match in pattern.finditer(text)):
        if span[0] >= end:
            yield span
            end = span[1]


# ---------------------------------------------------------------------------------------------------- e-mail

_LOCAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.!#$%&'*+/=?^_`{|}~-"  # RFC 5322, dot-atom
_LATIN = "".join(map(chr, range(0xC0, 0x250)))  # RFC 6531; not all letters: Chinese is written without spaces
_MAX_LOCAL_CHARS = 64  # RFC 5321
_DOMAIN = re.compile(
    r"@(?:[A-Za-z0-9À-ɏ](?:[A-Za-z0-9À-ɏ-]{0,61}[A-Za-z0-9À-ɏ])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9À-ɏ])"
)
# Names of systemd's units and of images for dense screens have the form of an address.
_NO_DOMAIN = re.compile(
    r"\.(?:service|socket|target|mount|automount|swap|timer|slice|scope|path|device|png|jpe?g|gif|svg|webp)$"
)


def _emails(text: str) -> Iterator[Span]:
    if "@" not in text:
        return
    end = 0
    for domain in _DOMAIN.finditer(text):
        before = text[max(end, domain.start() - _MAX_LOCAL_CHARS) : domain.start()]
        # from the left: what only surrounds an address in prose is no part of it
        local = before[len(before.rstrip(_LOCAL + _LATIN)) :].lstrip("!#$%&'*/=?^`{|}~.-")
        if local and not local.endswith(".") and not _NO_DOMAIN.search(domain[0]):
            end = domain.end()
            yield domain.start() - len(local), end


# ------------------------------------------------------------------------------------------------------ IBAN

# ISO 13616: country code, check digits, account. Lengths from SWIFT's IBAN registry.
_IBAN_LENGTHS = {
    country: int(length)
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FO FI GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?=(?: ?[A-Z0-9]){11})")
_WORD = re.compile(r"\w", re.ASCII)
_IBAN_CHARS = re.compile(r"(?: ?[A-Z0-9])+")


def _ibans(text: str) -> Iterator[Span]:
    end = 0
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2])
        if length is None or match.start() < end:
            continue
        run = _IBAN_CHARS.match(text, match.start(), match.start() + 2 * length)
        places = [n for n, sign in enumerate(run[0]) if sign != " "][:length] if run else []
        if len(places) < length:
            continue
        stop = match.start() + places[-1] + 1
        number = text[match.start() : stop].replace(" ", "")
        # ISO 7064 MOD 97-10: A is 10, …, Z is 35
        digits = "".join(str(int(sign, 36)) for sign in number[4:] + number[:4])
        if not _WORD.match(text, stop) and int(digits) % 97 == 1:
            end = stop
            yield match.start(), stop


# ---------------------------------------------------------------------------------------------- credit cards

# Digits with signs between them that numbers are grouped by; all cards and phone numbers are in such runs.
_RUN = re.compile(r"[0-9][0-9 ().\-/]{5,}[0-9]")


@lru_cache(maxsize=1)
def _runs(text: str) -> list[Span]:
    return [run.span() for run in _RUN.finditer(text)]


_CARD = re.compile(
    r"[2-6](?<![A-Za-z0-9_].)(?<![0-9][.,-].)"
    r"(?:[0-9]{12,18}|[0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(\1[0-9]{3})?|[0-9]{3}([ -])[0-9]{6}\3[0-9]{4,5})"
    r"(?![A-Za-z0-9_]|[.,-][0-9])"
)
# Issuer identification numbers (ISO/IEC 7812) and the lengths of their cards.
_ISSUERS = (
    (re.compile(r"4"), (13, 16, 19)),  # Visa
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile(r"3[47]"), (15,)),  # American Express
    (re.compile(r"6011|64[4-9]|65|62|35(?:2[89]|[3-8])|220[0-4]"), (16, 17, 18, 19)),  # Discover, UnionPay, JCB, Mir
    (re.compile(r"30[0-5]|3095|3[689]"), (14, 16, 17, 18, 19)),  # Diners Club
    (re.compile(r"50(?:18|20|38)|5893|6304|67(?:59|6[1-3])"), (13, 14, 15, 16, 17, 18, 19)),  # Maestro
)


def _credit_cards(text: str) -> Iterator[Span]:
    for start, end in _runs(text):
        for card in _CARD.finditer(text, start, end + 2):
            if _is_card(card[0]):
                yield card.span()
            elif card[2] and _is_card(card[0][: -len(card[2])]):  # three digits more are the verification number
                yield card.start(), card.end() - len(card[2])


def _is_card(number: str) -> bool:
    digits = number.replace(" ", "").replace("-", "")
    if not any(len(digits) in lengths and issuer.match(digits) for issuer, lengths in _ISSUERS):
        return False
    # Luhn's formula (ISO/IEC 7812-1): every second digit from the right doubled, and its digits added
    doubled = sum(int("0246813579"[int(digit)]) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + doubled) % 10 == 0


# ----------------------------------------------------------------------------------------------- IP addresses

_IPV4_REST = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![\w]|\.[0-9])", re.ASCII)
# Global unicast (RFC 4291, 2000::/3): anything else has the form of a time, or of a name in C++.
_IPV6 = re.compile(
    r"[23](?<![\w:.].)[0-9A-Fa-f]{3}(?:::?[0-9A-Fa-f]{1,4}){0,7}(?:::)?(?![\w]|:[0-9A-Fa-f:])",
    re.ASCII,
)
_WORD_END = re.compile(r"[\w.]\Z", re.ASCII)
_TWO_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")  # found ten times faster than _IPV6 is
_NO_ADDRESS_AFTER = re.compile(
    r"(?:(?:version|release|section|chapter|appendix|figure|table|firmware|driver|build|kernel|第|节|章|版|版本)\W{0,3}"
    r"|[A-Za-z]/)\Z",
    re.IGNORECASE,
)


def _ips(text: str) -> Iterator[Span]:
    """Public addresses, as FineWeb masks them (Penedo et al. 2024, arXiv:2406.17557): private, loopback, link-local
    and documentation ranges say nothing of a person.

    Four single digits, a line's first number with a period behind it, and what a word such as "version" stands before,
    are taken for the number of a version or a section.
    """
    yield from sorted([*_ipv4(text), *(_ipv6(text) if _TWO_COLONS.search(text) else ())])


def _ipv4(text: str) -> Iterator[Span]:
    for rest in _IPV4_REST.finditer(text):
        before = text[max(0, rest.start() - 24) : rest.start()]
        first = before[len(before.rstrip("0123456789")) :]
        context = before[: len(before) - len(first)]
        if not first or len(first) > 3 or _WORD_END.search(context):
            continue
        address = first + rest[0]
        is_heading = (context.endswith("\n") or not context) and text.startswith((". ", ".\n", " "), rest.end())
        # sections, unlike most addresses, have small numbers
        if is_heading and max(map(int, address.split("."))) < 100:
            continue
        if len(address) > len("1.2.3.4") and not _NO_ADDRESS_AFTER.search(context) and _is_public(address):
            yield rest.start() - len(first), rest.end()


def _ipv6(text: str) -> Iterator[Span]:
    for match in _IPV6.finditer(text):
        if ":" in match[0] and _is_public(match[0]):
            yield match.span()


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and not parsed.is_multicast


# ---------------------------------------------------------------------------------------------- phone numbers

# ITU-T E.164: country codes of one and two digits; all others have three.
_SHORT_CODES = re.compile(r"1|7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]")
_LONG_CODES = re.compile(
    r"21[12368]|2[2346][0-9]|25[0-8]|29[01789]|3[57][0-9]|38[0-35-79]|42[013]|5[09][0-9]|67[02-9]|68[0-35-9]|69[0-2]"
    r"|80[08]|85[02356]|87[08]|88[0-368]|96[0-8]|97[0-79]|99[2-68]"
)
_NATIONAL_DIGITS = {"1": (10, 10), "7": (10, 10), "44": (9, 10), "49": (6, 12), "86": (9, 11), "33": (9, 9)}
_ANY_NATIONAL_DIGITS = (6, 12)

_CUE = re.compile(
    r"(?:\b(?:tele?phone|telefon|phone|mobile|mobil|handy|tel|fax|whatsapp|hotline|rufnummer)"
    r"(?: ?(?:number|nummer|no|nr))?|(?:电话|電話|手机|手機|传真|傳真|热线|座机)(?:号码|号)?)"
    r"(?: is| lautet|是|为)?[^\w\n]{0,4}\Z",
    re.IGNORECASE,
)
_CUE_CHARS = 32
_IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")

_START = r"(?<![\w/=#+-])(?<![0-9][.,])"
_END = r"(?![\w]|[.,/-][0-9])"
_INTERNATIONAL = re.compile(r"(?<![\w+])\+[1-9](?:[ ().\-/]{0,2}[0-9]){6,14}" + _END, re.ASCII)
_NATIONAL = re.compile(
    _START + r"(?:"
    # North America: area and exchange begin with 2 to 9, and N11 are services
    r"(?:1[ .-])?(?:\((?!.11)[2-9][0-9]{2}\) ?|(?!.11)[2-9][0-9]{2}([.-]))(?!.11)[2-9][0-9]{2}(?(1)\1|[ .-])[0-9]{4}"
    # Germany, and Chinese land lines: an area code set apart, or a mobile or free number
    r"|\(0[1-9][0-9]{1,4}\) ?[1-9][0-9]{2,}(?:[ -][0-9]{2,4}){0,3}"
    r"|0[1-9][0-9]{1,4} ?/ ?[1-9][0-9]{2,}(?:[ -][0-9]{1,4}){0,3}"
    r"|0(?:1[567][0-9]|800)[0-9]?[ -][0-9]{3,8}(?:[ -][0-9]{2,4}){0,2}"
    r"|0[1-9][0-9]{1,3}-[1-9][0-9]{5,7}"
    # Chinese mobile and service numbers
    r"|1[3-9][0-9]-[0-9]{4}-[0-9]{4}"
    r"|[48]00-[0-9]{3}-?[0-9]{4}|[48]00-[0-9]{4}-[0-9]{3}"
    r")" + _END,
    re.ASCII,
)
_CHINESE_MOBILE = re.compile(r"(?<![\w.,+-])1[3-9][0-9](?: ?[0-9]{4}){2}" + _END, re.ASCII)
_AFTER_CUE = re.compile(r"\(?[0-9](?:[ ().\-/]{0,2}[0-9]){5,14}" + _END, re.ASCII)
_DATE = re.compile(r"(?:19|20)[0-9]{2}(?:[./ -]|$)|[0-9]{1,2}[./-][0-9]{1,2}[./-](?:19|20)?[0-9]{2}(?![0-9])")


def _phones(text: str) -> Iterator[Span]:
    for start, end in _runs(text):
        signs = len(text[max(0, start - 2) : start]) - len(text[max(0, start - 2) : start].rstrip("+("))
        # The characters after the run say whether the number ends there.
        yield from _phones_in(text, start - signs, end + 2)


def _phones_in(text: str, start: int, stop: int) -> Iterator[Span]:
    """The numbers in one run of digits and signs, from the left."""
    cue = _CUE.search(text[max(0, start - _CUE_CHARS) : start])
    if cue and not _DATE.match(text, start, stop):
        number = _AFTER_CUE.match(text, start, stop)
        if number:
            yield number.span()
            start = number.end()
    near = slice(max(0, start - 16), stop + 16)
    spans = [match.span() for match in _INTERNATIONAL.finditer(text, start, stop) if _is_international(match[0])]
    spans += [match.span() for match in _NATIONAL.finditer(text, start, stop) if _is_national(match[0])]
    if _IDEOGRAPH.search(text[near]):
        spans += [match.span() for match in _CHINESE_MOBILE.finditer(text, start, stop)]
    for first, last in sorted(spans):
        if first >= start:
            yield first, last
            start = last


def _is_international(number: str) -> bool:
    digits = re.sub("[^0-9]", "", number.replace("(0)", ""))
    code = _SHORT_CODES.match(digits) or _LONG_CODES.match(digits)
    if code is None:
        return False
    fewest, most = _NATIONAL_DIGITS.get(code[0], _ANY_NATIONAL_DIGITS)
    return fewest <= len(digits) - len(code[0]) <= most and not (code[0] == "1" and digits[1] in "01")


def _is_national(number: str) -> bool:
    return 9 <= sum(map(str.isdigit, number)) <= 13


_FINDERS: dict[PiiKind, Callable[[str], Iterator[Span]]] = {
    "api_key": _api_keys,
    "email": _emails,
    "iban": _ibans,
    "credit_card": _credit_cards,
    "ip": _ips,
    "phone": _phones,
}
"""In the order in which they are applied: what has a check first."""
