"""Request bodies of chat and text completions: limits, validation and records.

Names, limits and defaults follow the OpenAI API, with additions from vLLM. Unsupported fields that would change the
response are rejected by name. Fields without an effect are accepted.
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

from deltaw.data.row_images import MARKER
from deltaw.decoding.request import Constraint, Sampling
from deltaw.serving.http.errors import CLIENT_CLOSED_REQUEST, ApiError, validation_error
from deltaw.serving.http.settings import Limits

# Name of a model or an adapter.
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
# fail_fast: the errors of a million invalid elements would take gigabytes.
Tokens = Annotated[list[Token], Field(fail_fast=True, min_length=1)]
# Token id as a JSON key.
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
# Maximum number of tokens in logit_bias.
MAX_BIASES = 1024
MAX_STOPS = 16
# Maximum number of characters of a constraint. Compile time grows with its length.
MAX_CONSTRAINT_LENGTH = 64 << 10


class Fields(BaseModel):
    """Base class of request bodies: strict types, no unknown fields, only finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Fields):
    """Options of a stream. ``include_usage`` adds a last event with token counts. Obfuscation has no effect."""

    include_usage: bool = False
    include_obfuscation: bool = False


def invalid_field(message: str, param: str | None = None) -> PydanticCustomError:
    """Return a validation error with this message."""
    # Passed as a value, because pydantic formats braces in the template.
    return PydanticCustomError("invalid_value", "{message}", {"message": message, "param": param})


class SchemaFormat(Fields):
    """JSON schema with a name."""

    name: str = Field(max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """Format of the completion: text, a JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise invalid_field("'json_schema' must be set if and only if the type is 'json_schema'")
        return self


# Unsupported fields, with their values that have no effect and a hint. null is always accepted.
Unsupported = Mapping[str, tuple[tuple[object, ...], str]]


class TextFields(Fields):
    """Fields common to chat and text completions."""

    unsupported: ClassVar[Unsupported] = {}

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
    logit_bias: dict[TokenName, Bias] | None = Field(None, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    response_format: ResponseFormat | None = None
    # Extensions of vLLM.
    top_k: int | None = Field(None, ge=-1, le=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = Field(None, min_length=1, max_length=MAX_CONSTRAINT_LENGTH)
    guided_grammar: str | None = Field(None, min_length=1, max_length=MAX_CONSTRAINT_LENGTH)
    ignore_eos: bool | None = False
    # These have no effect.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        supported = {}
        for key, field_value in value.items():
            if key not in cls.unsupported:
                supported[key] = field_value
                continue
            harmless, hint = cls.unsupported[key]
            if field_value is not None and not any(field_value == h and type(field_value) is type(h) for h in harmless):
                raise invalid_field(f"the field '{key}' is not supported" + (f": {hint}" if hint else ""), key)
        return supported

    @model_validator(mode="after")
    def _one_constraint(self) -> TextFields:
        formatted = self.response_format is not None and self.response_format.type != "text"
        guides = self.guided_json, self.guided_regex, self.guided_grammar
        num_constraints = formatted + sum(guide is not None for guide in guides)
        if num_constraints > 1:
            raise invalid_field("use only one of response_format, guided_json, guided_regex and guided_grammar")
        if self.ignore_eos and num_constraints:
            raise invalid_field("'ignore_eos' cannot be combined with a format")
        if self.stream_options is not None and not self.stream:
            raise invalid_field("'stream_options' needs 'stream': true")
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise invalid_field(f"at most {MAX_STOPS} stop strings are allowed", "stop")
        return self

    @property
    def choices(self) -> int:
        """Number of completions per prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """True if a stream ends with an event with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, logprobs: int | None) -> Sampling:
        """Return the sampling parameters. Without a seed, a random one is used."""
        named = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        values = {"temperature": 1.0} | {name: x for name in named if (x := getattr(self, name)) is not None}
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        # Seeds must not be negative.
        seed = secrets.randbits(63) if self.seed is None else self.seed % (1 << 63)
        return Sampling(**values, top_k=max(0, self.top_k or 0), logit_bias=bias, seed=seed, logprobs=logprobs)

    def constraint(self) -> Constraint | None:
        """Return the constraint of the completion, or None."""
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
    """Return a JSON schema as a constraint.

    Raises:
        ApiError: if the schema is not JSON or too long.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    if len(text) > MAX_CONSTRAINT_LENGTH:
        raise ApiError(400, f"the schema has more than {MAX_CONSTRAINT_LENGTH:,} characters", param=param)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ApiError(400, "a schema must be a JSON object", param=param)
    return Constraint("json_schema", text)


# Key of the request's record in the ASGI scope.
KEY = "deltaw.record"
# Key of an exception that occurred after the status was sent.
FAILURE = "deltaw.failure"


@dataclass
class Bodies:
    """Total size of the bodies of all pending requests.

    Attributes:
        bytes: Number of bytes received.
    """

    bytes: int = 0


@dataclass
class Record:
    """Record of one request for the log and the metrics.

    Attributes:
        id: Id in the log and in the header ``x-request-id``.
        model: Requested model, if it exists.
        started_at: Time of arrival, from :func:`time.perf_counter`.
        first_token: Time of the first token, or None.
        last_token: Time of the last token, or None.
        prompt_tokens: Number of prompt tokens.
        cached_tokens: Number of prompt tokens served from the cache.
        completion_tokens: Number of generated tokens.
        finishes: Finish reasons of the completions.
        stream: True if a stream is requested.
        disconnected: True if the client disconnected.
        error: Error message, or None.
        asked: Prompt, if prompts are logged.
        body: Number of bytes received of the body.
        bodies: Total size of the bodies of all pending requests.
        owner: Number of the API key, counted from 1. 0 if the prefix cache is shared.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(12))
    model: str = ""
    started_at: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finishes: list[str] = field(default_factory=list)
    stream: bool = False
    disconnected: bool = False
    error: str | None = None
    asked: object = None
    body: int = 0
    bodies: Bodies = field(default_factory=Bodies)
    owner: int = 0

    def usage(self) -> dict[str, object]:
        """Return the token counts in the response format."""
        prompt = self.prompt_tokens
        completion = self.completion_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**counts, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}


def record_of(scope: Mapping[str, Any]) -> Record:
    """Return the record of the request with this ASGI scope."""
    return cast(Record, scope[KEY])


Model = TypeVar("Model", bound=BaseModel)
_ONE_THREAD = ThreadPoolExecutor(1, "deltaw-parse")
# Body size in bytes from which on the body is parsed on a worker thread.
LARGE = 64 << 10
# Body size from which on bodies are parsed one at a time, because parsing blocks other threads (GIL).
HUGE = 1 << 20
# Maximum number of keys of an object. Each invalid key causes an error of about a kilobyte.
MAX_KEYS = 4096


async def read_json(request: Request, model: type[Model], limits: Limits) -> Model:
    """Read and validate the JSON body of a request.

    Raises:
        ApiError: 400 if the body is invalid, 408 if it does not arrive in time, 413 if it is too large, 415 if its
            content type is not JSON. The content type prevents requests from HTML forms of other sites.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the header 'Content-Type: application/json'", code="unsupported_media_type")
    body = await read_body(request, limits)
    if len(body) < LARGE:
        return _validate(body, model, limits)
    threads = _ONE_THREAD if len(body) > HUGE else None
    return await asyncio.get_running_loop().run_in_executor(threads, _validate, body, model, limits)


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the entire body of a request.

    Raises:
        ApiError: 408 if it does not arrive in time, 413 if it is too large, 429 if all bodies together are too large.
    """
    declared = request.headers.get("content-length", "0")
    record = record_of(request.scope)
    too_large = ApiError(413, f"the body has more than {limits.body:,} bytes", code="request_too_large", close=True)
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limits.body):
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
        record.disconnected = True
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client disconnected in its body", code="cancelled") from None
    except asyncio.TimeoutError:
        raise ApiError(408, f"no complete body within {limits.body_seconds:g} s", code="timeout", close=True) from None


def request_body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a request body, for FastAPI's ``openapi_extra``."""
    schema = _inline_definitions(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _validate(body: bytes, model: type[Model], limits: Limits) -> Model:
    """Parse and validate a JSON body. Reject NaN, unpaired surrogates and deep nesting."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        _check(value, limits)
    except RecursionError:
        raise ApiError(400, f"the JSON is nested more than {limits.depth} deep", code="invalid_json") from None
    except UnicodeError:
        raise ApiError(400, "the body is not UTF-8, or a text has half a surrogate pair", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}"[:300], code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise validation_error(error, model.model_fields) from None


def _check(value: Any, limits: Limits) -> None:
    """Check the depth and size of values, and that all text can be encoded as UTF-8.

    Raises:
        RecursionError: if the values are nested too deeply.
        UnicodeError: if a text contains half of a surrogate pair.
        ApiError: if a number is infinite or an object has too many keys.
    """
    level = [value]
    for _ in range(limits.depth + 1):
        below: list[Any] = []
        for part in level:
            if isinstance(part, str):
                part.encode("utf-8")  # raises UnicodeError for an unpaired surrogate
            elif isinstance(part, float) and not math.isfinite(part):
                raise ApiError(400, "a number is too large")
            elif isinstance(part, dict):
                if len(part) > MAX_KEYS:
                    raise ApiError(400, f"an object has more than {MAX_KEYS:,} keys")
                below += [*part, *part.values()]
            elif isinstance(part, list):
                below += part
        if not below:
            return
        level = below
    raise RecursionError


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _inline_definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """Replace references by their definitions, because the schema is embedded in the OpenAPI document."""
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


MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_IMAGES = 64


class TextPart(Fields):
    """Text part of a message."""

    type: Literal["text"]
    text: str


class ImageURL(Fields):
    """Data URL of an image: ``data:image/png;base64,…``. The level of detail has no effect."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Fields):
    """Image part of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class CalledFunction(Fields):
    """Function called in a message, with its arguments as JSON text."""

    name: str = Field(max_length=256)
    arguments: str


class ToolCall(Fields):
    """Tool call in an assistant message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Fields):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, max_length=256)
    reasoning_content: str | None = None
    # Fields that clients copy from responses. They are empty or have no effect.
    refusal: str | None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise invalid_field("the message has no content")
        if self.tool_calls and self.role != "assistant":
            raise invalid_field("only the assistant calls tools")
        if self.num_images and self.role != "user":
            raise invalid_field("only messages of the user have images")
        return self

    @property
    def num_images(self) -> int:
        """Number of images in the message."""
        parts = self.content if isinstance(self.content, list) else []
        return sum(isinstance(part, ImagePart) for part in parts)

    def as_turn(self, *, images: bool = False) -> dict[str, object]:
        """Return the message in the format of chat templates.

        Args:
            images: Return a message with images as a list of parts. By default, its images are replaced by markers.
        """
        content: object = self.content or ""
        if isinstance(self.content, list):
            content = "".join(part.text if isinstance(part, TextPart) else MARKER for part in self.content)
            if images and self.num_images:
                content = [part.model_dump() for part in self.content]
        turn: dict[str, object] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        keys = ("name", "tool_call_id", "reasoning_content")
        turn |= {key: value for key in keys if (value := getattr(self, key)) is not None}
        if self.tool_calls:
            turn["tool_calls"] = [c.model_dump(exclude={"index"}, exclude_none=True) for c in self.tool_calls]
        return turn


class Function(Fields):
    """Function that the model may call, with a JSON schema of its arguments."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """Tool that the model may use."""

    type: Literal["function"]
    function: Function


class ChatRequest(TextFields):
    """Body of ``/v1/chat/completions``."""

    unsupported: ClassVar[Unsupported] = {
        **dict.fromkeys(("functions", "function_call"), ((), "use 'tools' and 'tool_choice'")),
        **dict.fromkeys(("audio", "prediction", "reasoning_effort", "web_search_options"), ((), "")),
        "modalities": ((["text"],), "only text is supported"),
        "service_tier": (("auto", "default"), ""),
        "store": ((False,), "requests are not stored"),
        "verbosity": (("medium",), ""),
        "prompt_cache_retention": (("in_memory", "in-memory"), ""),
    }

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 30)
    max_tokens: int | None = Field(None, ge=1, le=1 << 30)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = True
    add_system_prompt: bool = Field(True, description="add the run's system prompt to messages without one")

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.messages[-1].role == "assistant":
            raise invalid_field("the last message must not be the assistant's", "messages")
        if self.num_images > MAX_IMAGES:
            raise invalid_field(f"at most {MAX_IMAGES} images are allowed", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid_field("'top_logprobs' needs 'logprobs': true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise invalid_field("use only one of 'max_tokens' and 'max_completion_tokens'")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise invalid_field("two tools have the same name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise invalid_field("'tool_choice' needs 'tools'")
        if isinstance(self.tool_choice, Tool) and self.tool_choice.function.name not in names:
            raise invalid_field("'tool_choice' names a tool that is not in 'tools'")
        if self.forced_functions and self.constraint() is not None:
            raise invalid_field("a forced tool call cannot be combined with another format")
        return self

    @property
    def num_images(self) -> int:
        """Number of images in the conversation."""
        return sum(message.num_images for message in self.messages)

    @property
    def forced_functions(self) -> list[Function]:
        """Functions of which one must be called. Empty if no call is forced."""
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, Tool):
            return [function for function in functions if function.name == self.tool_choice.function.name]
        return functions if self.tool_choice == "required" else []

    @property
    def offered_tools(self) -> list[Tool]:
        """Tools that the prompt contains."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def prompts(self) -> list[list[Message]]:
        """The conversation as a list with one element."""
        return [self.messages]

    @property
    def log_value(self) -> object:
        """Prompt for the request log."""
        return [message.as_turn() for message in self.messages]


MAX_PROMPTS = 1024


class CompletionRequest(TextFields):
    """Body of ``/v1/completions``."""

    unsupported: ClassVar[Unsupported] = {"suffix": (("",), "text is only generated after the prompt")}

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(16, ge=0, le=1 << 30)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise invalid_field("'best_of' other than 'n' is not supported: increase 'n' and choose yourself")
        if self.max_tokens == 0 and not self.echo:
            raise invalid_field("'max_tokens' of 0 needs 'echo': true")
        if self.echo and self.constraint() is not None:
            raise invalid_field("'echo' cannot be combined with a format")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Prompts as text or token ids."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else list(self.prompt)  # type: ignore[arg-type, list-item]

    @property
    def log_value(self) -> object:
        """Prompt for the request log."""
        return self.prompt
