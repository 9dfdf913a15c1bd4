"""What is known of one request when it has been answered: for its line in the log, and for the metrics."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """One request.

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

    def token(self) -> None:
        """A token came."""
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token

    def arrived(self, count: int) -> None:
        """A part of the body came."""
        self.body += count
        self.bodies.bytes += count

    def ended(self) -> None:
        """The request has been answered; nothing holds its body any more."""
        self.bodies.bytes -= self.body

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
    record: Record = scope[KEY]
    return record
