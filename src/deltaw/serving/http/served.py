"""What an application serves: one value that holds the engine and what goes with it.

It is the seam to the rest of deltaw: a test makes it of a toy, the command line of a real model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from fastapi import APIRouter

from deltaw.serving.http.tool_calls import CallForm
from deltaw.serving.request import TextEngine


class Prompts(Protocol):
    """Prompts of one adapter, or of the base model, as tokens; may be called from any thread."""

    @property
    def call_form(self) -> CallForm | None:
        """How its chat template lets a model write calls of tools; None where it has no tools."""

    def chat(self, messages: Sequence[dict[str, object]], tools: Sequence[dict[str, object]]) -> np.ndarray:
        """A conversation through what opens the assistant's turn: (length,) token ids.

        Raises:
            UserError: the template does not take it.
        """

    def text(self, text: str) -> np.ndarray:
        """Plain text with the tokens that open every text: (length,) token ids."""

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for in a text."""


class Shelf(Protocol):
    """Adapters that come and go while an engine runs."""

    def add(self, name: str, folder: Path) -> object:
        """Make an adapter known.

        Raises:
            UserError: the folder holds no adapter, or none for this model, or the name is taken.
        """

    def swap(self, name: str, folder: Path) -> object:
        """Let a known name stand for another folder's adapter; texts in hand are written to their end.

        Raises:
            UserError: as ``add``; the adapter from before then stays.
        """

    def remove(self, name: str) -> object:
        """Forget an adapter; texts in hand are written to their end.

        Raises:
            UserError: there is none of that name.
        """


@dataclass(frozen=True)
class Load:
    """What an engine is doing, for those who watch it.

    Attributes:
        running, waiting: texts that are being written, and that are not yet begun.
        pages_used, pages: of keys and values. adapters_loaded: adapters that are in memory.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages: int = 0
    adapters_loaded: int = 0


@dataclass(frozen=True)
class Served:
    """All that an application knows of what it serves.

    Args:
        name: of the base model in requests. reference: what it was loaded from, as a person named it.
        engine: writes texts; None where the model writes none, and only ``routers`` answer.
        prompts: of an adapter by its name, or of the base model for None.
        positions: the most tokens of a prompt and its text; None where the engine alone knows.
        shelf: where adapters are added and removed; None where they are fixed.
        load: what the engine is doing.
        alive: whether texts can be written now.
        closed: ends the engine, and what belongs to it.
        routers: more routes: embeddings, classes, a page. open_paths: those of them that need no key.
        others: names besides the base model's where there is no engine, such as a classifier's adapters.
    """

    name: str
    engine: TextEngine | None
    prompts: Callable[[str | None], Prompts]
    reference: str = ""
    positions: int | None = None
    shelf: Shelf | None = None
    load: Callable[[], Load] = Load
    alive: Callable[[], bool] = field(default=lambda: True)
    closed: Callable[[], None] = field(default=lambda: None)
    routers: tuple[APIRouter, ...] = ()
    open_paths: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()

    def close(self) -> None:
        """End what is still being written, and let go of what it took."""
        self.closed()

    def adapters(self) -> tuple[str, ...]:
        """The names that requests may give besides the base model's."""
        return self.others if self.engine is None else self.engine.adapters()
