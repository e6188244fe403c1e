"""A gettext catalog comes back with its gaps filled, and nothing else of it changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from babel.messages.pofile import read_po

from raylm.errors import InputError, OutputError
from raylm.inference.batch import run_batch
from raylm.inference.gettext import filled, untranslated
from raylm.settings import Settings
from raylm.storage import StoragePath
from raylm.tasks import TRANSLATE

CATALOG = """\
# Translators: somebody
msgid ""
msgstr ""
"Project-Id-Version: thing 1\\n"
"Language: de\\n"
"Content-Type: text/plain; charset=utf-8\\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\\n"

#. A comment for translators
#: src/main.c:12
msgid "Open the file"
msgstr ""

msgctxt "menu"
msgid "Close"
msgstr "Schließen"

#, c-format
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] ""

#~ msgid "old"
#~ msgstr "alt"
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    file = tmp_path / "de.po"
    file.write_text(CATALOG)
    return file


def test_only_gaps_are_rows(catalog: Path) -> None:
    assert untranslated(StoragePath(str(catalog))) == [
        {"text": "Open the file", "context": None, "form": None},
        {"text": "%d files", "context": None, "form": 1},
    ]


def test_answers_fill_the_gaps_and_are_fuzzy(catalog: Path) -> None:
    place = StoragePath(str(catalog))
    written = filled(place, ["Datei öffnen", "%d Dateien"]).decode()
    catalog.write_text(written)
    assert untranslated(place) == []
    with catalog.open("rb") as file:
        found = read_po(file)
    message, plural, kept = found.get("Open the file"), found.get("%d file"), found.get("Close", "menu")
    assert (message.string, message.fuzzy) == ("Datei öffnen", True)
    assert (plural.string, plural.fuzzy, "c-format" in plural.flags) == (("%d Datei", "%d Dateien"), True, True)
    assert (kept.string, kept.fuzzy) == ("Schließen", False)
    for line in ("# Translators: somebody", "#. A comment for translators", "#: src/main.c:12", '#~ msgid "old"'):
        assert line in written
    catalog.write_text(CATALOG)
    half = filled(place, [None, "%d Dateien"]).decode()
    assert 'msgid "Open the file"\nmsgstr ""' in half, "a row with an error stays a gap"


@pytest.mark.parametrize("charset", ["iso-8859-1", "ascii", "CHARSET"])
def test_letters_are_written_that_the_encoding_of_the_catalog_lacks(catalog: Path, charset: str) -> None:
    text = CATALOG.replace("utf-8", charset).replace("Schließen", "Zu" if charset == "ascii" else "Schließen")
    catalog.write_text(text, encoding="utf-8" if charset == "CHARSET" else charset)
    catalog.write_bytes(filled(StoragePath(str(catalog)), ["Otwórz „plik“", None]))
    with catalog.open("rb") as file:
        found = read_po(file)
    assert found.get("Open the file").string == "Otwórz „plik“"
    assert found.get("Close", "menu").string == ("Zu" if charset == "ascii" else "Schließen")


@pytest.mark.parametrize(
    ("plural", "expected"),
    [
        ("nplurals=1; plural=0;", ["%d files"]),
        ("nplurals=2; plural=(n != 1);", ["%d file", "%d files"]),
        ("nplurals=2; plural=(n > 1);", ["%d files", "%d files"]),  # French says none like one
        (
            "nplurals=3; plural=(n%10==1 && n%100!=11 ? 0 : n%10>=2 && n%10<=4 && (n%100<12 || n%100>14) ? 1 : 2);",
            ["%d files", "%d files", "%d files"],  # the first says 21 as well
        ),
    ],
)
def test_the_singular_is_asked_for_where_a_form_says_one_alone(
    tmp_path: Path, plural: str, expected: list[str]
) -> None:
    header = f'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=utf-8\\n"\n"Plural-Forms: {plural}\\n"\n\n'
    (tmp_path / "x.po").write_text(header + 'msgid "%d file"\nmsgid_plural "%d files"\nmsgstr[0] ""\n')
    assert [row["text"] for row in untranslated(StoragePath(str(tmp_path / "x.po")))] == expected


def test_only_the_first_rows_may_be_answered(catalog: Path) -> None:
    written = filled(StoragePath(str(catalog)), ["Datei öffnen"]).decode()
    assert "Datei öffnen" in written and 'msgstr[1] ""' in written


@pytest.mark.usefixtures("ray_cluster")
def test_a_catalog_is_translated(catalog: Path, model_directory: Path, tmp_path: Path) -> None:
    settings = Settings.model_validate({"batch": {"workers": 1}})
    manifest = run_batch(settings, TRANSLATE, str(catalog), model=str(model_directory))
    assert manifest.counts["rows"] == 2 and manifest.counts["errors"] == 0
    with (tmp_path / "de.translated.po").open("rb") as file:
        found = read_po(file)
    assert found.get("Open the file").string and "%d" in found.get("%d file").string[1]
    with pytest.raises(OutputError, match="a gettext catalog is made of a catalog alone"):
        (tmp_path / "t.csv").write_text("text\nHi\n")
        run_batch(
            settings, TRANSLATE, str(tmp_path / "t.csv"), model=str(model_directory), output=str(tmp_path / "x.po")
        )


def test_what_is_no_catalog_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.po").write_bytes(b'msgid "a"\nnothing of the kind\n')
    with pytest.raises(InputError, match=r"x\.po: not readable as a gettext catalog: "):
        untranslated(StoragePath(str(tmp_path / "x.po")))
