"""The `raylm` command: each subcommand parses, loads the settings, calls one stage and prints its manifest."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from raylm import __version__
from raylm import settings as settings_module
from raylm.errors import RaylmError
from raylm.settings import Settings

if TYPE_CHECKING:
    from raylm.storage import Manifest
    from raylm.tasks import Task

Command = TypeVar("Command", bound=Callable[..., Any])


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


def _with_settings(command: Command) -> Command:
    """Give a command `--cluster`, `--with` and `--set`, and hand it the loaded settings."""

    @click.option("--cluster", type=click.Path(), help="Cluster YAML. Default: $RAYLM_CLUSTER, the head node's, local.")
    @click.option("--with", "overlays", multiple=True, type=click.Path(), help="YAML laid over metadata.raylm.")
    @click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value.")
    @wraps(command)
    def loaded(cluster: str | None, overlays: tuple[str, ...], overrides: tuple[str, ...], **arguments: Any) -> Any:
        return command(settings=settings_module.load(cluster, overlays, overrides), **arguments)

    return loaded  # type: ignore[return-value]


_json_option = click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
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
@click.option("--to", default="de", show_default=True, help="Target language.")
@_with_settings
def quickstart(settings: Settings, out: str | None, to: str) -> None:
    """Text to trained model to translated files, on this machine, in minutes."""
    from raylm.quickstart import run_quickstart

    with ray_session():
        click.echo(run_quickstart(settings, out=out, to=to))


@main.command()
@_with_settings
@_json_option
def prepare(settings: Settings, as_json: bool) -> None:
    """Clean, filter and deduplicate text, learn a tokenizer, write token shards."""
    from raylm.corpus.prepare import prepare as stage

    with ray_session():
        _print(stage(settings), as_json)


@main.command()
@_with_settings
@_dry_run_option
@_json_option
def pretrain(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Train a model on the documents of the corpus, which is prepared first where it is not."""
    if dry_run:
        _print_estimate(settings, "pretrain", as_json)
        return
    from raylm.corpus.stream import open_stream
    from raylm.training.trainer import pretrain as stage

    with ray_session():
        _prepare_if_needed(settings)
        _print(stage(settings, open_stream(settings) if settings.pretrain.stream else None), as_json)


@main.command()
@_with_settings
@_dry_run_option
@_json_option
def finetune(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Train the pretrained model on the labelled pairs of the corpus."""
    if dry_run:
        _print_estimate(settings, "finetune", as_json)
        return
    from raylm.training.trainer import finetune as stage

    with ray_session():
        _prepare_if_needed(settings)
        _print(stage(settings), as_json)


@main.command()
@_with_settings
@_json_option
def evaluate(settings: Settings, as_json: bool) -> None:
    """Score the fine-tuned model on held-out pairs, beside a baseline."""
    from raylm.training.evaluate import evaluate as stage

    _print(stage(settings), as_json)


@main.command()
@_with_settings
@_json_option
def export(settings: Settings, as_json: bool) -> None:
    """Write the fine-tuned model in Hugging Face layout, with a model card."""
    from raylm.training.export import export as stage

    _print(stage(settings), as_json)


# ----------------------------------------------------------------------------------- batch and service


def _batch_options(command: Command) -> Command:
    options = [
        click.argument("input_path", metavar="INPUT"),
        click.option("--model", help="Model directory. Default: the one that `raylm export` wrote."),
        click.option("--output", type=click.Path(), help="Where to write. Default: beside the input."),
        click.option("--limit", type=click.IntRange(min=1), help="Only the first rows of the input."),
        click.option("--overwrite", is_flag=True, help="Replace an output that is there."),
        click.option("--max-errors", help="Fail where more rows than this have an error: 20, or 1%. Default: never."),
        click.option("--through", type=click.Choice(["actors", "serve"]), default="actors", show_default=True,
                     help="Own engine actors, or the replicas of a running `raylm serve`."),
        click.option("--dry-run", is_flag=True, help="Say rows, tokens and time; write nothing."),
        _json_option,
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return _with_settings(command)


_column_option = click.option("--column", help="Column with the text. Default: the only one that holds strings.")
_prompt_option = click.option("--prompt", help="Words of your own around columns: 'Write a title: {text}'.")


@main.command("batch-translate")
@_batch_options
@_column_option
@_prompt_option
@click.option("--from", "source_language", help="Source language, for models that know several.")
@click.option("--to", help="Target language. Default: the model's only one.")
def batch_translate(settings: Settings, **arguments: Any) -> None:
    """Translate a column of parquet, Arrow, jsonl or csv files."""
    from raylm.tasks import TRANSLATE

    _batch(settings, TRANSLATE, **arguments)


@main.command("batch-summarize")
@_batch_options
@_column_option
@_prompt_option
def batch_summarize(settings: Settings, **arguments: Any) -> None:
    """Summarise a column of parquet, Arrow, jsonl or csv files."""
    from raylm.tasks import SUMMARIZE

    _batch(settings, SUMMARIZE, **arguments)


@main.command("batch-generate")
@_batch_options
@_column_option
@_prompt_option
def batch_generate(settings: Settings, **arguments: Any) -> None:
    """Have a model write on from a column, or from words of your own around several."""
    from raylm.tasks import GENERATE

    _batch(settings, GENERATE, **arguments)


@main.command("batch-classify")
@_batch_options
@_column_option
def batch_classify(settings: Settings, **arguments: Any) -> None:
    """Give each text of a column one of the model's labels, with its probability."""
    from raylm.tasks import CLASSIFY

    _batch(settings, CLASSIFY, **arguments)


@main.command("batch-answer")
@_batch_options
@click.option("--question", help="Column with the question. Default: the one called so.")
@click.option("--context", help="Column with the text that says the answer. Default: the one called so.")
@_prompt_option
def batch_answer(settings: Settings, question: str | None, context: str | None, **arguments: Any) -> None:
    """Answer each row's question from the text in its context."""
    from raylm.tasks import ANSWER

    _batch(settings, ANSWER, columns={"question": question, "context": context}, **arguments)


def _batch(
    settings: Settings,
    task: Task,
    input_path: str,
    model: str | None,
    as_json: bool,
    column: str | None = None,
    columns: dict[str, str | None] | None = None,
    prompt: str | None = None,
    max_errors: str | None = None,
    **arguments: Any,
) -> None:
    from raylm.inference.batch import run_batch

    if prompt is not None:
        settings = settings_module.with_options(settings, "batch", {"prompt": prompt})
    if max_errors is not None:
        limit = int(max_errors) if max_errors.isdecimal() else max_errors
        settings = settings_module.with_options(settings, "batch", {"max_errors": limit})
    named = {field: name for field, name in ({"text": column} | (columns or {})).items() if name is not None}
    with ExitStack() as stack:
        session = ray_session(join=arguments["through"] == "serve")
        manifest = run_batch(
            settings,
            task,
            input_path,
            model=model,
            columns=named,
            connect=lambda: stack.enter_context(session),
            **arguments,
        )
        _print(manifest, as_json)


@main.command()
@click.option("--model", help="Model directory. Default: the one that `raylm export` wrote.")
@click.option("--host", help="Address to listen on. Default: serve.host.")
@click.option("--port", type=int, help="Port to listen on. Default: serve.port.")
@_with_settings
def serve(settings: Settings, model: str | None, host: str | None, port: int | None) -> None:
    """Answer POST /v1/translate, /v1/summarize and so on, as the model can, until interrupted."""
    from raylm.inference.serve import start_service, stop_service, wait_for_signal

    chosen = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update={"serve": settings.serve.model_copy(update=chosen)})
    with ray_session():
        url = start_service(settings, model or settings_module.model_directory(settings))
        click.echo(f"raylm answers at {url} (Ctrl-C ends it; see {url}/docs)")
        try:
            wait_for_signal()
        finally:
            stop_service()


# ------------------------------------------------------------------------------------------- looking


@main.command()
@click.argument("directory", required=False, type=click.Path())
@click.option("--html", type=click.Path(), help="Where to write the page. Default: report.html in the directory.")
@_with_settings
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
@_with_settings
def show(settings: Settings) -> None:
    """The resolved settings as YAML."""
    import yaml

    click.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)


# ------------------------------------------------------------------------------------------- helpers


@contextmanager
def ray_session(join: bool = False) -> Iterator[None]:
    """A connection to Ray: that of `$RAY_ADDRESS`, one that `ray start` started here, or a new one of this process.

    :param join: only to a running one: that of `raylm serve` on this machine, or any other.
    :raises RaylmError: there is none to join.
    """
    # Ray warns of this in every process; nothing here depends on either behaviour.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address in (None, "local"):
        _use_own_token()
        # Workers that compute together all wait for the one that another process of this machine holds up.
        os.environ.setdefault("RAY_worker_niceness", "0")
    if join and not address:
        from raylm.inference.address import noted_service

        address = noted_service() or "auto"
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except ConnectionError as error:
        where = f"at {address}" if address != "auto" else "on this machine"
        raise RaylmError(f"there is no running Ray {where}: {str(error).splitlines()[0]}") from error
    _hush_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def _use_own_token() -> None:
    """Guard a Ray of this machine's user with a token of raylm's own.

    Ray would write one to ~/.ray/auth_token, readable by all, and from then on every `ray start` would ask every
    `ray job submit` for it. Where that file is there already, or the environment says something, Ray has its way.
    """
    said = any(f"RAY_AUTH_{name}" in os.environ for name in ("MODE", "TOKEN", "TOKEN_PATH"))
    if said or Path("~/.ray/auth_token").expanduser().exists():
        return
    token = Path("~/.cache/raylm/ray_token").expanduser()
    if not token.exists():
        token.parent.mkdir(parents=True, exist_ok=True)
        with open(token, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def _hush_ray_data() -> None:
    """Keep Ray Data's progress bars and notes off the terminal: raylm shows progress of its own."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)


def _prepare_if_needed(settings: Settings) -> None:
    from raylm.errors import ArtifactError
    from raylm.training.trainer import prepared_corpus

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


def _print(manifest: Manifest, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(manifest), indent=2, ensure_ascii=False, default=str))
        return
    from raylm.summary import manifest_table

    click.echo(manifest_table(manifest))
