"""Generation requests of an API request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deltaw.decoding.request import Constraint, Request
from deltaw.serving.http.errors import ApiError, blame_field
from deltaw.serving.http.prompts import far_exceeds
from deltaw.serving.http.requests import ChatRequest, CompletionRequest, json_constraint
from deltaw.serving.http.served import Served, TokenizedPrompts
from deltaw.serving.http.settings import Limits
from deltaw.serving.http.tool_calls import forced_schema


def build_requests(
    fields: ChatRequest | CompletionRequest, adapter: str | None, served: Served, limits: Limits, owner: int = 0
) -> list[Request]:
    """Build the engine requests of a chat or of a completion's prompts. All choices of a prompt are consecutive.

    Args:
        fields: Fields of the API request.
        adapter: Name of the adapter, or None for the base model.
        served: The served model.
        limits: Limits of the server.
        owner: Owner of the request (see :class:`deltaw.decoding.request.Request`).

    Raises:
        ApiError: if a prompt is empty or too long, or a conversation cannot be rendered.
    """
    prompts = served.prompts(adapter)
    images = served.images
    max_length = min(limits.prompt, served.positions or limits.prompt)
    if isinstance(fields, ChatRequest):
        prompt_tokens = [_chat_tokens(fields, prompts, max_length)]
        constraint = _forced_constraint(fields) if fields.forced_functions else fields.constraint()
        logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
        max_tokens = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
        score_prompt = False  # the chat API has no log-probabilities of the prompt
    else:
        prompt_tokens = [_prompt_tokens(prompt, prompts, max_length) for prompt in fields.prompts]
        if images is not None and any((tokens >= images.first_id).any() for tokens in prompt_tokens):
            raise ApiError(400, "a prompt has a token that does not exist", param="prompt")  # no images of others
        constraint = fields.constraint()
        logprobs = fields.logprobs
        max_tokens = fields.max_tokens
        score_prompt = fields.echo is True and logprobs is not None
    sampling = fields.sampling(logprobs)
    # The seed of a choice depends only on the request's seed and the choice's index.
    seeds: Sequence[int] = [(sampling.seed + index) % (1 << 63) for index in range(fields.choices)]
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    options: dict[str, Any] = {"stop": stop, "stop_ids": () if fields.ignore_eos else None, "seconds": limits.seconds}
    options |= {"constraint": constraint, "prompt_logprobs": score_prompt, "owner": owner}
    requests = []
    for tokens in prompt_tokens:
        options["max_new_tokens"] = _new_tokens(max_tokens, tokens, served, limits)
        requests += [Request(tokens, adapter, replace(sampling, seed=seed), **options) for seed in seeds]
        if images is not None:
            images.compute_prompt(tokens)
    return requests


def _chat_tokens(fields: ChatRequest, prompts: TokenizedPrompts, max_length: int) -> np.ndarray:
    tools = [tool.model_dump(exclude_none=True) for tool in fields.offered_tools]
    texts = [message.as_turn() for message in fields.messages]
    _check_not_too_long(json.dumps([texts, tools], ensure_ascii=False), prompts, max_length)
    with blame_field("messages"):
        turns = [message.as_turn(images=True) for message in fields.messages]
        return prompts.chat(turns, tools, add_system=fields.add_system_prompt)


def _prompt_tokens(prompt: str | list[int], prompts: TokenizedPrompts, max_length: int) -> np.ndarray:
    if not isinstance(prompt, str):
        return np.asarray(prompt, dtype=np.int32)
    _check_not_too_long(prompt, prompts, max_length)
    tokens = prompts.text(prompt)
    if not len(tokens):
        raise ApiError(400, "a prompt is empty", param="prompt")
    return tokens


def _check_not_too_long(text: str, prompts: TokenizedPrompts, max_tokens: int) -> None:
    """Reject texts that are far too long before they are tokenized, which would take seconds."""
    if far_exceeds(text, max_tokens, prompts.text):
        raise _too_long(f"the prompt has far more than {max_tokens:,} tokens")


def _new_tokens(max_tokens: int | None, tokens: np.ndarray, served: Served, limits: Limits) -> int:
    """Return the number of tokens to generate for a prompt."""
    if len(tokens) > limits.prompt:
        raise _too_long(f"the prompt has {len(tokens):,} tokens, and {limits.prompt:,} are allowed")
    max_tokens = limits.new_tokens if max_tokens is None else max_tokens
    if max_tokens > limits.new_tokens:
        message = f"{max_tokens:,} new tokens are requested, and {limits.new_tokens:,} are allowed"
        raise ApiError(400, message, param="max_tokens")
    if served.positions is None:
        return max_tokens
    available = served.positions - len(tokens)
    if available < min(1, max_tokens):
        raise _too_long(f"the prompt has {len(tokens):,} tokens, and the model has {served.positions:,} positions")
    return min(max_tokens, available)


def _forced_constraint(fields: ChatRequest) -> Constraint:
    with blame_field("tools"):
        schema = forced_schema([(function.name, function.parameters) for function in fields.forced_functions])
    return json_constraint(schema, "tools")


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, param="prompt", code="context_length_exceeded")
