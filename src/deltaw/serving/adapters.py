"""Adapters that an engine writes with: what it asks of whoever keeps them, and how a folder becomes one.

Knows packed adapters, folders and one base model, which it does not change; not which adapters are in memory, nor
how a step computes.
"""

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

from deltaw import tasks
from deltaw.contained import require_contained
from deltaw.data.chat_template import read_chat_template
from deltaw.errors import UserError, did_you_mean
from deltaw.hub.terminators import terminators
from deltaw.kernels.decode import PackedAdapter
from deltaw.lora.attachment import attachment
from deltaw.lora.factors import AdapterFactors, Factors, read_factors
from deltaw.lora.files import PICKLED_NAME, read_settings
from deltaw.lora.fingerprint import FINGERPRINT_KEY, base_fingerprint, same_base
from deltaw.lora.stored import weight_shape
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltaw.methods.files import metadata_of, method_of_folder, text_or_none
from deltaw.methods.prompt import read_prompt
from deltaw.runtime.virtual_tokens import input_embedding
from deltaw.serving.request import UnknownAdapterError
from deltaw.settings import RunConfig
from deltaw.training.origin import CHAT_TEMPLATE, read_folder


@dataclass(frozen=True)
class FolderState:
    """The two files of an adapter at one moment.

    Attributes:
        stat: what the file system says of each: size, time of the last change, inode.
        digest: of their content.
    """

    stat: tuple[tuple[int, ...], ...] = ()
    digest: str = ""


@dataclass(frozen=True, eq=False)
class AdapterFacts:
    """What is known of an adapter without its weights.

    Attributes:
        virtual_tokens: positions that its soft prompt takes before each prompt.
        invocation: tokens from whose last occurrence in a prompt on its update acts; None where it acts on
            all tokens.
        terminators: tokens that end its texts.
        folder: where it was read, if it was. state: of its files then.
        tokenizer: the base's, with the chat template that was saved with the adapter; None without one.
        config: the run's settings; None where no run of deltaw's made it.
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
    """An adapter in memory.

    Attributes:
        number: names these weights; at least 1, and no other ones ever get it.
        packed: its low-rank update; None where it has none.
        soft_prompt: (k, D) fp32, what stands in for embeddings of k tokens before each prompt; None without.
    """

    number: int
    facts: AdapterFacts
    packed: PackedAdapter | None = None
    soft_prompt: Tensor | None = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        """Of its weights."""
        factors = 0 if self.packed is None else self.packed.bytes
        return factors + (0 if self.soft_prompt is None else self.soft_prompt.nbytes)


class Adapters(Protocol):
    """Keeps adapters by name. May be called from any thread."""

    @property
    def loaded(self) -> int:
        """How many adapters are in memory."""

    def names(self) -> tuple[str, ...]:
        """The names that a request may give."""

    def facts(self, name: str) -> AdapterFacts:
        """What is known of an adapter.

        Raises:
            UserError: there is none of this name.
        """

    def acquire(self, name: str) -> ActiveAdapter | None:
        """The adapter, which stays in memory until it is released; None where there is no room for it before
        others are released.

        Raises:
            UserError: there is none of this name, or it cannot be loaded.
        """

    def release(self, adapter: ActiveAdapter) -> None:
        """Note that a text which :meth:`acquire` was called for does not need it any more."""

    def close(self) -> None:
        """Load no more of them."""


class FixedAdapters:
    """Adapters that are in memory all the time, such as the one that a run was opened with."""

    def __init__(self, by_name: dict[str, ActiveAdapter] | None = None) -> None:
        self._by_name = dict(by_name or {})
        self.loaded = len(self._by_name)

    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def facts(self, name: str) -> AdapterFacts:
        return self.acquire(name).facts

    def acquire(self, name: str) -> ActiveAdapter:
        if name not in self._by_name:
            raise no_adapter(name, self.names())
        return self._by_name[name]

    def release(self, adapter: ActiveAdapter) -> None:
        """Nothing to do: it stays."""

    def close(self) -> None:
        """Nothing to do: none is loaded."""


def no_adapter(name: str, names: Iterable[str]) -> UnknownAdapterError:
    """The error of a name that no adapter has."""
    return UnknownAdapterError(f"there is no adapter '{name}'", where=name, hint=did_you_mean(name, names))


_OWN_BASE = "serve it on the base model that it was trained on"


@dataclass(frozen=True)
class AdapterParts:
    """An adapter as it was read.

    Attributes:
        layers: factors by the names of the base's layers.
        prompt: (k, D) fp32, rows put before each prompt, as the embedding's outputs; None without a soft
            prompt.
    """

    facts: AdapterFacts
    layers: Mapping[str, Factors]
    prompt: Tensor | None


class FolderReader:
    """Reads adapters for one base model.

    An adapter can be served on a base that others use as well if it leaves the base's weights alone: low-rank
    factors of linear layers, with or without an invocation sequence, and soft prompts. Everything else is refused,
    and the refusal names it. The chat template, the terminators and the settings that were saved with the adapter
    come along.

    Args:
        model: the base; it is looked at and never changed.
        tokenizer: of the base; None for a model without one.

    Raises:
        UserError: an adapter is on the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if attachment(model) is not None:
            raise UserError("the base model has an adapter on it", hint="detach it, and add its folder to the bank")
        self._model, self._tokenizer = model, tokenizer
        self._fingerprint = base_fingerprint(model)
        self._terminators = terminators(model, tokenizer)

    def read(self, folder: Path, known: FolderState | None = None) -> AdapterParts:
        """The adapter in ``folder``.

        Args:
            known: the state of its files when they were read before. Where the file system says that they are
                the same, their content is not gone through for a digest again.

        Raises:
            UserError: it is no adapter of this base, or more than what can be put on a row.
        """
        refuse_missing(folder)
        before = known if known is not None and known.stat == stat_of(folder) else state_of(folder)
        found = read_folder(folder, trust_remote_code=None)
        as_a_model = f"serve it as a model of its own: deltaw serve {folder}"
        if not tasks.entry_of(found.task).writes_text:
            raise _unfit(folder, f"it is an adapter for {found.task}, and the base here writes text", as_a_model)
        name = method_of_folder(folder, self._tokenizer).name
        if name not in ("lora", "prompt"):
            what = f"its method '{name}' trains the base model's own weights, which other requests use as well"
            raise _unfit(folder, what, as_a_model)
        factors, prompt = (self._factors(folder), None) if name == "lora" else (None, self._prompt(folder))
        if stat_of(folder) != before.stat:
            raise _unfit(folder, "the adapter's files change while they are read", "add it again when they are written")
        invoked = None if factors is None else factors.config.invocation_tokens
        invocation = tuple(invoked) if isinstance(invoked, list) else None
        tokenizer, virtual = self._own_tokenizer(folder), 0 if prompt is None else len(prompt)
        ends = self._ends(folder, tokenizer)
        facts = AdapterFacts(virtual, invocation, ends, folder, before, tokenizer, found.run)
        return AdapterParts(facts, {} if factors is None else factors.layers, prompt)

    def _factors(self, folder: Path) -> AdapterFactors:
        factors = read_factors(self._model, folder)
        self._refuse_base(folder, factors.metadata, factors.metadata.get("base_model_name_or_path"))
        return factors

    def _refuse_base(self, folder: Path, metadata: Mapping[str, str], named: str | None) -> None:
        if same_base(metadata.get(FINGERPRINT_KEY), self._fingerprint) is False:
            raise _unfit(folder, "it was trained on another base model" + (f": {named}" if named else ""), _OWN_BASE)

    def _prompt(self, folder: Path) -> Tensor:
        file = read_prompt(folder)
        if file.whole:
            names = ", ".join(sorted(file.whole_modules or file.whole))
            hint = "merge it into a model of its own: deltaw merge"
            raise _unfit(folder, f"it has modules trained in full: {names}", hint)
        width, shape = weight_shape(input_embedding(self._model))[1], tuple(file.prompt.shape)
        if len(shape) != 2 or shape[1] != width:
            what = f"the soft prompt is {shape}, and the model's embedding is {width} wide"
            raise _unfit(folder, what, _OWN_BASE)
        prompt = file.prompt.to(torch.float32, copy=True).contiguous()
        if not bool(torch.isfinite(prompt).all()):
            raise _unfit(folder, "the soft prompt has values that are not finite", "take an earlier checkpoint of it")
        self._refuse_base(folder, metadata_of(folder), file.base_model)
        return prompt

    def _own_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase | None:
        """The base's tokenizer with the chat template in the folder, where there is one."""
        if self._tokenizer is None:
            return None
        template = _template_in(folder)
        if template is None or template == self._tokenizer.chat_template:
            return self._tokenizer
        changed = copy.copy(self._tokenizer)
        changed.chat_template = template
        return changed

    def _ends(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
        """The terminators that a generation configuration in the folder declares, else the base's."""
        path = folder / "generation_config.json"
        declared = read_settings(path).get("eos_token_id") if path.is_file() else None
        if declared is None:
            return tuple(self._terminators)
        ids = declared if isinstance(declared, list) else [declared]
        rows = weight_shape(input_embedding(self._model))[0]
        if not all(isinstance(number, int) and 0 <= number < rows for number in ids):
            raise _unfit(path, f"its terminators {ids} are no tokens of the base model", "correct eos_token_id")
        return tuple(sorted({*ids, *terminators(None, tokenizer)}))


def _unfit(where: Path, what: str, hint: str) -> UserError:
    return UserError(what, where=str(where), hint=hint)


def refuse_missing(folder: Path) -> None:
    """Raise a UserError where a folder is no adapter's: what is missing, pickled, or a link out of it."""
    if not folder.is_dir():
        raise UserError(f"there is no adapter folder '{folder}'", hint="name a folder on this machine")
    require_contained(folder)
    config, weights = _files(folder)
    if not config.is_file():
        raise _unfit(folder, f"the folder has no {ADAPTER_CONFIG}", "name the folder that an adapter was saved in")
    if not weights.is_file() and (folder / PICKLED_NAME).exists():
        what = f"the adapter is in {PICKLED_NAME}, a pickle, which could run any code and is not read"
        raise _unfit(folder / PICKLED_NAME, what, f"ask its author to save it again as {ADAPTER_WEIGHTS}")
    if not weights.is_file():
        raise _unfit(folder, f"the folder has no {ADAPTER_WEIGHTS}", "copy or download it again")


def state_of(folder: Path) -> FolderState:
    """The state of an adapter's files.

    Raises:
        UserError: the folder or a file is missing.
    """
    digest = hashlib.sha256()
    for path in _files(folder):
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            what = f"{path.name} cannot be read: {error.strerror or error}"
            raise _unfit(folder, what, "save or copy the adapter again") from error
        digest.update(b"\0")
    return FolderState(stat_of(folder), digest.hexdigest())


def stat_of(folder: Path) -> tuple[tuple[int, ...], ...]:
    """What the file system says of an adapter's files; nothing of a file that is not there."""
    found = []
    for path in _files(folder):
        try:
            stat = path.stat()
        except OSError:
            continue
        found.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return tuple(found)


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS


def _template_in(folder: Path) -> str | None:
    """The chat template that stands in a folder, in a file of its own or among the tokenizer's settings."""
    if (folder / CHAT_TEMPLATE).is_file():
        return read_chat_template(str(folder / CHAT_TEMPLATE))
    settings = folder / "tokenizer_config.json"
    template = read_settings(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return text_or_none(template)
