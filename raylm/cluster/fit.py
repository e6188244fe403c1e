"""Whether the work that a file asks for fits the machines that it describes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raylm.cluster.file import CLOUDS, OWN_PROVIDERS, ClusterFile, Finding, Key
from raylm.cluster.pools import Pool, Stage, cpus_in, estimate, gpus_in, pools_of
from raylm.errors import RaylmError, remedy_for
from raylm.prices import OTHER
from raylm.settings import FinetuneSettings, PretrainSettings, Settings, problems
from raylm.storage import StoragePath
from raylm.summary import size
from raylm.training.examples import step_sequences
from raylm.training.groups import automatic_workers

OURS = ("metadata", "raylm")
_ELSEWHERE = (*CLOUDS, "kuberay")
"""Providers whose machines are not those that a file was written on."""


def check_fit(cluster: ClusterFile) -> Iterator[Finding]:
    """What is wrong with `metadata.raylm`, by itself and on these machines."""
    values = cluster.get(*OURS, default={})
    found = list(problems(values))
    for key, why, remedy in found:
        yield cluster.error((*OURS, *key), why, remedy or "take it out")
    if found:
        return
    settings = Settings.model_validate(values)
    pools = pools_of(cluster, settings)
    yield from _prices(cluster, settings)
    yield from _spot(cluster, settings, pools)
    yield from _paths(cluster, settings, pools)
    for training in (settings.pretrain, settings.finetune):
        yield from _width(cluster, training, pools)
    yield from _steps(cluster, settings, pools)
    for stage in ("pretrain", "finetune"):
        yield from _memory(cluster, settings, stage, pools)


def _prices(cluster: ClusterFile, settings: Settings) -> Iterator[Finding]:
    if not settings.prices or not cluster.node_types:
        return
    known = ", ".join(sorted(cluster.node_types))
    for name in sorted(settings.prices.keys() - cluster.node_types.keys() - {OTHER}):
        yield cluster.error((*OURS, "prices", name), "there is no such node type", f"known: {known}")
    for name in sorted(cluster.node_types.keys() - settings.prices.keys()):
        if OTHER not in settings.prices:
            why = f"'{name}' has no price, so that jobs cannot say what they cost"
            yield cluster.warning((*OURS, "prices"), why, f"add {name}: or other:")


def _spot(cluster: ClusterFile, settings: Settings, pools: Sequence[Pool]) -> Iterator[Finding]:
    """Machines that could not stand in for others."""
    by_name = {pool.name: pool for pool in pools}
    key = (*OURS, "spot", "fallback")
    own = OWN_PROVIDERS.get(cluster.provider)
    if settings.spot.fallback and own and cluster.get("provider", "type") != "external":
        why = f"Ray's own {cluster.provider} provider lets no machines stand in for others"
        yield cluster.error(key, why, f"say provider: {{type: external, module: {own}, …}}")
    for spot, on_demand in settings.spot.fallback.items():
        for name in (spot, on_demand):
            if name not in by_name:
                remedy = remedy_for(name, by_name, f"known: {', '.join(sorted(by_name))}")
                yield cluster.error((*key, spot), f"there is no node type '{name}'", remedy)
        if not (first := by_name.get(spot)) or not (second := by_name.get(on_demand)):
            continue
        if cluster.provider in CLOUDS and not first.is_spot:
            yield cluster.error((*key, spot), f"machines of '{spot}' are not spot", "name a type that is")
        if second.is_spot:
            yield cluster.error((*key, spot), f"machines of '{on_demand}' are spot themselves", "name on-demand ones")
        if (first.cpus, first.gpus) != (second.cpus, second.gpus):
            why = f"'{spot}' has {first.cpus} CPUs and {first.gpus} GPUs, '{on_demand}' {second.cpus} and {second.gpus}"
            yield cluster.error((*key, spot), why, "name a type of the same machines")


def _paths(cluster: ClusterFile, settings: Settings, pools: Sequence[Pool]) -> Iterator[Finding]:
    """Directories of one machine in a cluster of several."""
    if sum(pool.most for pool in pools) < 2 or cluster.provider not in (*_ELSEWHERE, "local"):
        return
    places: list[tuple[Key, str]] = [(("storage",), settings.storage)]
    for kind in ("documents", "pairs"):
        for number, source in enumerate(getattr(settings.corpus, kind)):
            if path := getattr(source, "path", None):
                places.append((("corpus", kind, number, "path"), path))
    for key, path in places:
        if not StoragePath(path).is_local:
            continue
        why = f"{path} is a directory of each machine by itself"
        if cluster.provider in _ELSEWHERE:
            yield cluster.error((*OURS, *key), why, "name a place that all reach, such as s3://bucket/…")
        else:
            yield cluster.warning((*OURS, *key), why, "name a place that all reach, or mount one directory on all")


def _width(
    cluster: ClusterFile, training: PretrainSettings | FinetuneSettings, pools: Sequence[Pool]
) -> Iterator[Finding]:
    """More workers than there are GPUs, or without GPUs CPUs."""
    gpus = gpus_in(pools)
    have, kind = (gpus, "GPUs") if gpus else (cpus_in(pools), "CPUs")
    if have is None or training.workers == "auto":
        return
    key = (*OURS, training.section, "workers")
    least, most = training.workers if isinstance(training.workers, tuple) else (training.workers, training.workers)
    why = f"all machines together have {have} {kind}"
    if least > have:
        yield cluster.error(key, f"wants {least} workers, {why}", f"say {have} or less")
    elif most > have:
        yield cluster.warning(key, f"up to {most} workers, {why}", f"say {have}")


def _steps(cluster: ClusterFile, settings: Settings, pools: Sequence[Pool]) -> Iterator[Finding]:
    """Steps of pretraining that cannot be dealt out evenly."""
    most, length = widest(settings.pretrain, pools), settings.corpus.sequence_length
    if most < 2:
        return
    key = (*OURS, "pretrain", "global_batch_tokens")
    sequences = step_sequences(settings.pretrain.global_batch_tokens, length)
    better = -(-sequences // most) * most * length
    if sequences < most:
        why = f"{sequences} sequences of {length} tokens a step, for {most} workers"
        yield cluster.error(key, why, f"say {better} or more, or fewer workers")
    elif sequences % most:
        why = f"{sequences} sequences a step do not divide by {most} workers: some wait for others"
        yield cluster.warning(key, why, f"say {better}")


def widest(training: PretrainSettings | FinetuneSettings, pools: Sequence[Pool]) -> int:
    """The most workers that may train; of machines whose CPUs are not known, one where the settings do not say."""
    if training.workers == "auto":
        gpus, cpus = gpus_in(pools), cpus_in(pools)
        for_data = int(isinstance(training, PretrainSettings) and training.stream)
        return automatic_workers(gpus, gpus if cpus is None else cpus - for_data)
    return training.workers[1] if isinstance(training.workers, tuple) else training.workers


def _memory(cluster: ClusterFile, settings: Settings, stage: Stage, pools: Sequence[Pool]) -> Iterator[Finding]:
    """A model that a GPU cannot hold."""
    gpus = [pool.gpu for pool in pools if pool.gpu and pool.most]
    training: PretrainSettings | FinetuneSettings = getattr(settings, stage)
    if not gpus or settings.model.start_from:  # whose size is known on the hub alone
        return
    try:
        found = estimate(settings, stage, widest(training, pools), on_gpus=True)
    except RaylmError as error:
        yield cluster.error((*OURS, stage), f"cannot train: {error}", "mend it")
        return
    needed, smallest = found.memory.peak - found.memory.offloaded, min(gpus, key=lambda gpu: gpu.bytes)
    if needed > smallest.bytes:
        remedies = [f"raise {stage}.zero_stage"] * (training.zero_stage < 3)
        remedies += [f"lower {stage}.micro_batch_tokens", f"set {stage}.activation_checkpointing: true"]
        why = f"a worker needs about {size(needed)}, an {smallest.name} has {size(smallest.bytes)}"
        yield cluster.error((*OURS, stage), why, " or ".join(remedies))
