"""What is asked of a model that writes text, what comes back, and the protocol between them.

Knows neither models nor HTTP: an engine reads these values, and whoever serves or prints text makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from deltaw.errors import UserError

# Why a text ended: a terminator or a stop string; the limit of new tokens or of positions; its reader went
# away or its time was up; the engine was shut down or failed.
FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


class UnknownAdapterError(UserError):
    """There is no adapter of the name that a request gives: there never was, or it has been removed."""


class UnsupportedError(UserError):
    """What a request asks for is not possible with this model, or this installation."""


class BusyError(UserError):
    """A request cannot be taken now; later it may be."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Args:
        temperature: 0 takes the likeliest token; above it tokens are drawn.
        top_k: draw from this many of the likeliest tokens; 0 is all of them.
        top_p: draw from the likeliest tokens that together have this probability.
        min_p: leave out tokens less likely than this share of the likeliest one.
        repetition_penalty: divides positive logits of tokens seen in the prompt or the text and multiplies
            negative ones (arXiv 1909.05858); 1 changes nothing.
        presence_penalty, frequency_penalty: taken from the logits of tokens of the text, once, and once for
            each time that they occurred, as in the OpenAI API.
        logit_bias: added to the logits of single tokens.
        seed: of the drawing; with the same seed a request gets the same text, whatever runs beside it.
        logprobs: how many of the likeliest tokens' log-probabilities come with each token; None for none at
            all, 0 for the chosen token's alone.
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
    """What a text must match: a JSON schema, any JSON object, a regular expression, or a Lark grammar.

    Args:
        kind: which of them. value: the schema as JSON text, the expression, or the grammar.
    """

    kind: Literal["json_schema", "json_object", "regex", "grammar"]
    value: str = ""


@dataclass(frozen=True)
class Request:
    """One text to be written.

    Args:
        tokens: (length,) token ids of the prompt, rendered and without virtual tokens.
        adapter: the name of the adapter that writes it; None for the base model.
        max_new_tokens: the most tokens to write; fewer where the model's positions end before.
        stop: texts that end it; they are not part of it.
        stop_ids: tokens that end it instead of the adapter's own terminators; None for those.
        seconds: time from submission after which it ends with "timeout"; None for no limit.
        prompt_logprobs: whether log-probabilities of the prompt's own tokens are wanted.
        owner: whose request it is; what was computed for one owner is not used for another.
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
    """A token with its log-probability, and those of the likeliest tokens at its place (token id, value)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next part of a text.

    Attributes:
        text: valid text, perhaps empty; the pieces together are the text.
        tokens: the tokens that were chosen since the last piece, terminators left out.
        logprobs: of these tokens, where they were asked for.
        finish: why the text ended, with its last piece; None before.
        reused: tokens of the prompt whose keys and values were already there; told with the first piece.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    reused: int = 0

    @staticmethod
    def joined(pieces: Sequence[Piece]) -> Piece:
        """Pieces of a text as one."""
        return Piece(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.tokens),
            tuple(one for piece in pieces for one in piece.logprobs),
            pieces[-1].finish if pieces else None,
        )


@dataclass(frozen=True)
class Written:
    """A whole text: the sum of its pieces.

    Attributes:
        terminator: the token that ended it; None where none did.
    """

    text: str
    tokens: np.ndarray
    finish: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    terminator: int | None = None


Listener = Callable[[Piece], None]
"""Told each piece of a text as it comes."""


@dataclass(frozen=True)
class EngineLoad:
    """What an engine is doing, for those who watch it.

    Attributes:
        running, waiting: texts that are being written, and that are not yet begun.
        pages_used, pages: of keys and values.
        reused, tokens: since the start, tokens of prompts that were found written, and tokens that ran.
        adapters_loaded: adapters that are in memory.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages: int = 0
    reused: int = 0
    tokens: int = 0
    adapters_loaded: int = 0


class Writing(Protocol):
    """A text that is being written: iterate over its pieces, from any one thread."""

    def __iter__(self) -> Iterator[Piece]: ...

    def cancel(self) -> None:
        """End it, from any thread; the last piece then says "cancelled". Nothing where it has ended."""

    def result(self) -> Written:
        """Wait for its end.

        Raises:
            Exception: what the engine failed with.
        """


class TextEngine(Protocol):
    """Writes many texts at once. All functions may be called from any thread."""

    def submit(self, request: Request, listener: Listener | None = None) -> Writing:
        """Queue a request; it starts when there is room.

        Args:
            listener: called with each piece, on another thread, which it must not hold up; without one, the
                pieces wait for whoever iterates.

        Raises:
            UnknownAdapterError: there is no such adapter.
            UserError: the request cannot be served at all: an empty or over-long prompt, a token that
                does not exist, a value out of range, a constraint that cannot be compiled.
            UnsupportedError: a constraint, where there can be none.
            BusyError: a constraint, and too many others are being compiled or in use.
        """

    def adapters(self) -> tuple[str, ...]:
        """The names that a request may give."""

    def hurry(self) -> None:
        """Cancel texts that take long for their own reasons, such as their constraints: the end is near."""

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests; end when those in hand are written, or at once."""
