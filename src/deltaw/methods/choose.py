"""The method that settings ask for, or that made an adapter's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deltaw.errors import UserError
from deltaw.methods import registry
from deltaw.methods.base import ADAPTER_CONFIG, Method
from deltaw.methods.files import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Settings(Protocol):
    """What is read of a run's settings; with them an attribute for each method's section."""

    @property
    def method(self) -> str: ...

    @property
    def train(self) -> registry.TrainOptions: ...


def choose_method(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> Method:
    """The method that ``settings.method`` names, with its section."""
    entry = registry.entry_of(settings.method)
    section = None if entry.settings is None else getattr(settings, entry.name)
    return entry.load().from_run(section, train=settings.train, tokenizer=tokenizer)


def method_of_folder(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Method:
    """The method that made an adapter's folder, with default settings, to load the folder.

    Raises:
        UserError: the folder's config cannot be read, or names an unknown method.
    """
    config = read_config(folder)
    kind = config.get("peft_type") or config.get("method")
    entry = registry.entry_of_adapter(kind)
    if entry is None:
        raise UserError(
            f"the adapter is of the unknown kind {kind!r}",
            where=str(folder / ADAPTER_CONFIG),
            hint="give a LoRA, a prompt-tuning or one of deltaw's own adapters",
        )
    return entry.load().from_run(None, train=None, tokenizer=tokenizer)
