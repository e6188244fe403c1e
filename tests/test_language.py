from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raylm.language import identify, is_known, likeliest, primary, same_language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The scheduler decides which process\nruns next.", "en"),
        ("Der Planer entscheidet, welcher Prozess als nächster läuft.", "de"),
        ("L'ordonnanceur décide quel processus s'exécute ensuite.", "fr"),
        ("Планировщик решает, какой процесс выполняется следующим.", "ru"),
        ("调度器决定下一个运行的进程", "zh"),
        ("調度器決定下一個運行的進程", "zh"),
        ("在 Writer 中打开 File - Open 对话框以选择文档", "zh"),
        ("スケジューラは次に実行するプロセスを決定します", "ja"),
        ("스케줄러는 다음에 실행할 프로세스를 결정합니다", "ko"),
        ("THE SCHEDULER DECIDES WHICH PROCESS RUNS NEXT", "en"),
    ],
)
def test_languages_are_told_apart(text: str, language: str) -> None:
    found, score = identify(text)
    assert found == language
    assert score > 0.5


@pytest.mark.parametrize("text", ["", " \n", "1234 --- 56", "١٢٣", "😀"])
def test_no_letters_is_no_language(text: str) -> None:
    assert identify(text) == ("und", 0.0)
    assert likeliest(text, 3) == []


@given(st.text(alphabet=st.characters(exclude_categories=())))
@example("a\ud800\n b")
@example("\x00\x85\u2028x")
def test_any_text_has_an_answer(text: str) -> None:
    language, score = identify(text)
    assert language.isalpha()
    assert 0 <= score <= 1


def test_a_long_text_is_looked_at_beyond_its_beginning() -> None:
    english = "The scheduler decides which process runs next. "
    german = "Der Planer entscheidet, welcher Prozess als nächster laufen darf. "
    assert identify(english * 3 + german * 100)[0] == "de"


def test_the_likeliest_come_first() -> None:
    guesses = likeliest("Der Planer entscheidet über den Prozess.", 5)
    assert guesses[0][0] == "de"
    assert len(guesses) == 5
    assert [score for _, score in guesses] == sorted((score for _, score in guesses), reverse=True)


def test_codes_are_compared_by_language() -> None:
    assert primary("zh-Hant") == primary("zh_CN") == primary("yue") == primary("ZH") == "zh"
    assert primary("pt_BR") == "pt"
    assert same_language("nb", "no")
    assert same_language("sr_Latn", "hr")
    assert not same_language("de", "nl")
    assert is_known("de-AT")
    assert is_known("nb")
    assert not is_known("tlh")


@pytest.mark.parametrize(
    ("file", "column", "language"),
    [
        ("text.en.tech.validation", "text", "en"),
        ("text.zh.mixed.validation", "text", "zh"),
        ("translate.en-de.docs.validation", "tgt", "de"),
    ],
)
def test_real_text_is_identified(data: Path, file: str, column: str, language: str) -> None:
    texts = [text for text in pq.read_table(data / f"{file}.parquet")[column].to_pylist() if len(text) > 40]
    assert sum(identify(text)[0] == language for text in texts) >= 0.98 * len(texts)
