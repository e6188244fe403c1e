"""What is flagged as odd, and what is not."""

from __future__ import annotations

import pytest

from raylm.inference.prompts import Prompt
from raylm.inference.quality import flags

TO_GERMAN = Prompt("translate", to="de")


@pytest.mark.parametrize(
    ("source", "output", "expected"),
    [
        ("Open the file in the editor.", "Öffnen Sie die Datei im Editor.", []),
        ("Open the file in the editor.", " …", ["empty"]),
        ("***", "***", []),
        ("Open the file in the editor.", "Open the file in the editor", ["copied"]),
        ("Microsoft Office 2019", "Microsoft Office 2019", []),
        ("Open the file.", "Die Datei die Datei die Datei die Datei", ["repeats"]),
        ("no no no no no", "nein nein nein nein nein", []),
        ("Very good.", "sehr sehr sehr sehr gut und noch mehr davon", ["repeats"]),
        ("Open the file in the editor now.", "Ouvrez le fichier dans l'éditeur maintenant.", ["wrong_language"]),
        ("Open the file in the editor now.", "请在编辑器里打开这个文件", ["wrong_language"]),
        ("Open it.", "Ouvrez.", []),
    ],
)
def test_odd_translations_are_flagged(source: str, output: str, expected: list[str]) -> None:
    assert flags(TO_GERMAN, (source,), output) == expected


def test_what_is_no_translation_may_copy_and_be_in_any_language() -> None:
    text = "The file is open in the editor."
    assert flags(Prompt("summarize"), (text,), text) == []
    assert flags(Prompt("summarize"), (text,), "datei " * 5) == ["repeats"]
    assert flags(Prompt("answer", fields=("question", "context")), ("Who?", text), "") == ["empty"]
    assert flags(Prompt("classify"), (text,), "") == []
    assert flags(Prompt("translate", to="zh-Hans"), (text,), "文件文件文件文件") == ["repeats"]
    assert flags(Prompt("translate", to="zh-Hans"), (text,), "文件在编辑器里打开了") == []
