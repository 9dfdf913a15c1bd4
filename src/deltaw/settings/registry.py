"""Registries of named entries, which installed packages can extend with entry points.

Entry points are loaded when entries are first requested. Importing this module and registering entries do not scan
installed packages.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from deltaw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from importlib import metadata
# Packages that register the built-in entries when they are imported. The top-level package names them, because they
# are above this module in the import order.
built_in_packages: tuple[str, ...] = ()
# Classes of the callbacks that each run has, as "package.module:Class". Also set by the top-level package.
default_callbacks: tuple[str, ...] = ()


def load_built_in() -> None:
    """Register the built-in entries of all registries. Only the first call has an effect."""
    for package in built_in_packages:
        importlib.import_module(package)


class BrokenPackageWarning(UserWarning):
    """An entry of an installed package cannot be loaded. Entries of other packages are not affected."""


class RegistryEntry(Protocol):
    """Interface of registered objects."""

    @property
    def name(self) -> str: ...
    @property
    def implementation(self) -> Any: ...


Entry = TypeVar("Entry", bound=RegistryEntry)


class Registry(Generic[Entry]):
    """Entries in the order of registration.

    Args:
        kind: Name of the kind of entry in messages, for example ``method``.
        entry_type: Class of the entries.
        group: Entry-point group with which installed packages provide entries.
        check: Raises ValueError for an invalid entry.
    """

    def __init__(
        self, kind: str, entry_type: type[Entry], group: str, check: Callable[[Entry], None] | None = None
    ) -> None:
        self._kind = kind
        self._entry_type = entry_type
        self._group = group
        self._check = check
        self._loaded = False
        self._broken: dict[str, UserError] = {}
        self._entries: dict[str, Entry] = {}
        self._listeners: list[Callable[[], None]] = []

    def register(self, entry: Entry) -> None:
        """Add an entry.

        Raises:
            ValueError: if the name is taken, or the check or a listener rejects the entry.
        """
        if self._check is not None:
            self._check(entry)
        if entry.name in self._entries:
            raise ValueError(f"the {self._kind} '{entry.name}' is already registered")
        self._entries[entry.name] = entry
        try:
            self._notify()
        except BaseException:
            self.unregister(entry.name)
            raise

    def unregister(self, name: str) -> None:
        """Remove an entry."""
        del self._entries[name]
        self._notify()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` now and after every change. It may raise ValueError to reject a new entry."""
        self._listeners.append(listener)
        listener()

    def registered(self) -> tuple[Entry, ...]:
        """Return the entries registered so far without loading entry points, for listeners."""
        return tuple(self._entries.values())

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries, including those of installed packages."""
        self.load_plugins()
        return self.registered()

    def names(self) -> tuple[str, ...]:
        """Return the names of all entries."""
        return tuple(entry.name for entry in self.entries())

    def is_built_in(self, name: str) -> bool:
        """True if an entry with this name exists, and its implementation is part of deltaw."""
        if name not in self._entries:
            return False
        implementation = self._entries[name].implementation
        if implementation is None:
            return True
        module = implementation if isinstance(implementation, str) else str(implementation.__module__)
        return module.startswith("deltaw.")

    def entry_of(self, name: str, *, location: str | None = None) -> Entry:
        """Return the entry with this name.

        Raises:
            UserError: if no entry has this name, or its package cannot be loaded. The hint contains the nearest names.
        """
        self.load_plugins()
        if name in self._entries:
            return self._entries[name]
        if name in self._broken:
            raise self._broken[name]
        hint = did_you_mean(name, self._entries)
        if hint.startswith("available"):
            hint += f"; if a package provides '{name}', install it"
        raise UserError(f"unknown {self._kind} '{name}'", location=location or self._kind, hint=hint)

    def broken(self, name: str) -> UserError | None:
        """Return the error of the package that provides this entry, or None."""
        self.load_plugins()
        return self._broken.get(name)

    def load_plugins(self) -> None:
        """Register the entries that installed packages provide. Only the first call has an effect.

        A package that cannot be imported or registered causes a :class:`BrokenPackageWarning`. Only requests of its
        entry raise the error.
        """
        if self._loaded:
            return
        self._loaded = True  # a plugin may request entries during its import
        load_built_in()
        from importlib import metadata

        for plugin in metadata.entry_points(group=self._group):
            try:
                self._load(plugin)
            except UserError as error:
                self._broken[plugin.name] = error
                warnings.warn(f"{error.message} ({error.location})", BrokenPackageWarning, stacklevel=2)

    def _load(self, plugin: metadata.EntryPoint) -> None:
        try:
            entry = plugin.load()
            if not isinstance(entry, self._entry_type):
                raise TypeError(f"it is a {type(entry).__name__}, not a {self._entry_type.__name__}")
            # A package may register its entry on import.
            if self._entries.get(entry.name) is not entry:
                self.register(entry)
        except (Exception, SystemExit) as error:
            package = f"package '{plugin.dist.name}'" if plugin.dist is not None else "an installed package"
            message = f"the {self._kind} '{plugin.name}' of {package} cannot be loaded: {type(error).__name__}: {error}"
            location = f"entry point {self._group}: {plugin.name} = {plugin.value}"
            raise UserError(message, location=location, hint="update or uninstall that package") from error

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()


def import_object(implementation: Any) -> Any:
    """Import and return the object named by ``"package.module:Class"``. Return any other value unchanged."""
    if not isinstance(implementation, str):
        return implementation
    module, _, attribute = implementation.partition(":")
    return getattr(importlib.import_module(module), attribute)
