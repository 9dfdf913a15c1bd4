"""What an engine asks of whoever keeps adapters, and an engine's adapters where there is one at most.

Knows packed adapters; not files, nor how a step computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from deltaw.kernels.decode import PackedAdapter
from deltaw.serving.request import UnknownAdapterError


@dataclass(frozen=True)
class AdapterFacts:
    """What is known of an adapter without its weights.

    Attributes:
        virtual_tokens: positions that its soft prompt takes before each prompt.
        invocation: tokens from whose last occurrence in a prompt on its update acts; None where it acts on
            all tokens.
        terminators: tokens that end its texts.
    """

    virtual_tokens: int = 0
    invocation: tuple[int, ...] | None = None
    terminators: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ActiveAdapter:
    """An adapter in memory.

    Attributes:
        number: names these weights; at least 1, and no other ones ever get it.
        packed: its low-rank update; None where it has none.
        soft_prompt: (k, D), what stands in for embeddings of k tokens before each prompt; None without.
    """

    number: int
    facts: AdapterFacts
    packed: PackedAdapter | None = None
    soft_prompt: Tensor | None = field(default=None, repr=False)


class Adapters(Protocol):
    """Keeps adapters by name. May be called from any thread."""

    def names(self) -> tuple[str, ...]:
        """The names that a request may give."""

    def facts(self, name: str) -> AdapterFacts:
        """What is known of an adapter.

        Raises:
            UserError: there is none of this name.
        """

    def acquire(self, name: str) -> ActiveAdapter | None:
        """The adapter, which stays in memory until it is released; None where there is no room for it before
        others are released.

        Raises:
            UserError: there is none of this name, or it cannot be loaded.
        """

    def release(self, adapter: ActiveAdapter) -> None:
        """Note that a text which :meth:`acquire` was called for does not need it any more."""


class FixedAdapters:
    """Adapters that are in memory all the time, such as the one that a run was opened with."""

    def __init__(self, by_name: dict[str, ActiveAdapter] | None = None) -> None:
        self._by_name = dict(by_name or {})

    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def facts(self, name: str) -> AdapterFacts:
        return self.acquire(name).facts

    def acquire(self, name: str) -> ActiveAdapter:
        found = self._by_name.get(name)
        if found is None:
            raise no_adapter(name, self.names())
        return found

    def release(self, adapter: ActiveAdapter) -> None:
        """Nothing to do: it stays."""


def no_adapter(name: str, names: tuple[str, ...]) -> UnknownAdapterError:
    """The error of a name that no adapter has."""
    known = f"one of {', '.join(names)}" if names else "none: there are no adapters"
    return UnknownAdapterError(f"there is no adapter '{name}'", where="adapter", hint=f"give {known}")
