"""Adapters of a decoding engine: the interface that provides them, and the reader of adapter folders."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import read_chat_template
from deltaw.decoding.model_decoder import ModelAdapter
from deltaw.decoding.request import UnknownAdapterError
from deltaw.errors import UserError, did_you_mean
from deltaw.hub.terminators import terminators
from deltaw.kernels.decode import PackedAdapter
from deltaw.lora.attachment import get_attachment
from deltaw.lora.files import PICKLED_NAME, AdapterFactors, Factors, read_factors, read_settings
from deltaw.lora.fingerprint import FINGERPRINT_KEY, base_fingerprint, same_base
from deltaw.lora.stored import weight_shape
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltaw.methods.files import method_from_folder, read_metadata, text_or_none
from deltaw.methods.prompt import read_prompt
from deltaw.methods.trust import CHAT_TEMPLATE, read_folder
from deltaw.runtime.virtual_tokens import input_embedding
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.untrusted_paths import require_contained


@dataclass(frozen=True)
class FolderState:
    """State of an adapter's two files at one moment.

    Attributes:
        stat: Size, modification and change times, and inode of each file.
        digest: SHA-256 digest of the contents.
    """

    stat: tuple[tuple[int, ...], ...] = ()
    digest: str = ""


@dataclass(frozen=True, eq=False)
class AdapterInfo:
    """Description of an adapter, without its weights.

    Attributes:
        virtual_tokens: Number of positions that its soft prompt adds before each prompt.
        invocation: Token sequence that activates the adapter. The update acts from the last occurrence in the prompt
            on. None if it acts on all tokens.
        terminators: Tokens that end completions.
        folder: Folder from which it was read.
        state: State of the folder's files when it was read.
        tokenizer: Tokenizer of the base model with the adapter's chat template. None for a model without a tokenizer.
        config: Settings of the run, or None if the adapter was not trained by deltaw.
    """

    virtual_tokens: int = 0
    invocation: tuple[int, ...] | None = None
    terminators: tuple[int, ...] = ()
    folder: Path = Path()
    state: FolderState = FolderState()
    tokenizer: PreTrainedTokenizerBase | None = None
    config: RunConfig | None = None


@dataclass(frozen=True, eq=False)
class ActiveAdapter:
    """Adapter in memory.

    Attributes:
        number: Unique number of these weights, at least 1. It is never reused.
        info: Description of the adapter.
        packed: Low-rank update, or None.
        soft_prompt: (k, D) fp32 embeddings of virtual tokens before each prompt, or None.
    """

    number: int
    info: AdapterInfo
    packed: PackedAdapter | ModelAdapter | None = None
    soft_prompt: Tensor | None = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        factors = 0 if self.packed is None else self.packed.bytes
        return factors + (0 if self.soft_prompt is None else self.soft_prompt.nbytes)


class Adapters(Protocol):
    """Provides adapters by name. All methods are thread-safe."""

    @property
    def loaded(self) -> int:
        """Number of adapters in memory."""

    def names(self) -> tuple[str, ...]:
        """Return the names that requests may use."""

    def info(self, name: str) -> AdapterInfo:
        """Return the description of an adapter.

        Raises:
            UserError: if no adapter has this name.
        """

    def acquire(self, name: str) -> ActiveAdapter | None:
        """Pin an adapter in memory until it is released. Return None if it is not in memory yet.

        Raises:
            UserError: if no adapter has this name, or it cannot be loaded.
        """

    def release(self, adapter: ActiveAdapter) -> None:
        """Unpin an adapter that a request acquired."""

    def close(self) -> None:
        """Stop loading adapters."""


class FixedAdapters:
    """Adapters that are always in memory, for example the adapter of a session."""

    def __init__(self, by_name: dict[str, ActiveAdapter] | None = None) -> None:
        self._by_name = dict(by_name or {})
        self.loaded = len(self._by_name)

    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def info(self, name: str) -> AdapterInfo:
        return self.acquire(name).info

    def acquire(self, name: str) -> ActiveAdapter:
        if name not in self._by_name:
            raise unknown_adapter_error(name, self.names())
        return self._by_name[name]

    def release(self, adapter: ActiveAdapter) -> None:
        """No effect: the adapter remains in memory."""

    def close(self) -> None:
        """No effect: no adapter is being loaded."""


def unknown_adapter_error(name: str, names: Iterable[str]) -> UnknownAdapterError:
    """Return the error for a name that no adapter has."""
    return UnknownAdapterError(f"there is no adapter '{name}'", location=name, hint=did_you_mean(name, names))


_BASE_HINT = "serve it on the base model that it was trained on"


@dataclass(frozen=True)
class AdapterParts:
    """Adapter as read from a folder.

    Attributes:
        info: Description of the adapter.
        layers: Factors by the names of the base model's layers.
        prompt: (k, D) fp32 soft prompt, as outputs of the embedding, or None.
    """

    info: AdapterInfo
    layers: Mapping[str, Factors]
    prompt: Tensor | None


class FolderReader:
    """Reads adapters of one base model.

    Only adapters that leave the base model's weights unchanged can share it with other requests: low-rank factors of
    linear layers, with or without an invocation sequence, and soft prompts. Other adapters are rejected with the
    reason. The chat template, terminators and settings that were saved with the adapter are read too.

    Args:
        model: Base model. It is not modified.
        tokenizer: Tokenizer of the base model, or None.

    Raises:
        UserError: if an adapter is attached to the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if get_attachment(model) is not None:
            raise UserError("an adapter is attached to the base model", hint="detach it and add its folder to the bank")
        self._model = model
        self._tokenizer = tokenizer
        self._fingerprint = base_fingerprint(model)
        self._terminators = terminators(model, tokenizer)

    def read(self, folder: Path, earlier: FolderState | None = None) -> AdapterParts:
        """Read the adapter in ``folder``.

        Args:
            folder: Folder of the adapter.
            earlier: State of the files at an earlier read. If sizes, times and inodes are unchanged, the digest is
                reused.

        Raises:
            UserError: if the folder is not an adapter of this base model, or the adapter is more than factors or a soft
                prompt.
        """
        require_adapter_files(folder)
        before = earlier if earlier is not None and earlier.stat == file_stats(folder) else read_folder_state(folder)
        adapter_folder = read_folder(folder, trust_remote_code=None)
        hint = f"serve it as a separate model: deltaw serve {folder}"
        if not task_registry.entry_of(adapter_folder.task).generates_text:
            raise _adapter_error(folder, f"it is for {adapter_folder.task}, and this base model generates text", hint)
        name = method_from_folder(folder, self._tokenizer).name
        if name not in ("lora", "prompt"):
            hint = f"merge it into a separate model: deltaw merge {folder}"
            raise _adapter_error(folder, f"its method '{name}' changes weights that other requests use", hint)
        factors, prompt = (self._factors(folder), None) if name == "lora" else (None, self._prompt(folder))
        if file_stats(folder) != before.stat:
            raise _adapter_error(folder, "the adapter's files change while they are read", "add it again later")
        invoked = None if factors is None else factors.config.invocation_tokens
        invocation = tuple(invoked) if isinstance(invoked, list) else None
        tokenizer = self._adapter_tokenizer(folder)
        virtual = 0 if prompt is None else len(prompt)
        terminator_ids = self._read_terminators(folder, tokenizer)
        info = AdapterInfo(virtual, invocation, terminator_ids, folder, before, tokenizer, adapter_folder.run)
        return AdapterParts(info, {} if factors is None else factors.layers, prompt)

    def _factors(self, folder: Path) -> AdapterFactors:
        factors = read_factors(self._model, folder)
        self._check_base(folder, factors.metadata, factors.metadata.get("base_model_name_or_path"))
        return factors

    def _check_base(self, folder: Path, metadata: Mapping[str, str], named: str | None) -> None:
        if same_base(metadata.get(FINGERPRINT_KEY), self._fingerprint) is False:
            raise _adapter_error(folder, "trained on another base model" + (f": {named}" if named else ""), _BASE_HINT)

    def _prompt(self, folder: Path) -> Tensor:
        file = read_prompt(folder)
        if file.extra_tensors:
            names = ", ".join(sorted(file.extra_modules or file.extra_tensors))
            raise _adapter_error(folder, f"it has modules trained in full: {names}", "merge it with deltaw merge")
        width = weight_shape(input_embedding(self._model))[1]
        shape = tuple(file.prompt.shape)
        if len(shape) != 2 or shape[1] != width:
            raise _adapter_error(folder, f"the soft prompt is {shape}, but the embedding is {width} wide", _BASE_HINT)
        prompt = file.prompt.to(torch.float32, copy=True).contiguous()
        if not bool(torch.isfinite(prompt).all()):
            raise _adapter_error(folder, "the soft prompt has values that are not finite", "use an earlier checkpoint")
        self._check_base(folder, read_metadata(folder), file.base_model)
        return prompt

    def _adapter_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase | None:
        """Return the base model's tokenizer, with the chat template from the folder if it has one."""
        if self._tokenizer is None:
            return None
        template = _read_template(folder)
        if template is None or template == self._tokenizer.chat_template:
            return self._tokenizer
        changed = copy.copy(self._tokenizer)
        changed.chat_template = template
        return changed

    def _read_terminators(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
        """Return the terminators declared by a generation config in the folder, or the base model's."""
        path = folder / "generation_config.json"
        declared = read_settings(path).get("eos_token_id") if path.is_file() else None
        if declared is None:
            return tuple(self._terminators)
        ids = declared if isinstance(declared, list) else [declared]
        rows = weight_shape(input_embedding(self._model))[0]
        if not all(isinstance(number, int) and 0 <= number < rows for number in ids):
            raise _adapter_error(path, f"its terminators {ids} are not tokens of the base model", "fix eos_token_id")
        return tuple(sorted({*ids, *terminators(None, tokenizer)}))


def _adapter_error(location: Path, message: str, hint: str) -> UserError:
    return UserError(message, location=str(location), hint=hint)


def require_adapter_files(folder: Path) -> None:
    """Check that a folder contains an adapter in safetensors format and no link that leads outside it.

    Raises:
        UserError: if the folder or a file is missing, the weights are pickled, or a link leads outside the folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no adapter folder '{folder}'", hint="specify a folder on this machine")
    require_contained(folder)
    config, weights = _files(folder)
    if not config.is_file():
        raise _adapter_error(folder, f"the folder has no {ADAPTER_CONFIG}", "specify the folder of a saved adapter")
    if not weights.is_file() and (folder / PICKLED_NAME).exists():
        message = f"the adapter is in {PICKLED_NAME}, a pickle, which could run any code and is not read"
        raise _adapter_error(folder / PICKLED_NAME, message, f"ask its author to save it again as {ADAPTER_WEIGHTS}")
    if not weights.is_file():
        raise _adapter_error(folder, f"the folder has no {ADAPTER_WEIGHTS}", "copy or download it again")


def read_folder_state(folder: Path) -> FolderState:
    """Return the state of an adapter's files.

    Raises:
        UserError: if the folder or a file is missing.
    """
    digest = hashlib.sha256()
    for path in _files(folder):
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            message = f"{path.name} cannot be read: {error.strerror or error}"
            raise _adapter_error(folder, message, "save or copy the adapter again") from error
        digest.update(b"\0")
    return FolderState(file_stats(folder), digest.hexdigest())


def file_stats(folder: Path) -> tuple[tuple[int, ...], ...]:
    """Return size, times and inode of an adapter's files, without missing files."""
    stats = []
    for path in _files(folder):
        try:
            stat = path.stat()
        except OSError:
            continue
        stats.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return tuple(stats)


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS


def _read_template(folder: Path) -> str | None:
    """Return the chat template in a folder, from a separate file or from the tokenizer config."""
    if (folder / CHAT_TEMPLATE).is_file():
        return read_chat_template(str(folder / CHAT_TEMPLATE))
    settings = folder / "tokenizer_config.json"
    template = read_settings(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # named templates
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return text_or_none(template)
