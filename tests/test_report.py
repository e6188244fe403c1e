"""The report: what it says of manifests, and that the page is one safe, self-contained, deterministic file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.errors import ArtifactError
from raylm.plots import MOST_POINTS, points, thinned
from raylm.report import Bar, funnel, languages, lengths, reasons, write_report
from raylm.storage import Manifest, StoragePath
from raylm.summary import course_facts, manifest_table, percent, quickstart_summary, size
from tests.browser import in_browser

HOSTILE = "<script>alert('x')</script> & \"q\""


def prepare_manifest() -> Manifest:
    return Manifest(
        stage="prepare",
        settings={"corpus": {"name": "default", "sequence_length": 128, "documents": []}},
        inputs={"key": "k", "units": 2, "bytes": 2_500_000},
        outputs=[{"name": "pairs/train/shard-00000.arrow", "rows": 600, "tokens": 9_000, "bytes": 70_000}],
        counts={
            "dropped.duplicate": 50,
            "dropped.few_letters": 0,
            "dropped.too_short": 150,
            "kept": 800,
            "read": 1_000,
            "rows": {"documents/train": 20, "pairs/train": 600},
            "tokens": {"documents/train": 2_500, "pairs/train": 7_500},
        },
        metrics={"mb_per_s": 1.25, "tokens": 10_000},
        wall_time_s=2.0,
    )


def corpus_manifest() -> Manifest:
    """A preparation with everything that a report can draw."""
    manifest = prepare_manifest()
    manifest.settings["corpus"]["pack"] = {"max_document_tokens": 512}
    manifest.counts |= {"rejected": 7, "read": 1_007, "masked.email": 12, "masked.ip": 0, "masked.iban": 1_300}
    manifest.counts |= {"paragraphs_dropped": 31, "truncated_documents": 1}
    manifest.metrics |= {"padding": 0.004, "seconds": {"clean": 70.2, "merge": 0.2, "dedup": 3.3}}
    counts = [
        {"read": 507, "kept_clean": 400, "rejected": 7, "dropped.too_short": 98, "dropped.many_digits": 2},
        {"read": 500, "kept_clean": 450, "dropped.too_short": 50},
    ]
    manifest.statistics = {
        "sources": [
            {"name": f"corpus.documents[{number}]", "describes": f"jsonl data/{number}.jsonl", "counts": counted}
            for number, counted in enumerate(counts)
        ],
        "lengths": {"documents": [[1_024, 300], [2_048, 0], [4_096, 100]], "pairs": [[1, 100], [2, 300]]},
        "languages": {"documents": {"zh": 10, "en": 390}, "pairs": {"de": 400}},
        "duplicates": [
            {"copies": 1_200, "text": f"copied {HOSTILE}", "other": "nearly copied"},
            {"copies": 2, "text": "a copy"},
        ],
        "samples": {"dropped.duplicate": [], "dropped.too_short": [HOSTILE, "tiny"], "kept": ["a kept text"]},
        "rejected": [
            {"file": "data/a.jsonl", "position": 99, "stage": "read", "error": "not JSON", "excerpt": HOSTILE},
            {"file": "data/b.jsonl", "position": 1_000, "stage": "clean", "error": "broken", "excerpt": ""},
        ],
    }
    return manifest


def training_manifest(stage: str, storage: Path) -> Manifest:
    return Manifest(
        stage=stage,
        settings={"model": {"name": "default"}, stage: {"name": stage, "steps": 40}},
        inputs={"tokens": str(storage / "tokens" / "default"), "start": None},
        outputs=[{"name": "checkpoints/step-00000040"}],
        metrics={
            "step": 40,
            "loss": 2.5,
            "validation_loss": 2.625,
            "validation_perplexity": 13.8,
            "best_step": 40,
            "tokens_per_s": 12_345.6,
            "workers": 1,
            "parameters": 2_199_568,
        },
        wall_time_s=65.0,
    )


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def measured(step: int) -> dict[str, Any]:
    """What a row has besides since runs tell more of themselves."""
    return {
        "gradient_norm": 4.0 / step,
        "real_tokens_per_s": 9_000.0,
        "mfu": 0.3 if step > 10 else 0.1,
        "step_s": 0.25,
        "data_wait": 0.02,
        "checkpoint_stall": 0.1,
        "checkpoint_s": 1.5,
        "validation_s": 3.0,
        "memory_gb": 1.0 + step / 100,
    }


def metrics_lines(scale: float = 1.0) -> str:
    rows: list[dict[str, Any]] = []
    for step in (10, 20, 30, 40):
        rows.append({"step": step, "loss": scale * 80 / step, "tokens_per_s": 12_000.0, "learning_rate": step / 1e4})
        if step % 20 == 0:
            rows.append({"step": step, "validation_loss": scale * 90 / step, "validation_perplexity": 9.0})
    return jsonl(rows)


def evaluate_manifest() -> Manifest:
    translate = {"chrf": 42.0, "chrf_signature": "nrefs:1|chrf", "bleu": 12.0, "bleu_signature": "nrefs:1|bleu"}
    rouge = {"rouge1": 31.0, "rouge2": 11.0, "rougeL": 29.0}
    return Manifest(
        stage="evaluate",
        settings={"evaluate": {"rows_per_task": 500, "beam_size": 1}},
        metrics={
            "translate-de": {
                "rows": 500,
                **translate,
                "exact_match": 3.25,
                "baseline": {"method": "copy of the source", **translate, "chrf": 21.0, "exact_match": 0.5},
            },
            "summarize": {
                "rows": 400,
                **rouge,
                "baseline": {"method": "lead sentence", "rouge1": 25.0, "rouge2": 8.0, "rougeL": 22.0},
            },
            "validation_perplexity": 13.8,
        },
        samples=[{"task": "translate-de", "source": "kept", "target": "in", "prediction": "manifest"}],
        wall_time_s=20.0,
    )


def batch_manifest(task: str, output: Path) -> Manifest:
    return Manifest(
        stage=f"batch-{task}",
        settings={"key": "k", "task": task, "model": "models/default"},
        outputs=[{"path": str(output), "rows": 1_000, "bytes": 5_000}],
        counts={"rows": 1_000, "answered": 998, "errors": 2, "truncated": 3, "error_reasons": {"too long": 2}},
        metrics={"rows_per_s": 250.5, "output_tokens_per_s": 3_000.0, "chunks": 8, "chunks_reused": 2},
        samples=[{"source": "A  long\nsource " * 20, "output": f"{task} [bold]\x1b[31m " + "東京" * 80}] * 4,
        wall_time_s=4.0,
    )


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage root with every kind of artifact, and with checkpoints that a report leaves out."""
    root = tmp_path / "storage"

    def put(manifest: Manifest, directory: str) -> Path:
        place = root / directory
        manifest.write(StoragePath(str(place)))
        return place

    put(corpus_manifest(), "tokens/default")
    for stage, scale in (("pretrain", 1.0), ("finetune", 0.5)):
        run = put(training_manifest(stage, root), f"runs/{stage}")
        (run / "metrics.jsonl").write_text(metrics_lines(scale))
        put(Manifest(stage="checkpoint", metrics={"step": 40}), f"runs/{stage}/checkpoints/step-00000040")
    evaluation = put(evaluate_manifest(), "runs/finetune/evaluation")
    rows = [
        {"task": "translate-de", "source": f"{HOSTILE} {i}", "target": "Ziel", "prediction": "Ziel"} for i in range(9)
    ]
    (evaluation / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exported = Manifest(
        stage="export",
        settings={"model": {"name": "default"}},
        inputs={"run": str(root / "runs" / "finetune")},
        outputs=[{"name": "model.safetensors", "bytes": 8_800_000}, {"name": "config.json", "bytes": 1_200}],
        metrics={"validation_loss": 2.625},
        wall_time_s=1.0,
    )
    put(exported, "models/default")
    put(batch_manifest("translate", root / "batch" / "in.translate.parquet"), "batch/in.translate.parquet.raylm")
    return root


class Page(HTMLParser):
    """Which elements a page has, and what its addresses are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def page_of(storage: Path) -> tuple[str, Page]:
    write_report(str(storage))
    html = (storage / "report.html").read_text()
    return html, Page(html)


# ------------------------------------------------------------------------------------------- the page


def test_page_shows_the_funnel_of_rows(storage: Path) -> None:
    text = page_of(storage)[1].text
    assert "read 1,007 100.0 % unreadable 7 0.7 % readable 1,000 99.3 % dropped 200 19.9 % kept 800 79.4 %" in text
    assert "too short 150 14.9 % duplicate 50 5.0 %" in text
    assert "few letters" not in text  # nothing was dropped for it
    assert "pairs/train 600 7,500 75.0 %" in text


def test_page_shows_what_became_of_each_source(storage: Path) -> None:
    text = page_of(storage)[1].text
    first = "corpus.documents[0] jsonl data/0.jsonl dropped: too short 98, many digits 2 507 7 100 400"
    assert f"{first} corpus.documents[1] jsonl data/1.jsonl dropped: too short 50 500 0 50 450" in text
    manifest = corpus_manifest()
    del manifest.statistics["sources"][1:]
    manifest.write(StoragePath(str(storage / "tokens" / "default")))
    assert "corpus.documents[0]" not in page_of(storage)[1].text  # one source: the funnel says it all


def test_page_shows_lengths_and_languages_of_documents_and_pairs(storage: Path) -> None:
    text = page_of(storage)[1].text
    assert "1,024–2,047 300 75.0 % 2,048–4,095 0 0.0 % 4,096–8,191 100 25.0 %" in text
    assert "Languages of the documents kept language count share en 390 97.5 % zh 10 2.5 %" in text
    assert "1 100 25.0 % 2–3 300 75.0 %" in text
    assert "Languages of the targets of the pairs kept language count share de 400 100.0 %" in text


def test_page_folds_texts_away(storage: Path) -> None:
    html, page = page_of(storage / "tokens")
    assert "kept 1 of 800 a kept text dropped: too short 2 of 150" in page.text
    assert "dropped: duplicate" not in page.text  # there is no sample
    assert f"1,200 copied {HOSTILE} nearly copied 2 a copy counts as the same" in page.text
    assert "2 of 7; all are in rejected/rows.jsonl data/a.jsonl at 99, read: not JSON" in page.text
    assert "data/b.jsonl at 1,000, clean: broken" in page.text
    assert page.tags.count("details") == 5  # kept, too short, copies, unreadable, settings
    assert "<details open" not in html


def test_page_says_what_was_done_to_text(storage: Path) -> None:
    text = page_of(storage / "tokens")[1].text
    assert "masked iban 1,300, email 12 paragraphs 31 dropped" in text
    assert "truncated 1 document to 512 tokens tokens 10,000, 0.4 % padding time clean 1 min 10 s, dedup 3 s" in text


@pytest.mark.parametrize("part", [*corpus_manifest().statistics, "all", "none"])
def test_every_part_of_the_statistics_may_be_absent(tmp_path: Path, part: str) -> None:
    manifest = corpus_manifest()
    if part == "all":
        manifest.statistics = {}
    elif part == "none":
        manifest.statistics = {name: type(value)() for name, value in manifest.statistics.items()}
    else:
        del manifest.statistics[part]
    manifest.write(StoragePath(str(tmp_path)))
    assert "kept 800 79.4 %" in page_of(tmp_path)[1].text


def test_a_manifest_from_before_there_were_statistics_makes_a_page(tmp_path: Path) -> None:
    prepare_manifest().write(StoragePath(str(tmp_path)))
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["statistics"], content["seal"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    text = page_of(tmp_path)[1].text
    assert "read 1,000 100.0 % dropped 200 20.0 % kept 800 80.0 %" in text
    assert "unreadable" not in text


@given(rejected=st.integers(0, 10**9), dropped=st.lists(st.integers(0, 10**9), max_size=5), kept=st.integers(0, 10**9))
def test_bars_of_the_funnel_lie_side_by_side_and_fill_their_room(rejected: int, dropped: list[int], kept: int) -> None:
    counts = {"read": rejected + sum(dropped) + kept, "rejected": rejected, "kept": kept}
    manifest = Manifest("prepare", counts=counts | {f"dropped.{n}": count for n, count in enumerate(dropped)})
    bars = funnel(manifest)
    end = 0
    for bar in sorted((bar for bar in bars if bar.label in ("kept", "dropped", "unreadable")), key=lambda b: b.before):
        assert bar.before == end or bar.count == 0
        end += bar.count
    assert end == counts["read"] == bars[0].count
    assert {bar.whole for bar in bars} == {end}
    why = reasons(manifest)
    assert sum(bar.count for bar in why) == sum(dropped)
    assert [bar.full for bar in why] == [max(dropped)] * len(why) if why else not any(dropped)


@given(st.dictionaries(st.text("abc", min_size=2, max_size=3), st.integers(1, 99)))
def test_no_language_gets_lost_among_the_others(counts: dict[str, int]) -> None:
    bars = languages(counts)
    assert sum(bar.count for bar in bars) == sum(counts.values())
    assert len(bars) == min(len(counts), 9)
    assert all(counts[bar.label] == bar.count for bar in bars if "other" not in bar.label)
    assert not any(bar.label.startswith("1 ") for bar in bars)
    assert [bar.label for bar in languages({"": 1})] == ["not said"]  # as of summaries


def test_a_bar_can_be_seen_wherever_it_lies() -> None:
    assert Bar("", 1, 4).style == "width: 25.00%"
    assert Bar("", 1, 4, full=2).style == "width: 50.00%"
    assert Bar("", 1, 10**6, before=10**6 - 1).style == "margin-left: min(100.00%, 100% - 2px); width: 0.00%"
    assert Bar("", 0, 0).style == "width: 0.00%"
    assert lengths([]) == []
    assert [bar.style for bar in lengths([[8, 1], [16, 2]])] == ["width: 50.00%", "width: 100.00%"]


def test_page_shows_scores_beside_the_baseline(storage: Path) -> None:
    html, page = page_of(storage)
    assert "chrF 42.00 21.00 +21.00" in page.text
    assert "ROUGE-L 29.00 22.00 +7.00" in page.text
    assert "BLEU: nrefs:1|bleu" in page.text
    assert 'class="model" style="width: 42.0%"' in html


def test_page_has_three_charts_for_each_run_with_units(storage: Path) -> None:
    html, page = page_of(storage)
    assert page.tags.count("svg") == 6
    assert all(html.count(f">{label}</text>") == 2 for label in ("loss (nats per token)", "tokens/s", "learning rate"))
    assert html.count(">step</text>") == 6
    assert len(re.findall(r'<figure role="img" aria-label="[^"]+"', html)) == 6
    assert "#0102" not in html  # every placeholder colour became one of the page's


def test_page_shows_all_that_a_run_measured(storage: Path) -> None:
    """On one page with a run that measured less, and with one that did so from some step on only."""
    rows = [json.loads(line) for line in metrics_lines().splitlines()]
    for run, first in (("pretrain", 10), ("finetune", 30)):
        told = [row | measured(row["step"]) if "loss" in row and row["step"] >= first else row for row in rows]
        (storage / f"runs/{run}/metrics.jsonl").write_text(jsonl(told))
    html, page = page_of(storage)
    assert page.tags.count("svg") == 10
    for label in ("training", "validation", "gradient norm", "MFU (%)", "with padding", "without padding"):
        assert html.count(f">{label}</text>") == 2, label
    assert "MFU (%) over steps, from 10 to 30" in html
    assert html.count("30.0 % of the measured matmul peak") == 2
    assert "6 s for checkpoints, 12 s for validation" in page.text
    assert "12,346 tokens/s, MFU 30.0 %" in write_report(str(storage / "runs/pretrain"))


def test_page_loads_nothing_and_runs_nothing(storage: Path) -> None:
    html, page = page_of(storage)
    assert all(address.startswith("#") for address in page.addresses), page.addresses
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert "url(http" not in html
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids))
    targets = {address[1:] for address in page.addresses}
    assert targets <= set(page.ids)


def test_text_of_rows_is_escaped(storage: Path) -> None:
    html, page = page_of(storage)
    assert "<script>" not in html
    assert HOSTILE in page.text
    assert "&lt;script&gt;alert(" in html


def test_samples_come_from_the_predictions_and_else_from_the_manifest(storage: Path) -> None:
    assert "✓ equal" in page_of(storage)[1].text
    assert "3 more" in page_of(storage)[1].text
    (storage / "runs/finetune/evaluation/predictions.jsonl").unlink()
    assert "kept in manifest" in page_of(storage)[1].text


def test_same_artifacts_give_the_same_bytes(storage: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.html", tmp_path / "deep" / "second.html"
    write_report(str(storage), str(first))
    said = write_report(str(storage), str(second))
    assert first.read_bytes() == second.read_bytes()
    assert said.endswith(f"page: {second}")
    inside = storage / "tokens" / "default"
    assert page_of(inside)[0] == page_of(inside)[0]  # the page does not count itself


def test_checkpoints_and_foreign_manifests_are_left_out(storage: Path) -> None:
    (storage / "other").mkdir()
    (storage / "other" / "manifest.json").write_text('{"name": "a web app"}')
    said = write_report(str(storage))
    assert "checkpoints/" not in said
    assert f"passed over: {storage}/other/manifest.json" in said
    assert "step-00000040/" not in (storage / "report.html").read_text()


def test_a_run_without_metrics_or_any_single_artifact_makes_a_page(storage: Path, tmp_path: Path) -> None:
    (storage / "runs/pretrain/metrics.jsonl").unlink()
    assert page_of(storage)[1].tags.count("svg") == 3
    for folder in ("tokens/default", "runs/finetune/evaluation", "models", "batch"):
        assert "<main>" in page_of(storage / folder)[0]


def test_a_long_run_makes_a_page_of_bounded_size(storage: Path) -> None:
    rows = [{"step": step, "loss": 4.0, "tokens_per_s": 9e3, "learning_rate": 1e-3} for step in range(1, 30_001)]
    for row in rows:
        row |= measured(row["step"]) | {"gradient_norm": float(row["step"] * 7_919 % 10_007)}  # a line full of spikes
    (storage / "runs/pretrain/metrics.jsonl").write_text(jsonl(rows))
    html = page_of(storage)[0]
    assert len(html) < 500_000
    assert ">30,000</text>" in html


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_the_outline(values: list[float], most: int) -> None:
    course = list(enumerate(values))
    kept = thinned(course, most)
    assert len(kept) <= max(most, 1)
    assert [point for point in course if point in kept] == kept, "the same points in the same order"
    assert (kept[0], kept[-1]) == (course[0], course[-1])
    assert {max(value for _, value in kept), min(value for _, value in kept)} == {max(values), min(values)}
    if len(course) <= most:
        assert kept == course


def test_a_spike_of_one_step_stays_in_the_chart() -> None:
    rows: list[dict[str, Any]] = [{"step": step, "gradient_norm": 1.0} for step in range(1, 100_001)]
    rows[54_321]["gradient_norm"] = 250.0
    rows[60_000]["gradient_norm"] = float("inf")  # fp16 that overflowed: nothing to draw
    found = points(rows, "gradient_norm")
    assert len(found) <= MOST_POINTS
    assert (54_322, 250.0) in found
    assert points(rows, "mfu") == []


def test_facts_of_a_run_are_those_that_its_rows_tell() -> None:
    old = [{"step": 10, "loss": 2.0, "tokens_per_s": 12_000.0}]
    assert course_facts([]) == course_facts(old) == []
    assert course_facts(old + [old[0] | measured(step) for step in (20, 30, 40)]) == [
        ("utilisation", "30.0 % of the measured matmul peak"),
        ("padding", "25.0 % of the positions computed"),
        ("step", "0.25 s, of which 2.0 % waiting for data"),
        ("paused", "4 s for checkpoints, 9 s for validation"),
        ("memory", "1.40 GB at most, of the first worker"),
    ]


def test_unknown_stages_are_listed(tmp_path: Path) -> None:
    Manifest(stage="nightly", metrics={"batches": 3}, wall_time_s=1).write(StoragePath(str(tmp_path / "n")))
    assert re.search(r"nightly +batches 3 +1 s\n +n\n", write_report(str(tmp_path)))


@pytest.mark.parametrize("missing", [True, False])
def test_a_root_without_artifacts_is_an_error_that_says_what_to_run(tmp_path: Path, missing: bool) -> None:
    root = tmp_path / "nothing" if missing else tmp_path
    with pytest.raises(ArtifactError, match=f"{root}.*raylm quickstart"):
        write_report(str(root))
    assert not (root / "report.html").exists()


def test_page_in_a_browser(storage: Path, tmp_path: Path) -> None:
    page = page_of(storage)[1]
    seen = Page(in_browser((storage / "report.html").as_uri(), tmp_path))
    assert seen.tags.count("svg") == 6
    assert seen.tags.count("path") > 20
    assert seen.tags.count("tr") == page.tags.count("tr")  # the browser had to repair no table
    assert seen.text == page.text, "the browser understood the page otherwise than it was written"


def test_page_fits_a_narrow_screen(storage: Path, tmp_path: Path) -> None:
    html = page_of(storage)[0]
    (tmp_path / "open.html").write_text(html.replace("<details>", "<details open>"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<iframe id=f src=open.html width=400 height=900 frameborder=0></iframe><script>f.onload = () => "
        "document.title = 'as wide as ' + f.contentDocument.documentElement.scrollWidth</script>"
    )
    options = ("--allow-file-access-from-files", "--hide-scrollbars")
    assert "<title>as wide as 400</title>" in in_browser(frame.as_uri(), tmp_path, *options)


# --------------------------------------------------------------------------------------- the terminal


def test_report_lists_the_stages_in_the_order_of_the_road(storage: Path) -> None:
    said = write_report(str(storage))
    assert [line.split()[0] for line in said.splitlines()[3 : 9 * 2] if line[1:2].strip()] == [
        "prepare",
        "pretrain",
        "finetune",
        "evaluate",
        "export",
        "batch-translate",
    ]
    assert "loss 8.00 → 2.50, 12,346 tokens/s" in said
    assert "1 min 05 s" in said
    assert said.endswith(f"page: {storage}/report.html")
    assert "\x1b" not in said


def test_table_of_a_preparation(tmp_path: Path) -> None:
    assert manifest_table(replace(prepare_manifest(), directory="tokens/default")).splitlines() == [
        "prepare: 2 s",
        "  read      1,000 rows, 2.5 MB at 1.25 MB/s",
        "  kept      800 rows (80.0 %)",
        "  dropped   200 rows (20.0 %): too short 150, duplicate 50",
        "  tokens    10,000",
        "  artifact  tokens/default",
    ]


def test_table_of_a_preparation_with_all_there_is_to_say() -> None:
    manifest = corpus_manifest()
    manifest.counts |= {"read": 1_107, **{f"dropped.rare_{number}": 20 for number in range(5)}}
    assert manifest_table(manifest).splitlines() == [
        "prepare: 2 s",
        "  read        1,107 rows, 2.5 MB at 1.25 MB/s",
        "  unreadable  7 rows (0.6 %), see rejected/rows.jsonl",
        "  kept        800 rows (72.3 %)",
        "  dropped     300 rows (27.1 %): too short 150, duplicate 50, rare 0 20, rare 1 20, rare 2 20,"
        " 2 other reasons 40",
        "  masked      iban 1,300, email 12",
        "  paragraphs  31 dropped that stood in the corpus before",
        "  truncated   1 document to 512 tokens",
        "  tokens      10,000, 0.4 % padding",
        "  time        clean 1 min 10 s, dedup 3 s",
    ]


def test_tables_of_the_other_stages(tmp_path: Path) -> None:
    trained = manifest_table(replace(training_manifest("finetune", tmp_path), directory=f"{tmp_path}/runs/finetune"))
    assert "12,346 tokens/s, 1 worker\n" in trained
    assert trained.endswith(f"artifact    {tmp_path}/runs/finetune")
    scored = manifest_table(evaluate_manifest())
    assert "chrF 42.0 (21.0), BLEU 12.0 (12.0), exact match % 3.2 (0.5): copy of the source" in scored
    answered = manifest_table(batch_manifest("translate", tmp_path / "out.parquet"))
    assert "1,000: 998 answered, 3 truncated" in answered
    assert "2: too long 2" in answered
    assert "250.5 rows/s" in answered
    assert str(tmp_path / "out.parquet") in answered


def test_table_of_an_estimate_says_that_it_is_one() -> None:
    estimate = Manifest(
        stage="batch-translate",
        settings={"dry_run": True, "workers": 2},
        counts={"rows": 5_000, "chunks": 10, "characters": 1, "source_tokens": 70_000, "output_tokens": 80_000},
        metrics={"sample_rows": 32, "sample_s": 1.5, "engine_load_s": 0.5, "predicted_s": 130.0},
    )
    said = manifest_table(estimate)
    assert said.startswith("batch-translate: estimate\n")
    assert "2 min 10 s, 2 workers" in said


def test_table_of_many_languages_stays_short() -> None:
    manifest = evaluate_manifest()
    manifest.metrics |= {f"translate-x{i}": manifest.metrics["translate-de"] for i in range(40)}
    assert len(manifest_table(manifest).splitlines()) <= 15


@pytest.mark.parametrize("width", [60, 100])
def test_quickstart_ends_with_samples_that_fit_the_terminal(
    storage: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(width))
    places = ("tokens/default", "runs/pretrain", "runs/finetune", "runs/finetune/evaluation")
    manifests = [found for place in places if (found := Manifest.read(StoragePath(f"{storage}/{place}")))]
    manifests += [batch_manifest(task, storage / f"batch/{task}.parquet") for task in ("translate", "summarize")]
    said = quickstart_summary(manifests, StoragePath(str(storage / "report.html")))
    samples = [line for line in said.splitlines() if " → " in line and "[bold]" in line]
    assert len(samples) == 6
    assert all(cell_len(line) <= width and line.count("…") == 2 for line in samples)
    assert "\x1b" not in said
    assert said.endswith(f"page: {storage}/report.html")
    assert "loss 8.00 → 2.50" in said
    assert " runs/finetune/evaluation\n" in said
    assert " batch/translate.parquet\n" in said
    assert re.search(r"total +2 min 40 s", said)


def test_numbers_are_said_as_a_person_says_them() -> None:
    assert [size(n) for n in (0, 999, 1_500, 2_000_000, 5e12)] == ["0 B", "999 B", "1.5 kB", "2.0 MB", "5.0 TB"]
    assert [percent(*n) for n in ((1, 4), (1, 9_999), (0, 5), (0, 0))] == ["25.0 %", "< 0.1 %", "0.0 %", "0.0 %"]


def test_import_is_light() -> None:
    heavy = "{'ray', 'torch', 'matplotlib', 'jinja2', 'transformers'}"
    code = f"import raylm.report, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
