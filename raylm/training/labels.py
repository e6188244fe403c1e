"""The labels of a corpus: which there are, how often, and their numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raylm.errors import ArtifactError
from raylm.storage import StoragePath
from raylm.tasks import CLASSIFY
from raylm.training.batches import Shards
from raylm.training.objectives import IGNORE

MAX_LABELS = 10_000
"""More than these are texts in the place of labels."""


def label_counts(tokens: StoragePath, split: str) -> Counter[str]:
    """How many texts of a split of a prepared corpus have each label.

    :raises ArtifactError: the split has no pairs at all.
    """
    table = Shards(tokens / "pairs" / split).table
    counted = pc.value_counts(table.filter(pc.equal(table["task"], CLASSIFY.name))["target"]).to_pylist()
    return Counter({entry["values"]: entry["counts"] for entry in counted})


def label_names(tokens: StoragePath) -> list[str]:
    """The labels of the training texts of a prepared corpus, sorted: a label's number is its place.

    :raises ArtifactError: there is one label or none, or more than a classifier has, or a held-out text has another.
    """
    labels = sorted(label_counts(tokens, "train"))
    where = f"corpus {tokens}: pairs/train"
    if not labels:
        raise ArtifactError(f"{where} has no labelled texts; give the corpus a pair source with `task: classify`")
    if len(labels) == 1:
        raise ArtifactError(f"{where} has only the label '{labels[0]}'; two are the least to choose from")
    if len(labels) > MAX_LABELS:
        raise ArtifactError(
            f"{where} has {len(labels):,} labels, {MAX_LABELS:,} are the most; is `target` the column of the labels? "
            f"It holds '{labels[0][:80]}'"
        )
    for split in ("validation", "test"):
        if (tokens / "pairs" / split).list():
            check_labels(label_counts(tokens, split), labels, f"corpus {tokens}: pairs/{split}")
    return labels


def check_labels(found: Mapping[str, int], labels: Sequence[str], where: str) -> None:
    """:raises ArtifactError: a label was found that is not among those learned."""
    unseen = sorted(found.keys() - set(labels))
    if unseen:
        known = ", ".join(labels[:10]) + ", …" * (len(labels) > 10)
        raise ArtifactError(
            f"{where} has {found[unseen[0]]} times the label '{unseen[0]}', which no training text has; known: {known}"
        )


def label_numbers(targets: pa.ChunkedArray, labels: Sequence[str]) -> NDArray[np.int64]:
    """(N,) the number of each label, `IGNORE` for a target that is none."""
    numbers = pc.fill_null(pc.index_in(targets, value_set=pa.array(labels, pa.string())), IGNORE)
    return np.asarray(numbers.to_numpy(), dtype=np.int64)
