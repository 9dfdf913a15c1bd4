"""The methods that exist. Each registers once; settings, flags, plans, searches and adapters follow from it.

The built-in methods register in ``settings``. Other code registers its own the same way, before it reads any
settings; an installed package names its entry as an entry point of the group ``deltaw.methods``. An entry
names its class by text where the class is slow to import, so this module needs no torch.
"""

from __future__ import annotations

import keyword
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaw.registry import Registry, imported

if TYPE_CHECKING:
    from deltaw.methods.base import Method


@dataclass(frozen=True)
class MethodEntry:
    """One method, as it is registered.

    Attributes:
        name: the value of the setting ``method``, and the name of the method's section.
        implementation: the class, or ``"package.module:Class"``, imported at first use.
        settings: dataclass of the method's section; None where it has no settings of its own. A classmethod
            ``from_dict`` of it reads the section, if there is one.
        description: what the section is about, for ``--help``.
        peft_type: what ``adapter_config.json`` calls the method, where PEFT reads its files.
        search: what a search changes by default besides the learning rate, in the syntax of ``--search``.
        compared: whether a comparison includes it by default.
    """

    name: str
    implementation: str | type[Method]
    settings: type | None = None
    description: str = ""
    peft_type: str | None = None
    search: tuple[str, ...] = ("train.weight_decay=[0.0, 0.01, 0.1]",)
    compared: bool = False

    def load(self) -> type[Method]:
        """The method's class."""
        found: type[Method] = imported(self.implementation)
        return found


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


def compared_names() -> tuple[str, ...]:
    """The methods that a comparison includes by default."""
    return tuple(entry.name for entry in entries() if entry.compared)


def section_names() -> tuple[str, ...]:
    """The methods that have a section of settings."""
    return tuple(entry.name for entry in entries() if entry.settings is not None)


def entry_of_adapter(kind: object) -> MethodEntry | None:
    """The method whose adapters carry this ``peft_type``, or this ``method`` where PEFT has no type."""
    return next((e for e in entries() if kind == (e.peft_type or e.name)), None)
