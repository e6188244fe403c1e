"""`raylm batch-…`, `raylm serve` and `raylm serve-key`: a finished model at work."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from raylm import settings as settings_module
from raylm.cli.options import Command, json_option, model_option, print_manifest, with_settings
from raylm.cli.session import ray_session
from raylm.errors import SettingsError
from raylm.settings import Settings

if TYPE_CHECKING:
    from raylm.tasks import Task

# -------------------------------------------------------------------------------------------- batch jobs


def _batch_options(command: Command) -> Command:
    options = [
        click.argument("input_path", metavar="INPUT"),
        model_option,
        click.option("--output", type=click.Path(), help="Where to write. Default: beside the input."),
        click.option("--limit", type=click.IntRange(min=1), help="Only the first rows of the input."),
        click.option("--overwrite", is_flag=True, help="Replace an output that is there."),
        click.option("--max-errors", help="Fail where more rows than this have an error: 20, or 1%. Default: never."),
        click.option("--through", type=click.Choice(["actors", "serve"]), default="actors", show_default=True,
                     help="Own engine actors, or the replicas of a running `raylm serve`."),
        click.option("--dry-run", is_flag=True, help="Say rows, tokens and time; write nothing."),
        json_option,
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return with_settings(command)


_column_option = click.option("--column", help="Column with the text. Default: `text`, or the only one of strings.")
_prompt_option = click.option("--prompt", help="Words of your own around columns: 'Write a title: {text}'.")


@click.command("batch-translate")
@_batch_options
@_column_option
@_prompt_option
@click.option("--from", "source_language", help="Source language, for models that know several.")
@click.option("--to", help="Target language. Default: the model's only one.")
def batch_translate(settings: Settings, **arguments: Any) -> None:
    """Translate a column of parquet, Arrow, jsonl or csv files, or the messages of gettext catalogs."""
    from raylm.tasks import TRANSLATE

    _batch(settings, TRANSLATE, **arguments)


@click.command("batch-summarize")
@_batch_options
@_column_option
@_prompt_option
def batch_summarize(settings: Settings, **arguments: Any) -> None:
    """Summarise a column of parquet, Arrow, jsonl or csv files."""
    from raylm.tasks import SUMMARIZE

    _batch(settings, SUMMARIZE, **arguments)


@click.command("batch-generate")
@_batch_options
@_column_option
@_prompt_option
def batch_generate(settings: Settings, **arguments: Any) -> None:
    """Have a model write on from a column, or from words of your own around several."""
    from raylm.tasks import GENERATE

    _batch(settings, GENERATE, **arguments)


@click.command("batch-classify")
@_batch_options
@_column_option
def batch_classify(settings: Settings, **arguments: Any) -> None:
    """Give each text of a column one of the model's labels, with its probability."""
    from raylm.tasks import CLASSIFY

    _batch(settings, CLASSIFY, **arguments)


@click.command("batch-answer")
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
        print_manifest(manifest, as_json)


# ------------------------------------------------------------------------------------------- the service


@click.command()
@model_option
@click.option("--host", help="Address to listen on. Default: serve.host.")
@click.option("--port", type=int, help="Port to listen on. Default: serve.port.")
@click.option("--update", is_flag=True, help="Give the running service this model and these settings, and return.")
@click.option("--config", is_flag=True, help="Print the file that `serve deploy` starts it from, and return.")
@with_settings
def serve(
    settings: Settings, model: str | None, host: str | None, port: int | None, update: bool, config: bool
) -> None:
    """Answer POST /v1/translate, /v1/summarize and so on, as the model can, until interrupted."""
    from raylm.inference.service.start import deploy_file, start_service, stop_service, wait_for_signal

    options = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    wanted = settings_module.with_options(settings, "serve", options).serve
    model = model or settings_module.model_directory(settings)
    if config:
        click.echo(deploy_file(wanted, model, settings.topology), nl=False)
        return
    with ray_session(join=update):
        url = start_service(wanted, model, is_update=update, topology=settings.topology)
        if update:
            click.echo(f"raylm answers at {url} with {model}")
            return
        click.echo(f"raylm answers at {url} (Ctrl-C ends it; see {url}/docs)")
        if wanted.keys is None and not url.startswith("http://127."):
            click.echo("It asks for no key: whoever reaches that port may use it. `raylm serve-key` makes one.")
        try:
            wait_for_signal()
        finally:
            stop_service()


@click.command("serve-key")
@click.argument("name")
@click.option("--file", help="Where its hash is kept. Default: serve.keys.")
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="Its limit. Default: that of the service.")
@click.option("--texts-per-minute", type=click.IntRange(min=1), help="Its limit. Default: that of the service.")
@with_settings
def serve_key(
    settings: Settings, name: str, file: str | None, requests_per_minute: int | None, texts_per_minute: int | None
) -> None:
    """Make an API key for the service. It is shown this once: the file keeps its hash alone."""
    from raylm.inference.service.keys import add_key
    from raylm.storage import StoragePath

    place = file or settings.serve.keys
    if place is None:
        raise SettingsError("there is no file for keys: name one with --file, or in serve.keys")
    click.echo(add_key(StoragePath(place), name, requests_per_minute, texts_per_minute))
