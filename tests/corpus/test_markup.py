from __future__ import annotations

import importlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.corpus import markup
from raylm.corpus.markup import check_markup, html_text, markdown_text, plain_text
from raylm.errors import InputError

PAGE = """\
---
title: Not prose
---
# Install *raylm*

Run `raylm` on a [cluster](https://example.com/a "title") of
machines, see <https://example.com>.<br>A second \\*line\\* &amp; more.

```bash
pip install raylm
```

    indented code

![a badge](badge.svg)

- tight one
- tight two
  1. nested **one**
  2. nested two

* loose one

* loose two

> quoted

| name | what |
|------|------|
| a    | `b` c |

Setext
======
"""


def test_markdown_becomes_its_prose() -> None:
    assert markdown_text(PAGE) == (
        "Install raylm\n\n"
        "Run raylm on a cluster of machines, see https://example.com.A second *line* & more.\n\n"
        "- tight one\n- tight two\n1. nested one\n2. nested two\n\n"
        "- loose one\n\n- loose two\n\n"
        "quoted\n\n"
        "name | what\na | b c\n\n"
        "Setext"
    )


def test_a_bullet_before_code_marks_nothing_else() -> None:
    assert markdown_text("- ```\n  code\n  ```\n\nprose") == "prose"
    assert markdown_text("***\n\n+++\n\ntext\n") == "+++\n\ntext"


@given(st.lists(st.text("abcü漢 ", min_size=1).map(str.strip).filter(bool), min_size=1))
def test_prose_without_markup_stays_as_it_is(paragraphs: list[str]) -> None:
    text = "\n\n".join(paragraphs)
    assert markdown_text(text) == text
    assert plain_text(text, "none") == text


def test_html_keeps_the_main_content() -> None:
    page = (
        "<html><head><title>t</title><script>var x;</script></head><body><nav><a href=/>Home</a></nav><main><h1>Title"
        "</h1><p>Hello <b>new</b> world &amp; all.</p></main><footer>Imprint</footer></body></html>"
    )
    assert html_text(page).split("\n\n") == ["Title", "Hello new world & all."]


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "windows-1252"])
def test_html_bytes_are_read_in_the_encoding_that_the_page_names(encoding: str) -> None:
    words = "Grüße aus der Küche" if encoding != "gbk" else "机器学习很有意思"
    page = f'<html><head><meta charset="{encoding}"></head><body><p>{words}</p></body></html>'
    assert html_text(page.encode(encoding)) == words


def test_html_without_its_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "resiliparse"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "resiliparse", None)
    importlib.reload(markup)
    with pytest.raises(InputError, match=r"corpus.documents\[0\]: .*pip install raylm\[html\]"):
        markup.check_markup("html", "corpus.documents[0]")
    check_markup("markdown", "corpus.documents[0]")
