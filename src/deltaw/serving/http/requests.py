"""The bodies of chats and completions: read within bounds, checked against their fields, and recorded.

Names, bounds and defaults are OpenAI's, with some of vLLM's beside them. Fields that would change an answer
and are not supported are refused by name; those that change nothing are accepted.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect

from deltaw.serving.http.errors import GONE, ApiError, wrong_field
from deltaw.serving.http.settings import Limits
from deltaw.serving.request import Constraint, Sampling

# Names of models in requests.
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
# Lists are checked to their first error: a million wrong elements would take gigabytes.
Tokens = Annotated[list[Token], Field(fail_fast=True, min_length=1)]
# A token as the key of a JSON object.
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
# Tokens that one request may weigh by logit_bias.
MOST_BIASES = 1024
MOST_STOPS = 16
# A constraint's text: it is compiled, which takes time that grows with it.
LONGEST_CONSTRAINT = 64 << 10


class Fields(BaseModel):
    """A body's fields: none that is not named, each of its own type, no number that is not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Fields):
    """What else a stream says: its usage in a last event. Padding against guessing by length is not made."""

    include_usage: bool = False
    include_obfuscation: bool = False


def wrong(message: str, param: str | None = None) -> PydanticCustomError:
    """A mistake that is told as it stands, with the field that it concerns."""
    # In the message itself, braces would be read as places for values.
    return PydanticCustomError("invalid_value", "{told}", {"told": message, "param": param})


class SchemaFormat(Fields):
    """A JSON schema with the name that the client has for it."""

    name: str = Field(max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """What a text must be: any text, a JSON object, or what a JSON schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise wrong("'json_schema' and the type 'json_schema' belong together")
        return self


class TextFields(Fields):
    """How texts are written."""

    # Fields that would change the answer, with the only values that do not; null is accepted for all.
    unsupported: ClassVar[Mapping[str, tuple[tuple[object, ...], str]]] = {}

    model: ModelName
    max_tokens: int | None = Field(None, ge=0, le=1 << 30)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True)] | None = None
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenName, Bias] | None = Field(None, max_length=MOST_BIASES)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    response_format: ResponseFormat | None = None
    # Of vLLM.
    top_k: int | None = Field(None, ge=-1, le=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = Field(None, min_length=1, max_length=LONGEST_CONSTRAINT)
    guided_grammar: str | None = Field(None, min_length=1, max_length=LONGEST_CONSTRAINT)
    ignore_eos: bool | None = False
    # These change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for key, given in value.items():
            if key not in cls.unsupported:
                kept[key] = given
                continue
            harmless, hint = cls.unsupported[key]
            if given is not None and not any(given == h and type(given) is type(h) for h in harmless):
                raise wrong(f"the field '{key}' is not supported" + (f": {hint}" if hint else ""), key)
        return kept

    @model_validator(mode="after")
    def _one_constraint(self) -> TextFields:
        formatted = self.response_format is not None and self.response_format.type != "text"
        given = formatted + sum(g is not None for g in (self.guided_json, self.guided_regex, self.guided_grammar))
        if given > 1:
            raise wrong("give one of response_format, guided_json, guided_regex and guided_grammar")
        if self.ignore_eos and given:
            raise wrong("'ignore_eos' and a format do not go together: the format says where a text ends")
        if self.stream_options is not None and not self.stream:
            raise wrong("'stream_options' needs 'stream': true")
        if isinstance(self.stop, list) and len(self.stop) > MOST_STOPS:
            raise wrong(f"at most {MOST_STOPS} stop texts", "stop")
        return self

    @property
    def choices(self) -> int:
        """Texts for each prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, logprobs: int | None) -> Sampling:
        """How tokens are chosen; without a seed by one that nobody knows."""
        named = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        given = {name: value for name in named if (value := getattr(self, name)) is not None}
        return Sampling(
            **{"temperature": 1.0, **given},
            top_k=max(0, self.top_k or 0),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            # Engines take seeds as numpy does: not negative.
            seed=secrets.randbits(63) if self.seed is None else self.seed % (1 << 63),
            logprobs=logprobs,
        )

    def constraint(self) -> Constraint | None:
        """What the text must match; None for any text."""
        if self.guided_regex is not None:
            return Constraint("regex", self.guided_regex)
        if self.guided_grammar is not None:
            return Constraint("grammar", self.guided_grammar)
        if self.guided_json is not None:
            return json_constraint(self.guided_json, "guided_json")
        if self.response_format is None or self.response_format.type == "text":
            return None
        if self.response_format.json_schema is None:
            return Constraint("json_object")
        return json_constraint(self.response_format.json_schema.json_schema, "response_format.json_schema.schema")


def json_constraint(schema: dict[str, Any] | str, param: str) -> Constraint:
    """A JSON schema as a constraint.

    Raises:
        ApiError: its text is none of JSON, or too long.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    if len(text) > LONGEST_CONSTRAINT:
        raise ApiError(400, f"the schema has more than {LONGEST_CONSTRAINT:,} characters", param=param)
    try:
        known = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise ApiError(400, "a schema must be a JSON object", param=param)
    return Constraint("json_schema", text)


# Where a request's record is, in the scope that ASGI hands on.
KEY = "deltaw.record"
# Where a fault is that a stream met after its status was sent.
FAILURE = "deltaw.failure"


@dataclass
class Bodies:
    """The bodies of all requests that are in hand: how many bytes have arrived."""

    bytes: int = 0


@dataclass
class Record:
    """What is known of one request when it has been answered: for its line in the log, and for the metrics.

    Attributes:
        id: names it in the log and in the header ``x-request-id``.
        model: the name that it gave, where there is such a model.
        began, first_token: on the clock of :func:`time.perf_counter`.
        prompt_tokens, cached_tokens, completion_tokens: counts over its texts.
        finishes: why its texts ended. stream: whether it asked for a stream.
        gone: whether its client went away. error: what it was refused for.
        asked: the prompt, where the log shows it.
        body: bytes of its body that have arrived. bodies: those of all requests in hand.
        owner: the API key that it came with, by its number from 1; 0 where prompts are shared by all.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(12))
    model: str = ""
    began: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finishes: list[str] = field(default_factory=list)
    stream: bool = False
    gone: bool = False
    error: str | None = None
    asked: object = None
    body: int = 0
    bodies: Bodies = field(default_factory=Bodies)
    owner: int = 0

    def usage(self) -> dict[str, object]:
        """The counts as answers have them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def record_of(scope: Mapping[str, Any]) -> Record:
    """The record of the request with this scope."""
    return cast(Record, scope[KEY])


Model = TypeVar("Model", bound=BaseModel)
_ONE_THREAD = ThreadPoolExecutor(1, "deltaw-parse")
# Bytes from which on parsing would keep the event loop from other requests.
LARGE = 64 << 10
# Those that keep it from them in any thread, by Python's lock: they are parsed one after another.
HUGE = 1 << 20
# Keys of one object: each that is wrong is an error of its own, which takes a kilobyte.
MOST_KEYS = 4096


async def read_json(request: Request, model: type[Model], limits: Limits) -> Model:
    """The body of a request as the fields of ``model``.

    Raises:
        ApiError: 400 it is not JSON, or not these fields; 408 it did not arrive in time; 413 it is too large;
            415 it does not say that it is JSON, so that no other site's form can send it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the header 'Content-Type: application/json'", code="unsupported_media_type")
    body = await read_body(request, limits)
    if len(body) < LARGE:
        return _checked(body, model, limits)
    threads = _ONE_THREAD if len(body) > HUGE else None
    return await asyncio.get_running_loop().run_in_executor(threads, _checked, body, model, limits)


async def read_body(request: Request, limits: Limits) -> bytes:
    """All bytes of a body; nothing is parsed before all of it has arrived within its bounds.

    Raises:
        ApiError: 408, 413, or 429 where those of all requests together are too large.
    """
    told, record = request.headers.get("content-length", "0"), record_of(request.scope)
    too_large = ApiError(413, f"the body has more than {limits.body:,} bytes", code="request_too_large", close=True)
    if told.isdecimal() and (len(told) > 18 or int(told) > limits.body):
        raise too_large

    async def arrived() -> bytes:
        parts: list[bytes] = []
        async for part in request.stream():
            record.body += len(part)
            record.bodies.bytes += len(part)
            if record.body > limits.body:
                raise too_large
            if record.bodies.bytes > max(limits.bodies, limits.body):
                raise ApiError(429, "too many requests are arriving", code="busy", retry_after=1, close=True)
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(arrived(), limits.body_seconds)
    except ClientDisconnect:
        record.gone = True
        raise ApiError(GONE, "the client went away in its body", code="cancelled") from None
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} s"
        raise ApiError(408, message, code="timeout", close=True) from None


def described(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a body: for FastAPI's ``openapi_extra``."""
    schema = _inlined(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _checked(body: bytes, model: type[Model], limits: Limits) -> Model:
    """The fields of a body of JSON without NaN, without halves of surrogate pairs, and not deeper than allowed."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        _check(value, limits)
    except RecursionError:
        raise ApiError(400, f"the JSON is nested more than {limits.depth} deep", code="invalid_json") from None
    except UnicodeError:
        message = "the body is not UTF-8, or a text holds half of a surrogate pair"
        raise ApiError(400, message, code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}"[:300], code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise wrong_field(error, model.model_fields) from None


def _check(value: Any, limits: Limits) -> None:
    """Raise an error where values are too deep, or have text that cannot be written as UTF-8."""
    level = [value]
    for _ in range(limits.depth + 1):
        below: list[Any] = []
        for part in level:
            if isinstance(part, str):
                part.encode("utf-8")  # fails for half of a surrogate pair
            elif isinstance(part, float) and not math.isfinite(part):
                raise ApiError(400, "a number is too large")
            elif isinstance(part, dict):
                if len(part) > MOST_KEYS:
                    raise ApiError(400, f"an object has more than {MOST_KEYS:,} keys")
                below += part.keys()
                below += part.values()
            elif isinstance(part, list):
                below += part
        if not below:
            return
        level = below
    raise RecursionError


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions where they are used, since a body has no place for them in OpenAPI."""
    definitions = schema.pop("$defs", {})

    def put(part: Any) -> Any:
        if isinstance(part, list):
            return [put(p) for p in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            part = {**definitions[part["$ref"].rpartition("/")[2]], **part}
        return {key: put(value) for key, value in part.items() if key != "$ref"}

    return cast(dict[str, Any], put(schema))


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
        turn: dict[str, object] = {"role": "system" if self.role == "developer" else self.role, "content": text}
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


class ChatRequest(TextFields):
    """The body of ``/v1/chat/completions``."""

    unsupported: ClassVar[Mapping[str, tuple[tuple[object, ...], str]]] = {
        **dict.fromkeys(("functions", "function_call"), ((), "use 'tools' and 'tool_choice'")),
        **dict.fromkeys(("audio", "prediction", "reasoning_effort", "web_search_options"), ((), "")),
        "modalities": ((["text"],), "answers are text"),
        "service_tier": (("auto", "default"), ""),
        "store": ((False,), "nothing is stored"),
        "verbosity": (("medium",), ""),
        "prompt_cache_retention": (("in_memory", "in-memory"), ""),
    }

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 30)
    max_tokens: int | None = Field(None, ge=1, le=1 << 30)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = True

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.messages[-1].role == "assistant":
            raise wrong("the last message must not be the assistant's", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("'top_logprobs' needs 'logprobs': true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise wrong("give one of 'max_tokens' and 'max_completion_tokens'")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise wrong("two tools have one name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise wrong("'tool_choice' needs 'tools'")
        if isinstance(self.tool_choice, Tool) and self.tool_choice.function.name not in names:
            raise wrong("'tool_choice' names a tool that is not in 'tools'")
        if self.forced and self.constraint() is not None:
            raise wrong("a forced tool call leaves no room for another format")
        return self

    @property
    def forced(self) -> list[Function]:
        """The functions of which one must be called; empty where none must."""
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, Tool):
            return [function for function in functions if function.name == self.tool_choice.function.name]
        return functions if self.tool_choice == "required" else []

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def prompts(self) -> list[list[Message]]:
        """What is answered: one conversation."""
        return [self.messages]

    @property
    def shown(self) -> object:
        """What the log shows of it, where it does."""
        return [message.as_turn() for message in self.messages]


MOST_PROMPTS = 1024


class CompletionRequest(TextFields):
    """The body of ``/v1/completions``."""

    unsupported: ClassVar[Mapping[str, tuple[tuple[object, ...], str]]] = {
        "suffix": (("",), "texts are written at the end of a prompt")
    }

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: int | None = Field(16, ge=0, le=1 << 30)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise wrong("'best_of' other than 'n' is not supported: ask for more texts with 'n', and choose")
        if self.max_tokens == 0 and not self.echo:
            raise wrong("'max_tokens' of 0 needs 'echo': true")
        if self.echo and self.constraint() is not None:
            raise wrong("'echo' and a format do not go together")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def shown(self) -> object:
        """What the log shows of it, where it does."""
        return self.prompt
