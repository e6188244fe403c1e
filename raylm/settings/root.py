"""Everything under `metadata.raylm`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PrivateAttr

from raylm.settings.cluster import JobSettings, NightlySettings, SpotSettings
from raylm.settings.corpus import CorpusSettings
from raylm.settings.inference import BatchSettings, ServeSettings
from raylm.settings.section import Section
from raylm.settings.topology import Topology
from raylm.settings.training import EvaluateSettings, FinetuneSettings, ModelSettings, PretrainSettings


class Settings(Section):
    """Everything under `metadata.raylm`."""

    storage: str = "~/raylm-storage"
    """Where artifacts live: a local directory on one machine, any pyarrow URI on a cluster."""
    prices: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """What an hour of a machine costs, by node type, in any currency: `{head: 0.2, gpu: 1.1}`; `other` is that of all
    the rest. Jobs then say what they will cost."""
    corpus: CorpusSettings = CorpusSettings()
    model: ModelSettings = ModelSettings()
    pretrain: PretrainSettings = PretrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    batch: BatchSettings = BatchSettings()
    serve: ServeSettings = ServeSettings()
    job: JobSettings = JobSettings()
    nightly: NightlySettings = NightlySettings()
    spot: SpotSettings = SpotSettings()
    _topology: Topology | None = PrivateAttr(default=None)

    @property
    def topology(self) -> Topology | None:
        """The machines that the cluster file describes; no setting, and in no manifest."""
        return self._topology

    def on(self, topology: Topology | None) -> Settings:
        """These settings for a cluster of such machines."""
        settings = self.model_copy()
        settings._topology = topology
        return settings


def model_directory(settings: Settings) -> str:
    """Where `raylm export` writes the finished model."""
    from raylm.storage import StoragePath

    return (StoragePath(settings.storage) / "models" / settings.model.name).uri
