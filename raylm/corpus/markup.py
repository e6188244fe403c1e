"""Markdown and HTML as plain text: what a reader of the page would read, without its navigation and program code."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal

from markdown_it import MarkdownIt
from markdown_it.token import Token

from raylm.errors import InputError

Markup = Literal["none", "markdown", "html"]

_FRONT_MATTER = re.compile(r"\A(---|\+\+\+)[ \t]*\r?\n.*?^\1[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def check_markup(markup: Markup, key: str) -> None:
    """:raises InputError: what reads this markup is not installed."""
    if markup == "html":
        try:
            _resiliparse()
        except ImportError as error:
            raise InputError(f"{key}: reading HTML needs a package more: pip install raylm[html]") from error


def plain_text(text: str, markup: Markup) -> str:
    """The prose of a text that is marked up."""
    if markup == "markdown":
        return markdown_text(text)
    return html_text(text) if markup == "html" else text


# ------------------------------------------------------------------------------------------------ HTML


@cache
def _resiliparse() -> tuple[Any, Any]:
    from resiliparse.extract import html2text
    from resiliparse.parse import encoding

    return html2text, encoding


def html_text(page: str | bytes) -> str:
    """The main content of a page; bytes that are not UTF-8 are in the encoding that it names, or looks to be in."""
    html2text, encoding = _resiliparse()
    if isinstance(page, bytes):
        try:
            page = page.decode()
        except UnicodeDecodeError:
            page = str(encoding.bytes_to_str(page, encoding.detect_encoding(page, from_html_meta=True)))
    return str(html2text.extract_plain_text(page, main_content=True))


# -------------------------------------------------------------------------------------------- Markdown


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


def markdown_text(text: str) -> str:
    """Headings, paragraphs, lists and tables as lines of prose, blank lines between blocks.

    Code blocks, HTML tags, images and front matter go; the words of links, of emphasis and `code` within a sentence
    stay. Items keep their bullet or number, the cells of a table's row are parted by ` | `.
    """
    written: list[str] = []
    gap, bullet = "\n\n", ""
    hidden = False  # the paragraph that we are in is an item of a list without blank lines
    cells: list[str] | None = None  # of the table's row that we are in
    for token in _parser().parse(_FRONT_MATTER.sub("", text, count=1)):
        if token.type == "list_item_open":
            bullet = f"{token.info}{token.markup} " if token.info else "- "
        elif token.type == "tr_open":
            cells = []
        elif token.type == "paragraph_open":
            hidden = token.hidden
        elif token.type == "inline" and cells is not None:
            cells.append(_words(token))
        elif token.type == "inline":
            if words := _words(token):
                written += [gap, bullet, words]
                gap, bullet = "\n" if hidden else "\n\n", ""
            hidden = False
        elif token.type == "tr_close" and cells is not None:
            if any(cells):
                written += [gap, " | ".join(cells)]
                gap = "\n"
            cells = None
        elif token.type == "table_close" or (token.level == 0 and token.type.endswith("_list_close")):
            gap, bullet = "\n\n", ""
    return "".join(written[1:])


def _words(token: Token) -> str:
    """The words of a heading, a paragraph or a cell, in one line but for hard breaks."""
    words = []
    for child in token.children or ():
        if child.type in ("text", "code_inline"):
            words.append(child.content)
        elif child.type in ("softbreak", "hardbreak"):
            words.append(" " if child.type == "softbreak" else "\n")
    return "".join(words).strip()
