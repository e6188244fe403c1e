"""Texts are parted where sentences end, and nowhere else, without losing a character."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.sentences import split_text

# Text of the signs that matter here, so that random strings meet every rule.
SIGNS = st.text(alphabet=st.sampled_from("aB1 .!?…。！？．３\"'”)(\n\r\t\u2028-*—é中、,"), max_size=60)


@settings(max_examples=400)
@given(SIGNS | st.text(max_size=80))
def test_its_own_sentences_give_the_text_back(text: str) -> None:
    parts = split_text(text)
    assert parts.join(parts.sentences) == text


@settings(max_examples=200)
@given(SIGNS)
def test_sentences_carry_no_white_space_around_them_and_no_line_end(text: str) -> None:
    for sentence in split_text(text).sentences:
        assert sentence == sentence.strip()
        assert len(sentence.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four… Five", ["One.", "Two!", "Three?", "Four…", "Five"]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("It (really) works. (So they say.) Good.", ["It (really) works.", "(So they say.)", "Good."]),
        ("First line\nsecond line", ["First line", "second line"]),
        ("  - One item.\n  - Two items.\n", ["One item.", "Two items."]),
        ("Title\n=====\n\nText.", ["Title", "Text."]),
        ("我来了。你好！真的吗？好", ["我来了。", "你好！", "真的吗？", "好"]),
        ("「はい。」と言った。", ["「はい。」", "と言った。"]),
        ("Released in 1999. It was new.", ["Released in 1999.", "It was new."]),
        ("Add 2.5 to 3.25. Then stop.", ["Add 2.5 to 3.25.", "Then stop."]),
        ("He lives in the U.S. It is big.", ["He lives in the U.S.", "It is big."]),
        ("It was 5 p.m. She left.", ["It was 5 p.m.", "She left."]),
        ("Acme Inc. is small. Ask Acme Inc. They know.", ["Acme Inc. is small.", "Ask Acme Inc.", "They know."]),
        ("See www.x.org. It works.", ["See www.x.org.", "It works."]),
        ("Take vitamin C. Then rest.", ["Take vitamin C.", "Then rest."]),
        ("It came with version 3. The rest is new.", ["It came with version 3.", "The rest is new."]),
        ("Das gilt z. B. Sonntags. Und so.", ["Das gilt z. B. Sonntags.", "Und so."]),
        ("A b. C d.", ["A b.", "C d."]),
        ("真的吗？！是的……好。", ["真的吗？！", "是的……好。"]),
        ("房间太小!早餐很差?是的。", ["房间太小!", "早餐很差?", "是的。"]),
        ("他走了．版本３．５来了．", ["他走了．", "版本３．５来了．"]),
        ("价格3.5元。版本Python 3.11。好", ["价格3.5元。", "版本Python 3.11。", "好"]),
        ('他说:"好。走。"然后走了。', ['他说:"好。', '走。"', "然后走了。"]),
        ('他来了。"你好。"', ["他来了。", '"你好。"']),
        ("（见第三章。）“完。”他说。", ["（见第三章。）", "“完。”", "他说。"]),
        ("第一句。 第二句。　第三句。", ["第一句。", "第二句。", "第三句。"]),
    ],
)
def test_sentences_are_parted(text: str, sentences: list[str]) -> None:
    assert list(split_text(text).sentences) == sentences


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith met Mrs. Jones.",
        "J. R. Hartley wrote it.",
        "Use a sign, e.g. A or B.",
        "See Fig. 3 and vol. 2 of it.",
        "See No. 5 for more.",
        "The U.S. Army came.",
        "1. Open the file",
        "Am 3. Oktober begann es.",
        "It costs 3.50 dollars",
        "Yahoo! is a name.",
        "Go to example.com now.",
        "Wait... what",
        "1. The file is opened",
        "Step 2. The file",
        "J. K. Rowling and the U.N. Security Council met.",
        "Use a sign, e.g. The one above.",
        "主机.名 a.b.c 你好!",
        "他说……然后走了",
    ],
)
def test_stops_that_end_nothing_do_not_part(text: str) -> None:
    assert split_text(text).sentences == (text,)


@pytest.mark.parametrize("text", ["", "   ", "----", "***\n!!!\n"])
def test_what_holds_no_letter_or_digit_is_no_sentence(text: str) -> None:
    assert split_text(text).sentences == ()
    assert split_text(text).join([]) == text


def test_other_sentences_keep_the_white_space() -> None:
    assert split_text("  A b.  C d.\n\nE f. ").join(["1", "2", "3"]) == "  1  2\n\n3 "


def test_a_language_with_spaces_gets_them_between_sentences_that_had_none() -> None:
    assert split_text("你好。再见。").join(["Hello.", "Bye."]) == "Hello. Bye."
    assert split_text("你好。再见。").join(["你好。", "再见。"]) == "你好。再见。"
    assert split_text("你好!再见。").join(["Hello!", "Bye."]) == "Hello! Bye."


def test_long_lines_take_linear_time() -> None:
    for text in ("." * 200_000, "A b. " * 40_000, "a" * 200_000 + ". B", "…" * 100_000 + "。"):
        assert "".join(split_text(text).join(split_text(text).sentences)) == text


def test_real_text_comes_back(data: Path) -> None:
    for name, column in (("text.en.tech", "text"), ("text.zh.mixed", "text"), ("summarize.en.packages", "document")):
        texts = pq.read_table(data / f"{name}.validation.parquet")[column].to_pylist()
        parted = [split_text(text) for text in texts]
        assert [parts.join(parts.sentences) for parts in parted] == texts
        assert sum(len(parts.sentences) for parts in parted) > 2 * len(texts)
