"""The fields that chats and completions share: how tokens are chosen, when a text ends, what it must match.

Names, bounds and defaults are OpenAI's, with some of vLLM's beside them. Fields that would change an answer
and are not supported are refused by name; those that change nothing are accepted.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from deltaw.serving.request import Constraint, Sampling

# Names of models in requests.
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
# Lists are checked to their first error: a million wrong elements would take gigabytes.
Tokens = Annotated[list[Token], Field(fail_fast=True, min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
# Tokens that one request may weigh by logit_bias.
MOST_BIASES = 1024
# A constraint's text: it is compiled, which takes time that grows with it.
LONGEST_CONSTRAINT = 64 << 10


class Fields(BaseModel):
    """A body's fields: none that is not named, each of its own type, no number that is not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Fields):
    """What else a stream says: its usage in a last event. Padding against guessing by length is not made."""

    include_usage: bool = False
    include_obfuscation: bool = False


class SchemaFormat(Fields):
    """A JSON schema with the name that the client has for it."""

    name: str = Field(max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """What a text must be: any text, a JSON object, or what a JSON schema describes."""

    type: str = Field(pattern=r"^(text|json_object|json_schema)$")
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
    logit_bias: dict[str, Bias] | None = Field(None, max_length=MOST_BIASES)
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

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 16:
            raise wrong("at most 16 stop texts")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise wrong(f"{key[:40]!r} is no token id")
        return value

    @model_validator(mode="after")
    def _one_constraint(self) -> TextFields:
        formatted = self.response_format is not None and self.response_format.type != "text"
        given = [self.guided_json, self.guided_regex, self.guided_grammar, True if formatted else None]
        if sum(g is not None for g in given) > 1:
            raise wrong("give one of response_format, guided_json, guided_regex and guided_grammar")
        if self.ignore_eos and any(g is not None for g in given):
            raise wrong("'ignore_eos' and a format do not go together: the format says where a text ends")
        if self.stream_options is not None and not self.stream:
            raise wrong("'stream_options' needs 'stream': true")
        return self

    @property
    def choices(self) -> int:
        """Texts for each prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, logprobs: int | None) -> Sampling:
        """How tokens are chosen; without a seed by one that nobody knows.

        Args:
            logprobs: how many likely tokens are told with each, as in :class:`Sampling`.
        """
        return Sampling(
            temperature=_or(self.temperature, 1.0),
            top_k=max(0, self.top_k or 0),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
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
            given = self.guided_json
            return json_constraint(given, "guided_json")
        if self.response_format is None or self.response_format.type == "text":
            return None
        if self.response_format.json_schema is None:
            return Constraint("json_object")
        return json_constraint(
            self.response_format.json_schema.json_schema, "response_format.json_schema.schema"
        )


def json_constraint(schema: dict[str, Any] | str, param: str) -> Constraint:
    """A JSON schema as a constraint.

    Raises:
        ApiError: its text is none of JSON, or too long.
    """
    from deltaw.serving.http.errors import ApiError

    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    if len(text) > LONGEST_CONSTRAINT:
        raise ApiError(400, f"the schema has more than {LONGEST_CONSTRAINT:,} characters", param=param)
    try:
        known = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise ApiError(400, "a schema must be a JSON object", param=param, code="invalid_value")
    return Constraint("json_schema", text)


def wrong(message: str, param: str | None = None) -> PydanticCustomError:
    """A mistake that is told as it stands, with the field that it concerns."""
    # In the message itself, braces would be read as places for values.
    return PydanticCustomError("invalid_value", "{told}", {"told": message, "param": param})


def _or(given: float | None, default: float) -> float:
    return default if given is None else given
