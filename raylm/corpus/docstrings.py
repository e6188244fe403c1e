"""Documentation strings of installed Python packages: real English text that is on every machine.

Files are parsed with ``ast``; no package is ever imported.
"""

import ast
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_OUTSIDE_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
_MIN_TOPIC_CHARS = 200  # shorter constants in a module's dicts are names and messages, not text


def python_files(package: str) -> list[tuple[str, Path]]:
    """``(name, path)`` of every Python file of ``package``, sorted; the name is ``torch/nn/functional.py``.

    ``package`` is an import name, or ``stdlib`` for the standard library without its tests.
    Raises LookupError where it is not installed as Python source.
    """
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [(path.relative_to(root), path) for path in root.rglob("*.py")]
        return sorted(
            (f"stdlib/{name.as_posix()}", path) for name, path in files if not _OUTSIDE_STDLIB & set(name.parts)
        )
    try:
        # A dotted name would import its parent; a top-level name imports nothing.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module made at run time, such as __main__
        spec = None
    if spec is not None and spec.submodule_search_locations is not None:
        found: dict[str, Path] = {}
        for root in map(Path, spec.submodule_search_locations):
            for path in root.rglob("*.py"):
                found.setdefault(path.relative_to(root.parent).as_posix(), path)  # as import does: first wins
        if found:
            return sorted(found.items())
    elif spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        return [(Path(spec.origin).name, Path(spec.origin))]
    raise LookupError(
        f"no Python source of package {package!r} here: `pip install {package}`, or name another package"
        " (an import name such as torch, or stdlib)"
    )


def docstrings(source: bytes) -> Iterator[str]:
    """The documentation strings in a Python file, in its order, dedented.

    Long strings in a module's dicts count as documentation: that is where ``pydoc_data`` keeps the language reference.
    Raises SyntaxError where the source cannot be parsed, whatever the cause, at the first ``next``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            found = list(_documented(ast.parse(source)))
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; code nested too deep
        raise SyntaxError(f"cannot be parsed: {error}") from error
    yield from found


def _documented(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)  # cleaned with inspect.cleandoc
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # `if` around a definition
            if isinstance(node, ast.Module) and isinstance(child, ast.Assign | ast.AnnAssign):
                yield from _topics(child.value)
            yield from _documented(child)


def _topics(assigned: ast.expr | None) -> Iterator[str]:
    for value in assigned.values if isinstance(assigned, ast.Dict) else ():
        text = value.value if isinstance(value, ast.Constant) else None
        if isinstance(text, str) and len(text) >= _MIN_TOPIC_CHARS:
            yield inspect.cleandoc(text)


# --- document and summary -----------------------------------------------------------------------------------

_SUMMARY_WORDS = range(3, 26)
_MIN_BODY_CHARS = 120
_MAX_BODY_CHARS = 1200
_MAX_SUMMARY_CHARS = 200
_MIN_LETTER_SHARE = 0.7  # of the characters that are not space; sentences have 0.9 and more

_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_SENTENCE_END = re.compile(r"(?<![.\s])(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\bcf)[.!?](?=\s|$)")
_GENERIC = re.compile(
    r"(?:see|deprecated|todo|do not|alias|same as|like|inherited|inherits|overrides?|copyright|licen[sc]ed"
    r"|usage|args?|parameters?|tests?|testing|this file (?:is|was)|initiali[sz]es? self"
    r"|this (?:class|method|function|module) is (?:deprecated|generated))\b"
    r"|\w+ ?(?:\([^()]*\) ?)?:",  # `Args:`, `dim (int):`
    re.IGNORECASE,
)
# Where reading stops: what follows says where to look further or shows code.
_APPENDIX = re.compile(
    r"^[ \t]*(?:see also|examples?|references?|citations?|usage|doctests?|authors?|licen[sc]e|todo)\b.{0,20}$"
    r"|^[ \t]*\.\. (?:seealso|code|code-block|testcode|doctest|plot|rubric)::|^[ \t]*(?:>>>|```)"
    r"|^[ \t]*(?:SPDX-|Copyright )",
    re.IGNORECASE | re.MULTILINE,
)
# Where prose stops: lists of parameters stay in the body, but they alone do not tell what a function does.
_SECTION = re.compile(
    r"^[ \t]*(?:(?:\w+ )?(?:args|arguments|parameters|params|attributes)|returns?|yields?|raises|inputs?"
    r"|outputs?|shape|kwargs|methods|warns)[ \t]*:?[ \t]*$"
    r"|^[ \t]*[:@](?:param|arg|type|return|rtype|raise)s?\b",
    re.IGNORECASE | re.MULTILINE,
)


def summary_pair(docstring: str) -> tuple[str, str] | None:
    """``(body, summary)`` of a documentation string, or None where it does not make a pair.

    The summary is the first sentence, if it is one of 3 to 25 words that says something. The body is what
    comes after it, up to the examples and references, at most 1200 characters. It has at least 120 characters
    of prose, not counting lists of parameters, so that the summary can be told from it.
    """
    first, *rest = _PARAGRAPH.split(docstring.strip(), maxsplit=1)
    end = _SENTENCE_END.search(first)
    if end is None:
        return None
    summary = " ".join(first[: end.end()].split())
    if not _is_summary(summary):
        return None
    body = "\n\n".join(part for part in (first[end.end() :].strip(), *rest) if part)
    appendix = _APPENDIX.search(body)
    if appendix:
        body = body[: appendix.start()]
    body = _shortened(body.strip())
    section = _SECTION.search(body)
    prose = body[: section.start()] if section else body
    if not _is_prose(prose) or summary.rstrip(".").lower() in " ".join(body.lower().split()):
        return None
    return body, summary


def _is_summary(text: str) -> bool:
    words = text.split()
    return (
        len(words) in _SUMMARY_WORDS
        and len(text) <= _MAX_SUMMARY_CHARS
        and text[0].isupper()  # small letters start parameters and fragments
        and _letter_share(text) >= _MIN_LETTER_SHARE
        and not any(mark in text for mark in ("(...)", "->", "=", "::", "http", "{", "<", "|"))
        and not _GENERIC.match(text)
    )


def _is_prose(text: str) -> bool:
    """Whether the text is mostly sentences: tables, grammars and program code are not."""
    long_enough = len(text.strip()) >= _MIN_BODY_CHARS
    return long_enough and _letter_share(text) >= _MIN_LETTER_SHARE and _SENTENCE_END.search(text) is not None


def _letter_share(text: str) -> float:
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) / max(1, len(visible))


def _shortened(text: str) -> str:
    """The text up to the last end of a sentence or line within the limit."""
    if len(text) <= _MAX_BODY_CHARS:
        return text
    head = text[: _MAX_BODY_CHARS + 1]
    sentences = [end.end() for end in _SENTENCE_END.finditer(head)]
    cut = max([head.rfind("\n"), *(end for end in sentences if end <= _MAX_BODY_CHARS)])
    return text[: cut if cut > _MIN_BODY_CHARS else _MAX_BODY_CHARS].rstrip()
