"""Text made regular, in any language, before filters and tokenizers see it.

Pure functions. ``clean`` is for documents, ``clean_line`` for one side of a translation pair,
``clean_markup`` is the step of ``clean`` that removes reST and HTML. Cleaning cleaned text changes nothing.
"""

import re
import unicodedata

import ftfy

from raylm.corpus.stopwords import STOP_WORDS
from raylm.language import IDEOGRAPHS, KANA
from raylm.settings.corpus import CleanSettings

# Curly quotes, full-width signs and ligatures stay, and NFC, not NFKC: that is how Chinese, French or German
# is written, and a model that is to write it must have seen it.
_DOCUMENT = ftfy.TextFixerConfig(
    uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False
)
# `&lt;none&gt;` in a message catalog is as much a placeholder as `<b>`: both sides must keep it.
_LINE = _DOCUMENT._replace(unescape_html=False)

_MAX_ROUNDS = 50  # ordinary text needs two; the bound is for text nested on purpose, like `<<<b>b>b>`
_DEFAULT = CleanSettings()


def clean(text: str, rules: CleanSettings = _DEFAULT) -> str:
    """The document as regular text: NFC, no mojibake, control characters or spare whitespace; the rest as `rules` say.

    Lines and paragraphs stay; indentation goes, and runs of spaces become one (one tab, if they hold a tab).
    Never raises: a lone surrogate becomes U+FFFD, so that the result can be written as UTF-8.
    """
    for _ in range(_MAX_ROUNDS):
        before = text
        text = _regular_characters(text, _DOCUMENT)
        if rules.markup:
            text = clean_markup(text)
        text = _regular_lines(text)
        if rules.boilerplate:
            text = _without_boilerplate(text)
        text = _words(text, rules)
        if rules.repeated_lines:
            text = _without_repeated_lines(text)
        # What one step uncovers another may change (an entity behind a removed tag): go on until all agree.
        if text == before:
            break
    return text


def clean_line(text: str, rules: CleanSettings = _DEFAULT) -> str:
    """One side of a translation pair as a single line; markup, entities and placeholders untouched."""
    for _ in range(_MAX_ROUNDS):
        before = text
        text = _words(" ".join(_regular_characters(text, _LINE).split()), rules)
        if text == before:
            break
    return text


def _words(text: str, rules: CleanSettings) -> str:
    if rules.urls != "keep":
        text = _without_urls(text, "<URL>" if rules.urls == "mask" else "")
    if rules.cjk and not text.isascii():
        text = _regular_cjk(text)
    if rules.remove_punctuation:
        text = _PUNCTUATION.sub(_kept_sign, text)
    if rules.remove_stop_words:
        text = _without_stop_words(text)
    return text


# --- characters ---------------------------------------------------------------------------------------------

_NEWLINES = "\r\x0b\x0c\x85\u2028\u2029"
_SPACES = "\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
# Control and format characters (Unicode Cc, Cf) and noncharacters. Not among them: the Arabic and Egyptian
# format characters, which are visible or place signs; joiners and tags, which depend on their neighbours.
_REMOVED = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffc\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001"
)
_ASCII_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
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

# ftfy is by far the slowest step: 130 ns a character where 5 are enough to see that it has nothing to do.
# It acts on entities; on these characters, whatever is around them; and on what its `badness` finds, which
# always holds one of `ÂÃÎÐØÙŒœ` (the ones that it takes for broken beside ASCII or beside common punctuation),
# or two characters of mojibake in a row, the second of which is no dash, ’ or ellipsis, nor a letter of Greek,
# Cyrillic or the scripts from Hebrew to Mongolian. A test holds all this against ftfy itself.
_ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")
_ALONE = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\r\u2028\u2029\u206a-\u206f\ufeff\ufff9-\ufffc\ud800-\udfffÂÃÎÐØÙŒœ]"
)
_TOGETHER = re.compile(
    "[\x80-\u2e7f\uf8ff\ufb01\ufb02\ufffd]"
    "[\x80-\xac\xae-\xb6\xb8-\u036f\u0384\u0385ЂҐґ\u0500-\u058f\u1d00-\u2012\u2016-\u2018\u201a-\u2025"
    "\u2027-\u2e7f\uf8ff\ufb01\ufb02\ufffd]"
)
# ftfy peels one layer for each pass over the text: a long chain would take time that grows with its square.
_AMP_CHAIN = re.compile(r"&(?:amp;){2,}")
_LINES = re.compile(r"[^\n]*\n|[^\n]+")


def _regular_characters(text: str, config: ftfy.TextFixerConfig) -> str:
    text = _fixed(text, config)
    if (_ASCII_ODD if text.isascii() else _ODD).search(text):
        text = _ODD_NEWLINES.sub("\n", text)
        text = _ODD_SPACES.sub(" ", text)
        text = _ODD_REMOVED.sub("", text)
        text = _STRAY_JOINERS.sub("", _REPEATED_JOINERS.sub(r"\1", text))
        text = _STRAY_TAGS.sub("", text)
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _fixed(text: str, config: ftfy.TextFixerConfig) -> str:
    """What `ftfy.fix_text` makes of a text, which works line by line; lines that it would not change are spared it."""
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
    if config.unescape_html and "&amp;amp;" in text:
        text = _AMP_CHAIN.sub("&amp;", text)
    if not _is_suspect(text, config):
        return text
    fixed = []
    for line in _LINES.findall(text):
        if config.unescape_html and "<" in line:  # ftfy takes this and all that follows for HTML
            config = _LINE
        fixed.append(ftfy.fix_text(line, config) if _is_suspect(line, config) else line)
    return "".join(fixed)


def _is_suspect(text: str, config: ftfy.TextFixerConfig) -> bool:
    """Whether ftfy could change anything."""
    if config.unescape_html and "&" in text and _ENTITY.search(text):
        return True
    if text.isascii():
        return bool(_ASCII_ODD.search(text))
    return bool(_ALONE.search(text) or _TOGETHER.search(text)) or not unicodedata.is_normalized("NFC", text)


# --- lines --------------------------------------------------------------------------------------------------

_SPACE_RUN = re.compile("  +")
_GAP = re.compile(r"[ \t]*\t[ \t]*")
_BLANK_LINES = re.compile(r"\n{3,}")


def _regular_lines(text: str) -> str:
    text = "\n".join([line.strip(" \t") for line in text.split("\n")])
    if "\t" in text:
        text = _GAP.sub("\t", text)
    if "  " in text:
        text = _SPACE_RUN.sub(" ", text)
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    return text.strip()


# What web pages carry beside their text. C4 drops every line with the word "javascript" or "cookies" in such a
# phrase (Raffel et al. 2020, section 2.2); that takes sentences of technical prose too, so that here a line
# goes where it says such a thing and nothing else.
_BOILERPLATE_LINES = (
    # scripts and browsers
    r"(?:please )?(?:enable|turn on|activate|allow) (?:javascript|cookies)"
    r"(?: and (?:javascript|cookies))?(?: (?:in|on|to|for) [^\n.]{1,80})?[.!]?",
    r"(?:sorry, )?(?:this|our|the) (?:site|website|web site|page|web page|form|video|app) "
    r"(?:requires?|needs|works best with) javascript(?: to [^\n.]{1,60})?[.!]?",
    r"(?:sorry, )?(?:it (?:seems|looks like|appears)(?: that)? )?(?:you have )?javascript (?:is|has been) "
    r"(?:currently )?(?:disabled|not enabled|turned off|required)(?: (?:in|on|to|for) [^\n.]{1,80})?[.!]?",
    r"(?:sorry, )?your browser does not support (?:javascript|iframes|html5 (?:audio|video)|the (?:audio|video) "
    r"(?:tag|element))[.!]?",
    # cookies
    r"(?:we|this (?:site|website|web site)|our (?:site|website|web site)) uses? (?:\w+ )?cookies (?:to|so that|for) "
    r"[^\n]{1,200}(?:experience|website|site|traffic|content|services?|ads|preferences)\b[^\n]{0,160}",
    r"by (?:continuing|using|browsing|visiting|clicking)[^\n]{1,120}(?:use|usage) of cookies[^\n]{0,60}",
    r"(?:accept|reject|decline|allow|manage)(?: all)? cookies(?: settings| preferences)?",
    r"(?:cookie|cookies) (?:policy|settings|preferences|notice|consent)",
    # sharing and subscribing
    r"share (?:this|on|via|to)(?: (?:this|article|post|page|story|entry|on|via|with|your|friends|facebook|twitter|x|"
    r"linkedin|reddit|pinterest|whatsapp|tumblr|telegram|weibo|email|e-mail|and|or|,))*[:!]?",
    r"(?:like|follow|find|join) us on (?:facebook|twitter|instagram|linkedin|youtube|pinterest|google\+?|weibo)[.!]?",
    r"(?:tweet|pin it|email this(?: (?:article|page|post))?|print this (?:article|page|post))",
    r"(?:subscribe to|sign up (?:for|to)) (?:our|the) (?:free |daily |weekly |monthly )*"
    r"(?:newsletter|mailing list|rss feed|blog)[^\n]{0,60}",
    # getting around a page
    r"skip to (?:main |the )?(?:content|navigation|search)",
    r"(?:back|return|scroll) to (?:the )?top(?: of (?:the |this )?page)?",
    r"(?:read more|continue reading|click here to (?:read|see|view) more|load more|show more)(?: ?[»›→…>]|\.{3})*",
    r"(?:leave|post|add|write) a (?:comment|reply)(?: cancel reply)?",
    r"(?:you must be|please) (?:logged in|log in|login|sign in)(?: or register)? to (?:post a )?(?:comment|reply)[.!]?",
    r"(?:related|popular|recent) (?:posts|articles|stories)[:]?",
    r"(?:advertisement|sponsored content|story continues below(?: advertisement)?)",
    r"(?:privacy policy|terms of (?:use|service)|terms (?:and|&) conditions)"
    r"(?: ?[|·•] ?(?:privacy policy|terms of (?:use|service)|terms (?:and|&) conditions|contact us|about us|sitemap))*",
    # Chinese: the same in this order
    r"(?:请|您需要|需要)(?:先|在)?[^\n。]{0,12}(?:开启|启用|打开|允许) ?javascript[^\n。]{0,30}[。！]?",
    r"(?:抱歉，|对不起，)?您?的?浏览器(?:不支持|已?禁用了?|版本过低)[^\n。]{0,40}[。！]?",
    r"(?:本|我们的?)(?:网站|站|网页)?(?:会|将)?使用 ?cookies?(?:来|以|，|技术|提升|改善)[^\n]{0,120}",
    r"(?:接受|同意|拒绝)(?:所有|全部)? ?cookies?",
    r"(?:分享|转发)(?:到|至|给)[:：]?(?:[ 、，/|]?(?:微信|微博|新浪微博|朋友圈|好友|qq空间|qq|豆瓣|人人网|更多))*",
    r"(?:扫一扫|扫描|扫码|长按)[^\n。]{0,20}(?:二维码|关注|公众号|手机阅读|下载)[^\n。]{0,20}[。！]?",
    r"(?:欢迎)?(?:关注|订阅)(?:我们|本站)?的?(?:官方)?(?:微信)?(?:公众号|微博|微信)[^\n。]{0,20}[。！]?",
    r"(?:返回|回到)(?:顶部|首页|列表|目录|上一页|页首)",
    r"(?:上|下)一(?:篇|页|章|节)(?:[:：][^\n]{0,60})?",
    r"(?:点击)?(?:阅读|查看|展开|加载)(?:更多|全文|原文)(?: ?[»›→…>]|\.{3})*",
    r"(?:责任编辑|责编|本文编辑)[:：][^\n]{1,12}",
    r"(?:登录|登陆|注册)(?:或注册)?(?:后|之后)?(?:才能|可以|即可|方可)?(?:发表)?(?:评论|回复)",
    r"(?:相关|热门|推荐|最新)(?:文章|阅读|新闻|推荐|评论)[:：]?",
    r"(?:您|你)?(?:的)?(?:当前|现在)(?:的)?位置[:：][^\n]{1,60}[>›»][^\n]{1,60}",
    r"(?:未经|没有)(?:本站|本网|许可|授权|书面|作者|允许|同意|,|，|的)*(?:请勿|不得|禁止|严禁)[^\n。]{0,10}转载[^\n]{0,20}",
    r"(?:隐私政策|隐私声明|用户协议|服务条款|使用条款|免责声明|联系我们|关于我们|网站地图|友情链接)"
    r"(?: ?[|·•] ?(?:隐私政策|隐私声明|用户协议|服务条款|使用条款|免责声明|联系我们|关于我们|网站地图|友情链接))*",
    r"[京沪粤浙苏津渝川鲁闽鄂湘皖豫冀晋陕辽吉黑桂云贵琼赣蒙宁新青藏甘]icp[备证] ?[\d-]{5,12} ?号(?:-\d+)?",
)
# A first look at one letter saves most lines the whole list.
_BOILERPLATE = re.compile(
    r"\n(?=[A-FIJLMOPR-TWYa-fijlmopr-twy\u4e00-\u9fff])(?i:" + "|".join(_BOILERPLATE_LINES) + r")(?=\n)"
)


def _without_boilerplate(text: str) -> str:
    """Text without lines that belong to a web page and not to what it says, once lines are regular."""
    return _BOILERPLATE.sub("", f"\n{text}\n")[1:-1] if text else text


def _without_repeated_lines(text: str) -> str:
    """Text with the first of equal lines; blank ones part paragraphs and stay."""
    seen: set[str] = set()
    kept = []
    for line in text.split("\n"):
        if not line or line not in seen:
            kept.append(line)
            seen.add(line)
    return "\n".join(kept)


# --- words --------------------------------------------------------------------------------------------------

# RFC 3986 characters that do not end a sentence or close a bracket; `<…>` around an address is part of it.
_ADDRESS = r"(?:https?://|ftp://|www\.(?=\w))[\w!#$%&'()*+,\-./:;=?@\[\]~]*[\w#$%&*+\-/=@~]"
_URL = re.compile(rf"(?<![A-Za-z0-9])(?:{_ADDRESS})", re.ASCII)
_BRACKETED_URL = re.compile(rf"<(?:URL:)?{_ADDRESS}>", re.ASCII)


def _without_urls(text: str, replacement: str) -> str:
    if "://" in text or "www." in text:
        text = _URL.sub(replacement, _BRACKETED_URL.sub(replacement, text))
    return text


_IDEOGRAPHS = KANA + IDEOGRAPHS
_FULL_WIDTH_SIGNS = "、。〈-】！（），．：；？"
_HAS_IDEOGRAPHS = re.compile(f"[{_IDEOGRAPHS}\uff10-\uff9f]")
_WIDTHS = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff61-\uff9f]+")
_SPACE_BETWEEN = re.compile(
    f" (?:(?<=[{_IDEOGRAPHS}] )(?=[{_IDEOGRAPHS}{_FULL_WIDTH_SIGNS}])|(?<=[{_FULL_WIDTH_SIGNS}] )(?=[{_IDEOGRAPHS}]))"
)
_NUMERALS = "〇一二三四五六七八九十百千"
# A full stop without a space behind it also parts names (`约翰.史密斯`) and tables (`数据库.表格`): it is one where a
# clause stands before it.
_STOP_BETWEEN = re.compile(
    f"[,;:?!.](?:(?<=[{_IDEOGRAPHS}][,;:?!])|(?<=[{_IDEOGRAPHS}]{{5}}\\.)|(?<=[{_IDEOGRAPHS}]\\.)(?= ))"
    f"(?<![{_NUMERALS}]\\.) ?(?=[{_IDEOGRAPHS}])"
)
_FULL_WIDTH = str.maketrans(",;:?!.", "，；：？！。")
_CODE = re.compile(r"[/\\_=<>{}\[\]`\"'$#@|&%^~*]")
_OPEN_CALL = re.compile(r"\w\([^()]*$", re.ASCII)
_CONTEXT_CHARS = 60  # looked at on either side: keeps the work linear in the length of a line


def _regular_cjk(text: str) -> str:
    """Chinese and Japanese as they are set: narrow letters and digits, wide kana and punctuation, no spaces."""
    if not _HAS_IDEOGRAPHS.search(text):
        return text
    text = _WIDTHS.sub(lambda wide: unicodedata.normalize("NFKC", wide[0]), text)
    if " " in text:
        text = _SPACE_BETWEEN.sub("", text)
    return _STOP_BETWEEN.sub(_full_width, text)


def _full_width(stop: re.Match[str]) -> str:
    """The full-width form of a sign between ideographs, unless they are part of code or of a path."""
    text = stop.string
    before = text[max(0, stop.start() - _CONTEXT_CHARS) : stop.start()].rpartition("\n")[2]
    after = text[stop.end() : stop.end() + _CONTEXT_CHARS].split(None, 1)[0]
    if _CODE.search(before.rpartition(" ")[2]) or _CODE.search(after) or _OPEN_CALL.search(before):
        return stop[0]
    return stop[0][0].translate(_FULL_WIDTH)


# Addresses stay whole, and so do `don't`, `well-known`, `3.5` and `10:30`.
_PUNCTUATION = re.compile(
    rf"(?P<kept><URL>|(?<![A-Za-z0-9])(?a:{_ADDRESS})|(?<=[^\W\d_])['’-](?=[^\W\d_])|(?<=\d)[.,:](?=\d))|[^\w\s]|_"
)


def _kept_sign(sign: re.Match[str]) -> str:
    """A space for punctuation (Unicode P, and ASCII signs such as `+`), otherwise the match itself."""
    is_punctuation = sign["kept"] is None and (sign[0].isascii() or unicodedata.category(sign[0])[0] == "P")
    return " " if is_punctuation else sign[0]


# Negations stay: for a classifier they are what the text says. `US` and `IT` are no pronouns.
_ENGLISH_STOPS = frozenset(
    form for word in STOP_WORDS["en"] - {"no", "not", "nor"} for form in (word, word.capitalize())
)
_WORD = re.compile(r"[\w'’-]+")
# Nobody says where a Chinese word begins: a single character goes only where it is nearly always a word of its own,
# and not in the words listed before it.
_CHINESE_STOPS = [
    *(word for word in STOP_WORDS["zh"] if len(word) > 1 and word[0] not in "不没"),
    *"的了吗呢吧啊呀嘛我你您他她它这那是与也很",
]
_CHINESE_STOP = re.compile(
    "目的|的确|的士|标的|了解|了然|了不起|了结|明了|受不了|酒吧|网吧|贴吧|自我|他人|其他|吉他|那么|刹那|是否|是非|于是|总是|参与|与会"
    f"|(?P<stop>{'|'.join(sorted(_CHINESE_STOPS, key=lambda word: (-len(word), word)))})"
)


def _without_stop_words(text: str) -> str:
    text = _WORD.sub(lambda word: "" if word[0] in _ENGLISH_STOPS else word[0], text)
    return text if text.isascii() else _CHINESE_STOP.sub(lambda word: "" if word["stop"] else word[0], text)


# --- markup -------------------------------------------------------------------------------------------------

# Patterns begin with what they look for, and what has to stand before it comes after: `re` finds a first character
# ten times faster than it tries a pattern at each place. Lines are looked for by the line end before them.

# reST, https://docutils.sourceforge.io/docs/ref/rst/restructuredtext.html
_DOCTEST = re.compile(r"\n[ \t]*>>>(?: .*)?(?:\n[ \t]*\S.*)*(?=\n)")  # ends at a blank line
_MAIL_QUOTE = re.compile(r"\n[ \t]*>{1,2}(?!>)")  # beside it `>>>` quotes a quoted quote
_ROLE = re.compile(r":[A-Za-z][\w.+-]{0,40}(?::[\w.+-]{1,40}){0,2}:`([^`]{1,300})`")
_REFERENCE = re.compile(r"`(?<![`\w:]`)([^`]{1,300})`__?(?!\w)")
_LITERAL = re.compile(r"``(?<!```)([^`]{1,300})``(?!`)")
_EXPLICIT_TITLE = re.compile(r"(.+?)\s*<[^<>]+>\s*", re.DOTALL)  # `title <target>`
_DIRECTIVE = re.compile(r"\n[ \t]*\.\. ([A-Za-z][\w:.+-]*?)::(?:[ \t]+(.*))?(?:\n[ \t]+:[\w -]+:.*)*(?=\n)")
_SPEAKING = re.compile(
    "admonition|attention|caution|danger|deprecated|error|hint|important|note|rubric|seealso|tip|topic"
    "|versionadded|versionchanged|warning"
)
_TARGET = re.compile(r"\n[ \t]*\.\. _[^:\n]+:.*")
# title underlines, table borders
_RULER = re.compile(r"\n[ \t]*(?:[-=~^*+#_\"'`|][ \t]?){4,}(?=\n)")
_CODE_FOLLOWS = re.compile(r"::(?<=[\w)\]]::)(?=[ \t]*\n[ \t]*\n)")

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
    text = f"\n{text}\n"
    if ">>>" in text and not _MAIL_QUOTE.search(text):
        text = _DOCTEST.sub("", text)
    if ".. " in text:
        text = _DIRECTIVE.sub(_spoken, text)
        text = _TARGET.sub("", text)
    if "::" in text:
        text = _CODE_FOLLOWS.sub(":", text)
    if "<" in text and ">" in text:
        text = _without_tags(text)
    return _RULER.sub("", text)[1:-1]


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
    return "\n" + words if _SPEAKING.fullmatch(directive[1]) and " " in words.strip() else ""


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
