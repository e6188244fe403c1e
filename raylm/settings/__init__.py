"""What `metadata.raylm` of a cluster YAML may say: the sections, how a file is found, read and overridden.

A value is looked for in this order: `--set key=value`, `--with overlay.yaml` (the last one first), the cluster
file, the default written here. Defaults live in this room alone.
"""

from raylm.settings.cluster import JobSettings, NightlyJob, NightlySettings, SpotSettings
from raylm.settings.corpus import (
    CldrSource,
    CleanSettings,
    CorpusSettings,
    DecontaminateSettings,
    DedupSettings,
    DocstringsSource,
    DocstringSummariesSource,
    EvaluationSource,
    FileSource,
    FilterSettings,
    PackSettings,
    PairFileSource,
    PairFilterSettings,
    PiiSettings,
    TokenizerSettings,
)
from raylm.settings.inference import BatchSettings, DecodeSettings, ServeSettings
from raylm.settings.loading import (
    differences,
    find_cluster_file,
    json_schema,
    load,
    packaged_cluster_file,
    problems,
    with_options,
)
from raylm.settings.root import Settings, model_directory
from raylm.settings.section import Section
from raylm.settings.topology import Topology
from raylm.settings.training import (
    EvaluateSettings,
    FinetuneSettings,
    ModelSettings,
    PretrainSettings,
    TrainingSettings,
)

__all__ = [
    "BatchSettings",
    "CldrSource",
    "CleanSettings",
    "CorpusSettings",
    "DecodeSettings",
    "DecontaminateSettings",
    "DedupSettings",
    "DocstringSummariesSource",
    "DocstringsSource",
    "EvaluateSettings",
    "EvaluationSource",
    "FileSource",
    "FilterSettings",
    "FinetuneSettings",
    "JobSettings",
    "ModelSettings",
    "NightlyJob",
    "NightlySettings",
    "PackSettings",
    "PairFileSource",
    "PairFilterSettings",
    "PiiSettings",
    "PretrainSettings",
    "Section",
    "ServeSettings",
    "Settings",
    "SpotSettings",
    "TokenizerSettings",
    "Topology",
    "TrainingSettings",
    "differences",
    "find_cluster_file",
    "json_schema",
    "load",
    "model_directory",
    "packaged_cluster_file",
    "problems",
    "with_options",
]
