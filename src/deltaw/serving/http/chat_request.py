"""The fields of a chat completion: messages and tools besides those of :mod:`fields`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from deltaw.serving.http.fields import Fields, TextFields, wrong

MOST_MESSAGES = 4096
MOST_TOOLS = 128


class TextPart(Fields):
    """A part of a message's content; images and sounds are not read."""

    type: Literal["text"]
    text: str


class CalledFunction(Fields):
    """The function that a message calls, its arguments as JSON text."""

    name: str = Field(max_length=256)
    arguments: str


class ToolCall(Fields):
    """A call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Fields):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(None, max_length=MOST_TOOLS)
    tool_call_id: str | None = Field(None, max_length=256)
    reasoning_content: str | None = None
    # What clients copy from an answer: without a value, or of no meaning to a template.
    refusal: str | None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise wrong("the message has no content")
        if self.tool_calls and self.role != "assistant":
            raise wrong("only the assistant calls tools")
        return self

    def as_turn(self) -> dict[str, object]:
        """The message as chat templates take it."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        turn: dict[str, object] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        for key in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, key) is not None:
                turn[key] = getattr(self, key)
        if self.tool_calls:
            turn["tool_calls"] = [c.model_dump(exclude={"index"}, exclude_none=True) for c in self.tool_calls]
        return turn


class Function(Fields):
    """A function that the model may call, with a JSON schema of its arguments."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    """A function by its name."""

    name: str


class NamedTool(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


_NEED_TOOLS = "use 'tools' and 'tool_choice'"


class ChatRequest(TextFields):
    """The body of ``/v1/chat/completions``."""

    unsupported: ClassVar[Mapping[str, tuple[tuple[object, ...], str]]] = {
        "functions": ((), _NEED_TOOLS),
        "function_call": ((), _NEED_TOOLS),
        "audio": ((), ""),
        "modalities": ((["text"],), "answers are text"),
        "prediction": ((), ""),
        "reasoning_effort": ((), ""),
        "service_tier": (("auto", "default"), ""),
        "store": ((False,), "nothing is stored"),
        "verbosity": (("medium",), ""),
        "web_search_options": ((), ""),
        "prompt_cache_retention": (("in_memory", "in-memory"), ""),
    }

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 30)
    max_tokens: int | None = Field(None, ge=1, le=1 << 30)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True

    @field_validator("messages")
    @classmethod
    def _asks(cls, value: list[Message]) -> list[Message]:
        if value[-1].role == "assistant":
            raise wrong("the last message must not be the assistant's")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("'top_logprobs' needs 'logprobs': true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise wrong("give one of 'max_tokens' and 'max_completion_tokens'")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise wrong("two tools have one name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise wrong("'tool_choice' needs 'tools'")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise wrong("'tool_choice' names a tool that is not in 'tools'")
        if self.forced and self.constraint() is not None:
            raise wrong("a forced tool call leaves no room for another format")
        return self

    @property
    def forced(self) -> list[Function]:
        """The functions of which one must be called; empty where none must."""
        if isinstance(self.tool_choice, NamedTool):
            asked = self.tool_choice.function.name
            return [tool.function for tool in self.tools or () if tool.function.name == asked]
        return [tool.function for tool in self.tools or ()] if self.tool_choice == "required" else []

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def most_tokens(self) -> int | None:
        """Tokens of a text at most; None where the request does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def told_logprobs(self) -> int | None:
        """As :class:`Sampling` has it."""
        return (self.top_logprobs or 0) if self.logprobs else None
