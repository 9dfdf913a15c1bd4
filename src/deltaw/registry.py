"""A registry: entries by name, which code of the library and of others adds, and what follows from them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from deltaw.errors import UserError, did_you_mean


class Named(Protocol):
    """What can be registered."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


class Registry(Generic[Entry]):
    """Entries in the order of registration.

    Args:
        kind: what an entry is called in messages, such as ``method``.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, Entry] = {}
        self._listeners: list[Callable[[], None]] = []

    def register(self, entry: Entry) -> None:
        """Make an entry known.

        Raises:
            ValueError: the name is taken, or a listener refuses it.
        """
        if entry.name in self._entries:
            raise ValueError(f"there is a {self._kind} '{entry.name}' already")
        self._entries[entry.name] = entry
        try:
            self._tell()
        except ValueError:
            del self._entries[entry.name]
            raise

    def unregister(self, name: str) -> None:
        """Forget an entry."""
        del self._entries[name]
        self._tell()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` now, and again whenever the entries change. It may raise ValueError to refuse
        one."""
        self._listeners.append(listener)
        listener()

    def entries(self) -> tuple[Entry, ...]:
        """All of them."""
        return tuple(self._entries.values())

    def names(self) -> tuple[str, ...]:
        """The names of all."""
        return tuple(self._entries)

    def entry_of(self, name: str, *, where: str | None = None) -> Entry:
        """The entry of this name.

        Raises:
            UserError: there is none; the message names the nearest.
        """
        if name not in self._entries:
            raise UserError(
                f"there is no {self._kind} '{name}'",
                where=where or self._kind,
                hint=did_you_mean(name, self._entries),
            )
        return self._entries[name]

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()


def imported(implementation: Any) -> Any:
    """``"package.module:Class"`` as the class, imported now; anything else as it is."""
    if not isinstance(implementation, str):
        return implementation
    module, _, attribute = implementation.partition(":")
    return getattr(importlib.import_module(module), attribute)
