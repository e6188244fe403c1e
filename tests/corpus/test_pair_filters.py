from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.corpus.pair_filters import reject_pair
from raylm.settings import PairFilterSettings

RULES = PairFilterSettings()


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("Save", "Speichern", None),
        ("OK", "In Ordnung, fertig", None),  # short: no ratio
        ("", "Speichern", "empty_source"),
        (" \n", "Speichern", "empty_source"),
        ("Save", " ", "empty_target"),
        ("x" * 2_001, "x" * 2_001, "too_long"),
        ("Save the document under another name.", "Ja", "length_ratio"),
        ("Ja", "Save the document under another name.", "length_ratio"),
        ("You must register a database within the program to see it.", "您必须注册数据库，才能看到它。", None),
        ("Save the document under another name, in another place.", "保存", "length_ratio"),
    ],
)
def test_lengths(source: str, target: str, reason: str | None) -> None:
    assert reject_pair(source, target, RULES) == reason


def test_settings_move_the_bounds() -> None:
    assert reject_pair("ab", "abc", PairFilterSettings(min_chars=3)) == "empty_source"
    assert reject_pair("abc", "ab", PairFilterSettings(min_chars=3)) == "empty_target"
    long_and_short = "Save the document under another name.", "Ja"
    assert reject_pair(*long_and_short, PairFilterSettings(max_length_ratio=50)) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("LibreOffice", None),
        ("10 x 20", None),
        ("Open File", "identical"),
        ("打开文件", "identical"),
    ],
)
def test_identical_sides_of_two_words(text: str, reason: str | None) -> None:
    assert reject_pair(text, text, RULES) == reason
    assert reject_pair(text, text, PairFilterSettings(identical=False)) is None


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("On 2024-03-15 at 10:30", "Am 15.3.2024 um 10.30 Uhr"),
        ("1,234.56 of 12,000", "1.234,56 von 12 000"),
        ("35,000 units at 10:30", "35000 Einheiten um 10.30 Uhr"),
        ("100,000 people", "10 万人"),
        ("December 30, 1899", "1899 年 12 月 30 日"),
        ("October 5", "10月5日"),
        ("chapter 12", "第十二章"),
        ("at 3:30 pm or 11 am", "um 15:30 oder 11 Uhr"),
        ("５６ files", "56 Dateien"),
        ("٤٥ files", "45 Dateien"),
        ("Chapter 3", "Kapitel 03"),
        ("i18n and l10n", "Übersetzung und Anpassung"),
        ("No. 4 of the 5 files", "Nr. 5 der 4 Dateien"),  # one digit: too often a word
        ("in 2001, and since then", "自2001年问世以来"),
        ("12 of 24", "12 von 24, also 12 mehr"),
    ],
)
def test_the_same_numbers_written_otherwise(source: str, target: str) -> None:
    assert reject_pair(source, target, RULES) is None


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("Port 8080 is used.", "Port 8008 wird verwendet."),
        ("Port 8080 is used.", "Der Port wird verwendet."),
        ("The port is used.", "Port 8080 wird verwendet."),
        ("From 10 to 25 files", "Von 10 bis 26 Dateien"),
        ("It costs 1,234 units.", "Es kostet 1.243 Einheiten."),
        ("in 2001, and since then", "自2007年问世以来"),
    ],
)
def test_numbers_of_one_side_alone(source: str, target: str) -> None:
    assert reject_pair(source, target, RULES) == "numbers_differ"
    assert reject_pair(source, target, PairFilterSettings(numbers=False)) is None


@given(st.integers(1_000, 999_999_999), st.sampled_from(["{:,}", "{:_}", "{}"]), st.sampled_from([".", " ", "'", ""]))
def test_grouping_thousands_is_no_difference(number: int, style: str, separator: str) -> None:
    source = style.format(number).replace("_", "\u202f")
    assert reject_pair(f"{source} files", f"{number:,} Dateien".replace(",", separator), RULES) is None
    assert reject_pair(f"{source} files", f"{number + 10:,} Dateien".replace(",", separator), RULES) == "numbers_differ"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("%s of %d", "%2$d von %1$s"),
        ("%d of %s", "%i von %s"),
        ("%5.2f km", "%.1f km"),
        ("%(name)s has {count} items", "{count} Dinge hat %(name)s"),
        ("${HOME} and $(var) and $[officename]", "$[officename], ${HOME} und $(var)"),
        ("%{x} is <b>bold</b>", "<b>fett</b> ist %{x}"),
        ("{name} left", "{name} ging, und {name} kam nicht wieder"),
        ("_Save as…", "Speichern &unter…"),
        ("100% of them, 50 %", "100%ige, 50 %"),
        ("Copying %1...", "%1 wird kopiert ..."),
        ("ls <file>", "ls <Datei>"),
        ("%l:%M %p", "%H:%M"),
        ("100%% of %s", "100 %% von %s"),
    ],
)
def test_the_same_placeholders_in_another_order(source: str, target: str) -> None:
    assert reject_pair(source, target, PairFilterSettings(numbers=False)) is None


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("%s of %s", "%s von"),
        ("%d files", "Dateien"),
        ("files", "%d Dateien"),
        ("%d files", "%s Dateien"),
        ("%(name)s left", "%(Name)s ging"),
        ("{0} of {1}", "{0} von {0}"),
        ("{} of {}", "{} von"),
        ("$(var) is set", "$(war) ist gesetzt"),
        ("${HOME} is set", "$HOME ist gesetzt"),
        ("$[officename] Help", "Hilfe"),
        ("%{x} is set", "x ist gesetzt"),
        ("Copying %1 to %2.", "%1 wird kopiert."),
        ("a <b>bold</b> word", "ein <b>fettes Wort"),
        ("see <link>here</link>", "siehe hier"),
        ('<a href="x">here</a>', "hier"),
        ("line<br/>break", "Zeilenumbruch"),
    ],
)
def test_placeholders_of_one_side_alone(source: str, target: str) -> None:
    rules = PairFilterSettings(numbers=False)
    assert reject_pair(source, target, rules) == "placeholders_differ"
    assert reject_pair(source, target, PairFilterSettings(numbers=False, placeholders=False)) is None


ENGLISH = "The scheduler decides which process runs next."
GERMAN = "Der Planer entscheidet, welcher Prozess als nächster läuft."
CHINESE = "调度器决定下一个运行的进程，等待最久的最先运行。"


@pytest.mark.parametrize(
    ("source", "target", "languages", "reason"),
    [
        (ENGLISH, GERMAN, ("en", "de"), None),
        (ENGLISH, GERMAN, ("en-GB", "de_AT"), None),
        (ENGLISH, CHINESE, ("en", "zh-Hant"), None),
        (ENGLISH, ENGLISH.replace("decides", "chooses"), ("en", "de"), "wrong_language_target"),
        (ENGLISH, ENGLISH.replace("decides", "chooses"), (None, "de"), "wrong_language_target"),
        (ENGLISH, ENGLISH.replace("decides", "chooses"), ("en", None), None),
        (GERMAN, GERMAN.replace("Planer", "Planer jetzt"), ("en", "de"), "wrong_language_source"),
        (ENGLISH, CHINESE, ("en", "de"), "wrong_language_target"),
        (ENGLISH, GERMAN, ("en", "zh"), "wrong_language_target"),
        (GERMAN, ENGLISH, ("en", "de"), "wrong_language_source"),
        ("Open the file", "Open a file", ("en", "de"), None),  # too short to be sure
        ("usage: git-log --all [file]", "git-log --all [file]: Aufruf", ("en", "de"), None),
        (ENGLISH, GERMAN, ("en", "tlh"), None),  # Klingon is not known to the model
        ("The file is saved on the disk.", "Filen er lagret på disken nå.", ("en", "nb"), None),
        ("The file is saved on the disk.", "Datoteka je spremljena na disk.", ("en", "sr_Latn"), None),
    ],
)
def test_languages(source: str, target: str, languages: tuple[str | None, str | None], reason: str | None) -> None:
    def rejected(rules: PairFilterSettings) -> str | None:
        return reject_pair(source, target, rules, source_language=languages[0], target_language=languages[1])

    assert rejected(RULES) == reason
    assert rejected(PairFilterSettings(languages=False)) is None


def test_patterns_are_looked_for_on_both_sides() -> None:
    rules = PairFilterSettings(exclude=(r"(?i)todo\b",))
    assert reject_pair("TODO: save", "Speichern", rules) == "excluded"
    assert reject_pair("Save the file", "Datei speichern, todo", rules) == "excluded"
    assert reject_pair("Save the file", "Datei speichern", rules) is None
    assert reject_pair("TODO: save", "Speichern", rules, generated=True) == "excluded"


def test_summaries_are_judged_by_lengths_and_patterns_alone() -> None:
    document = "Port 8080 of %s is used. " * 20
    assert reject_pair(document, "Ports", RULES, translation=False) is None
    assert reject_pair(document, document, RULES, translation=False) is None
    assert reject_pair(document, "", RULES, translation=False) == "empty_target"
    assert reject_pair(document, "Ports", PairFilterSettings(exclude=("8080",)), translation=False) == "excluded"
    assert reject_pair(document, "Ports", PairFilterSettings(max_chars=100), translation=False) == "too_long"


def test_generated_pairs_are_right_by_construction() -> None:
    for source, target in (("half past 12", "0:30 Uhr"), ("Hong Kong", "Hong Kong"), ("<b>%s</b>", "x")):
        assert reject_pair(source, target, RULES, source_language="en", target_language="de") is not None
        assert reject_pair(source, target, RULES, source_language="en", target_language="de", generated=True) is None
    assert reject_pair("", "15:30", RULES, generated=True) == "empty_source"
    assert reject_pair("Save the document under another name.", "Ja", RULES, generated=True) == "length_ratio"


@given(st.text(max_size=60), st.text(max_size=60))
def test_rules_about_numbers_and_placeholders_do_not_depend_on_the_direction(source: str, target: str) -> None:
    mirrored = {"empty_source": "empty_target", "empty_target": "empty_source"}
    both_empty = not source.strip() and not target.strip()
    there, back = reject_pair(source, target, RULES), reject_pair(target, source, RULES)
    assert both_empty or there == mirrored.get(back or "", back)


@given(st.text(alphabet="0123456789 .,:-/%sd{}<b>$()a一年", max_size=40))
def test_a_text_agrees_with_itself(text: str) -> None:
    rules = PairFilterSettings(identical=False)
    assert reject_pair(text, text, rules) in (None, "empty_source")


def test_text_made_to_be_slow_is_not() -> None:
    rules = PairFilterSettings(identical=False, max_chars=100_000)
    for text in ("1" * 20_000, "1," * 10_000, "<a " * 7_000, "{a" * 10_000, "%(" * 10_000, "词" * 20_000, "-" * 20_000):
        assert reject_pair(text, text, rules, source_language="en", target_language="en") is None or "词" in text


# ------------------------------------------------------------------------------------------------- real pairs


def pairs(data: Path, name: str) -> list[tuple[str, str]]:
    table = pq.read_table(data / f"{name}.parquet")
    return list(zip(table["src"].to_pylist(), table["tgt"].to_pylist(), strict=True))


FILES = [
    ("translate.en-de.docs.validation", "de"),
    ("translate.en-de.ui.validation", "de"),
    ("translate.en-zh.docs.validation", "zh"),
]


@pytest.mark.parametrize(("name", "to"), FILES)
def test_real_pairs_are_kept(data: Path, name: str, to: str) -> None:
    real = pairs(data, name)
    dropped = Counter(reject_pair(*pair, RULES, source_language="en", target_language=to) for pair in real)
    assert dropped[None] >= 0.99 * len(real), dropped


@pytest.mark.parametrize(("name", "to"), FILES)
def test_untranslated_text_is_found(data: Path, name: str, to: str) -> None:
    sources = [source for source, _ in pairs(data, name) if len(source.split()) >= 8]
    reasons = [
        reject_pair(source, f"{source} ", PairFilterSettings(identical=False), source_language="en", target_language=to)
        for source in sources
    ]
    assert reasons.count("wrong_language_target") >= 0.95 * len(sources)


@pytest.mark.parametrize(("name", "to"), FILES)
def test_changed_numbers_are_found(data: Path, name: str, to: str) -> None:
    rng = random.Random(1)
    found = []
    for source, target in pairs(data, name.replace("validation", "train"))[:20_000]:
        numbers = re.findall(r"(?<![A-Za-z\d])\d{2,}(?![A-Za-z\d])", target)
        if not numbers or not re.search(r"\d\d", source):
            continue
        number = rng.choice(numbers)
        changed = target.replace(number, str((int(number) * 7 + 31) % 10 ** len(number)).rjust(len(number), "8"))
        found.append(reject_pair(source, changed, RULES) == "numbers_differ")
    assert len(found) > 100
    assert sum(found) >= 0.95 * len(found)


def test_lost_placeholders_are_found(data: Path) -> None:
    rng = random.Random(1)
    rules = PairFilterSettings(max_length_ratio=100, numbers=False)
    found = []
    for source, target in pairs(data, "translate.en-de.ui.train")[:40_000]:
        placeholders = list(re.finditer(r"%(?:\d\$)?[sd]|\{\w+\}|\$\{\w+\}|%[1-9]|</?[bi]>", target))
        if not placeholders:
            continue
        lost = rng.choice(placeholders)
        rest = target[: lost.start()] + target[lost.end() :]
        if rest.strip():
            found.append(reject_pair(source, rest, rules) == "placeholders_differ")
    assert len(found) > 100
    assert sum(found) >= 0.95 * len(found)


def test_pairs_out_of_step_are_noticed(data: Path) -> None:
    real = pairs(data, "translate.en-de.docs.validation")
    sources, targets = zip(*real, strict=True)
    wrong = zip(sorted(sources, key=len), sorted(targets, key=len, reverse=True), strict=True)
    assert sum(reject_pair(*pair, RULES) == "length_ratio" for pair in wrong) > 0.3 * len(real)
