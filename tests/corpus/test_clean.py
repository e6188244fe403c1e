import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.corpus.clean import clean, clean_line, clean_markup

# Pieces that the steps act on, to be found next to each other far more often than random text has them.
PIECES = [
    "word", "中文。", "　", "é", "e\u0301", "a\u200b\u0301", "â€™", "Ã©", "x", " ", "  ", "\t",
    "&amp;", "&lt;", "&gt;", "amp;", "&#60;", "lt;", "<", ">", "<b>", "</b>", "<p>", "<br/>", "<a href='x'>",
    "<!--", "-->", "<script>", "</script>", "`", "``", ":class:`", "~", "`_", ".. ", "note::",
    ".. note:: mind it", "::", "\n", "\n\n", "\r", "\r\n", ">>>", ">>> f()", "> ", "====", "----",
    "\x00", "\x1b[31m", "\x85", "\xa0", "\xad", "\u200b", "\u200c", "\u200d", "\u2028", "\ud83d", "\udca9",
    "\ufeff", "👩", "👩\u200d💻", "🏴", "\U000e0067", "کتاب\u200cها", "क्\u200dष", "한글", "\u1100\u1161",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=())),  # with lone surrogates
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(alphabet="<>b/&amplt;`:. \n~_x=", max_size=30),
)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    for function in (clean, clean_line):
        once = function(text)
        assert function(once) == once


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_result_is_regular(text: str) -> None:
    for function in (clean, clean_line):
        result = function(text)
        result.encode("utf-8")
        assert unicodedata.is_normalized("NFC", result)
        assert result == result.strip()
        assert "  " not in result
        controls = {character for character in result if unicodedata.category(character) in ("Cc", "Zl", "Zp")}
        assert controls <= {"\n", "\t"}
        assert "\n\n\n" not in result
    assert "\n" not in clean_line(text) and "\t" not in clean_line(text)


@pytest.mark.parametrize(
    ("raw", "regular"),
    [
        ("cafÃ© â€” naÃ¯ve", "café — naïve"),
        ("Fish &amp; chips &hellip;", "Fish & chips …"),
        ("&amp;amp;amp;lt; x", "< x"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("a\x00b\x07c\u200bd\xade\ufefff", "abcdef"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("a\xa0b\u2009c\u3000d", "a b c d"),
        ("one   two\n    three  \n\n\n\nfour", "one two\nthree\n\nfour"),
        ("name \t  value", "name\tvalue"),
        ("e\u0301 10³ ½", "é 10³ ½"),
        ("ﬁne ＡＢＣ “quoted” ‘so’", "ﬁne ＡＢＣ “quoted” ‘so’"),
        ("中文，全角！“引号”……《书名》", "中文，全角！“引号”……《书名》"),
        ("　　段首缩进。\r\n　　第二段。", "段首缩进。\n第二段。"),
        ("pair \ud83d\udca9 lone \ud800", "pair 💩 lone \ufffd"),
        (
            "👩\u200d💻 and 🏴\U000e0067\U000e0062\U000e007f",
            "👩\u200d💻 and 🏴\U000e0067\U000e0062\U000e007f",
        ),
        ("plain\u200d hidden\U000e0068\U000e0069", "plain hidden"),
        ("کتاب\u200cها", "کتاب\u200cها"),
        ("\u202bعربي\u202c", "عربي"),
        ("", ""),
        (" \n\t ", ""),
    ],
)
def test_clean(raw: str, regular: str) -> None:
    assert clean(raw) == regular


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("a :class:`~torch.Tensor` of :py:attr:`torch.dtype`", "a Tensor of torch.dtype"),
        ("see :ref:`the guide <guide-label>` or `the page <https://x.org>`_", "see the guide or the page"),
        ("call ``f(x)``, not `g`", "call f(x), not `g`"),
        ("```python\nf()\n```", "```python\nf()\n```"),
        (".. note:: Mind the gap.\n   It is wide.", "Mind the gap.\n   It is wide."),
        ("Text.\n\n.. code-block:: python\n   :linenos:\n\n   f()", "Text.\n\n\n   f()"),
        (".. versionadded:: 2.0\nText", "Text"),
        ("As here::\n\n    f()", "As here:\n\n    f()"),
        ("std::vector", "std::vector"),
        ("Title\n=====\nText", "Title\nText"),
        ("Text.\n\n>>> f()\n3\n>>> g()\n... more\n\nMore text.", "Text.\n\n\nMore text."),
        ("> he said\n>>> she said\nI say", "> he said\n>>> she said\nI say"),
        ("<p>One <b>bold</b> word<br/>and <a href='x'>a link</a></p>", "\nOne bold word\nand a link\n"),
        ("H<sub>2</sub>O<!-- water -->", "H2O"),
        ("<script>var x = '<b>';</script>text", "text"),
        ("git push <remote> <title> <b>", "git push <remote> <title> <b>"),
        ("if a < b and c > d", "if a < b and c > d"),
        ("std::map<a, b> <john@x.org> <https://x.org>", "std::map<a, b> <john@x.org> <https://x.org>"),
    ],
)
def test_clean_markup(raw: str, plain: str) -> None:
    assert clean_markup(raw) == plain


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (" Save  %s as\n{0} &File <b>%1$d</b> ", "Save %s as {0} &File <b>%1$d</b>"),
        ("&lt;none&gt; ``x`` :ref:`y`", "&lt;none&gt; ``x`` :ref:`y`"),
        ("cafÃ©\t“x”", "café “x”"),
        ("打开　文件\u200b…", "打开 文件…"),
    ],
)
def test_clean_line(raw: str, line: str) -> None:
    assert clean_line(raw) == line


@pytest.mark.parametrize(
    "unit",
    [
        "&",
        "amp;",
        "<",
        "<a ",
        ' b="',
        ":a",
        "`",
        "`a ",
        ">>> a\n",
        ".. a::\n",
        "<!--",
        "- ",
        " ",
        "\n ",
        "\u200d",
        "Ã©",
    ],
)
def test_hostile_repetition_ends_and_is_clean(unit: str) -> None:
    once = clean("&" + unit * 20_000 + "\n\nx")  # would not end within minutes where a pattern is quadratic
    assert clean(once) == once
    assert once.endswith("x")
