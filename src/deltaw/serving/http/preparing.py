"""A request of the API becomes requests to the engine: which adapter, how many tokens, which seeds.

Knows the fields of requests and the limits; not how answers are written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from deltaw.errors import UserError
from deltaw.serving.http.chat_request import ChatRequest
from deltaw.serving.http.completion_request import CompletionRequest
from deltaw.serving.http.errors import ApiError, refused
from deltaw.serving.http.fields import TextFields, json_constraint
from deltaw.serving.http.prompts import surely_longer
from deltaw.serving.http.served import Prompts, Served
from deltaw.serving.http.settings import Limits
from deltaw.serving.http.tool_calls import forced_schema
from deltaw.serving.request import Constraint, Request, Sampling, UnknownAdapterError


def adapter_named(served: Served, model: str) -> str | None:
    """The adapter that a request asks for; None for the base model.

    Raises:
        ApiError: 404, there is no such model; 501, the model writes no text.
    """
    if model != served.name and model not in served.adapters():
        raise ApiError(
            404,
            f"there is no model '{model[:128]}': /v1/models lists those there are",
            param="model",
            code="model_not_found",
        )
    if served.engine is None:
        raise ApiError(400, f"'{model}' writes no text", param="model", code="model_not_supported")
    return None if model == served.name else model


def check_choices(count: int, limits: Limits) -> None:
    """Refuse more texts than one request may ask for."""
    if count > limits.choices:
        raise ApiError(
            400,
            f"{count} texts are asked for, and a request may have {limits.choices}",
            param="n",
            code="invalid_value",
        )


def chat_requests(
    asked: ChatRequest, adapter: str | None, served: Served, limits: Limits, owner: int = 0
) -> list[Request]:
    """The requests for a chat's choices.

    Args:
        owner: who asks, as in :class:`deltaw.serving.request.Request`.

    Raises:
        ApiError: the conversation cannot be rendered, or is too long.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in asked.offered]
    turns = [message.as_turn() for message in asked.messages]
    prompts = _prompts_of(served, adapter)
    _refuse_long(json.dumps([turns, tools], ensure_ascii=False), prompts, served, limits)
    try:
        tokens = prompts.chat(turns, tools)
    except UserError as error:
        raise refused(error, param="messages") from error
    constraint = _forced(asked) if asked.forced else asked.constraint()
    sampling = asked.sampling(asked.told_logprobs)
    made = _choices(asked, tokens, adapter, served, limits, asked.most_tokens, sampling, constraint)
    return [replace(request, owner=owner) for request in made]


def completion_requests(
    asked: CompletionRequest, adapter: str | None, served: Served, limits: Limits, owner: int = 0
) -> list[Request]:
    """The requests for the choices of a completion's prompts, prompt by prompt.

    Args:
        owner: who asks, as in :class:`deltaw.serving.request.Request`.

    Raises:
        ApiError: a prompt is empty or too long.
    """
    prompts = _prompts_of(served, adapter)
    sampling = asked.sampling(asked.logprobs)
    constraint = asked.constraint()
    requests: list[Request] = []
    for prompt in asked.prompts:
        if isinstance(prompt, str):
            _refuse_long(prompt, prompts, served, limits)
        tokens = prompts.text(prompt) if isinstance(prompt, str) else np.asarray(prompt, dtype=np.int32)
        if not len(tokens):
            raise ApiError(400, "a prompt is empty", param="prompt", code="invalid_value")
        requests += _choices(asked, tokens, adapter, served, limits, asked.max_tokens, sampling, constraint)
    told = asked.echo is True and asked.logprobs is not None
    return [replace(request, owner=owner, prompt_logprobs=told) for request in requests]


def _prompts_of(served: Served, adapter: str | None) -> Prompts:
    try:
        return served.prompts(adapter)
    except UnknownAdapterError as error:
        raise refused(error) from error


def _refuse_long(text: str, prompts: Prompts, served: Served, limits: Limits) -> None:
    """Refuse what is far too long before all of it is tokenized, which would take seconds."""
    most = min(limits.prompt, served.positions or limits.prompt)
    if surely_longer(text, most, prompts.text):
        raise _too_long(f"the prompt has far more than {most:,} tokens")


def _choices(
    asked: TextFields,
    tokens: np.ndarray,
    adapter: str | None,
    served: Served,
    limits: Limits,
    most: int | None,
    sampling: Sampling,
    constraint: Constraint | None,
) -> list[Request]:
    if len(tokens) > limits.prompt:
        raise _too_long(f"the prompt has {len(tokens):,} tokens, and {limits.prompt:,} are allowed")
    if most is not None and most > limits.new_tokens:
        raise ApiError(
            400,
            f"{most:,} new tokens are asked for, and {limits.new_tokens:,} are allowed",
            param="max_tokens",
            code="invalid_value",
        )
    most = limits.new_tokens if most is None else most
    if served.positions is not None:
        room = served.positions - len(tokens)
        if room < min(1, most):
            raise _too_long(
                f"the prompt has {len(tokens):,} tokens, and the model has {served.positions:,} positions"
            )
        most = min(most, room)
    request = Request(
        tokens=tokens,
        adapter=adapter,
        constraint=constraint,
        max_new_tokens=most,
        stop=asked.stops,
        stop_ids=() if asked.ignore_eos else None,
        seconds=limits.seconds,
    )
    # Each choice draws with a seed of its own, which does not depend on what else is asked for.
    seeds: Sequence[int] = [(sampling.seed + number) % (1 << 63) for number in range(asked.choices)]
    return [replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds]


def _forced(asked: ChatRequest) -> Constraint:
    try:
        schema = forced_schema([(function.name, function.parameters) for function in asked.forced])
    except UserError as error:
        raise refused(error, param="tools") from error
    return json_constraint(schema, "tools")


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, param="prompt", code="context_length_exceeded")
