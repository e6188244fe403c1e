"""`raylm prepare`: sources → clean → merge → deduplicate → tokenizer → tokenise → pack → token shards.

Each step works on files on storage through Ray Data, an item at a time. Rows are put in the order of a hash of their
content, which shuffles the corpus, brings copies together and makes every shard the same bytes, whatever the number of
CPUs, the cut of the files or their order. No text crosses a shuffle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from raylm.corpus.cleaning import check_rejected, clean_units
from raylm.corpus.dedup import find_near_duplicates
from raylm.corpus.merge import merge
from raylm.corpus.paragraphs import find_repeats
from raylm.corpus.plan import WORK, Plan, make_plan
from raylm.corpus.shards import TOKENIZER, Ids, check_tokenizer, learn_tokenizer, tokenize, write_shards
from raylm.corpus.steps import Result
from raylm.errors import InputError
from raylm.lease import held
from raylm.progress import note
from raylm.settings import Settings
from raylm.storage import MANIFEST, Manifest, Stopwatch

_SHOWN = 5
REJECTED = "rejected/rows.jsonl"
_DROPPED = "dropped"
_LOCK = "prepare.lock"


def prepare(settings: Settings) -> Manifest:
    """Token shards and a tokenizer of the corpus in the settings; nothing is done where they exist already.

    :raises InputError: a source is missing or damaged, more rows cannot be read than allowed, or nothing is left.
    :raises ArtifactError: the tokenizer that is to be taken cannot be.
    :raises OutputError: another process is preparing this corpus.
    """
    stopwatch = Stopwatch()
    plan = make_plan(settings)
    if (earlier := _up_to_date(plan)) is not None:
        return earlier
    taken = f"corpus {plan.root}: is being prepared by {{who}}; wait for it, or give this one another corpus.name"
    with held(plan.root.mkdir() / _LOCK, taken):
        return _up_to_date(plan) or _prepared(plan, stopwatch)


def _up_to_date(plan: Plan) -> Manifest | None:
    """What an earlier start has finished.

    :raises InputError: more of its rows could not be read than is allowed by now.
    """
    earlier = Manifest.read(plan.root)
    if earlier and earlier.inputs.get("key") == plan.key:
        counts = earlier.counts
        limit, rows = plan.corpus.max_rejected, earlier.statistics.get("rejected", [])
        check_rejected(limit, counts["read"], counts.get("rejected", 0), rows)
        note(f"prepare: {plan.root} is up to date")
        return earlier
    return None


def _prepared(plan: Plan, stopwatch: Stopwatch) -> Manifest:
    check_tokenizer(plan)
    (plan.root / MANIFEST).delete()  # unfinished from here on
    _forget_shards(plan)

    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        start = stopwatch.elapsed_s
        result = work()
        seconds[step] = round(stopwatch.elapsed_s - start, 2)
        return result

    cleaned: list[Result] = timed("clean", lambda: clean_units(plan))
    merged: list[Result] = timed("merge", lambda: merge(plan, cleaned))
    parts = len(merged)
    clusters = timed("dedup", lambda: find_near_duplicates(plan, parts))
    timed("paragraphs", lambda: find_repeats(plan, parts))
    special: Ids = timed("tokenizer", lambda: learn_tokenizer(plan, parts))
    tokenized: list[Result] = timed("tokenize", lambda: tokenize(plan, parts, special))
    packed: list[Result] = timed("pack", lambda: write_shards(plan, tokenized, special))

    total = _counts(cleaned, merged, tokenized, packed)
    shards = sorted((shard for result in packed for shard in result["shards"]), key=lambda shard: str(shard["name"]))
    if not shards:
        dropped = ", ".join(f"{name} {number}" for name, number in total.items() if number and name != "read")
        raise InputError(f"corpus: nothing is left of {total['read']} rows read: {dropped}")
    _publish(plan, shards)
    manifest = _manifest(plan, total, shards, seconds, stopwatch.elapsed_s)
    manifest.statistics = _statistics(plan, cleaned, merged, tokenized, clusters)
    manifest.write(plan.root)
    _forget(plan)
    return manifest


def _counts(cleaned: list[Result], merged: list[Result], tokenized: list[Result], packed: list[Result]) -> Counter[str]:
    """Rows read, kept by the last step that drops any, and dropped by reason."""
    counts: Counter[str] = Counter()
    for results in (cleaned, merged, tokenized, packed):
        for result in results:
            counts.update(result["counts"])
    counts["kept"] = sum(result["rows"] for result in tokenized)
    return counts


def _publish(plan: Plan, shards: list[dict[str, Any]]) -> None:
    """Put beside the shards what else belongs to the artifact, and remove what an earlier preparation left."""
    root = plan.root
    names = {shard["name"] for shard in shards}
    for kind in ("documents", "pairs"):
        for file, info in (root / kind).list(recursive=True):
            if info.is_file and file.path[len(root.path.rstrip("/")) + 1 :] not in names:
                file.delete()
    for directory in (TOKENIZER, "rejected", _DROPPED):
        (root / directory).delete()
    for file, info in (plan.place("tokenizer") / TOKENIZER).list():
        if info.is_file:
            (root / TOKENIZER / file.name).write_bytes(file.read_bytes())
    there = {file.name: file for file, _ in plan.place("clean").list()}
    rejected = [there[name] for unit in plan.unit_names if (name := f"{unit}-rejected.jsonl") in there]
    if rejected:
        with (root / REJECTED).writing() as stream:
            for file in rejected:
                stream.write(file.read_bytes())
    if plan.corpus.keep_dropped:
        units = {f"{unit}-dropped.parquet" for unit in plan.unit_names}
        for step in ("clean", "merge", "tokenize"):
            for file, _ in plan.place(step).list():
                if file.name.endswith("-dropped.parquet") and (step != "clean" or file.name in units):
                    (root / _DROPPED / f"{step}-{file.name}").write_bytes(file.read_bytes())


def _forget_shards(plan: Plan) -> None:
    """Forget that shards were written for other settings: these would lie over them, and not be written again."""
    current = plan.place("pack").name
    for place, _ in (plan.root / WORK).list():
        if place.name.startswith("pack-") and place.name != current:
            place.delete()


def _forget(plan: Plan) -> None:
    """Remove what steps wrote for other settings, or all of it."""
    work = plan.root / WORK
    if not plan.corpus.keep_work:
        work.delete()
        return
    current = {plan.place(step).name for step in plan.keys}
    for place, _ in work.list():
        if place.name not in current:
            place.delete()
    for file, _ in plan.place("clean").list():
        if not file.name.startswith(tuple(plan.unit_names)):
            file.delete()


def _manifest(
    plan: Plan, counts: Counter[str], shards: list[dict[str, Any]], seconds: dict[str, float], wall_time_s: float
) -> Manifest:
    rows, tokens = Counter[str](), Counter[str]()
    for shard in shards:
        split = shard["name"].rpartition("/")[0]
        rows[split] += shard["rows"]
        tokens[split] += shard["tokens"]
    size = sum(unit.bytes for unit in plan.units)
    padding = counts.pop("padding", 0)
    sequences = sum(number for split, number in rows.items() if split.startswith("documents"))
    places = sequences * plan.corpus.sequence_length
    return Manifest(
        stage="prepare",
        settings={"corpus": plan.corpus.model_dump(mode="json")},
        inputs={"key": plan.key, "units": len(plan.units), "bytes": size},
        outputs=shards,
        counts={**dict(sorted(counts.items())), "rows": dict(rows), "tokens": dict(tokens)},
        metrics={
            "mb_per_s": round(size / 1e6 / wall_time_s, 2),
            "tokens": sum(tokens.values()),
            "padding": round(padding / places, 6) if places else 0.0,
            "seconds": seconds,
        },
        wall_time_s=wall_time_s,
    )


def _statistics(
    plan: Plan, cleaned: list[Result], merged: list[Result], tokenized: list[Result], clusters: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a report draws."""
    samples: dict[str, list[str]] = {}
    for result in [*tokenized, *cleaned]:
        for reason, texts in result["samples"].items():
            samples[reason] = (samples.get(reason, []) + texts)[:_SHOWN]
    exact = [cluster for result in merged for cluster in result["clusters"]]
    duplicates = sorted([*clusters, *exact], key=lambda cluster: -int(cluster["copies"]))[: 2 * _SHOWN]
    return {
        "sources": _sources(plan, cleaned, tokenized),
        "lengths": {kind: _dense(_summed(r["lengths"][kind] for r in tokenized)) for kind in ("documents", "pairs")},
        "languages": {
            kind: dict(_summed(r["languages"][kind] for r in tokenized).most_common())
            for kind in ("documents", "pairs")
        },
        "duplicates": duplicates,
        "samples": samples,
        "rejected": [row for result in cleaned for row in result["rejected"]][: 2 * _SHOWN],
    }


def _sources(plan: Plan, cleaned: list[Result], tokenized: list[Result]) -> list[dict[str, Any]]:
    """Each source's rows read, rejected, dropped and kept by cleaning; of documents, also their training tokens."""
    corpus = plan.corpus
    sources = [*corpus.documents, *corpus.pairs]
    totals: list[Counter[str]] = [Counter() for _ in sources]
    for unit, result in zip(plan.units, cleaned, strict=True):
        totals[unit.source].update(result["counts"])
    tokens = _summed(result["tokens"] for result in tokenized)
    described = []
    for number, (source, total) in enumerate(zip(sources, totals, strict=True)):
        is_document = number < len(corpus.documents)
        key = f"documents[{number}]" if is_document else f"pairs[{number - len(corpus.documents)}]"
        total["kept_clean"] = total.pop("kept", 0)
        what = getattr(source, "path", None) or ", ".join(getattr(source, "packages", ())) or getattr(source, "to", "")
        shown = {"name": f"corpus.{key}", "describes": f"{source.type} {what}", "counts": dict(total)}
        described.append(shown | ({"tokens": tokens[str(number)]} if is_document else {}))
    return described


def _summed(counters: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _dense(bins: Counter[str]) -> list[list[int]]:
    """Histogram rows `[lower bound, count]` from the first to the last power of two that has one."""
    numbers = {int(n): count for n, count in bins.items()}
    return [[1 << n, numbers.get(n, 0)] for n in range(min(numbers), max(numbers) + 1)] if numbers else []
