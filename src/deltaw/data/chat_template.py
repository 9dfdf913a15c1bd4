"""Chat templates as text: a file of the user's own, checked before anything else is done, and today's date.

Some templates write the current date into each conversation. Within one run it is the same date for all rows.
It knows no rows and no labels.
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

from deltaw.data.rendering import FAULTS, dated, rendered
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "data.chat_template"
# The function with which templates ask for the date, and how they call it.
_ASKS_DATE = re.compile(r"\bstrftime_now\b")
_ASKS_FORMAT = re.compile(r"""\bstrftime_now\(\s*(?:'([^'\n]*)'|"([^"\n]*)")\s*\)""")

# The function again, with a dictionary of dates. What it ends with keeps the template's first line as it is.
_MACRO = "{%% macro strftime_now(format) %%}{{ %s[format] }}{%% endmacro %%}{{ '' }}"


def read_chat_template(path: str) -> str:
    """The text of a template file.

    Raises:
        UserError: it cannot be read, is empty, or is no Jinja template (the message names the line), or one
            that costs more than a rendering may.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except OSError as error:
        what = f"the chat template cannot be read: {error.strerror}"
        raise UserError(what, where=f"{_KEY}: {path}", hint="give the path of a file with a Jinja template") from error
    except UnicodeDecodeError as error:
        raise UserError("the chat template is not UTF-8 text", where=path, hint="save it as UTF-8") from error
    if not text.strip():
        raise UserError("the chat template is empty", where=path, hint="write a Jinja template of 'messages'")
    try:
        rendered(text, [{"role": "user", "content": "Hello"}], generation=False, variables={})
    except jinja2.TemplateSyntaxError as error:
        what = f"the chat template is not Jinja: {error.message}"
        raise UserError(what, where=f"{path}, line {error.lineno}", hint="correct that line") from error
    except FAULTS:
        # It may well need an answer, or a token that only the tokenizer has; the rows will tell.
        return text
    return text


def with_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with the template in ``path`` instead of its own; the same one if there is no path.

    The tokenizer itself, which others may use, stays as it is.

    Raises:
        UserError: the file cannot be used.
    """
    if path is None:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = read_chat_template(path)
    return changed


def todays_date() -> str:
    """As in the setting ``data.date``."""
    return datetime.date.today().isoformat()


def asks_for_date(template: str) -> bool:
    """Whether a template's text depends on the date."""
    return _ASKS_DATE.search(template) is not None


def with_date(template: str, date: str) -> str:
    """The template with ``date`` (as 2026-01-31) as the current one, wherever it asks for it.

    A macro of the same name stands before the function that reads the clock.
    """
    formats = dict.fromkeys(match[1] or match[2] or "" for match in _ASKS_FORMAT.finditer(template))
    if not formats or len(_ASKS_FORMAT.findall(template)) < template.count("strftime_now("):
        return template  # it makes its format itself: the clock's date is all there is
    try:
        texts = {shape: dated(datetime.datetime.fromisoformat(date), shape) for shape in formats}
    except jinja2.TemplateError as error:
        what = f"the chat template cannot be used here: {error}"
        raise UserError(what, where="data.chat_template", hint="write another format for strftime_now") from error
    return f"{_MACRO % json.dumps(texts)}{template}"


def check_date(date: str | None) -> None:
    """Raise a UserError if ``data.date`` is no date."""
    if date is None:
        return
    try:
        datetime.date.fromisoformat(date)
    except ValueError as error:
        raise UserError(f"data.date is '{date}'", where="data.date", hint="write it as 2026-01-31, or null") from error
