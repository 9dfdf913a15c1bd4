"""Conversations through a chat template as transformers renders them, with limits on time, memory and length.

A chat template is a program that comes with a model or an adapter, so nothing is known of what it does; see
:mod:`deltaw.data.template_limits`. It knows conversations as plain values, no tokens.
"""

from __future__ import annotations

import datetime
import functools
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from deltaw.data.template_language import TemplateLimitError
from deltaw.data.template_limits import LimitedEnvironment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_TEMPLATE = 1 << 18
"""Characters of a template; those of published models have up to thirty thousand."""
OUTPUT, OUTPUT_A_CHARACTER = 1 << 20, 8
"""Characters that a rendering may have, and how many more for each character that goes in."""
FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""What templates raise on conversations that they are not made for, besides a :class:`TemplateLimitError`."""

_LONGEST_DATE = 1000  # characters of a date's format
_REASONING = ("reasoning_content", "thinking", "reasoning")


def rendered(
    template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    generation: bool,
    tools: Sequence[Mapping[str, object]] = (),
    variables: Mapping[str, object],
) -> str:
    """A conversation as text.

    Args:
        template: Jinja, as transformers takes it.
        generation: whether to go on through what opens the assistant's turn.
        variables: what else the template may use: the special tokens by their names.

    Raises:
        TemplateLimitError: the template costs more than a rendering may.
        Exception: one of :data:`FAULTS`.
    """
    found = _compiled(template)
    if isinstance(found, Exception):
        raise found.with_traceback(None)  # else it would grow each time
    return found.render(messages, generation, tools, variables)


def rendered_by(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], *, generation: bool
) -> str:
    """A conversation as a tokenizer's ``apply_chat_template`` renders it.

    Raises:
        Exception: as :func:`rendered`, or a ValueError where no template is the tokenizer's default.
    """
    template = tokenizer.get_chat_template()
    return rendered(template, messages, generation=generation, variables=tokenizer.special_tokens_map)


class _Rendering:
    """One compiled template."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_TEMPLATE:
            raise TemplateLimitError(
                f"it has {len(text):,} characters, and {LONGEST_TEMPLATE:,} are the most"
            )
        self._environment = LimitedEnvironment(raise_exception=_raise, strftime_now=_now)
        self._template = self._environment.from_string(self._environment.limited(text))
        self._lock = threading.Lock()  # there is one account

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        generation: bool,
        tools: Sequence[Mapping[str, object]],
        variables: Mapping[str, object],
    ) -> str:
        size = [0, 0]
        given = {key: _plain(value, size) for key, value in variables.items()}
        given["messages"] = [_with_reasoning(_plain(message, size)) for message in messages]
        given["tools"] = [_plain(tool, size) for tool in tools] or None
        given |= {"documents": None, "add_generation_prompt": generation}
        most = OUTPUT + OUTPUT_A_CHARACTER * size[1]
        pieces: list[str] = []
        with self._lock:
            self._environment.open_account(*size)
            for piece in self._template.generate(given):
                most -= len(piece)
                if most < 0:
                    raise TemplateLimitError("it writes more than a conversation of this length may become")
                pieces.append(piece)
        return "".join(pieces)


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> _Rendering | Exception:
    """The template, or why it is none."""
    try:
        return _Rendering(text)
    except (jinja2.TemplateError, TemplateLimitError) as error:
        return error
    except (*FAULTS, SyntaxError) as error:  # what Python makes of Jinja's translation
        return jinja2.TemplateSyntaxError(f"it cannot be compiled ({type(error).__name__}: {error})", 1)


def _plain(value: Any, size: list[int]) -> Any:
    """A value as a template may see it, as in transformers: of JSON's kinds alone.

    Args:
        size: mappings and characters are added to it.
    """
    kind = type(value)
    if kind is str:
        size[1] += len(value)
        return value
    if value is None or kind in (int, float, bool):
        return value
    if isinstance(value, Mapping):
        size[0] += 1
        return {_plain(key, size): _plain(item, size) for key, item in value.items()}
    if isinstance(value, list | tuple):
        size[1] += len(value)
        made = [_plain(item, size) for item in value]
        return made if isinstance(value, list) else tuple(made)
    if isinstance(value, str):
        return _plain(str.__str__(value), size)
    if isinstance(value, np.generic):
        return _plain(value.item(), size)
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    return f"<{kind.__name__}>"


def _with_reasoning(message: Any) -> Any:
    """The message with its reasoning under all names that templates read, where transformers does that."""
    if not isinstance(message, dict):
        raise TypeError(f"a message of a conversation is a dictionary, not {message!r}")
    told = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if told is None or not _fills_reasoning():
        return message
    return {"thinking": told, **message, "reasoning_content": told}


@functools.cache
def _fills_reasoning() -> bool:
    """Whether this version of transformers does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    asked: Any = [[{"role": "assistant", "thinking": "yes"}]]
    seen: Any = render_jinja_template(asked, chat_template="{{ messages[0].reasoning_content }}")
    return str(seen[0][0]) == "yes"


def _raise(message: str) -> None:
    """``raise_exception`` in a template."""
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    """``strftime_now`` in a template."""
    if len(format) > _LONGEST_DATE:
        raise TemplateLimitError("it asks for a very long date")
    return datetime.datetime.now().strftime(format)
