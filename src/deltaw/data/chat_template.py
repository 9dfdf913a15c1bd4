"""User-supplied chat template files, the current date in templates, and the text that starts an answer.

Within one run, a template that writes the date gets the same date for all rows. An activated adapter starts at its
invocation sequence: the text that starts an assistant message in the chat template. Without a template, it is the
common suffix of all prompts.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from deltaw.data.example import Example
from deltaw.data.prefix_tree import common_prefix
from deltaw.data.rendering import FAULTS, MAX_TEMPLATE_CHARS, render_conversation, render_with_tokenizer
from deltaw.data.template_functions import format_date
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    if len(template) > MAX_TEMPLATE_CHARS or any(len(shape) > MAX_FORMAT_CHARS for shape in formats):
        return template  # the worker rejects it, or formats the date within its limits
    if not formats or len(_ASKS_FORMAT.findall(template)) < template.count("strftime_now("):
        return template  # the format is computed, so that the date cannot be replaced
    try:
        texts = {shape: format_date(datetime.datetime.fromisoformat(date), shape) for shape in formats}
    except jinja2.TemplateError as error:
        message = f"the date in the chat template cannot be formatted: {error}"
        raise UserError(message, location="data.chat_template", hint="write another format for strftime_now") from error
    return f"{_MACRO % json.dumps(texts)}{template}"


# Maximum length of a date format that is applied outside of the worker.
MAX_FORMAT_CHARS = 200

# Maximum length of a derived sequence in tokens.
MAX_INVOCATION_TOKENS = 16
# Questions with different endings, so that their common suffix does not contain text of a question.
_QUESTIONS = ("Why?", "Name a color", "7 + 5 =", "Thank you.")


def opening_of_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that start an assistant message in the chat template. Empty if the template adds no tokens."""
    token_lists = []
    text = ""
    try:
        for question in _QUESTIONS:
            message = [{"role": "user", "content": question}]
            with_opening, without_opening = (
                render_with_tokenizer(tokenizer, message, generation=generation) for generation in (True, False)
            )
            if not with_opening.startswith(without_opening) or with_opening == without_opening:
                return []
            text = with_opening[len(without_opening) :]
            token_lists.append(np.asarray(tokenizer(with_opening, add_special_tokens=False)["input_ids"], np.int32))
    except FAULTS:
        return []  # the error is reported when rows are rendered
    return _common_ending(token_lists, len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def ending_of_prompts(rows: Iterable[Example]) -> list[int]:
    """Return the common token suffix of all prompts, which is empty if a row has no prompt."""
    return _common_ending((row.tokens[: row.prompt_length] for row in rows), MAX_INVOCATION_TOKENS)


def _common_ending(sequences: Iterable[np.ndarray], max_tokens: int) -> list[int]:
    """Return the longest common suffix of token sequences, limited to ``max_tokens``."""
    ending: np.ndarray | None = None
    for tokens in sequences:
        ending = tokens[::-1][:max_tokens] if ending is None else ending[: common_prefix(ending, tokens[::-1])]
        if not len(ending):
            break
    return [] if ending is None else ending[::-1].tolist()


def with_activation(row: Example, invocation: Sequence[int]) -> Example:
    """Set the position from which an adapter with this invocation sequence is active.

    It is the last occurrence of the sequence before the last completion, as in generation, so that a completion that
    quotes the sequence has no effect. Without an occurrence the adapter is inactive.
    """
    first_label = int(np.flatnonzero(row.is_label)[0]) if row.is_label.any() else len(row.tokens)
    start = last_occurrence(row.tokens[: row.prompt_length or first_label], invocation)
    return replace(row, active_from=len(row.tokens) if start is None else start)


def last_occurrence(tokens: np.ndarray, invocation: Sequence[int]) -> int | None:
    """Return the start of the last occurrence of the sequence in (length,) tokens, or None."""
    if len(tokens) < len(invocation):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(invocation))
    starts = np.flatnonzero((windows == np.asarray(invocation)).all(1))
    return int(starts[-1]) if len(starts) else None


def acts_before_labels(row: Example) -> bool:
    """Return True if an activated adapter is active before the first label, so that all labels are trained."""
    labels = np.flatnonzero(row.is_label)
    return row.active_from is None or len(labels) == 0 or int(labels[0]) > row.active_from
