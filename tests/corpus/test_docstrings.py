import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from raylm.corpus.docstrings import docstrings, python_files, summary_pair

SOURCE = '''
"""About the module.

    Indented.
"""
import os
if os.name == "nt":
    def conditional():
        """In an if."""
class Shape:
    """A shape."""
    async def area(self):
        """Its area."""
        def inner():
            'In single quotes.'
    def plain(self):
        return 1
topics = {'assert': 'The assert statement\\n' + 'x', 'long': """LONG
    text""", 'short': 'no', 3: 4, **{}}
def outer():
    """Last."""
    local = {"long": """LONG"""}
'''.replace("LONG", "word " * 50)


def test_docstrings_come_in_order() -> None:
    assert list(docstrings(SOURCE.encode())) == [
        "About the module.\n\nIndented.",
        "In an if.",
        "A shape.",
        "Its area.",
        "In single quotes.",
        "word " * 50 + "\ntext",
        "Last.",
    ]


@pytest.mark.parametrize(
    "source",
    [
        b"def f(:\n",
        b"x = 1\x00\n",
        b"\xff\xfe = 1",
        b"(" * 5000 + b")" * 5000,
        b"x = " + b"-" * 200_000 + b"1",
    ],
)
def test_what_cannot_be_parsed_is_a_syntax_error(source: bytes) -> None:
    with pytest.raises(SyntaxError):
        list(docstrings(source))


def test_invalid_escapes_of_others_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(docstrings(b'"""A \\d pattern."""\n')) == ["A \\d pattern."]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the import path with a package and a module that must not be imported."""
    package = tmp_path / "unread_package"
    (package / "inner").mkdir(parents=True)
    for name in ("z.py", "__init__.py", "inner/a.py", "data.txt"):
        (package / name).write_text('raise RuntimeError("imported")')
    (tmp_path / "unread_module.py").write_text('raise RuntimeError("imported")')
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def test_python_files_of_a_package_that_is_not_imported(packages: Path) -> None:
    files = python_files("unread_package")
    assert [name for name, _ in files] == [
        "unread_package/__init__.py",
        "unread_package/inner/a.py",
        "unread_package/z.py",
    ]
    assert files[1][1] == packages / "unread_package" / "inner" / "a.py"
    assert python_files("unread_module") == [("unread_module.py", packages / "unread_module.py")]
    assert not {"unread_package", "unread_module"} & set(sys.modules)


def test_stdlib_comes_without_its_tests() -> None:
    names = [name for name, _ in python_files("stdlib")]
    assert names == sorted(names)
    assert {"stdlib/argparse.py", "stdlib/asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "/test/" in name or "idle_test" in name]


def test_the_language_reference_is_found() -> None:
    topics = dict(python_files("stdlib")).get("stdlib/pydoc_data/topics.py")
    if topics is None:
        pytest.skip("this Python comes without pydoc_data")
    assert sum(map(len, docstrings(topics.read_bytes()))) > 300_000


@pytest.mark.parametrize("package", ["not_installed_at_all", "torch.nn", "", "no-name", "sys", "made_at_run_time"])
def test_a_package_without_source_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "made_at_run_time", ModuleType("made_at_run_time"))
    with pytest.raises(LookupError, match=f"{package!r} here: `pip install"):
        python_files(package)


PROSE = (
    "The queue is a balanced tree, so that finding the next process takes logarithmic time. Processes that"
    " sleep are not in it; they come back with the smallest\nvirtual time of those that wait."
)


@pytest.mark.parametrize(
    ("docstring", "pair"),
    [
        (f"Pick the process to run next.\n\n{PROSE}", (PROSE, "Pick the process to run next.")),
        (f"Pick the process\nto run next. {PROSE}", (PROSE, "Pick the process to run next.")),
        (f"Pick e.g. the next process (or v1.2). {PROSE}", (PROSE, "Pick e.g. the next process (or v1.2).")),
        (
            f"Pick the process to run next.\n\n{PROSE}\n\nArgs:\n    queue: the tree",
            (f"{PROSE}\n\nArgs:\n    queue: the tree", "Pick the process to run next."),
        ),
        (
            f"Pick the process to run next.\n\n{PROSE}\n\nSee Also\n--------\nput",
            (PROSE, "Pick the process to run next."),
        ),
        (
            f"Pick the process to run next.\n\n{PROSE}\n\n>>> pick()\n1",
            (PROSE, "Pick the process to run next."),
        ),
        (f"Pick the process to run next\n\n{PROSE}", None),  # no end of a sentence
        (f"Pick next.\n\n{PROSE}", None),
        (f"Pick {'the next and ' * 9} last process.\n\n{PROSE}", None),
        (f"pick the process to run next.\n\n{PROSE}", None),
        (f"See also the other queue.\n\n{PROSE}", None),
        (f"Deprecated since version 3.\n\n{PROSE}", None),
        (f"Initialize self.  See help(type(self)) for more.\n\n{PROSE}", None),
        (f"Input_ids (`Tensor`): Indices of the tokens.\n\n{PROSE}", None),
        (f"f(x, y=1) -> the process.\n\n{PROSE}", None),
        ("Pick the process to run next.", None),
        ("Pick the process to run next.\n\nShort body.", None),
        (f"Pick the process to run next.\n\nArgs:\n    queue: {PROSE}", None),
        (f"Pick the process to run next.\n\nParameters\n----------\nqueue : Tree\n    {PROSE}", None),
        (f"Pick the process to run next.\n\n:param queue: {PROSE}", None),
        (f"Pick the process to run next.\n\n>>> pick()\n{PROSE}", None),
        (f"Pick the process to run next.\n\nPick the process to run next. {PROSE}", None),
        ("Pick the process to run next.\n\n" + "| 1 | 2 | 3.5 | -- |\n" * 20, None),
        ("", None),
    ],
)
def test_summary_pair(docstring: str, pair: tuple[str, str] | None) -> None:
    assert summary_pair(docstring) == pair


def test_a_long_body_ends_with_a_sentence_or_line() -> None:
    pair = summary_pair("Pick the process to run next.\n\n" + "It waits, and then it runs. " * 100)
    assert pair is not None
    assert 1100 < len(pair[0]) <= 1200
    assert pair[0].endswith("it runs.")
    pair = summary_pair(f"Pick the process to run next.\n\n{PROSE}\n" + "- no end of a sentence here\n" * 100)
    assert pair is not None
    assert 1100 < len(pair[0]) <= 1200
    assert pair[0].endswith("\n- no end of a sentence here")


def test_real_docstrings_make_pairs() -> None:
    pairs = {}
    for name, path in python_files("stdlib"):
        if name.count("/") == 1:
            pairs.update({pair: name for text in docstrings(path.read_bytes()) if (pair := summary_pair(text))})
    assert len(pairs) > 500
    for body, summary in pairs:
        assert 120 <= len(body) <= 1200
        assert 3 <= len(summary.split()) <= 25
        assert summary not in body
