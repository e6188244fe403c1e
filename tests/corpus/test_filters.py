import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from raylm.corpus.clean import clean
from raylm.corpus.filters import reject_document, reject_pair
from raylm.settings import FilterSettings, PairFilterSettings

DATA = Path(os.environ.get("RAYLM_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
RULES = FilterSettings()
PAIR_RULES = PairFilterSettings()

ENGLISH = (
    "The scheduler decides which process runs next. It keeps one queue for each processor, and a process that"
    " has waited longest is taken first. In 2007 this replaced an older design.\nA queue is a balanced tree."
)
CHINESE = "调度器决定下一个运行的进程。它为每个处理器保存一个队列，等待最久的最先运行。\n2007 年取代旧设计。"
HINDI = "अनुसूचक तय करता है कि आगे कौन सी प्रक्रिया चलेगी। जो प्रक्रिया सबसे अधिक समय से प्रतीक्षा कर रही है उसे पहले लिया जाता है।"
THAI = "ตัวกำหนดการตัดสินใจว่ากระบวนการใดจะทำงานต่อไปกระบวนการที่รอนานที่สุดจะถูกเลือกก่อนเสมอในทุกกรณี"
ARABIC = "يقرر المجدول أي عملية ستعمل بعد ذلك، والعملية التي انتظرت أطول وقت تؤخذ أولاً دائماً في كل الأحوال."


@pytest.mark.parametrize(
    "text",
    [
        ENGLISH,
        CHINESE,
        HINDI,
        THAI,
        ARABIC,
        ENGLISH.replace("\n", " ") * 4,
        "短句也可以包含足够多的信息，应当保留。",
    ],
)
def test_prose_of_any_script_is_kept(text: str) -> None:
    assert reject_document(text, RULES) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "too_short"),
        ("Barely a sentence.", "too_short"),
        ("太短了。", "too_short"),
        ("Prose. " * 40_000, "too_long"),
        ("+--+ | 1 | ~~ == {} // ;; " * 5, "few_letters"),
        (" \n" * 50, "few_letters"),
        ("Total 1234 sum 5678 mean 9012 and more figures 34", "many_digits"),
        ("aGVsbG8gd29ybGQhhIGhlbGxvIHdvcmxkaGVsbG8gd29ybGQ" * 3, "long_words"),
        (" ".join(["example.org/some/very/long/path/to/page.html"] * 3), "long_words"),
        ("Read more.\n" * 2 + ENGLISH, None),
        ("Read more about this article here.\nShare it.\n" * 5 + ENGLISH, "repeated_lines"),
        ("Buy it now, it is cheap. " * 40, "repetitive"),
        ("现在购买，价格便宜。" * 60, "repetitive"),
    ],
)
def test_reasons(text: str, reason: str | None) -> None:
    assert reject_document(text, RULES) == reason


def test_repetition_in_a_few_long_lines_counts_by_characters() -> None:
    others = "\n".join(f"Line {name}." for name in ("one", "two", "three", "four", "five", "six"))
    text = f"{ENGLISH.splitlines()[0]}\n{others}\n{ENGLISH.splitlines()[0]}"
    assert reject_document(text, RULES) == "repeated_lines"  # 1 of 8 lines, but 4 of 10 characters
    assert reject_document(text, FilterSettings(max_duplicate_line_char_ratio=1)) is None


def test_vowel_signs_count_as_letters() -> None:
    assert reject_document(HINDI, FilterSettings(min_letter_ratio=0.9)) is None


def test_addresses_in_chinese_prose_are_not_its_words() -> None:
    text = CHINESE + " 参见 kernel.org/doc/html/latest/scheduler/sched-design-CFS.html"
    assert reject_document(text, RULES) is None


def test_settings_move_the_bounds() -> None:
    assert reject_document("Barely a sentence.", FilterSettings(min_chars=5)) is None
    assert reject_document(ENGLISH, FilterSettings(max_chars=100)) == "too_long"
    with pytest.raises(ValidationError, match="min_char"):
        FilterSettings(min_char=5)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        RULES.min_chars = 5


def test_lone_surrogates_do_not_raise() -> None:
    assert reject_document(ENGLISH.replace("\n", " ") * 3 + "\ud800", RULES) is None


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
        (
            "You must register a database within the program to see it.",
            "您必须注册数据库，才能看到它。",
            None,
        ),
        ("Save the document under another name, in another place.", "保存", "length_ratio"),
    ],
)
def test_reject_pair(source: str, target: str, reason: str | None) -> None:
    assert reject_pair(source, target, PAIR_RULES) == reason


def test_pair_settings_move_the_bounds() -> None:
    assert reject_pair("ab", "abc", PairFilterSettings(min_chars=3)) == "empty_source"
    assert reject_pair("abc", "ab", PairFilterSettings(min_chars=3)) == "empty_target"
    long_and_short = "Save the document under another name.", "Ja"
    assert reject_pair(*long_and_short, PairFilterSettings(max_length_ratio=50)) is None


def column(name: str, column: str) -> list[str]:
    path = DATA / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"real text is absent: no {path} (set RAYLM_DATA to its directory)")
    parquet = pytest.importorskip("pyarrow.parquet")
    return list(parquet.read_table(path).column(column).to_pylist())


@pytest.mark.parametrize("name", ["text.en.tech.validation", "text.zh.mixed.validation"])
def test_real_prose_is_kept(name: str) -> None:
    texts = [clean(text) for text in column(name, "text")]
    kept = sum(reject_document(text, RULES) is None for text in texts)
    assert kept >= 0.95 * len(texts)


@pytest.mark.parametrize("name", ["translate.en-de.docs.validation", "translate.en-zh.docs.validation"])
def test_real_pairs_are_kept_and_shuffled_ones_noticed(name: str) -> None:
    sources, targets = column(name, "src"), column(name, "tgt")
    kept = [reject_pair(*pair, PAIR_RULES) is None for pair in zip(sources, targets, strict=True)]
    assert sum(kept) >= 0.99 * len(kept)
    wrong = zip(sorted(sources, key=len), sorted(targets, key=len, reverse=True), strict=True)
    assert sum(reject_pair(*pair, PAIR_RULES) == "length_ratio" for pair in wrong) > 0.3 * len(kept)
