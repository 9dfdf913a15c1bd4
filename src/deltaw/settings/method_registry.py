"""Registry of training methods. Settings, flags, plans, searches and adapters are derived from it.

The built-in methods are registered in :mod:`deltaw.methods`. Other code registers methods the same way before it reads
any settings. An installed package can name its entry as an entry point of the group ``deltaw.methods``. An entry can
give its class as a string, so that this module does not import torch.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaw.settings.registry import Registry, import_object


@dataclass(frozen=True)
class MethodEntry:
    """A registered method.

    Attributes:
        name: Value of the setting ``method``, and name of the method's section.
        implementation: Subclass of :class:`deltaw.methods.base.Method`, or ``"package.module:Class"``, imported
            at first use.
        settings: Dataclass of the method's section, or None if it has no settings. If it has a classmethod
            ``from_dict``, that reads the section.
        description: Topic of the section, for ``--help``.
        peft_type: Name of the method in ``adapter_config.json`` if PEFT can read its files.
        aliases: Names of settings in PEFT, which the section also accepts.
        search: Default search space in addition to the learning rate, in the syntax of ``--search``.
        compared_by_default: True if a comparison includes the method by default.
    """

    name: str
    implementation: Any
    settings: type | None = None
    description: str = ""
    peft_type: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    search: tuple[str, ...] = ("train.weight_decay=[0.0, 0.01, 0.1]",)
    compared_by_default: bool = False

    def load(self) -> Any:
        """Import and return the method's class."""
        return import_object(self.implementation)


def _check(entry: MethodEntry) -> None:
    if not entry.name.isidentifier() or keyword.iskeyword(entry.name):
        raise ValueError(f"'{entry.name}' cannot name a method and its section")


_registry: Registry[MethodEntry] = Registry("method", MethodEntry, "deltaw.methods", _check)
register = _registry.register
unregister = _registry.unregister
listen = _registry.listen
registered = _registry.registered
load_plugins = _registry.load_plugins
entries = _registry.entries
names = _registry.names
entry_of = _registry.entry_of
is_built_in = _registry.is_built_in
broken = _registry.broken


def compared_names() -> tuple[str, ...]:
    """Return the names of the methods that a comparison includes by default."""
    return tuple(entry.name for entry in entries() if entry.compared_by_default)


def section_names() -> tuple[str, ...]:
    """Return the names of the methods that have settings."""
    return tuple(entry.name for entry in entries() if entry.settings is not None)


def entry_of_adapter(kind: object) -> MethodEntry | None:
    """Return the method with this ``peft_type``, or with this name if PEFT has no type for it. None if unknown."""
    return next((e for e in entries() if kind == (e.peft_type or e.name)), None)
