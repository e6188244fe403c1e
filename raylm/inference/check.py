"""A gate before publishing: answers beside references that the input itself has."""

from __future__ import annotations

from raylm import metrics
from raylm.errors import InputError, RaylmError
from raylm.inference.chunks import Job, read_part
from raylm.inference.io import read_fields
from raylm.settings.inference import CheckSettings

_GATE = "; nothing is published. What is done is kept, the same command with another min_chrf goes on from there"


def check_references(job: Job, settings: CheckSettings) -> None:
    """:raises InputError: a file lacks the column with the references."""
    for table in job.tables:
        if settings.references not in table.columns.names:
            raise InputError(f"{table.file.place}: batch.check.references: there is no column '{settings.references}'")


def check_answers(job: Job, settings: CheckSettings) -> dict[str, float]:
    """The chrF of the first rows that have an answer and a reference, as `checked_chrf` and `checked_rows`.

    :raises InputError: no row has a reference.
    :raises RaylmError: the score is too low.
    """
    found: list[tuple[str, str]] = []
    for chunk in job.chunks:
        table = job.tables[chunk.file]
        references = read_fields(table, [settings.references], chunk.start, chunk.stop).values
        answers = read_part(job, chunk)[job.task.column].to_pylist()
        pairs = zip(answers, references, strict=True)
        found += [(answer, wanted) for answer, (wanted,) in pairs if answer is not None and wanted]
        if len(found) >= settings.rows:
            break
    if not found:
        raise InputError(f"batch.check.references: no row has both an answer and a text in '{settings.references}'")
    answers, wanted = zip(*found[: settings.rows], strict=True)
    chrf = round(float(metrics.score(("chrf",), answers, wanted, job.prompt.to)["chrf"]), 2)
    check_score(chrf, len(answers), settings)
    return {"checked_chrf": chrf, "checked_rows": len(answers)}


def check_score(chrf: float, rows: int, settings: CheckSettings, outcome: str = _GATE) -> None:
    """Nothing, if a score is high enough.

    :param outcome: what the error says of the output.
    :raises RaylmError: it is too low.
    """
    if chrf < settings.min_chrf:
        raise RaylmError(
            f"batch.check: chrF of {rows:,} answers beside '{settings.references}' is {chrf:.1f},"
            f" min_chrf is {settings.min_chrf:g}{outcome}"
        )
