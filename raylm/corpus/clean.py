"""Text made regular, in any language, before filters and tokenizers see it.

Pure functions. ``clean`` is for documents, ``clean_line`` for one side of a translation pair,
``clean_markup`` is the step of ``clean`` that removes reST and HTML. Cleaning cleaned text changes nothing.
"""

import re
import unicodedata

import ftfy

# Curly quotes, full-width forms and ligatures stay, and NFC, not NFKC: that is how Chinese, French or German
# is written, and a model that is to write it must have seen it.
_DOCUMENT = ftfy.TextFixerConfig(
    uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False
)
# `&lt;none&gt;` in a message catalog is as much a placeholder as `<b>`: both sides must keep it.
_LINE = _DOCUMENT._replace(unescape_html=False)

# Encoding mistakes show in these characters only, entities and terminal escapes in "&" and ESC. Plain ASCII
# and pure Chinese are spared ftfy, which is by far the slowest step.
_MAY_BE_BROKEN = re.compile("[&\x1b\x80-\u2e7f\ud800-\udfff]")
# ftfy peels one layer for each pass over the text: a long chain would take time that grows with its square.
_AMP_CHAIN = re.compile(r"&(?:amp;){2,}")
_MAX_ROUNDS = 50  # ordinary text needs two; the bound is for text nested on purpose, like `<<<b>b>b>`

_NEWLINES = "\r\x0b\x0c\x85\u2028\u2029"
_SPACES = "\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
# Control and format characters (Unicode Cc, Cf) and noncharacters. Not among them: the Arabic and Egyptian
# format characters, which are visible or place signs; joiners and tags, which depend on their neighbours.
_REMOVED = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffc\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001"
)
_ODD = re.compile(f"[{_NEWLINES}{_SPACES}{_REMOVED}\u200c\u200d\U000e0020-\U000e007f]")
_ODD_NEWLINES = re.compile(f"\r\n|[{_NEWLINES}]")
_ODD_SPACES = re.compile(f"[{_SPACES}]")
_ODD_REMOVED = re.compile(f"[{_REMOVED}]")
# ZWNJ and ZWJ shape the scripts from Hebrew to Mongolian and build emoji; after anything else they are
# invisible noise. Tag characters spell the flags of Scotland or Wales; elsewhere they hide text.
_JOINED = (
    "\u0590-\u18af\ua800-\uabff\ufb1d-\ufdcf\ufe0f\ufe70-\ufefe\u2190-\u2bff\U00010a00-\U00011fff\U0001f000-\U0001faff"
)
_STRAY_JOINERS = re.compile(f"(?<![{_JOINED}])[\u200c\u200d]+")
_REPEATED_JOINERS = re.compile("([\u200c\u200d])[\u200c\u200d]+")
_STRAY_TAGS = re.compile("(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]+")

_GAPS = re.compile(r"[ \t]{2,}")
_LINE_EDGES = re.compile(r"[ \t]$|^[ \t]", re.MULTILINE)  # after _GAPS: an edge is one character wide
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """The document as regular text: NFC, no mojibake, control characters, markup or spare whitespace.

    Lines and paragraphs stay; indentation goes, and runs of spaces become one (one tab, if they hold a tab).
    Never raises: a lone surrogate becomes U+FFFD, so that the result can be written as UTF-8.
    """
    for _ in range(_MAX_ROUNDS):
        before = text
        text = _regular_lines(clean_markup(_regular_characters(text, _DOCUMENT)))
        # What one step uncovers another may change (an entity behind a removed tag): go on until all agree.
        if text == before:
            break
    return text


def clean_line(text: str) -> str:
    """One side of a translation pair as a single line; markup, entities and placeholders untouched."""
    for _ in range(_MAX_ROUNDS):
        before = text
        text = " ".join(_regular_characters(text, _LINE).split())
        if text == before:
            break
    return text


def _regular_characters(text: str, config: ftfy.TextFixerConfig) -> str:
    if _MAY_BE_BROKEN.search(text):
        text = ftfy.fix_text(_AMP_CHAIN.sub("&amp;", text), config)
    if _ODD.search(text):
        text = _ODD_NEWLINES.sub("\n", text)
        text = _ODD_SPACES.sub(" ", text)
        text = _ODD_REMOVED.sub("", text)
        text = _STRAY_JOINERS.sub("", _REPEATED_JOINERS.sub(r"\1", text))
        text = _STRAY_TAGS.sub("", text)
    return unicodedata.normalize("NFC", text)


def _regular_lines(text: str) -> str:
    text = _GAPS.sub(lambda gap: "\t" if "\t" in gap[0] else " ", text)
    text = _LINE_EDGES.sub("", text)
    return _BLANK_LINES.sub("\n\n", text).strip()


# --- markup -------------------------------------------------------------------------------------------------

# reST, https://docutils.sourceforge.io/docs/ref/rst/restructuredtext.html
_DOCTEST = re.compile(r"^[ \t]*>>>(?: .*)?$(?:\n[ \t]*\S.*)*\n?", re.MULTILINE)  # ends at a blank line
_MAIL_QUOTE = re.compile(r"^[ \t]*>{1,2}(?!>)", re.MULTILINE)  # beside it `>>>` quotes a quoted quote
_ROLE = re.compile(r":[A-Za-z][\w.+-]{0,40}(?::[\w.+-]{1,40}){0,2}:`([^`]{1,300})`")
_REFERENCE = re.compile(r"(?<![`\w:])`([^`]{1,300})`__?(?!\w)")
_LITERAL = re.compile(r"(?<!`)``(?!`)([^`]{1,300})(?<!`)``(?!`)")
_EXPLICIT_TITLE = re.compile(r"(.+?)\s*<[^<>]+>\s*", re.DOTALL)  # `title <target>`
_DIRECTIVE = re.compile(r"^[ \t]*\.\. ([A-Za-z][\w:.+-]*?)::(?:[ \t]+(.*))?$(?:\n[ \t]+:[\w -]+:.*)*\n?", re.MULTILINE)
_SPEAKING = re.compile(
    "admonition|attention|caution|danger|deprecated|error|hint|important|note|rubric|seealso|tip|topic"
    "|versionadded|versionchanged|warning"
)
_TARGET = re.compile(r"^[ \t]*\.\. _[^:\n]+:.*\n?", re.MULTILINE)
# title underlines, table borders
_RULER = re.compile(r"^[ \t]*(?:[-=~^*+#_\"'`|][ \t]?){4,}$\n?", re.MULTILINE)
_CODE_FOLLOWS = re.compile(r"(?<=[\w)\]])::(?=[ \t]*\n[ \t]*\n)")

_HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_HTML_SCRIPT = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BREAKS = re.compile(
    "blockquote|br|center|d[dlt]|div|h[1-6]|hr|li|ol|p|pre|table|tbody|td|tfoot|th|thead|tr|ul", re.IGNORECASE
)
_INLINE = re.compile(
    "a|abbr|address|article|aside|b|big|body|caption|cite|code|del|details|em|figcaption|figure|font|footer|form"
    "|head|header|html|i|iframe|img|ins|kbd|label|main|mark|nav|nobr|q|s|samp|section|small|span|strike|strong"
    "|sub|summary|sup|svg|title|tt|u|var|wbr",
    re.IGNORECASE,
)
_HTML_TAG = re.compile(
    r"<(/?)([A-Za-z][A-Za-z0-9]*)((?:\s+[\w:-]+(?:\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>=`]+))?)*)\s*/?>"
)


def clean_markup(text: str) -> str:
    """Text without reST and HTML; the words they mark up stay, doctest blocks (code, not prose) go.

    ``:class:`~torch.Tensor` `` becomes Tensor, ``.. note:: Mind`` becomes Mind. Single backticks stay:
    outside reST they are Markdown, shell or old quotation marks.
    """
    if "`" in text:
        text = _ROLE.sub(lambda role: _displayed(role[1]), text)
        text = _REFERENCE.sub(lambda reference: _displayed(reference[1]), text)
        text = _LITERAL.sub(r"\1", text)
    if ">>>" in text and not _MAIL_QUOTE.search(text):
        text = _DOCTEST.sub("", text)
    if ".. " in text:
        text = _DIRECTIVE.sub(_spoken, text)
        text = _TARGET.sub("", text)
    if "::" in text:
        text = _CODE_FOLLOWS.sub(":", text)
    if "<" in text and ">" in text:
        text = _without_tags(text)
    return _RULER.sub("", text)


def _displayed(content: str) -> str:
    """What a reader of the rendered page sees of a role's or reference's content."""
    titled = _EXPLICIT_TITLE.fullmatch(content)
    if titled:
        return titled[1]
    if content.startswith("~"):
        return content[1:].rpartition(".")[2]
    return content.removeprefix("!")


def _spoken(directive: re.Match[str]) -> str:
    """The argument of a directive that speaks to the reader; nothing of one that speaks to the renderer."""
    words = directive[2] or ""
    return words + "\n" if _SPEAKING.fullmatch(directive[1]) and " " in words.strip() else ""


def _without_tags(text: str) -> str:
    if "<!--" in text:
        text = _HTML_COMMENT.sub("", text)
    if "</" in text:
        text = _HTML_SCRIPT.sub("", text)
    closed = {tag[2].lower() for tag in _HTML_TAG.finditer(text) if tag[1]}

    def replacement(tag: re.Match[str]) -> str:
        name = tag[2].lower()
        if _BREAKS.fullmatch(name):
            return "\t" if name in ("td", "th") else "\n"
        # `<a>` or `<title>` is as often a placeholder on a command line: a tag has attributes or is closed.
        if _INLINE.fullmatch(name) and (name in closed or "=" in tag[3]):
            return ""
        return tag[0]

    return _HTML_TAG.sub(replacement, text)
