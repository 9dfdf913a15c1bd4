"""Read and write adapters, and the file format of methods that PEFT lacks.

That format stores trained tensors under the model's parameter names, and the method's name in ``adapter_config.json``.
PEFT cannot read it.
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

from deltaw.errors import UserError
from deltaw.lora import files as lora_files
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CLASSES_KEY, Method, MethodOptions, Tensors
from deltaw.settings import method_registry
from deltaw.tensor_files import read_header
from deltaw.untrusted_paths import require_contained
from deltaw.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Endings of the weight names of classification heads.
_HEAD_WEIGHTS = (
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "logits_proj.weight",
    "score.weight",
)


@dataclass(frozen=True)
class SavedConfig:
    """The content of ``adapter_config.json``.

    Attributes:
        method: Name of the method.
        base_model: Reference of the base model.
        settings: Settings of the method.
        tied: Further names of tied parameters, by their first name.
    """

    method: str
    base_model: str | None
    settings: dict[str, object] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(default_factory=dict)


def write_trained_parameters(folder: Path, saved: SavedConfig, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write both files atomically.

    Raises:
        UserError: if the folder cannot be written.
    """
    config = {"method": saved.method, "base_model_name_or_path": saved.base_model, "settings": saved.settings}
    write_adapter(folder, tensors, {**config, "tied": saved.tied, "deltaw_version": __version__}, metadata)


def write_adapter(folder: Path, tensors: Tensors, config: Mapping[str, object], metadata: Mapping[str, str]) -> None:
    """Write the weights and ``adapter_config.json`` atomically.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lora_files.write_adapter(folder, tensors, config, metadata)
    except OSError as error:
        message = f"the adapter cannot be written: {error.strerror or error}"
        raise UserError(message, location=str(folder), hint="choose a folder that you may write to") from error


def read_config(folder: Path) -> dict[str, object]:
    """Read ``adapter_config.json`` of any method.

    Raises:
        UserError: if it is missing or not a JSON object, or if a link in the folder points outside of it.
    """
    require_contained(folder)
    return lora_files.read_settings(folder / ADAPTER_CONFIG)


def read_trained_parameters(folder: Path, method: str) -> tuple[dict[str, Tensor], SavedConfig]:
    """Read the tensors and settings written by :func:`write_trained_parameters`.

    Raises:
        UserError: if a file is missing or damaged, or was written by another method.
    """
    settings = read_config(folder)
    if settings.get("method") != method:
        message = f"its method is {settings.get('method') or settings.get('peft_type')!r}, not '{method}'"
        raise UserError(message, location=str(folder), hint="use the method that it was trained with")
    tensors, _ = lora_files.read_tensors(folder)
    tied = _mapping(settings.get("tied"))
    saved = SavedConfig(
        method,
        text_or_none(settings.get("base_model_name_or_path")),
        dict(_mapping(settings.get("settings"))),
        {name: [str(other) for other in aliases] for name, aliases in tied.items() if isinstance(aliases, list)},
    )
    return tensors, saved


def read_metadata(folder: Path) -> dict[str, str]:
    """Return the metadata of the weights file in an adapter's folder. Empty if the file does not exist.

    Raises:
        UserError: if the weights cannot be read.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return {}  # loading the adapter reports the missing file
    with _open_weights(path) as file:
        return dict(file.metadata() or {})


def read_classes(folder: Path) -> tuple[str, ...] | None:
    """Return the class names that an adapter was trained for, or None if it is not a classifier.

    Raises:
        UserError: if the weights cannot be read.
    """
    text = read_metadata(folder).get(CLASSES_KEY)
    try:
        names = None if text is None else json.loads(text)
    except ValueError as error:
        raise _unreadable_error(folder / ADAPTER_WEIGHTS, error) from error
    return tuple(str(name) for name in names) if isinstance(names, list) else None


def read_num_outputs(folder: Path) -> int | None:
    """Return the number of outputs of an adapter's classification head, or None if it has no head.

    Raises:
        UserError: if the weights cannot be read.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return None  # loading the adapter reports the missing file
    with _open_weights(path) as file:
        names = [name for name in file.keys() if name.endswith(_HEAD_WEIGHTS)]  # noqa: SIM118
        return int(file.get_slice(names[-1]).get_shape()[0]) if names else None


@contextlib.contextmanager
def _open_weights(path: Path) -> Iterator[Any]:
    """Open a weights file and convert errors to UserError."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable_error(path, error) from error


def text_or_none(value: object) -> str | None:
    """Return ``value`` if it is a string, else None."""
    return value if isinstance(value, str) else None


def _unreadable_error(path: Path, error: Exception) -> UserError:
    message = f"the adapter's weights are damaged or cannot be read: {error}"
    return UserError(message, location=str(path), hint="save or copy it again")


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


class RunSettings(Protocol):
    """The settings of a run that are read here. They also have an attribute for each method's section."""

    @property
    def method(self) -> str: ...

    @property
    def train(self) -> MethodOptions: ...


def choose_method(settings: RunSettings, tokenizer: PreTrainedTokenizerBase | None) -> Method:
    """Create the method named by ``settings.method``, with its section."""
    entry = method_registry.entry_of(settings.method)
    section = None if entry.settings is None else getattr(settings, entry.name)
    method: type[Method] = entry.load()
    return method.from_run(section, settings.train, tokenizer)


def stored_names(folder: Path) -> list[str]:
    """Return the names of the tensors of an adapter."""
    return list(read_header(folder / ADAPTER_WEIGHTS))


def method_from_folder(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Method:
    """Create the method that an adapter's folder was trained with, with default settings, to load the folder.

    Raises:
        UserError: if the config cannot be read or names an unknown method.
    """
    config = read_config(folder)
    kind = config.get("peft_type") or config.get("method")
    if (entry := method_registry.entry_of_adapter(kind)) is None:
        hint = "use a LoRA or prompt-tuning adapter, or install the package that provides this method"
        raise UserError(f"the adapter has the unknown type {kind!r}", location=str(folder / ADAPTER_CONFIG), hint=hint)
    method: type[Method] = entry.load()
    return method.from_run(None, None, tokenizer)
