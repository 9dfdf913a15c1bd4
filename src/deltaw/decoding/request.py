"""Requests to a text generation engine, its results, and the engine protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from deltaw.errors import UserError

# "stop": a terminator or a stop string. "length": the limit of new tokens or of positions. "cancelled": by the caller
# or by an engine shutdown. "timeout": the request's time limit. "error": the engine failed.
FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


class UnknownAdapterError(UserError):
    """The requested adapter does not exist or has been removed."""


class UnsupportedError(UserError):
    """The request needs a feature that this model or this installation does not support."""


class BusyError(UserError):
    """The request is rejected because of load. A retry may succeed."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request.

    Args:
        temperature: Softmax temperature. 0 selects greedy decoding.
        top_k: Sample from the k most likely tokens. 0 disables the filter.
        top_p: Sample from the smallest set of tokens with this total probability.
        min_p: Remove tokens whose probability is below this fraction of the highest probability.
        repetition_penalty: Divides positive and multiplies negative logits of all tokens in the prompt and the
            completion
            (arXiv 1909.05858). 1 disables it.
        presence_penalty: Subtracted once from the logit of each token in the completion, as in the OpenAI API.
        frequency_penalty: Subtracted from the logit of a token for each occurrence in the completion, as in the OpenAI
            API.
        logit_bias: Value added to the logit of a token, by token id.
        seed: Seed of the request. The same seed produces the same text, independent of concurrent requests.
        logprobs: Number of top log-probabilities to return with each token. 0 returns only the chosen token's. None
            disables log-probabilities.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None


@dataclass(frozen=True)
class Constraint:
    """Constraint that a completion must match.

    Args:
        kind: JSON schema, arbitrary JSON object, regular expression or Lark grammar.
        value: Schema as JSON text, regular expression or grammar. Empty for ``json_object``.
    """

    kind: Literal["json_schema", "json_object", "regex", "grammar"]
    value: str = ""


@dataclass(frozen=True)
class Request:
    """Request for one completion.

    Args:
        tokens: (length,) token ids of the rendered prompt, without virtual tokens.
        adapter: Name of the adapter, or None for the base model.
        max_new_tokens: Maximum number of tokens to generate. The model's positions limit it further.
        stop: Stop strings. They are not part of the completion.
        stop_ids: Terminator tokens that replace the adapter's terminators, or None for the adapter's.
        seconds: Time limit, counted from submission. The completion then finishes with "timeout". None disables it.
        prompt_logprobs: Return log-probabilities of the prompt tokens.
        owner: Owner of the request. Cached keys and values are never shared between owners.
    """

    tokens: np.ndarray
    adapter: str | None = None
    sampling: Sampling = Sampling()
    constraint: Constraint | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    seconds: float | None = None
    prompt_logprobs: bool = False
    owner: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token, and (token id, log-probability) pairs of the most likely tokens at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TextChunk:
    """Increment of a completion.

    Attributes:
        text: Valid Unicode text, possibly empty. The chunks concatenate to the completion.
        tokens: Tokens generated since the previous chunk, without terminators.
        logprobs: Log-probabilities of these tokens, if requested.
        finish: Finish reason in the last chunk, otherwise None.
        reused: Number of prompt tokens whose keys and values were cached. Set in the first chunk.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    reused: int = 0

    @staticmethod
    def join(chunks: Sequence[TextChunk]) -> TextChunk:
        """Concatenate consecutive chunks of a completion."""
        return TextChunk(
            "".join(chunk.text for chunk in chunks),
            tuple(token for chunk in chunks for token in chunk.tokens),
            tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
            chunks[-1].finish if chunks else None,
        )


@dataclass(frozen=True)
class GenerationResult:
    """Complete result of a request.

    Attributes:
        terminator: Token that ended the completion, or None.
    """

    text: str
    tokens: np.ndarray
    finish: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    terminator: int | None = None


Listener = Callable[[TextChunk], None]
"""Callback for each chunk of a completion."""


@dataclass(frozen=True)
class EngineLoad:
    """Current load of an engine, for monitoring.

    Attributes:
        running: Number of requests that are being decoded.
        waiting: Number of queued requests.
        pages_used: Pages of keys and values in use.
        pages: Total number of pages.
        reused: Prompt tokens that were served from the cache since the start.
        tokens: Tokens computed since the start.
        adapters_loaded: Number of adapters in memory.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages: int = 0
    reused: int = 0
    tokens: int = 0
    adapters_loaded: int = 0


class GenerationHandle(Protocol):
    """Handle to a running generation. Iterate over its chunks from a single thread."""

    def __iter__(self) -> Iterator[TextChunk]: ...

    def cancel(self) -> None:
        """Cancel the generation, from any thread. Has no effect if it has finished.

        The last chunk then has the finish reason "cancelled".
        """

    def result(self) -> GenerationResult:
        """Wait for the complete result.

        Raises:
            Exception: if the engine failed.
        """


class TextEngine(Protocol):
    """Generates completions of many requests concurrently. All methods are thread-safe."""

    def submit(self, request: Request, listener: Listener | None = None) -> GenerationHandle:
        """Queue a request.

        Args:
            request: The request.
            listener: Called with each chunk on the engine's thread. It must not block. If it is None, the chunks are
                queued
                for the iterator of the handle.

        Raises:
            UnknownAdapterError: if the adapter does not exist.
            UserError: if the request is invalid: an empty or too long prompt, an unknown token, a value out of range,
                or a
                constraint that does not compile.
            UnsupportedError: if the request has a constraint and constraints are not supported.
            BusyError: if too many constraints are being compiled or are in use.
        """

    def adapters(self) -> tuple[str, ...]:
        """Return the adapter names that requests may use."""

    def cancel_slow(self) -> None:
        """Cancel requests that wait long for their constraints, because the engine will shut down soon."""

    def close(self, *, drain: bool = True) -> None:
        """Stop accepting requests, and stop the engine.

        Args:
            drain: Finish pending requests first. Otherwise cancel them.
        """
