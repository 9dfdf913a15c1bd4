"""Adapters on disk: writing and reading the two files, and the format of methods that PEFT does not have.

That format holds trained tensors by the model's own names, and the method's name in ``adapter_config.json``.
PEFT does not read it. This module knows no models.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import safetensors
from torch import Tensor

from deltaw.contained import require_contained
from deltaw.errors import UserError
from deltaw.lora import files as lora_files
from deltaw.methods import registry
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CLASSES_KEY, Method, TrainOptions
from deltaw.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Names of the last layers of classifiers.
_HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")


@dataclass(frozen=True)
class Saved:
    """The content of ``adapter_config.json``."""

    method: str
    base_model: str | None
    settings: dict[str, object] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(default_factory=dict)


def write_trained(folder: Path, saved: Saved, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write both files, each whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    config = {"method": saved.method, "base_model_name_or_path": saved.base_model, "settings": saved.settings}
    write_adapter(folder, tensors, {**config, "tied": saved.tied, "deltaw_version": __version__}, metadata)


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object], metadata: Mapping[str, str]
) -> None:
    """Write weights and ``adapter_config.json``, each whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lora_files.write_adapter(folder, tensors, config, metadata)
    except OSError as error:
        what = f"the adapter cannot be written: {error.strerror or error}"
        raise UserError(what, where=str(folder), hint="choose a folder that you may write to") from error


def read_config(folder: Path) -> dict[str, object]:
    """``adapter_config.json`` of any method.

    Raises:
        UserError: it is missing or not a JSON object, or a link in the folder leads out of it.
    """
    require_contained(folder)
    return lora_files.read_settings(folder / ADAPTER_CONFIG)


def read_trained(folder: Path, method: str) -> tuple[dict[str, Tensor], Saved]:
    """The tensors and settings that :func:`write_trained` wrote.

    Raises:
        UserError: a file is missing or damaged, or another method wrote it.
    """
    settings = read_config(folder)
    if settings.get("method") != method:
        what = f"its method is {settings.get('method') or settings.get('peft_type')!r}, not '{method}'"
        raise UserError(what, where=str(folder), hint="name its own method")
    tensors, _ = lora_files.read_tensors(folder)
    tied = _mapping(settings.get("tied"))
    saved = Saved(
        method,
        text_or_none(settings.get("base_model_name_or_path")),
        dict(_mapping(settings.get("settings"))),
        {name: [str(other) for other in others] for name, others in tied.items() if isinstance(others, list)},
    )
    return tensors, saved


def metadata_of(folder: Path) -> dict[str, str]:
    """The metadata of the weights file in an adapter's folder; empty where there is no file.

    Raises:
        UserError: the weights cannot be read.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return {}  # whoever loads the adapter says so
    with _opened(path) as file:
        return dict(file.metadata() or {})


def classes_of(folder: Path) -> tuple[str, ...] | None:
    """The names of the classes that an adapter was trained for; None if it is not a classifier.

    Raises:
        UserError: the weights cannot be read.
    """
    text = metadata_of(folder).get(CLASSES_KEY)
    try:
        names = None if text is None else json.loads(text)
    except ValueError as error:
        raise _unreadable(folder / ADAPTER_WEIGHTS, error) from error
    return tuple(str(name) for name in names) if isinstance(names, list) else None


def outputs_of(folder: Path) -> int | None:
    """The number of outputs of the classifier in an adapter's folder; None if it has no classifier.

    Raises:
        UserError: the weights cannot be read.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return None  # whoever loads the adapter says so
    with _opened(path) as file:
        names = [name for name in file.keys() if name.endswith(_HEADS)]  # noqa: SIM118
        return int(file.get_slice(names[-1]).get_shape()[0]) if names else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of weights, while it is read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


def text_or_none(value: object) -> str | None:
    """A text of a JSON file; None for anything else."""
    return value if isinstance(value, str) else None


def _unreadable(path: Path, error: Exception) -> UserError:
    what = f"the adapter's weights are damaged or cannot be read: {error}"
    return UserError(what, where=str(path), hint="save or copy it again")


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


# The method that settings ask for, or that made an adapter's folder.


class Settings(Protocol):
    """What is read of a run's settings; with them an attribute for each method's section."""

    @property
    def method(self) -> str: ...

    @property
    def train(self) -> TrainOptions: ...


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
    if (entry := registry.entry_of_adapter(kind)) is None:
        hint = "give a LoRA, a prompt-tuning or one of deltaw's own adapters"
        raise UserError(f"the adapter is of the unknown kind {kind!r}", where=str(folder / ADAPTER_CONFIG), hint=hint)
    return entry.load().from_run(None, train=None, tokenizer=tokenizer)
