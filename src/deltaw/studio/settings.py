"""Page of the settings: four of them, all others from the schema, the file and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import yaml
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from deltaw.errors import UserError
from deltaw.platforms import shell_word
from deltaw.settings import method_registry, task_registry
from deltaw.settings.config import RunConfig, Setting, flat, parse_setting, settings
from deltaw.settings.schema import value_types
from deltaw.studio.rendering import form, page, wants_json
from deltaw.studio.state import Studio
from deltaw.studio.workspace import Draft

# Labels and descriptions of the most important settings.
FOUR = {
    "train.epochs": ("Passes over the rows", "How often the model reads each row. Too many make it repeat them."),
    "train.learning_rate": ("Learning rate", "How much the model changes per step. “auto” suits most rows."),
    "lora.rank": ("Rank", "Size of the adapter. A higher rank can learn more, and needs more memory and time."),
    "train.keep_general": (
        "Keep general answers",
        "Keeps answers to other questions as they are. Steps take longer. 0: off; use 1.",
    ),
}
# Settings of other pages, and those that are not allowed in the studio.
ELSEWHERE = ("model", "task", "data.train", "output", "force", "trust_remote_code", "track")
# Name of messages that belong to no field.
FORM = "form"


def router(studio: Studio) -> APIRouter:
    """Return the routes of the page of the settings."""
    routes = APIRouter(prefix="/drafts/{identity}/settings")
    workspace = studio.workspace

    def show_form(request: Request, draft: Draft, errors: Mapping[str, str], texts: Mapping[str, str]) -> Response:
        sections = _sections(draft.settings, errors, texts)
        values = {"message": errors.get(FORM, ""), "four": sections.pop(""), "sections": sections, **_outputs(draft)}
        return page(request, "settings.html", status=400 if errors else 200, draft=draft, **values)

    @routes.get("")
    def show(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        for key, step in (("task", "data"), ("model", "model")):
            if not draft.settings.get(key):
                return RedirectResponse(f"/drafts/{identity}/{step}", 303)
        return show_form(request, draft, {}, {})

    @routes.post("")
    async def save(request: Request, identity: str) -> Response:
        draft = workspace.draft(identity)
        fields = await form(request)
        texts = {key: values[0] for key, values in fields.items()}
        errors = {}
        try:
            changed = replace(draft, settings=_changed(draft.settings, texts))
            workspace.config(changed)
            changed.save()
            draft = changed
        except UserError as error:
            errors = _field_errors(error, texts)
        if wants_json(request):
            return JSONResponse({**_outputs(draft), "errors": errors})
        return show_form(request, draft, errors, texts) if errors else RedirectResponse(str(request.url.path), 303)

    return routes


def _changed(values: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Return nested settings with changed values. Values that equal the default are left out.

    Raises:
        UserError: if a setting does not exist or cannot be changed here.
    """
    explicit = flat(values)
    known = {setting.key: setting for setting in settings()}
    for key, text in texts.items():
        if key not in known or key in ELSEWHERE:
            raise UserError(f"'{key}' cannot be changed here", location=key)
        default = known[key].default
        value = parse_setting(key, text.replace("\r\n", "\n")) if text.strip() else default
        try:
            explicit[key] = json.loads(json.dumps(value, default=str, skipkeys=True))  # dates become texts
        except ValueError as error:  # thousands of digits
            raise UserError("the number is too long", location=key) from error
        if value == (list(default) if isinstance(default, tuple) else default):
            del explicit[key]
    nested: dict[str, Any] = {}
    for key, value in explicit.items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return nested


def _text(key: str, value: object) -> str:
    """Return a value as it is written in a field or a flag."""
    if isinstance(value, str) and parse_setting(key, value) == value:
        return value
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()


def _outputs(draft: Draft) -> dict[str, str]:
    """Return the settings file and the command of a draft."""
    words = ["deltaw", "train"]
    for key, value in flat(draft.settings).items():
        words += [f"--{key}", shell_word(_text(key, value))]
    return {"yaml": yaml.safe_dump(draft.settings, sort_keys=False, allow_unicode=True), "command": " ".join(words)}


def _sections(
    values: Mapping[str, Any], errors: Mapping[str, str], texts: Mapping[str, str]
) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Return description and fields of each section that applies to the task. The four main settings are in section ''.

    Args:
        errors: Errors by key.
        texts: Texts that the user entered, by key.
    """
    entry = task_registry.entry_of(values["task"])
    method = values.get("method", "lora")
    leaves = {setting.key: setting for setting in settings() if setting.key not in ELSEWHERE}
    explicit = flat(values)
    kinds = value_types(leaves)
    names = {"train", "data", entry.section_name, *(entry.name for entry in method_registry.entries())}
    applies = {"train.keep_general": entry.generates_text, "lora.rank": method == "lora"}
    four = [key for key in FOUR if applies.get(key, True)]
    others = sorted((key for key in leaves if key not in FOUR), key=lambda key: not key.startswith("train."))
    sections: dict[str, tuple[str, list[dict[str, Any]]]] = {"": ("", []), "general": ("", [])}
    for key in [*four, *others]:
        section = key.rpartition(".")[0]
        if section and section not in names:
            continue
        name = "" if key in four else section or "general"
        description = str(RunConfig.model_fields[section].description) if section else "model, machine and start"
        text = texts.get(key, _text(key, explicit[key]) if key in explicit else "")
        field = _field(leaves[key], kinds[key], text, errors.get(key, ""))
        sections.setdefault(name, (description, []))[1].append(field)
    return sections


def _field(setting: Setting, kinds: str, text: str, error: str) -> dict[str, Any]:
    """Return the arguments of the macro of a field."""
    key = setting.key
    default = "none" if setting.default is None else _text(setting.key, setting.default)
    words = (kinds or "TEXT").split("|")
    label, note = FOUR.get(key, (key.rpartition(".")[2].replace("_", " ").capitalize(), ""))
    if not note:
        note = f"{setting.description[:1].upper()}{setting.description[1:]}. ({key})"
    result = {"id": key, "label": label, "note": note, "error": error, "value": text or default * (key in FOUR)}
    choices = [word for word in words if not word.isupper()]
    if choices == words:
        return {**result, "kind": "select", "choices": [("", f"default: {default}"), *((w, w) for w in choices)]}
    note = f"{note} {'' if key in FOUR else 'Default: ' + default}".strip()
    return {**result, "note": note, "kind": "number" if {*words} <= {"N", "NUMBER"} else "text"}


def _field_errors(error: UserError, keys: Collection[str]) -> dict[str, str]:
    """Return the error for each field that it names, and a summary."""
    hints = (error.hint or "").split("\n")
    text = "; ".join(filter(None, (error.message, error.hint)))
    located = f"{error.message} {error.location or ''}"
    errors = {}
    for key in keys:
        if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", located):
            own = [hint.removeprefix(f"'{key}' ") for hint in hints if hint.startswith(f"'{key}' ")]
            errors[key] = f"The value {own[0]}." if own else f"{text}."
    if not errors:
        return {FORM: f"Not saved: {text}."}
    return {**errors, FORM: f"Not saved. Correct {', '.join(FOUR.get(key, (key,))[0] for key in errors)}."}
