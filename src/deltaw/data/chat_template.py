"""User-supplied chat template files, and the current date in templates.

Within one run, a template that writes the date gets the same date for all rows.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from deltaw.data.rendering import FAULTS, format_date, render_conversation
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "data.chat_template"
# Function that returns the date in templates, and a call with a literal format.
_ASKS_DATE = re.compile(r"\bstrftime_now\b")
_ASKS_FORMAT = re.compile(r"""\bstrftime_now\(\s*(?:'([^'\n]*)'|"([^"\n]*)")\s*\)""")

# Replacement of the function by a dictionary of dates. The empty output at its end preserves the first line's white
# space.
_MACRO = "{%% macro strftime_now(format) %%}{{ %s[format] }}{%% endmacro %%}{{ '' }}"


def read_chat_template(path: str) -> str:
    """Read a template file.

    Raises:
        UserError: if the file cannot be read, is empty, or exceeds the rendering limits, or if it is not a Jinja
            template
            (the message names the line).
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except OSError as error:
        message = f"the chat template cannot be read: {error.strerror}"
        raise UserError(message, location=f"{_KEY}: {path}", hint="give a file with a Jinja template") from error
    except UnicodeDecodeError as error:
        raise UserError("the chat template is not UTF-8 text", location=path, hint="save it as UTF-8") from error
    if not text.strip():
        raise UserError("the chat template is empty", location=path, hint="write a Jinja template of 'messages'")
    try:
        render_conversation(text, [{"role": "user", "content": "Hello"}], generation=False, variables={})
    except jinja2.TemplateSyntaxError as error:
        message = f"the chat template is not Jinja: {error.message}"
        raise UserError(message, location=f"{path}, line {error.lineno}", hint="correct that line") from error
    except FAULTS:
        # The template may require an answer or a special token. Errors are reported when rows are rendered.
        return text
    return text


def with_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer with the template in ``path``, or the tokenizer itself if ``path`` is None.

    Raises:
        UserError: if the file cannot be used.
    """
    if path is None:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = read_chat_template(path)
    return changed


def todays_date() -> str:
    """Return the date in the format of ``data.date``."""
    return datetime.date.today().isoformat()


def asks_for_date(template: str) -> bool:
    """Return True if a template depends on the current date."""
    return _ASKS_DATE.search(template) is not None


def with_date(template: str, date: str) -> str:
    """Return the template with ``date`` (such as 2026-01-31) as the current date.

    A macro shadows the function that reads the clock.
    """
    formats = dict.fromkeys(match[1] or match[2] or "" for match in _ASKS_FORMAT.finditer(template))
    if not formats or len(_ASKS_FORMAT.findall(template)) < template.count("strftime_now("):
        return template  # the format is computed, so that the date cannot be replaced
    try:
        texts = {shape: format_date(datetime.datetime.fromisoformat(date), shape) for shape in formats}
    except jinja2.TemplateError as error:
        message = f"the date in the chat template cannot be formatted: {error}"
        raise UserError(message, location="data.chat_template", hint="write another format for strftime_now") from error
    return f"{_MACRO % json.dumps(texts)}{template}"


def check_date(date: str | None) -> None:
    """Raise a UserError if ``data.date`` is not a date."""
    if date is None:
        return
    try:
        datetime.date.fromisoformat(date)
    except ValueError as error:
        raise UserError(f"data.date is '{date}'", location="data.date", hint="write 2026-01-31, or null") from error
