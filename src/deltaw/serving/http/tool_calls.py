"""Parse tool calls in completions, in the formats of common chat templates, and build schemas of forced calls.

The format is recognized by the text of the chat template. Text that is not a complete call of an offered tool remains
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
    """Format in which a model writes tool calls.

    Attributes:
        opening: Text before each call. Empty if the completion itself is a JSON call.
        closing: Text after each call, possibly empty.
        arguments: JSON key of the arguments.
        mark: Token id of ``opening`` if it is a special token, which is not part of the decoded text.
    """

    opening: str
    closing: str = ""
    arguments: str = "arguments"
    mark: int | None = None

    def call_start(self, text: str) -> int | None:
        """Return the index at which a call may start in an incomplete text, or None.

        A prefix of ``opening`` at the end of the text counts as a possible start.
        """
        if not self.opening:
            start = len(text) - len(text.lstrip())
            return start if start == len(text) or text[start] == "{" else None
        index = text.find(self.opening)
        if index >= 0:
            return index
        for length in range(min(len(self.opening) - 1, len(text)), 0, -1):
            if self.opening.startswith(text[-length:]):
                return len(text) - length
        return None


@dataclass(frozen=True)
class ToolCallRequest:
    """Tool call in a completion.

    Attributes:
        name: Name of the tool.
        arguments: Arguments as JSON text.
    """

    name: str
    arguments: str

    def as_dict(self) -> dict[str, object]:
        """Return the call in the response format, with a new id."""
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": asdict(self)}


HERMES = CallForm("<tool_call>", "</tool_call>")
PIPED = CallForm("<|tool_call|>", "<|/tool_call|>")  # Phi-4-mini and Granite
MISTRAL = CallForm("[TOOL_CALLS]")
LLAMA = CallForm("", arguments="parameters")
# For a forced call, whose completion is a JSON call that matches a schema.
FORCED = CallForm("")


def form_of(template: str) -> CallForm | None:
    """Return the tool call format of a chat template, or None if it is unknown."""
    if HERMES.opening in template and "<function=" not in template:
        return HERMES
    for form, mark in ((PIPED, PIPED.opening), (MISTRAL, MISTRAL.opening), (LLAMA, '"parameters": dictionary')):
        if mark in template:
            return form
    return None


def parse_calls(text: str, form: CallForm, names: Sequence[str]) -> tuple[str, list[ToolCallRequest]]:
    """Split a complete text into its text outside of calls and the calls.

    Args:
        text: The text.
        form: Format of the calls.
        names: Names of the offered tools.

    Returns:
        The text and the calls. If any call is incomplete or of another tool, the unchanged text and no calls.
    """
    calls: list[ToolCallRequest] = []
    content, *parts = text.split(form.opening) if form.opening else ("", text)
    for part in parts:
        body, _, after = part.partition(form.closing) if form.closing else (part, "", "")
        part_calls = _calls_in(body, form, names)
        if not part_calls:
            return text, []
        calls += part_calls
        content += after if after.strip() else ""
    return content.strip() if calls else text, calls


class CallScan:
    """Streaming parser that withholds text that may become a tool call.

    Args:
        form: Format of the calls.
        names: Names of the offered tools.
    """

    def __init__(self, form: CallForm, names: Sequence[str]) -> None:
        self._form = form
        self._names = names
        self._withheld = ""
        self._has_text = False

    def feed(self, text: str, tokens: Sequence[int] = ()) -> str:
        """Add text with its tokens. Return the text that can be emitted."""
        if self._form.mark is not None and self._form.mark in tokens:
            text = self._form.opening + text
        self._withheld += text
        start = None if self._has_text and not self._form.opening else self._form.call_start(self._withheld)
        emitted = self._withheld if start is None else self._withheld[:start]
        self._withheld = self._withheld[len(emitted) :]
        self._has_text = self._has_text or bool(emitted.strip())
        return emitted

    def end(self) -> tuple[str, list[ToolCallRequest]]:
        """Return the remaining text and the calls at the end of the completion."""
        return parse_calls(self._withheld, self._form, self._names) if self._withheld else ("", [])


def forced_schema(functions: Sequence[tuple[str, dict[str, Any] | None]]) -> dict[str, Any]:
    """Return the JSON schema of one call of any of these functions.

    Args:
        functions: Names of the functions, with the JSON schemas of their arguments.

    Raises:
        UserError: if the schemas of two functions define one name differently.
    """
    definitions: dict[str, dict[str, Any]] = {}
    options = []
    for name, parameters in functions:
        arguments = dict(parameters or {"type": "object"})
        # References are resolved from the root, so definitions move to it.
        for key in ("$defs", "definitions"):
            for defined, schema in (arguments.pop(key, None) or {}).items():
                if definitions.setdefault(key, {}).setdefault(defined, schema) != schema:
                    raise UserError(f"two tools define '{defined}' differently", location="tools")
        properties = {"name": {"const": name}, "arguments": arguments}
        required = {"required": [*properties], "additionalProperties": False}
        options.append({"type": "object", "properties": properties, **required})
    combined: dict[str, Any] = options[0] if len(options) == 1 else {"anyOf": options}
    return {**combined, **definitions}


def _calls_in(body: str, form: CallForm, names: Sequence[str]) -> list[ToolCallRequest]:
    """Return the calls in the text between the marks, or an empty list if it contains anything else."""
    if form.opening == MISTRAL.opening and (mistral_name := re.match(r"\s*([\w.-]+)\[ARGS\]", body)):
        body = json.dumps({"name": mistral_name[1]})[:-1] + ', "arguments": ' + body[mistral_name.end() :] + "}"
    calls: list[ToolCallRequest] = []
    rest = body.strip()
    while rest:
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict) or item.get("name") not in names:
                return []
            arguments = item.get(form.arguments, item.get("arguments", {}))
            if not isinstance(arguments, dict):
                return []
            calls.append(ToolCallRequest(str(item["name"]), json.dumps(arguments, ensure_ascii=False)))
        rest = rest[end:].lstrip("; \n\t")
    return calls
