"""`python -m tests.benchmarks.recipes`: what the recipes of `jobs/recipes` make of real text, beside simple baselines.

Each is one command, `raylm quickstart --with jobs/recipes/NAME.yaml`, on a directory `data` with the files that it
names; its scores are those of texts that the model has not seen. The recipes are sized for half an hour on two CPUs;
`--only` makes some. Those that end in `-scratch` leave pretraining out and fine-tune for as many steps more.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from raylm.sentences import split_text
from raylm.settings import Settings, load
from raylm.storage import Manifest, StoragePath
from tests.benchmarks.commands import DATA, raylm_session, run_on_real_text
from tests.benchmarks.measure import REPOSITORY, BenchmarkError, Goal, Row, beside, mapped, peer, single

RECIPES = REPOSITORY / "jobs" / "recipes"
_MINUTES = 30
_PARAGRAPHS = re.compile(r"\n\s*\n")
_DEFINITION = re.compile(
    r"((?:The |A |An )?[A-Za-z][\w./+-]*(?: [\w./+-]+){0,3}) (?:is|are) ((?:an?|the) [^.;:!?\n]{10,120}[\w)\"'])[.;:,]"
)
_NO_TERM = re.compile(
    r"\b(this|there|here|it|these|that|those|they|you|we|if|when|which|what|where|who|as|but|and|or|in|on|for|with|to|by"
    r"|from|of|then|than|not|so|such|both|each|first|second|following|below|above|next)\b",
    re.IGNORECASE,
)
_CONTEXT_CHARS = 500
_MOST_OF_A_TERM = 3
_TESTED = 0.08
"""The share of terms whose definitions are for testing."""


@dataclass(frozen=True)
class Made:
    """What a recipe has left."""

    settings: Settings
    minutes: float

    @property
    def tokens(self) -> str:
        return f"{self.settings.storage}/tokens/{self.settings.corpus.name}"

    def scores(self, test_set: str) -> dict[str, Any]:
        """Of a test set, as `raylm evaluate` has found them."""
        run = self.settings.finetune.name
        manifest = Manifest.read(StoragePath(self.settings.storage) / "runs" / run / "evaluation")
        assert manifest is not None
        return dict(manifest.metrics[test_set])

    @property
    def time(self) -> Row:
        name = self.settings.model.name
        return single(f"{name}: from text to files", [self.minutes], "minutes", Goal("value", "<=", _MINUTES))


@contextmanager
def made(recipe: str, scale: float, *options: str) -> Iterator[Made]:
    """The end of the road of a recipe.

    :param options: settings that are others than the recipe's, such as `finetune.start=scratch`.
    """
    with tempfile.TemporaryDirectory(prefix="raylm-recipe-") as place:
        data = Path(place) / "data"
        data.mkdir()
        for file in DATA.glob("*.parquet"):
            (data / file.name).symlink_to(file)
        write_definitions(data)
        file = RECIPES / f"{recipe}.yaml"
        storage = Path(place) / recipe
        settings = load(overlays=[file], overrides=[*options, f"storage={storage}"])
        if scale != 1:
            for section in ("pretrain", "finetune"):
                steps = max(round(getattr(settings, section).steps * scale), 20)
                options += (f"{section}.steps={steps}",)
            settings = load(overlays=[file], overrides=[*options, f"storage={storage}"])
        others = (word for option in options for word in ("--set", option))
        command = ("quickstart", "--with", str(file), "--out", str(storage), *others)
        start = time.perf_counter()
        with raylm_session(command, None, as_json=False, where=Path(place)) as session:
            session.wait()
        yield Made(settings, (time.perf_counter() - start) / 60)


# --------------------------------------------------------------------------------------------- recipes


_BETTER = Goal("ratio", ">=", 1)


def _score(found: Made, test_set: str, name: str, goal: Goal | None = _BETTER) -> Row:
    """A score beside the baseline that `raylm evaluate` compares it with."""
    scores = found.scores(test_set)
    what = f"{found.settings.model.name}: {name} of {scores['rows']} held-out rows of {test_set}"
    return beside(what, [scores[name]], "", scores["baseline"]["method"], [scores["baseline"][name]], goal)


def _against_counting(found: Made, analyzer: str, ngrams: int, goal: Goal | None) -> Row:
    """The accuracy of labels beside a linear model over TF-IDF."""
    try:
        other: list[float] | BenchmarkError = [
            peer("with_counts.py", work="labels", tokens=found.tokens, analyzer=analyzer, ngrams=ngrams)["accuracy"]
        ]
    except BenchmarkError as error:
        other = error
    what = f"{found.settings.model.name}: accuracy"
    accuracy = found.scores("classify")["accuracy"]
    return beside(what, [accuracy], "%", "TF-IDF and a logistic regression", other, goal)


def make_news(scale: float) -> list[Row]:
    """English news posts about sports or finance."""
    with made("news-en", scale) as found:
        return [
            _score(found, "classify", "accuracy", Goal("value", ">=", 98)),
            _against_counting(found, "word", 2, None),
            found.time,
        ]


def make_sentiment(scale: float) -> list[Row]:
    """Chinese reviews: praise or blame."""
    with made("sentiment-zh", scale) as found:
        return [_against_counting(found, "char", 2, _BETTER), found.time]


def make_prose(scale: float) -> list[Row]:
    """English and Chinese prose, of which nothing is known but the text."""
    with made("prose", scale) as found:
        run = Manifest.read(StoragePath(found.settings.storage) / "models" / found.settings.model.name)
        assert run is not None
        bits = run.inputs["metrics"]["validation_bits_per_byte"]
        try:
            counted: Any = peer("with_counts.py", work="text", tokens=found.tokens)
        except BenchmarkError as error:
            counted = error
        results = counted if isinstance(counted, BenchmarkError) else [counted]
        return [
            *(
                beside("prose: bits per byte of held-out text", [bits], "", name,
                       mapped(results, lambda result, key=key: float(result[key])), _BETTER,
                       smaller_is_better=True)
                for key, name in (("ngrams_bits_per_byte", "5-grams, Kneser-Ney"), ("lzma_bits_per_byte", "LZMA"))
            ),
            found.time,
        ]  # fmt: skip


def make_german(scale: float) -> list[Row]:
    """Documentation and messages into German, package descriptions into a line."""
    with made("documentation-de", scale) as found:
        scores = [("translate-de", "chrf"), ("translate-de", "bleu"), ("summarize", "rougeL")]
        return [*(_score(found, *score) for score in scores), found.time]


def make_chinese(scale: float) -> list[Row]:
    """Documentation into Chinese."""
    with made("documentation-zh", scale) as found:
        return [*(_score(found, "translate-zh", name) for name in ("chrf", "bleu")), found.time]


def make_definitions(scale: float) -> list[Row]:
    """Questions about texts."""
    with made("definitions", scale) as found:
        return [_score(found, "answer", "f1"), _score(found, "answer", "exact_match", None), found.time]


def make_unpretrained(recipe: str, test_set: str, name: str, scale: float) -> list[Row]:
    """What is left of a score without pretraining: a model that is fine-tuned for the steps of both."""
    settings = load(overlays=[RECIPES / f"{recipe}.yaml"])
    steps = settings.pretrain.steps + settings.finetune.steps
    with made(recipe, scale, "finetune.start=scratch", f"finetune.steps={steps}") as found:
        what = f"{recipe}: {name} after {found.settings.finetune.steps:,} steps from scratch"
        return [single(what, [found.scores(test_set)[name]], ""), found.time]


# ----------------------------------------------------------------------------------------- definitions


def write_definitions(directory: Path) -> None:
    """`definitions.train.parquet` and `definitions.test.parquet`: what real texts say that something is, as questions.

    A term is in one of the two alone.
    """
    columns = {"text.en.tech.train": "text", "summarize.en.packages.train": "document"}
    seen: Counter[str] = Counter()
    kept: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for name, column in columns.items():
        for text in pq.read_table(DATA / f"{name}.parquet", columns=[column])[column].to_pylist():
            for question, context, answer in definitions(text):
                term = question.casefold()
                seen[term] += 1
                if seen[term] <= _MOST_OF_A_TERM:
                    is_tested = xxhash.xxh3_64_intdigest(term.encode()) < _TESTED * 2**64
                    row = {"question": question, "context": context, "answer": answer}
                    kept["test" if is_tested else "train"].append(row)
    for split, rows in kept.items():
        pq.write_table(pa.Table.from_pylist(rows), directory / f"definitions.{split}.parquet")


def definitions(text: str) -> Iterator[tuple[str, str, str]]:
    """Question, context and answer of each sentence of a text that says what something is."""
    for paragraph in _PARAGRAPHS.split(text):
        sentences = split_text(" ".join(paragraph.split())).sentences
        for number, sentence in enumerate(sentences):
            match = _DEFINITION.match(sentence)
            if match and not _NO_TERM.search(match[1]):
                term = match[1] if match[1].split()[0] not in ("A", "An", "The") else match[1][0].lower() + match[1][1:]
                yield f"What is {term}?", _around(sentences, number), match[2]


def _around(sentences: Sequence[str], number: int) -> str:
    """A sentence with the neighbours that there is room for."""
    context = sentences[number]
    for sentence in reversed(sentences[:number]):
        if len(context) + len(sentence) > _CONTEXT_CHARS / 2:
            break
        context = f"{sentence} {context}"
    for sentence in sentences[number + 1 :]:
        if len(context) + len(sentence) > _CONTEXT_CHARS:
            break
        context = f"{context} {sentence}"
    return context


PARTS = {
    "news-en": make_news,
    "sentiment-zh": make_sentiment,
    "sentiment-zh-scratch": partial(make_unpretrained, "sentiment-zh", "classify", "accuracy"),
    "prose": make_prose,
    "documentation-de": make_german,
    "documentation-zh": make_chinese,
    "definitions": make_definitions,
    "definitions-scratch": partial(make_unpretrained, "definitions", "answer", "f1"),
}


if __name__ == "__main__":
    sys.exit(run_on_real_text(__doc__.splitlines()[0], PARTS))
