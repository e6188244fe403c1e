"""Cleaned text is regular, says what it said, and is not changed by cleaning it again."""

from __future__ import annotations

import re
import unicodedata
from itertools import product
from pathlib import Path

import ftfy
import pyarrow.parquet as pq
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.corpus.clean import _DOCUMENT, _LINE, _fixed, _is_suspect, clean, clean_line, clean_markup
from raylm.corpus.stopwords import STOP_WORDS
from raylm.settings.corpus import CleanSettings

# Pieces that the steps act on, to be found next to each other far more often than random text has them.
PIECES = [
    "word", "中文。", "　", "é", "e\u0301", "a\u200b\u0301", "â€™", "Ã©", "x", " ", "  ", "\t",
    "&amp;", "&lt;", "&gt;", "amp;", "&#60;", "lt;", "<", ">", "<b>", "</b>", "<p>", "<br/>", "<a href='x'>",
    "<!--", "-->", "<script>", "</script>", "`", "``", ":class:`", "~", "`_", ".. ", "note::",
    ".. note:: mind it", "::", "\n", "\n\n", "\r", "\r\n", ">>>", ">>> f()", "> ", "====", "----",
    "\x00", "\x1b[31m", "\x85", "\xa0", "\xad", "\u200b", "\u200c", "\u200d", "\u2028", "\ud83d", "\udca9",
    "中", "文", "。", "，", ",", ".", ";", ":", "?", "!", " 中 ", "！", "一", "(", ")", "/", "=", "「", "あ",
    "１", "ｂ", "ｶ", "ﾞ", "｡", "的", "我们", "们", "目的", "the", "The", "not", "don't", "-", "'", "’", "_", "3",
    "http://", "https://x.org/a_b?c=1", "www.", "x.org", "<URL>", "<https://x.org>", "`a <http://x.org>`_",
    "Read more", "\nRead more\n", "\n下一页\n", "\nAccept cookies\n", "\nword\n", "share ", "this",
    "\ufeff", "👩", "👩\u200d💻", "🏴", "\U000e0067", "کتاب\u200cها", "क्\u200dष", "한글", "\u1100\u1161",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=())),  # with lone surrogates
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(alphabet="<>b/&amplt;`:. \n~_x=", max_size=30),
)
RULES = st.builds(
    CleanSettings, **{name: st.from_type(field.annotation) for name, field in CleanSettings.model_fields.items()}
)
BARE = CleanSettings(markup=False, boilerplate=False, cjk=False)


@settings(max_examples=1500)
@given(TEXTS, RULES)
def test_cleaning_twice_is_cleaning_once(text: str, rules: CleanSettings) -> None:
    for function in (clean, clean_line):
        once = function(text, rules)
        assert function(once, rules) == once


@settings(max_examples=600)
@given(TEXTS, RULES)
def test_result_is_regular(text: str, rules: CleanSettings) -> None:
    for function in (clean, clean_line):
        result = function(text, rules)
        result.encode("utf-8")
        assert unicodedata.is_normalized("NFC", result)
        assert result == result.strip()
        assert "  " not in result
        controls = {character for character in result if unicodedata.category(character) in ("Cc", "Zl", "Zp")}
        assert controls <= {"\n", "\t"}
        assert "\n\n\n" not in result
    line = clean_line(text, rules)
    assert "\n" not in line and "\t" not in line


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
        ("ﬁne ＡＢＣ１２ “quoted” ‘so’", "ﬁne ABC12 “quoted” ‘so’"),
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
        ("打开　文件\u200b…", "打开文件…"),
        ("Accept all cookies", "Accept all cookies"),
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
        "中,",
        "中 ",
        "f(中;",
        "http://(",
        "www.",
        "\nshare this on ",
        "\nwe use cookies to ",
        "\n未经许可",
        "the ",
        "我们的",
    ],
)
def test_hostile_repetition_ends_and_is_clean(unit: str) -> None:
    everything = CleanSettings(repeated_lines=True, urls="mask", remove_punctuation=True, remove_stop_words=True)
    for rules in (CleanSettings(), everything):
        once = clean("&" + unit * 20_000 + "\n\nx", rules)  # would not end within minutes where a pattern is quadratic
        assert clean(once, rules) == once
        assert once.endswith("x")


# --- what may go, and what may not -----------------------------------------------------------------------------

PROSE = st.lists(
    st.lists(
        st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-'", min_size=1, max_size=9),
        min_size=1,
        max_size=9,
    ).map(lambda words: " ".join(words) + "."),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200)
@given(PROSE.filter(lambda lines: not any(set(line) <= set("-'. ") for line in lines)))
def test_plain_prose_is_unchanged(lines: list[str]) -> None:
    assert clean("\n".join(lines)) == "\n".join(lines)
    assert clean_line(" ".join(lines)) == " ".join(lines)


@settings(max_examples=400)
@given(st.lists(st.sampled_from(["a", "b", "", "Read more", "下一页", " a", "中 文", "Accept cookies"]), max_size=12))
def test_lines_go_and_none_comes(lines: list[str]) -> None:
    text = "\n".join(lines)
    others = iter(clean(text, BARE).split("\n"))
    dropping = BARE.model_copy(update={"boilerplate": True, "repeated_lines": True})
    for line in filter(None, clean(text, dropping).split("\n")):
        assert any(line == other for other in others)  # in this order


@pytest.mark.parametrize(
    "line",
    [
        "Please enable JavaScript to view the comments powered by Disqus.",
        "This site requires JavaScript.",
        "JavaScript is disabled in your browser.",
        "Your browser does not support the video tag.",
        "We use cookies to give you the best experience on our website.",
        "This website uses necessary cookies to analyse traffic. Learn more",
        "By continuing to browse this site you agree to our use of cookies.",
        "Accept all cookies",
        "Cookie Policy",
        "Share this article on Facebook",
        "Share this:",
        "Follow us on Twitter",
        "Subscribe to our newsletter",
        "Skip to main content",
        "Back to top",
        "READ MORE »",
        "Leave a Reply",
        "Advertisement",
        "Privacy Policy | Terms of Use",
        "请在浏览器中启用JavaScript后访问",
        "您的浏览器不支持 HTML5 视频。",
        "本网站使用cookie来提升您的浏览体验。",
        "分享到：微信 微博 QQ空间",
        "扫一扫关注公众号",
        "返回顶部",
        "上一篇：关于春天的诗",
        "阅读全文 >>",
        "责任编辑：张三",
        "登录后才能发表评论",
        "未经授权，不得转载",
        "关于我们 | 联系我们 | 网站地图",
        "京ICP备12345678号-1",
    ],
)
def test_boilerplate_goes(line: str) -> None:
    line = line.replace(">>", "»")
    assert clean(f"One.\n  {line} \nTwo.") == "One.\nTwo."
    assert clean(line) == ""
    assert line in clean(f"One.\n{line}\nTwo.", CleanSettings(boilerplate=False, cjk=False))


@pytest.mark.parametrize(
    "line",
    [
        "Enable JavaScript support in the engine with --enable-js, then run make.",
        "The server uses cookies to remember the session.",
        "Cookies are small pieces of data.",
        "Share this directory over NFS with the exports file.",
        "Advertisements are sent by routers every 30 seconds.",
        "Back to top-level configuration we go.",
        "Please log in to the server as root.",
        "Read more than one block at a time.",
        "Follow us on this journey.",
        "下一页表项指向物理内存。",
        "分享到共享目录的文件需要权限。",
        "关注性能的用户应当调整缓冲区。",
        "浏览器不支持时，服务器会返回错误码，客户端需要自己处理所有的情况，包括超时、重试以及其他各种可能发生的异常状况。详见下文",
    ],
)
def test_technical_prose_stays(line: str) -> None:
    assert clean(f"One.\n{line}\nTwo.", CleanSettings(cjk=False)) == f"One.\n{line}\nTwo."


def test_boilerplate_of_technical_documents_is_next_to_nothing(data: Path) -> None:
    without_the_rule = CleanSettings(boilerplate=False)
    for text in pq.read_table(data / "text.en.tech.validation.parquet")["text"].to_pylist():
        assert clean(text) == clean(text, without_the_rule)


def test_equal_lines_are_kept_once() -> None:
    text = "Menu\n\nOne.\nMenu\n\nTwo.\nmenu\n  Menu"
    assert clean(text, CleanSettings(repeated_lines=True)) == "Menu\n\nOne.\n\nTwo.\nmenu"
    assert clean(text) == "Menu\n\nOne.\nMenu\n\nTwo.\nmenu\nMenu"


def test_markup_may_stay() -> None:
    text = "<b>bold</b> ``x``\n===="
    assert clean(text, CleanSettings(markup=False)) == text
    assert clean(text) == "bold x"


@pytest.mark.parametrize(
    ("text", "masked", "removed"),
    [
        ("See https://x.org/a_(b)?c=d#e.", "See <URL>.", "See ."),
        ("(www.x.org), <https://x.org>", "(<URL>), <URL>", "(), "),
        ("访问https://x.org/路径。完", "访问<URL>路径。完", "访问路径。完"),
        ("awww. www. http:// ://x", "awww. www. http:// ://x", "awww. www. http:// ://x"),
        ("ftp://x.org/f, or file.org", "<URL>, or file.org", ", or file.org"),
    ],
)
def test_urls(text: str, masked: str, removed: str) -> None:
    assert clean(text) == text
    for function in (clean, clean_line):
        assert function(text, CleanSettings(urls="mask")) == masked
        assert function(text, CleanSettings(urls="remove")) == removed.strip()


@pytest.mark.parametrize(
    ("raw", "regular"),
    [
        ("共１２３个ＡＢＣ，５０％", "共123个ABC，50％"),
        ("ｶﾞｲﾄﾞ｡", "ガイド。"),
        ("请 不要 使用 Linux 系统", "请不要使用 Linux 系统"),
        ("これ は　ペン です", "これはペンです"),
        ("你好， 世界 ！", "你好，世界！"),
        ("한국어 문장 은 띄어쓰기", "한국어 문장 은 띄어쓰기"),
        ("你好,世界;再见:朋友?是!好", "你好，世界；再见：朋友？是！好"),
        ("周末, 请使用", "周末，请使用"),
        ("这点勉强能算优点.进入房间", "这点勉强能算优点。进入房间"),
        ("很好. 离市中心近", "很好。离市中心近"),
        # not between ideographs, numbers, names, items
        ("版本 3.5, 大小 1,024", "版本 3.5, 大小 1,024"),
        ("默认为 8 位,16 位", "默认为 8 位,16 位"),
        ("约翰.史密斯", "约翰.史密斯"),
        ("一. 概述", "一. 概述"),
        ("三.一四", "三.一四"),
        # code and paths
        ('print("你好,世界")', 'print("你好,世界")'),
        ("/文档/报告:草稿,终稿", "/文档/报告:草稿,终稿"),
        ("SHIFT(数字; 移动位数)", "SHIFT(数字; 移动位数)"),
        ("标签={名称:数值}", "标签={名称:数值}"),
        ("名称:数值 x 列表,项目", "名称：数值 x 列表，项目"),
    ],
)
def test_cjk(raw: str, regular: str) -> None:
    assert clean(raw) == regular
    assert clean_line(raw) == regular
    assert clean(raw, CleanSettings(cjk=False)) == raw.replace("　", " ")


@pytest.mark.parametrize(
    ("raw", "regular"),
    [
        ("Well-known: don't pay 3.5 (or 1,000)!", "Well-known don't pay 3.5 or 1,000"),
        ("“很好！”他说，真的。", "很好他说真的"),
        ("see <URL> and https://x.org/a_b, ok?", "see <URL> and https://x.org/a_b ok"),
        ("snake_case a+b हिन्दी।", "snake case a b हिन्दी"),
    ],
)
def test_punctuation_goes(raw: str, regular: str) -> None:
    assert clean(raw, CleanSettings(remove_punctuation=True)) == regular
    assert clean_line(raw, CleanSettings(remove_punctuation=True)) == regular


@pytest.mark.parametrize(
    ("raw", "regular"),
    [
        ("The cat is not on the mat, don't US IT", "cat not mat, don't US IT"),
        ("我们的目的是了解市场", "目的了解市场"),
        ("这本书不是很好", "本书不好"),
        ("我没有去酒吧了", "没有去酒吧"),
    ],
)
def test_stop_words_go(raw: str, regular: str) -> None:
    assert clean(raw, CleanSettings(remove_stop_words=True)) == regular
    assert clean_line(raw, CleanSettings(remove_stop_words=True)) == regular
    assert clean(raw) == raw


def test_stop_words_are_lower_case_words() -> None:
    assert {"en", "zh", "de", "fr", "es"} <= set(STOP_WORDS)
    for language, words in STOP_WORDS.items():
        assert 40 <= len(words) <= 150, language
        assert all(word == word.lower() and word.isalpha() for word in words), language


# --- ftfy is spared only where it would change nothing ---------------------------------------------------------


def same_as_ftfy(text: str) -> None:
    for config in (_DOCUMENT, _LINE):
        if not (config.unescape_html and "&amp;amp;" in text):  # such chains are shortened first
            assert _fixed(text, config) == ftfy.fix_text(text, config)


# Text that was written in UTF-8 and read as something else, once or twice, beside text that was not.
BROKEN = st.builds(
    lambda text, codec, twice: (
        text.encode().decode(codec, "replace").encode().decode(codec, "replace")
        if twice
        else text.encode().decode(codec, "replace")
    ),
    st.text("éüñ’“”—…€中文яЖαà ab.", min_size=1, max_size=8),
    st.sampled_from(["latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1257", "mac_roman", "cp437", "iso8859_2"]),
    st.booleans(),
)
SUSPECTS = "".join(re.findall(f"[{''.join(MOJIBAKE_CATEGORIES.values())}]", "".join(map(chr, range(0x80, 0x10000)))))
MIXED = st.one_of(BROKEN, st.text(SUSPECTS + "aA .\n", max_size=6), st.sampled_from(PIECES), st.text(max_size=4))


@settings(max_examples=1500)
@given(st.lists(MIXED, max_size=8).map("".join))
def test_broken_text_is_mended_as_ftfy_does(text: str) -> None:
    same_as_ftfy(text)


def test_no_two_or_three_signs_that_ftfy_takes_for_broken_are_passed() -> None:
    signs = [*SUSPECTS, *"aA .\n1?"]
    for pair in map("".join, product(signs, signs)):
        assert _is_suspect(pair, _LINE) or not is_bad(pair), ascii(pair)
    for triple in map("".join, product(signs[::7], "aA .1", signs[::3])):
        assert _is_suspect(triple, _LINE) or not is_bad(triple), ascii(triple)


def test_real_text_is_mended_as_ftfy_does(data: Path) -> None:
    files = [("text.en.tech", "text"), ("text.zh.mixed", "text"), ("translate.en-de.docs", "tgt")]
    for name, column in files:
        for text in pq.read_table(data / f"{name}.validation.parquet")[column].to_pylist():
            same_as_ftfy(text)


def test_ordinary_text_is_spared_ftfy(data: Path) -> None:
    for name, share in (("text.en.tech", 0.1), ("text.zh.mixed", 0.1)):
        texts = pq.read_table(data / f"{name}.validation.parquet")["text"].to_pylist()
        lines = [line for text in texts for line in text.split("\n")]
        assert sum(_is_suspect(line, _LINE) for line in lines) < share * len(lines)
