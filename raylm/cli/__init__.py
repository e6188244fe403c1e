"""The `raylm` command: each subcommand parses, loads the settings, calls one stage and prints its manifest."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any, Literal

import click

from raylm import __version__
from raylm import settings as settings_module
from raylm.cli import inference
from raylm.cli.cluster import cluster, collect_logs, down, logs, nightly, render, run, status, submit, up
from raylm.cli.options import json_option, print_manifest, with_settings
from raylm.cli.session import ray_session
from raylm.errors import RaylmError
from raylm.settings import Settings


class _Group(click.Group):
    """Prints an error of ours as one line and exits with 1; a defect of raylm keeps its stack trace."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except RaylmError as error:
            click.echo(f"raylm: error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("raylm: interrupted; the same command continues where this one stopped", err=True)
            sys.exit(130)


_dry_run_option = click.option("--dry-run", is_flag=True, help="Say memory, tokens and time; start nothing.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raylm")
def main() -> None:
    """From raw text to translated and summarised files.

    Artifacts go below `storage`, each command continues where it stopped, and running a finished one again does
    nothing.
    """


# -------------------------------------------------------------------------------------------- stages


@main.command()
@click.option("--out", type=click.Path(), help="Directory for all artifacts. Default: `storage`.")
@click.option("--to", help="Target language of what is made from Unicode CLDR. Default: as the settings say.")
@with_settings
def quickstart(settings: Settings, out: str | None, to: str | None) -> None:
    """Text to trained model to translated files, on this machine: the whole road of the settings."""
    from raylm.quickstart import run_quickstart

    with ray_session():
        click.echo(run_quickstart(settings, out=out, to=to))


@main.command()
@with_settings
@json_option
def prepare(settings: Settings, as_json: bool) -> None:
    """Clean, filter and deduplicate text, learn a tokenizer, write token shards."""
    from raylm.corpus.prepare import prepare as stage

    with ray_session():
        print_manifest(stage(settings), as_json)


@main.command()
@with_settings
@_dry_run_option
@json_option
def pretrain(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Train a model on the documents of the corpus, which is prepared first where it is not."""
    if dry_run:
        _print_estimate(settings, "pretrain", as_json)
        return
    from raylm.corpus.stream import open_stream
    from raylm.training.trainer import pretrain as stage

    with ray_session():
        _prepare_if_needed(settings)
        print_manifest(stage(settings, open_stream(settings) if settings.pretrain.stream else None), as_json)


@main.command()
@with_settings
@_dry_run_option
@json_option
def finetune(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Train the pretrained model on the labelled pairs of the corpus."""
    if dry_run:
        _print_estimate(settings, "finetune", as_json)
        return
    from raylm.training.trainer import finetune as stage

    with ray_session():
        _prepare_if_needed(settings)
        print_manifest(stage(settings), as_json)


@main.command()
@with_settings
@json_option
def evaluate(settings: Settings, as_json: bool) -> None:
    """Score the fine-tuned model on held-out pairs, beside a baseline."""
    from raylm.training.evaluate import evaluate as stage

    print_manifest(stage(settings), as_json)


@main.command()
@click.option("--pretrained", is_flag=True, help="The pretrained model instead, which writes on or is to be tuned.")
@with_settings
@json_option
def export(settings: Settings, pretrained: bool, as_json: bool) -> None:
    """Write the fine-tuned model in Hugging Face layout, with a model card."""
    from raylm.training.export import export as stage

    print_manifest(stage(settings, pretrained), as_json)


for command in (
    inference.batch_translate, inference.batch_summarize, inference.batch_generate, inference.batch_classify,
    inference.batch_answer, inference.serve, inference.serve_key,
    cluster, up, down, status, submit, logs, collect_logs, run, nightly, render,
):  # fmt: skip
    main.add_command(command)


# ------------------------------------------------------------------------------------------- looking


@main.command()
@click.argument("directory", required=False, type=click.Path())
@click.option("--html", type=click.Path(), help="Where to write the page. Default: report.html in the directory.")
@with_settings
def report(settings: Settings, directory: str | None, html: str | None) -> None:
    """A table and one HTML page of what the manifests below a directory say. Default: `storage`."""
    from raylm.report import write_report

    click.echo(write_report(directory or settings.storage, html))


@main.group()
def settings() -> None:
    """Look at what the settings are and may be."""


@settings.command()
def schema() -> None:
    """The JSON Schema of metadata.raylm."""
    click.echo(json.dumps(settings_module.json_schema(), indent=2, ensure_ascii=False))


@settings.command()
@with_settings
def show(settings: Settings) -> None:
    """The resolved settings as YAML."""
    import yaml

    click.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)


# ------------------------------------------------------------------------------------------- helpers


def _prepare_if_needed(settings: Settings) -> None:
    from raylm.errors import ArtifactError
    from raylm.training.runs import prepared_corpus

    try:
        prepared_corpus(settings)
        is_prepared = not settings.pretrain.stream  # whose sample has to be of these very sources
    except ArtifactError:
        is_prepared = False
    if not is_prepared:
        from raylm.corpus.prepare import prepare as stage

        stage(settings)


def _print_estimate(settings: Settings, stage: Literal["pretrain", "finetune"], as_json: bool) -> None:
    from raylm.training.estimate import dry_run, estimate_table

    estimate = dry_run(settings, stage)
    click.echo(json.dumps(asdict(estimate), indent=2, ensure_ascii=False) if as_json else estimate_table(estimate))
