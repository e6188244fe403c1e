"""How a model is asked for a task: the tokens, language codes and words that stand around what a row says.

Models made by raylm and multilingual OPUS-MT models read a token before the text (`>>de<<`); NLLB, M2M100 and mBART a
code for the source's language, and begin their answer with one for the target's; T5 some words (`summarize: `);
decoders an instruction, in the form of the chats that they were trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from string import Formatter

from raylm.errors import ArtifactError, SettingsError
from raylm.inference.model import ModelInfo
from raylm.tasks import ANSWER, GENERATE, SUMMARIZE, TRANSLATE, Task, language_token

Fields = tuple[str, ...]
"""What a row says: the values of the columns that a prompt reads, in its order."""

_INSTRUCTIONS = {
    TRANSLATE.name: "Translate the following text{source} to {target}. Answer with the translation alone.\n\n{{text}}",
    SUMMARIZE.name: "Summarize the following text. Answer with the summary alone.\n\n{{text}}",
    ANSWER.name: "Answer the question from the text. Answer as briefly as possible.\n\n{{context}}\n\n{{question}}",
    GENERATE.name: "{{text}}",
}
_SHOWN = 8
_TRANSLATION = re.compile("translation_(.+)_to_(.+)")
_CODE = re.compile(r"__([a-z]{2,3})__|[a-z]{2}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}")
"""Language codes of M2M100, mBART and NLLB."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, but for the row."""

    task: str
    fields: tuple[str, ...] = ("text",)
    """The names of what it reads of a row."""
    template: str | None = None
    """Text with `{name}` in the place of a field; None where the only field is all."""
    token: str | None = None
    """A token of the vocabulary before the text."""
    source_code: str | None = None
    target_code: str | None = None
    """Tokens that say the languages: of the text, and of the answer, which begins with it."""
    is_chat: bool = False
    """Whether the text is a user's message in the model's own form of chats."""
    system: str | None = None
    """The message before the user's."""
    to: str | None = None
    """The language of the answer, where it is asked for."""

    def text(self, fields: Fields) -> str:
        """What the model reads of a row."""
        if self.template is None:
            return fields[0]
        return self.template.format_map(dict(zip(self.fields, fields, strict=True)))

    def with_template(self, template: str) -> Prompt:
        """The same with other words around other fields."""
        return replace(self, template=template, fields=template_fields(template))


def template_fields(template: str) -> tuple[str, ...]:
    """The names in braces of a template, each once, in order.

    :raises SettingsError: it has none, or braces with something else in them.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise SettingsError(f"prompt {template!r}: {error}; write {{{{ and }}}} for braces that are text") from error
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, form, conversion in parts:
        if name is not None and (not name or name.isdigit() or form or conversion or set("[].") & set(name)):
            raise SettingsError(f"prompt {template!r}: {{{name}}} is not the name of a column alone")
    if not names:
        raise SettingsError(f"prompt {template!r}: names no column; write, for example, {{text}}")
    return tuple(dict.fromkeys(names))


def prompt_for(
    model: ModelInfo,
    task: Task,
    to: str | None = None,
    source_language: str | None = None,
    template: str | None = None,
    system: str | None = None,
) -> Prompt:
    """How to ask a model for a task.

    :param to: the target language of a translation; may be left out where the model has a single one.
    :param template: words of the user's own, in the place of those that the model is usually asked with.
    :param system: the system message, for a model that chats.
    :raises ArtifactError: the model was not made for the task or the language.
    :raises SettingsError: the template is none, or there is a system message for a model that does not chat.
    """
    model.check_task(task)
    if system is not None and not model.chats:
        raise SettingsError(f"system: model {model.where} has no chat template, so there is no place for it")
    if template is not None and model.kind == "reader":
        raise SettingsError(f"prompt: model {model.where} marks answers in a context, there is no place for words")
    prompt = _usual_prompt(model, task, to, source_language, template)
    if template is not None:
        prompt = prompt.with_template(template)
    if task == TRANSLATE:
        language = model.target_language(to) if model.is_ours else to
        prompt = replace(prompt, to=_tag(language) if language else None)
    return replace(prompt, system=system)


def _usual_prompt(
    model: ModelInfo, task: Task, to: str | None, source_language: str | None, template: str | None
) -> Prompt:
    prompt = Prompt(task.name, task.fields)
    if model.kind in ("classifier", "reader"):
        return prompt
    if model.is_ours:
        prompt = prompt.with_template(task.template) if task.template else prompt
        return replace(prompt, token=_task_token(model, task, to, source_language))
    if model.kind == "decoder":
        if model.chats:
            words = _INSTRUCTIONS[task.name].format(**_language_names(task, to, source_language, template))
            return replace(prompt, is_chat=True).with_template(words)
        if task != GENERATE and template is None:
            raise ArtifactError(
                f"model {model.where}: a decoder without a chat template has to be told what to do in words of yours:"
                f" --prompt 'English: {{{task.fields[-1]}}}\\nGerman:', for example"
            )
        return prompt
    if task == TRANSLATE and model.is_language_coded:
        return _coded_prompt(model, prompt, to, source_language)
    prefix = _prefix(model, task, to, source_language) if template is None else None
    if prefix is not None:
        return prompt.with_template(prefix.replace("{", "{{").replace("}", "}}") + "{text}")
    if task == TRANSLATE:
        return replace(prompt, token=_language_token(model, to))
    return prompt.with_template(task.template) if task.template else prompt


def _task_token(model: ModelInfo, task: Task, to: str | None, source_language: str | None) -> str | None:
    if source_language and model.source_language and source_language != model.source_language:
        raise ArtifactError(f"model {model.where}: translates from '{model.source_language}', not '{source_language}'")
    return task.prompt_token(model.target_language(to) if task == TRANSLATE else None)


def _prefix(model: ModelInfo, task: Task, to: str | None, source_language: str | None) -> str | None:
    """The words that a model's config gives for a task, as T5's does; None where it gives none.

    :raises ArtifactError: it gives some for translating, but not for these languages.
    """
    if task == SUMMARIZE:
        return model.prefixes.get("summarization")
    if task != TRANSLATE:
        return None
    named = {_TRANSLATION.fullmatch(name): words for name, words in model.prefixes.items()}
    known = {match[0]: (match[1], match[2], words) for match, words in named.items() if match}
    fitting = [
        words for source, target, words in known.values() if to in (None, target) and source_language in (None, source)
    ]
    if known and len(fitting) != 1:
        raise ArtifactError(
            f"model {model.where}: say the languages with --from and --to; it knows "
            + ", ".join(name.removeprefix("translation_").replace("_", " ") for name in sorted(known))
        )
    return fitting[0] if fitting else None


# -------------------------------------------------------------------------------------------- languages


def _language_token(model: ModelInfo, to: str | None) -> str | None:
    """The token of a multilingual OPUS-MT model for a language; None for a model that has no such tokens.

    :raises ArtifactError: it has some, but none for the language.
    """
    tokens = model.language_tokens()
    if not tokens:
        return None
    if to is None:
        raise ArtifactError(f"model {model.where}: say --to; its languages: {_some(sorted(tokens))}")
    for code in _codes_of(to):
        for name in (code, code.split("_")[0]):
            if name in tokens:
                return language_token(name)
    raise ArtifactError(f"model {model.where}: cannot translate to '{to}'; its languages: {_some(sorted(tokens))}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", …" * (len(names) > _SHOWN)


def _tag(language: str) -> str:
    """A language or a model's code for it as a BCP 47 tag: `de` for `deu_Latn` and `__de__`."""
    from babel.core import get_global

    base, *rest = language.strip("_").replace("-", "_").split("_")
    return "-".join([get_global("language_aliases").get(base, base).split("_")[0], *rest])


def _coded_prompt(model: ModelInfo, prompt: Prompt, to: str | None, source_language: str | None) -> Prompt:
    codes = {code for code in model.added_tokens() if _CODE.fullmatch(code)}
    if source_language is None or to is None:
        option = "--to" if to is None else "--from"
        raise ArtifactError(f"model {model.where}: translates between {len(codes)} languages; say {option} too")
    return replace(prompt, source_code=_code(model, source_language, codes), target_code=_code(model, to, codes))


def _code(model: ModelInfo, language: str, codes: set[str]) -> str:
    """A model's code for a language that is given as its own code or as a BCP 47 tag: `de`, `zh-Hant`."""
    for code in _codes_of(language):
        if code in codes:
            return code
    same = sorted(code for code in codes if code.split("_")[0] == language.replace("-", "_").split("_")[0])
    if len(same) == 1:  # mBART's `de_DE`
        return same[0]
    shown = _some(same or sorted(codes))
    raise ArtifactError(f"model {model.where}: has no code for the language '{language}'; its codes: {shown}")


def _codes_of(language: str) -> Iterator[str]:
    """What a language may be called: itself, M2M100's form, and NLLB's, an ISO 639-3 code with the usual script."""
    from babel.core import get_global

    yield language
    tag = language.replace("-", "_")
    yield f"__{tag}__"
    yield _tag(tag.lower())
    base, *rest = tag.split("_")
    base = base.lower()
    likely = get_global("likely_subtags")
    script = next((part for part in rest if len(part) == 4), None)
    if script is None:
        script = (likely.get("_".join([base, *rest])) or likely.get(base) or "__").split("_")[1]
    for alias, meant in get_global("language_aliases").items():
        if meant == base and len(alias) == 3:
            yield f"{alias}_{script.title()}"


def _language_names(task: Task, to: str | None, source_language: str | None, template: str | None) -> dict[str, str]:
    """English names of the languages, to be put into an instruction."""
    if task != TRANSLATE or template is not None:
        return {"source": "", "target": ""}
    if to is None:
        raise ArtifactError("--to is missing: a model that chats has to be told the language to translate to")
    return {
        "source": f" from {_language_name(source_language)}" if source_language else "",
        "target": _language_name(to),
    }


def _language_name(language: str) -> str:
    from babel import Locale, UnknownLocaleError

    try:
        return str(Locale.parse(language.replace("-", "_")).get_display_name("en"))
    except (UnknownLocaleError, ValueError):
        return language
