from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from raylm import settings
from raylm.errors import SettingsError
from raylm.settings import Settings, loading

CLUSTERS = Path(__file__).parent.parent / "clusters"


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    return _write(tmp_path / "cluster.yaml", {"storage": "/data", "pretrain": {"steps": 7, "seed": 5}})


def _write(path: Path, raylm: object) -> Path:
    path.write_text(yaml.safe_dump({"cluster_name": "x", "metadata": {"raylm": raylm}}))
    return path


def test_a_cluster_file_overrides_defaults_alone(cluster_file: Path) -> None:
    loaded = settings.load(cluster_file)
    assert (loaded.storage, loaded.pretrain.steps, loaded.pretrain.seed) == ("/data", 7, 5)
    assert loaded.pretrain.learning_rate == Settings().pretrain.learning_rate


def test_overlays_then_overrides_win(cluster_file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("pretrain: {steps: 8, zero_stage: 2}\n")
    second.write_text("pretrain: {steps: 9}\n")
    loaded = settings.load(cluster_file, [first, second], ["pretrain.zero_stage=3", "pretrain.learning_rate=5e-4"])
    assert loaded.pretrain.steps == 9
    assert loaded.pretrain.zero_stage == 3
    assert loaded.pretrain.learning_rate == 5e-4
    assert loaded.pretrain.seed == 5


def test_the_environment_then_the_head_nodes_file_are_found(
    cluster_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loading, "BOOTSTRAP_CONFIG", _write(tmp_path / "ray_bootstrap_config.yaml", {"storage": "/head"})
    )
    assert settings.load().storage == "/head"
    monkeypatch.setenv("RAYLM_CLUSTER", str(cluster_file))
    assert settings.load().storage == "/data"


def test_without_any_file_the_packaged_one_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "BOOTSTRAP_CONFIG", tmp_path / "absent.yaml")
    loaded = settings.load()
    assert {source.type for source in loaded.corpus.pairs} == {"cldr", "docstrings"}


@pytest.mark.parametrize(
    ("raylm", "key", "nearest"),
    [
        ({"storag": "/x"}, "storag", "storage"),
        ({"pretrain": {"step": 3}}, "pretrain.step", "steps"),
        ({"corpus": {"pairs": [{"type": "cldr", "too": "de"}]}}, "corpus.pairs.0.cldr.too", "to"),
        ({"batch": {"decode": {"beamsize": 3}}}, "batch.decode.beamsize", "beam_size"),
    ],
)
def test_an_unknown_key_is_refused_with_file_path_and_nearest_name(
    tmp_path: Path, raylm: object, key: str, nearest: str
) -> None:
    path = _write(tmp_path / "c.yaml", raylm)
    with pytest.raises(SettingsError) as caught:
        settings.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert f"'{key}'" in message
    assert f"did you mean '{nearest}'" in message


def test_a_wrong_value_names_its_key_and_what_was_found(cluster_file: Path) -> None:
    with pytest.raises(SettingsError, match=r"--set pretrain.steps=many: pretrain.steps: .* found 'many'"):
        settings.load(cluster_file, (), ["pretrain.steps=many"])


def test_what_settings_say_together_counts_and_not_their_order(cluster_file: Path, tmp_path: Path) -> None:
    words = ["finetune.offload=all", "finetune.zero_stage=3"]
    for overrides in (words, words[::-1]):
        assert settings.load(cluster_file, (), overrides).finetune.offload == "all"
    with pytest.raises(SettingsError, match=r"--set finetune.offload=all: finetune: .*needs zero_stage 3"):
        settings.load(cluster_file, (), [words[0], "finetune.steps=5"])
    narrow = settings.with_options(settings.load(cluster_file), "batch", {"workers": 2, "max_errors": "1%"})
    assert narrow.batch.workers == 2
    with pytest.raises(SettingsError, match="metadata.raylm: holds a list; a mapping of keys is expected"):
        settings.load(_write(tmp_path / "list.yaml", [1]), (), words)


def test_translation_pairs_need_a_language(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.yaml", {"corpus": {"pairs": [{"type": "parquet", "path": "x"}]}})
    with pytest.raises(SettingsError, match="needs the target language"):
        settings.load(path)


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n"])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=str(path)):
        settings.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no file"):
        settings.load(tmp_path / "absent.yaml")
    with pytest.raises(SettingsError, match="--with: there is no file"):
        settings.load(None, [tmp_path / "absent.yaml"])
    with pytest.raises(SettingsError, match="write key=value"):
        settings.load(None, (), ["pretrain.steps"])


def test_differences_name_the_path() -> None:
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}
    assert list(settings.differences(old, new)) == ["a.c: 2 → 3", "d: None → 4"]


def test_the_json_schema_describes_every_key_of_a_section() -> None:
    schema = settings.json_schema()
    assert json.dumps(schema)
    assert "description" in schema["$defs"]["PretrainSettings"]["properties"]["noise_density"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_cluster_file_is_what_ray_and_raylm_take(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    settings.load(path)
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_workers: many", "cluster.yaml: max_workers: found 'many', a whole number is expected"),
        ("max_workers: null", None),
    ],
)
def test_machines_that_are_none_are_told(tmp_path: Path, text: str, said: str | None) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"{text}\nhead_node_type: head\navailable_node_types: {{head: , worker: {{max_workers: null}}}}\n")
    if said is None:
        assert settings.load(file).topology is not None
        return
    with pytest.raises(SettingsError, match=said):
        settings.load(file)


def test_the_nearest_name_is_told_in_a_section_that_may_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("metadata: {raylm: {finetune: {lora: {rnk: 8}}}}")
    with pytest.raises(SettingsError, match=r"unknown key 'finetune.lora.rnk'; did you mean 'rank'\?"):
        settings.load(file)
