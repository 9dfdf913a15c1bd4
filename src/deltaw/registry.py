"""A registry: entries by name, added by deltaw and by other packages.

Installed packages add entries by entry points. These are looked up when the entries are first asked for, so
importing this module, or registering, scans no installed package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
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
        entry_type: the class of an entry.
        group: the entry points of installed packages that name an entry each.
        check: raises ValueError for an entry that cannot be registered.
    """

    def __init__(
        self, kind: str, entry_type: type[Entry], group: str, check: Callable[[Entry], None] | None = None
    ) -> None:
        self._kind, self._entry_type, self._group, self._check = kind, entry_type, group, check
        self._plugins: list[metadata.EntryPoint] | None = None
        self._loading = False
        self._entries: dict[str, Entry] = {}
        self._listeners: list[Callable[[], None]] = []

    def register(self, entry: Entry) -> None:
        """Make an entry known.

        Raises:
            ValueError: the name is taken, or the check or a listener refuses it.
        """
        if self._check is not None:
            self._check(entry)
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
        """Call ``listener`` now, and again whenever the entries change. It may raise ValueError to refuse one."""
        self._listeners.append(listener)
        listener()

    def registered(self) -> tuple[Entry, ...]:
        """The entries registered so far, without looking for entry points; for listeners."""
        return tuple(self._entries.values())

    def entries(self) -> tuple[Entry, ...]:
        """All entries.

        Raises:
            UserError: an entry point of an installed package does not work; see :meth:`load_plugins`.
        """
        self.load_plugins()
        return self.registered()

    def names(self) -> tuple[str, ...]:
        """The names of all entries."""
        return tuple(entry.name for entry in self.entries())

    def entry_of(self, name: str, *, where: str | None = None) -> Entry:
        """The entry of this name.

        Raises:
            UserError: there is none; the message names the nearest.
        """
        self.load_plugins()
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            raise UserError(f"there is no {self._kind} '{name}'", where=where or self._kind, hint=hint)
        return self._entries[name]

    def load_plugins(self) -> None:
        """Register what installed packages offer as entry points of the group. Only the first call does work.

        Raises:
            UserError: one cannot be imported or registered. Every later call tries that one again.
        """
        if self._loading:
            return  # a package that asks for entries while it is imported
        if self._plugins is None:
            self._plugins = list(metadata.entry_points(group=self._group))
        self._loading = True
        try:
            while self._plugins:
                self._load(self._plugins[0])
                del self._plugins[0]
        finally:
            self._loading = False

    def _load(self, plugin: metadata.EntryPoint) -> None:
        try:
            entry = plugin.load()
            if not isinstance(entry, self._entry_type):
                raise TypeError(f"it is a {type(entry).__name__}, not a {self._entry_type.__name__}")
            # A package may register its entry itself when it is imported.
            if self._entries.get(entry.name) is not entry:
                self.register(entry)
        except Exception as error:
            package = f"package '{plugin.dist.name}'" if plugin.dist is not None else "an installed package"
            what = f"the {self._kind} '{plugin.name}' of {package} cannot be loaded: {type(error).__name__}: {error}"
            where = f"entry point {self._group}: {plugin.name} = {plugin.value}"
            raise UserError(what, where=where, hint="update or uninstall that package") from error

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()


def imported(implementation: Any) -> Any:
    """``"package.module:Class"`` as the class, imported now; anything else as it is."""
    if not isinstance(implementation, str):
        return implementation
    module, _, attribute = implementation.partition(":")
    return getattr(importlib.import_module(module), attribute)
