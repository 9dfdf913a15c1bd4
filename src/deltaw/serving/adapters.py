"""Adapters that an engine writes with: what it asks of whoever keeps them, and how a folder becomes one.

Knows packed adapters, folders and one base model, which it does not change; not which adapters are in memory, nor
how a step computes.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw import tasks
from deltaw.contained import require_contained
from deltaw.data.chat_template import read_chat_template
from deltaw.errors import UserError
from deltaw.hub.terminators import terminators
from deltaw.kernels.decode import PackedAdapter
from deltaw.lora.attachment import attachment
from deltaw.lora.factors import AdapterFactors, Factors, read_factors
from deltaw.lora.files import PICKLED_NAME
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


@dataclass(frozen=True)
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


class FixedAdapters:
    """Adapters that are in memory all the time, such as the one that a run was opened with."""

    def __init__(self, by_name: dict[str, ActiveAdapter] | None = None) -> None:
        self._by_name = dict(by_name or {})

    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def facts(self, name: str) -> AdapterFacts:
        return self.acquire(name).facts

    def acquire(self, name: str) -> ActiveAdapter:
        found = self._by_name.get(name)
        if found is None:
            raise no_adapter(name, self.names())
        return found

    def release(self, adapter: ActiveAdapter) -> None:
        """Nothing to do: it stays."""


def no_adapter(name: str, names: tuple[str, ...]) -> UnknownAdapterError:
    """The error of a name that no adapter has."""
    known = f"one of {', '.join(names)}" if names else "none: there are no adapters"
    return UnknownAdapterError(f"there is no adapter '{name}'", where="adapter", hint=f"give {known}")


# ---- An adapter's folder as a server reads it: what acts on a row, how it is talked to, and what is refused.
#
# What can be served on a base that others use as well leaves the base's weights alone: low-rank factors of
# linear layers, with or without an invocation sequence, and soft prompts. Everything else is refused, and the
# refusal names it. The chat template, the terminators and the settings that were saved with the adapter come
# along.


_OF_ITS_OWN = "merge it into a model of its own: deltaw merge"
_AS_A_MODEL = "serve it as a model of its own: deltaw serve"
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
        told = tasks.name_of_adapter(found.adapter.get("task_type"))
        task = found.run.task if found.run is not None else told
        if task is not None and not tasks.entry_of(task).writes_text:
            raise UserError(
                f"it is an adapter for {task}, and the base here writes text",
                where=str(folder),
                hint=f"{_AS_A_MODEL} {folder}",
            )
        name = method_of_folder(folder, self._tokenizer).name
        if name == "lora":
            factors, prompt = self._factors(folder), None
        elif name == "prompt":
            factors, prompt = None, self._prompt(folder)
        else:
            raise UserError(
                f"its method '{name}' trains the base model's own weights, which other requests use as well",
                where=str(folder),
                hint=f"{_AS_A_MODEL} {folder}",
            )
        if stat_of(folder) != before.stat:
            raise UserError(
                "the adapter's files change while they are read",
                where=str(folder),
                hint="wait until they are written, and add it again",
            )
        invoked = None if factors is None else factors.config.invocation_tokens
        tokenizer = self._own_tokenizer(folder)
        facts = AdapterFacts(
            virtual_tokens=0 if prompt is None else len(prompt),
            invocation=tuple(invoked) if isinstance(invoked, list) else None,
            terminators=self._ends(folder, tokenizer),
            folder=folder,
            state=before,
            tokenizer=tokenizer,
            config=found.run,
        )
        return AdapterParts(facts, {} if factors is None else factors.layers, prompt)

    def _factors(self, folder: Path) -> AdapterFactors:
        factors = read_factors(self._model, folder)
        self._refuse_base(folder, factors.metadata, factors.metadata.get("base_model_name_or_path"))
        return factors

    def _refuse_base(self, folder: Path, metadata: Mapping[str, str], named: str | None) -> None:
        if same_base(metadata.get(FINGERPRINT_KEY), self._fingerprint) is False:
            raise UserError(
                "it was trained on another base model" + (f": {named}" if named else ""),
                where=str(folder),
                hint=_OWN_BASE,
            )

    def _prompt(self, folder: Path) -> Tensor:
        file = read_prompt(folder)
        if file.whole:
            raise UserError(
                f"it has modules trained in full: {', '.join(sorted(file.whole_modules or file.whole))}",
                where=str(folder),
                hint=_OF_ITS_OWN,
            )
        width = weight_shape(input_embedding(self._model))[1]
        if file.prompt.dim() != 2 or file.prompt.shape[1] != width:
            raise UserError(
                f"the soft prompt is {tuple(file.prompt.shape)}, and the model's embedding is {width} wide",
                where=str(folder),
                hint=_OWN_BASE,
            )
        prompt = file.prompt.to(torch.float32, copy=True).contiguous()
        if not bool(torch.isfinite(prompt).all()):
            raise UserError(
                "the soft prompt has values that are not finite",
                where=str(folder),
                hint="take an earlier checkpoint of it",
            )
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
        declared = _json(folder / "generation_config.json").get("eos_token_id")
        if declared is None:
            return tuple(self._terminators)
        ids = declared if isinstance(declared, list) else [declared]
        rows = weight_shape(input_embedding(self._model))[0]
        if not all(isinstance(number, int) and 0 <= number < rows for number in ids):
            raise UserError(
                f"its terminators {ids} are no tokens of the base model",
                where=str(folder / "generation_config.json"),
                hint="correct eos_token_id",
            )
        return tuple(sorted({*ids, *terminators(None, tokenizer)}))


def refuse_missing(folder: Path) -> None:
    """Raise a UserError where a folder is no adapter's: what is missing, pickled, or a link out of it."""
    if not folder.is_dir():
        raise UserError(f"there is no adapter folder '{folder}'", hint="name a folder on this machine")
    require_contained(folder)
    config, weights = _files(folder)
    if not config.is_file():
        raise UserError(
            f"the folder has no {ADAPTER_CONFIG}",
            where=str(folder),
            hint="name the folder that an adapter was saved in",
        )
    if not weights.is_file():
        if (folder / PICKLED_NAME).exists():
            raise UserError(
                f"the adapter is in {PICKLED_NAME}, a pickle, which could run any code and is not read",
                where=str(folder / PICKLED_NAME),
                hint=f"ask its author to save it again as {ADAPTER_WEIGHTS}",
            )
        raise UserError(f"the folder has no {ADAPTER_WEIGHTS}", where=str(folder), hint="copy or download it again")


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
            raise UserError(
                f"{path.name} cannot be read: {error.strerror or error}",
                where=str(folder),
                hint="save or copy the adapter again",
            ) from error
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
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return text_or_none(template)


def _json(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        UserError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.name} cannot be read: {error}", where=str(path), hint="save or copy the adapter again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} is not a JSON object", where=str(path), hint="copy the adapter again")
    return value
