"""The methods that exist. Each registers once; settings, flags, plans, searches and adapters follow from it.

The built-in methods register in ``settings``. Other code registers its own the same way, before it reads any
settings. An entry names its class by text where the class is slow to import, so this module needs no torch.
"""

from __future__ import annotations

import importlib
import keyword
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from deltaw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.methods.base import Method


class TrainOptions(Protocol):
    """The part of the ``train:`` section that methods read."""

    @property
    def b_rate(self) -> float: ...


class Implementation(Protocol):
    """A method's class."""

    def from_run(
        self, section: object, *, train: TrainOptions | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Method:
        """Make the method from its section of a run's settings; None stands for the defaults.

        Args:
            section: the section; None where the method has none, or where an adapter is loaded.
            train: the run's ``train:`` section; None where an adapter is loaded.
            tokenizer: of the model; None for images.
        """


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
    implementation: str | Implementation
    settings: type | None = None
    description: str = ""
    peft_type: str | None = None
    search: tuple[str, ...] = ("train.weight_decay=[0.0, 0.01, 0.1]",)
    compared: bool = False

    def load(self) -> Implementation:
        """The method's class."""
        if not isinstance(self.implementation, str):
            return self.implementation
        module, _, attribute = self.implementation.partition(":")
        found: Implementation = getattr(importlib.import_module(module), attribute)
        return found


_entries: dict[str, MethodEntry] = {}
_listeners: list[Callable[[], None]] = []


def register(entry: MethodEntry) -> None:
    """Make a method known.

    Raises:
        ValueError: the name is taken or cannot name a section.
    """
    if not entry.name.isidentifier() or keyword.iskeyword(entry.name):
        raise ValueError(f"'{entry.name}' cannot name a method and its section")
    if entry.name in _entries:
        raise ValueError(f"there is a method '{entry.name}' already")
    _entries[entry.name] = entry
    try:
        _tell()
    except ValueError:
        del _entries[entry.name]
        raise


def unregister(name: str) -> None:
    """Forget a method."""
    del _entries[name]
    _tell()


def listen(listener: Callable[[], None]) -> None:
    """Call ``listener`` now, and again whenever the methods change. It may raise ValueError to refuse one."""
    _listeners.append(listener)
    listener()


def entries() -> tuple[MethodEntry, ...]:
    """All methods, in the order of registration."""
    return tuple(_entries.values())


def names() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(_entries)


def compared_names() -> tuple[str, ...]:
    """The methods that a comparison includes by default."""
    return tuple(entry.name for entry in _entries.values() if entry.compared)


def section_names() -> tuple[str, ...]:
    """The methods that have a section of settings."""
    return tuple(entry.name for entry in _entries.values() if entry.settings is not None)


def entry_of(name: str, *, where: str = "method") -> MethodEntry:
    """The method of this name.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name not in _entries:
        raise UserError(f"there is no method '{name}'", where=where, hint=did_you_mean(name, _entries))
    return _entries[name]


def entry_of_adapter(kind: object) -> MethodEntry | None:
    """The method whose adapters carry this ``peft_type``, or this ``method`` where PEFT has no type."""
    return next((e for e in _entries.values() if kind == (e.peft_type or e.name)), None)


def _tell() -> None:
    for listener in _listeners:
        listener()
