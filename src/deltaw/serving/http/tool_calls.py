"""Calls of tools in a text, in the forms that chat templates teach models, and the schema of a forced call.

A form is recognized by the template's own text. What is not a whole call of a tool that was offered stays
text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltaw.errors import UserError

_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class CallForm:
    """How a model writes calls.

    Attributes:
        opening: the text before each call; empty where a call begins the answer itself, with a brace.
        closing: the text after each call; may be empty.
        arguments: the key of a call's arguments.
        mark: the token that ``opening`` is, where it is a special one, which texts do not show.
    """

    opening: str
    closing: str = ""
    arguments: str = "arguments"
    mark: int | None = None

    def begins(self, text: str) -> int | None:
        """Where a call may begin in a text that goes on: of its opening, or of the first part of it at the
        text's end. None if nothing so far can become a call."""
        if not self.opening:
            start = len(text) - len(text.lstrip())
            return start if start == len(text) or text[start] == "{" else None
        at = text.find(self.opening)
        if at >= 0:
            return at
        for length in range(min(len(self.opening) - 1, len(text)), 0, -1):
            if self.opening.startswith(text[-length:]):
                return len(text) - length
        return None


@dataclass(frozen=True)
class Call:
    """A call: the tool's name, and its arguments as JSON text."""

    name: str
    arguments: str

    def as_dict(self) -> dict[str, object]:
        """As an answer has it, with an id of its own."""
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": asdict(self)}


HERMES = CallForm("<tool_call>", "</tool_call>")
PIPED = CallForm("<|tool_call|>", "<|/tool_call|>")  # of Phi-4-mini and Granite
MISTRAL = CallForm("[TOOL_CALLS]")
LLAMA = CallForm("", arguments="parameters")
# A forced call: the text is the call, by its schema.
FORCED = CallForm("")


def form_of(template: str) -> CallForm | None:
    """The form that a chat template teaches; None where it is not known."""
    if "<tool_call>" in template and "<function=" not in template:
        return HERMES
    if PIPED.opening in template:
        return PIPED
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if '"parameters": dictionary' in template:
        return LLAMA
    return None


def parse_calls(text: str, form: CallForm, names: Sequence[str]) -> tuple[str, list[Call]]:
    """A whole text as what was said besides calls, and the calls.

    Args:
        names: of the tools that were offered.

    Returns:
        the text itself and no call where any call in it is not one of these tools', or is not whole.
    """
    calls: list[Call] = []
    said, *rest = text.split(form.opening) if form.opening else ("", text)
    for part in rest:
        body, _, after = part.partition(form.closing) if form.closing else (part, "", "")
        found = _calls_in(body, form, names)
        if not found:
            return text, []
        calls += found
        said += after if after.strip() else ""
    return said.strip() if calls else text, calls


class CallScan:
    """Divides a text that is still being written into what is said and what may become calls.

    Args:
        form: of calls. names: of the tools that were offered.
    """

    def __init__(self, form: CallForm, names: Sequence[str]) -> None:
        self._form, self._names = form, names
        self._held, self._spoke = "", False

    def feed(self, text: str, tokens: Sequence[int] = ()) -> str:
        """The next part of the text, with its tokens: what of all so far can be said now."""
        if self._form.mark is not None and self._form.mark in tokens:
            text = self._form.opening + text
        self._held += text
        at = None if self._spoke and not self._form.opening else self._form.begins(self._held)
        said = self._held if at is None else self._held[:at]
        self._held = self._held[len(said) :]
        self._spoke = self._spoke or bool(said.strip())
        return said

    def end(self) -> tuple[str, list[Call]]:
        """At the text's end: what is left to say, and the calls."""
        return parse_calls(self._held, self._form, self._names) if self._held else ("", [])


def forced_schema(functions: Sequence[tuple[str, dict[str, Any] | None]]) -> dict[str, Any]:
    """The JSON schema of one call of any of these functions, given with the schemas of their arguments.

    Raises:
        UserError: two functions' schemas define one name differently.
    """
    definitions: dict[str, dict[str, Any]] = {}
    options = []
    for name, parameters in functions:
        arguments = dict(parameters or {"type": "object"})
        # References to definitions count from the root, where these move.
        for key in ("$defs", "definitions"):
            for defined, schema in (arguments.pop(key, None) or {}).items():
                if definitions.setdefault(key, {}).setdefault(defined, schema) != schema:
                    raise UserError(f"two tools define '{defined}' differently", where="tools")
        properties = {"name": {"const": name}, "arguments": arguments}
        required = {"required": [*properties], "additionalProperties": False}
        options.append({"type": "object", "properties": properties, **required})
    whole: dict[str, Any] = options[0] if len(options) == 1 else {"anyOf": options}
    return {**whole, **definitions}


def _calls_in(body: str, form: CallForm, names: Sequence[str]) -> list[Call]:
    """The calls in what stands between the marks; none at all unless all of it is calls."""
    if form.opening == MISTRAL.opening and (named := re.match(r"\s*([\w.-]+)\[ARGS\]", body)):
        body = json.dumps({"name": named[1]})[:-1] + ', "arguments": ' + body[named.end() :] + "}"
    found: list[Call] = []
    rest = body.strip()
    while rest:
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, dict) or one.get("name") not in names:
                return []
            arguments = one.get(form.arguments, one.get("arguments", {}))
            if not isinstance(arguments, dict):
                return []
            found.append(Call(str(one["name"]), json.dumps(arguments, ensure_ascii=False)))
        rest = rest[end:].lstrip("; \n\t")
    return found
