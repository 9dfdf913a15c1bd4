"""Adapters that a run starts from (``start_from``): reading them, checking them, and deriving the settings of the run.

:func:`open_start` and :func:`resolve_start` run before weights of the base model are loaded. The trust rules are those
of other folders (:mod:`deltaw.methods.trust`): a start adapter is only read, and references in it are not followed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError, clean
from deltaw.hub.folders import adapter_folder
from deltaw.hub.outside_references import read_json_object
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.lora.config import LoRAConfig, scaling
from deltaw.lora.files import AdapterFile, find_weights, read_adapter, unsupported_reason
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_format import base_reference
from deltaw.lora.starting import TARGET_KEYS, check_factors, concatenate, padded_alpha, require_finite
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, REPLACED_KEY
from deltaw.methods.files import read_classes, read_metadata
from deltaw.methods.trust import CHAT_TEMPLATE, AdapterFolder, read_folder
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings import method_registry, task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.start import start_sources
from deltaw.tensor_files import read_header

# Maximum number of earlier runs, and of adapters of each, that are recorded.
_MAX_ORIGINS = 16
_LOCATION = "start_from"
# Settings that are not compared with those of the folder. Targets are compared by the modules that they select.
_FROM_FOLDER = (*TARGET_KEYS, "init", "invocation_tokens")


@dataclass(frozen=True)
class StartAdapter:
    """The adapters of ``start_from``.

    Attributes:
        sources: Content of each folder.
        weights: Factor of each adapter's update.
        is_stacked: True if the adapters are frozen and a new one is trained on top.
        keeps_new: True if the new adapter is also saved separately.
        fingerprint: Digest of the adapters' files, weights and mode.
        checks_base: False if the run loads the base model with another head, so that fingerprints differ.
    """

    sources: tuple[AdapterFolder, ...]
    weights: tuple[float, ...]
    is_stacked: bool
    keeps_new: bool
    fingerprint: str
    checks_base: bool

    @property
    def folder(self) -> Path:
        """Folder of the first adapter."""
        return self.sources[0].folder

    @property
    def location(self) -> str:
        """Folders for messages."""
        return f"{_LOCATION}: {', '.join(str(source.folder) for source in self.sources)}"

    @property
    def is_combined(self) -> bool:
        """True if the update is not that of a single adapter with weight 1."""
        return len(self.sources) > 1 or self.weights != (1.0,)

    @property
    def needs_sum(self) -> bool:
        """True if the factors of the run are concatenated from those of the adapters."""
        return self.is_stacked or self.is_combined

    @property
    def has_modules(self) -> bool:
        """True if an adapter contains modules that were trained in full, which its fingerprint excludes."""
        return any(
            source.adapter.get("modules_to_save") or read_metadata(source.folder).get(REPLACED_KEY, "[]") != "[]"
            for source in self.sources
        )

    def read_files(self, *, dry_run: bool) -> list[AdapterFile]:
        """Read the LoRA adapters.

        Args:
            dry_run: Return tensors without the values of the files.
        """
        files = [read_adapter(source.folder, lazy=True) for source in self.sources]
        if not dry_run:
            return files
        headers = [read_header(find_weights(source.folder)) for source in self.sources]
        shapes = [{name: torch.empty(t.shape, dtype=t.dtype) for name, t in header.items()} for header in headers]
        return [file._replace(tensors=tensors) for file, tensors in zip(files, shapes, strict=True)]

    def lora(self, config: LoRAConfig, *, dry_run: bool = False) -> tuple[AdapterFile, LoRAConfig]:
        """Return the LoRA adapter to start from, and the settings of the run's adapter.

        Args:
            config: The run's ``lora:`` section, see :func:`resolve_start`.
            dry_run: Return tensors for a dry run, which reads no values.
        """
        files = self.read_files(dry_run=dry_run)
        file, config = self._combined(files, config)
        if not dry_run:
            require_finite(file.tensors, self.location)
        return file, config

    def _combined(self, files: list[AdapterFile], config: LoRAConfig) -> tuple[AdapterFile, LoRAConfig]:
        if self.is_stacked:
            rank = config.rank + _total_rank([file.config for file in files])
            factor = scaling(config.rank, config.alpha, config.rslora)
            config = replace(config, rank=rank, alpha=factor * rank, rslora=False, init="uniform")
            return concatenate(files, self.weights, scaling(rank, config.alpha), self.location), config
        if not self.is_combined:
            return files[0], config
        target = scaling(config.rank, config.alpha, config.rslora)
        return concatenate(files, self.weights, target, self.location), config

    def require_base(self, fingerprint: str | None) -> None:
        """Check the fingerprint of the loaded base model.

        Raises:
            UserError: if an adapter was trained on another base model.
        """
        for source in self.sources if self.checks_base else ():
            if same_base(read_metadata(source.folder).get(FINGERPRINT_KEY), fingerprint) is False:
                raise _other_base_error(source, "the weights of 'model'")

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None, *, has_template: bool) -> None:
        """Check that the run has the tokenizer and the chat template of the adapters.

        Args:
            tokenizer: Tokenizer of the run, or None.
            has_template: True if the user set a chat template for this run.

        Raises:
            UserError: if they differ.
        """
        for source in self.sources if tokenizer is not None else ():
            assert tokenizer is not None
            if not (source.folder / "tokenizer_config.json").is_file():
                continue
            stored = load_tokenizer(str(source.folder), log=ignore_line, trust_remote_code=False)
            if stored.get_vocab() != tokenizer.get_vocab():
                message = f"the adapter was trained with another tokenizer than that of the model: {source.folder}"
                raise UserError(message, location=_LOCATION, hint="use the base model that it was trained on")
            template = source.folder / CHAT_TEMPLATE
            text = template.read_text(encoding="utf-8") if template.is_file() else stored.chat_template
            if not has_template and text and text != tokenizer.chat_template:
                message = f"the adapter was trained with another chat template: {source.folder}"
                hint = f"choose one: --data.chat_template {template if template.is_file() else 'FILE'}"
                raise UserError(message, location=_LOCATION, hint=hint)

    def require_classes(self, classes: tuple[str, ...] | None) -> None:
        """Check that a classifier continues with the same classes in the same order."""
        stored = read_classes(self.folder)
        if stored is not None and classes is not None and stored != tuple(classes):
            message = f"the adapter has the classes {', '.join(stored)}; the rows have {', '.join(classes)}"
            raise UserError(message, location=_LOCATION, hint=f"set data.classes: [{', '.join(stored)}]")

    def lineage(self, config: RunConfig) -> dict[str, Any]:
        """Return the origin of the run for ``run.json``: adapters, their settings, and their origins."""
        adapters = []
        for source, weight in zip(self.sources, self.weights, strict=True):
            values = {"name": source.folder.resolve().name, "folder": str(source.folder), "weight": weight}
            values |= {"fingerprint": adapter_digest(source.folder), "task": source.task}
            settings = {} if source.run is None else source.run.train.model_dump(mode="json", exclude_defaults=True)
            adapters.append({**values, "settings": settings, "start": read_lineage(source.folder)})
        return {"mode": config.start_mode, "fingerprint": self.fingerprint, "adapters": adapters}


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """Return the origin that a run recorded in its folder, or None. The folder may be untrusted."""
    return _known_lineage(read_json_object(folder / "run.json").get("start"), _MAX_ORIGINS)


def _known_lineage(value: Any, depth: int) -> dict[str, Any] | None:
    """Return the known entries of a lineage, up to a depth. Only the first adapter's earlier runs are included."""
    if not isinstance(value, dict) or not depth or not isinstance(value.get("adapters"), list):
        return None
    adapters = [entry for entry in value["adapters"][:_MAX_ORIGINS] if isinstance(entry, dict)]
    keys = ("name", "weight", "fingerprint", "task")
    known: list[dict[str, Any]] = [{key: _short_text(entry.get(key)) for key in keys} for entry in adapters]
    for entry, origin in zip(adapters, known, strict=True):
        origin["start"] = _known_lineage(entry.get("start"), depth - 1) if origin is known[0] else None
    return {"mode": _short_text(value.get("mode")), "adapters": known}


def _short_text(value: object) -> str:
    """Return one line of an untrusted value, without control characters."""
    return clean(" ".join(str(value)[:200].split()))


def lineage_lines(lineage: Mapping[str, Any] | None) -> list[str]:
    """Return a line per generation of earlier runs, the latest first, following the first adapter of each."""
    lines: list[str] = []
    while lineage is not None and lineage["adapters"]:
        parts = []
        for adapter in lineage["adapters"]:
            weight = "" if str(adapter["weight"]) == "1.0" else f" × {adapter['weight']}"
            parts.append(f"{adapter['name']}{weight} ({adapter['task']}, {adapter['fingerprint'][:12]})")
        earlier = "before that, " if lines else ""
        lines.append(f"{earlier}{lineage['mode']} from {' + '.join(parts)}")
        lineage = lineage["adapters"][0]["start"]
    return lines


def adapter_digest(folder: Path) -> str:
    """Return a digest of an adapter's two files."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def open_start(config: RunConfig) -> StartAdapter | None:
    """Return the adapters that a run starts from, or None.

    Raises:
        UserError: if a folder is missing, is not an adapter of the run's method, or belongs to another base model.
    """
    if config.start_from is None:
        return None
    sources = []
    for source in (listed := start_sources(config.start_from)):
        folder = Path(os.path.expanduser(adapter_folder(source.reference)))
        if not folder.is_dir():
            message = f"there is no folder '{source.reference}' to start from"
            raise UserError(message, location=_LOCATION, hint="give the folder of a run or an adapter, or a hub id")
        opened = read_folder(folder, trust_remote_code=None)
        weights_file = find_weights(folder)  # reports missing weights
        _check_kind(opened, config)
        if config.method == "lora":
            with torch.device("meta"):
                header = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in read_header(weights_file).items()}
            stored = read_adapter(folder, lazy=True)._replace(tensors=header)
            check_factors(stored, f"{_LOCATION}: {folder}")
        sources.append(opened)
    weights = tuple(float(source.weight) for source in listed)
    values = repr([config.start_mode, weights, [adapter_digest(source.folder) for source in sources]])
    fingerprint = hashlib.blake2b(values.encode(), digest_size=16).hexdigest()
    models = {task_registry.entry_of(name).auto_model for name in (config.task, *(source.task for source in sources))}
    start = StartAdapter(
        tuple(sources),
        weights,
        is_stacked=config.start_mode == "stack",
        keeps_new=config.stack == "keep",
        fingerprint=fingerprint,
        checks_base=len(models) == 1,
    )
    if config.method != "lora" and start.needs_sum:
        message = f"method '{config.method}' can only continue a single adapter"
        raise UserError(message, location=_LOCATION, hint="set start_mode: continue, with one adapter of weight 1")
    return start


def _check_kind(source: AdapterFolder, config: RunConfig) -> None:
    """Check method, task and base model of an adapter."""
    kind = source.adapter.get("peft_type") or source.adapter.get("method")
    entry = method_registry.entry_of_adapter(kind)
    location = f"{_LOCATION}: {source.folder}"
    if entry is None:
        message = f"an adapter of the kind {kind!r} is not supported"
        raise UserError(
            message, location=location, hint="use an adapter of deltaw, or of LoRA or prompt tuning in PEFT"
        )
    require_same_kind(entry.name, source.task, config, location)
    stored = base_reference(source.adapter)
    has_fingerprint = FINGERPRINT_KEY in read_metadata(source.folder)
    if stored and not has_fingerprint and Path(stored).name.lower() != Path(config.model).name.lower():
        raise _other_base_error(source, f"'{config.model}'")


def require_same_kind(method: str, task: str, config: RunConfig, location: str) -> None:
    """Check that a run can start from an adapter of this method and task.

    Raises:
        UserError: if it is of another method, or of a task with another head.
    """
    if method != config.method:
        message = f"the adapter is of method '{method}', and the run is of method '{config.method}'"
        raise UserError(message, location=location, hint=f"set method: {method}")
    models = [task_registry.entry_of(name).auto_model for name in (task, config.task)]
    if models[0] != models[1] and "AutoModel" in models:
        message = f"the task '{config.task}' cannot start from an adapter of the task '{task}'"
        raise UserError(message, location=location, hint="remove start_from to train a new adapter")


def _other_base_error(source: AdapterFolder, model: str) -> UserError:
    stored = base_reference(source.adapter) or "unknown"
    message = f"the adapter was trained on another base model ({stored}), not on {model}"
    return UserError(message, location=f"{_LOCATION}: {source.folder}", hint="set model to that base model")


def _total_rank(configs: list[LoRAConfig]) -> int:
    return sum(max([config.rank, *config.rank_pattern.values()]) for config in configs)


def resolve_start(config: RunConfig, log: LogFunction = ignore_line) -> RunConfig:
    """Return the settings of a run, completed with those of the adapters of ``start_from``.

    Applying it again to the result has no effect.

    Raises:
        UserError: if the adapters cannot be used, or a setting contradicts them.
    """
    if (start := open_start(config)) is None:
        return config
    for line in lineage_lines(start.lineage(config)):
        log(line)
    if config.method != "lora":
        return _with_prompt_settings(config, start) if config.method == "prompt" else config
    resolved = _resolve_lora(config, start)
    names = [name for name in ("rank", "alpha", "dropout") if getattr(resolved, name) != getattr(config.lora, name)]
    if names:
        log("from the adapter: " + ", ".join(f"{name} {getattr(resolved, name):g}" for name in names))
    init = "uniform" if start.is_stacked else resolved.init
    if _is_set(config, "lora", "init", init) and config.lora.init != init:
        log(f"lora.init: {config.lora.init} has no effect with start_from")
    return config.model_copy(update={"lora": resolved})


def _with_prompt_settings(config: RunConfig, start: StartAdapter) -> RunConfig:
    length = start.sources[0].adapter.get("num_virtual_tokens")
    if _is_set(config, "prompt", "length", length) and config.prompt.length != length:
        message = f"prompt.length is {config.prompt.length}, and the adapter has {length} vectors"
        raise UserError(message, location="prompt.length", hint="remove it")
    return config.model_copy(update={"prompt": replace(config.prompt, length=length)})


def _is_set(config: RunConfig, section: str, name: str, other: object) -> bool:
    """Return True if the user set a setting of a section, or it has another value than its default."""
    aliases = [alias for alias, key in method_registry.entry_of(section).aliases.items() if key == name]
    is_explicit = any(config.is_explicit(f"{section}.{key}") for key in (name, *aliases))
    values = getattr(config, section)
    return is_explicit or getattr(values, name) not in (getattr(type(values)(), name), other)


def _explicit_settings(config: RunConfig, stored: LoRAConfig) -> set[str]:
    """Return the names in the ``lora:`` section that the user set."""
    names = [field.name for field in dataclasses.fields(stored)]
    return {name for name in names if _is_set(config, "lora", name, getattr(stored, name))}


def _resolve_lora(config: RunConfig, start: StartAdapter) -> LoRAConfig:
    """Return the run's ``lora:`` section: the adapter's settings, and those of the user that may differ."""
    user: LoRAConfig = config.lora
    with torch.device("meta"):  # only the settings are needed
        files = start.read_files(dry_run=True)
        stored = files[0].config
        combined = concatenate(files, start.weights, 1.0, start.location) if start.needs_sum else None
    explicit = _explicit_settings(config, stored)
    if combined is not None:
        reason = unsupported_reason(user)
        if user.rank_pattern or user.alpha_pattern or user.dropout:
            reason = "rank_pattern, alpha_pattern and dropout would also apply to the frozen adapter"
        if start.is_stacked and reason is not None:
            message = f"the new adapter cannot be stacked: {reason}"
            raise UserError(message, location="lora", hint="remove the setting, or set start_mode: continue")
        rank = _total_rank([file.config for file in files])
        stored = replace(combined.config, rank=rank, alpha=float(rank))
        if start.is_stacked:
            targets = {key: getattr(user if key in explicit else stored, key) for key in TARGET_KEYS}
            return replace(user, **targets)
    return continue_settings(config, stored, str(start.folder))


def continue_settings(config: RunConfig, stored: LoRAConfig, location: str) -> LoRAConfig:
    """Return the ``lora:`` section of a run that continues an adapter.

    Args:
        config: Settings of the run.
        stored: Settings of the adapter.
        location: Folder of the adapter, for messages.

    Raises:
        UserError: if a setting of the run contradicts the adapter.
    """
    user: LoRAConfig = config.lora
    explicit = _explicit_settings(config, stored)
    for name in sorted(explicit - {*_FROM_FOLDER, "rank", "alpha", "dropout"}):
        if (own := getattr(user, name)) != (value := getattr(stored, name)):
            message = f"lora.{name} is {own!r}, and the adapter was trained with {value!r}"
            raise UserError(message, location=f"lora.{name}", hint=f"remove lora.{name}")
    rank = user.rank if "rank" in explicit else stored.rank
    if rank < stored.rank:
        message = f"lora.rank is {rank}, lower than the adapter's rank {stored.rank}"
        hint = f"remove lora.rank, or lower the rank first: deltaw merge {location} --as-adapter --rank {rank}"
        raise UserError(message, location="lora.rank", hint=hint)
    if rank > stored.rank and (stored.rank_pattern or stored.alpha_pattern):
        message = f"the rank of an adapter with rank_pattern or alpha_pattern cannot be raised to {rank}"
        raise UserError(message, location="lora.rank", hint="remove lora.rank")
    alpha = stored.alpha if rank == stored.rank else padded_alpha(stored, rank)
    if "alpha" in explicit and scaling(rank, user.alpha, stored.rslora) != scaling(rank, alpha, stored.rslora):
        message = f"lora.alpha {user.alpha:g} changes the scaling of the adapter's update"
        raise UserError(message, location="lora.alpha", hint=f"remove it, or set lora.alpha: {alpha:g}")
    changes: dict[str, Any] = {key: getattr(user, key) for key in TARGET_KEYS if key in explicit}
    changes |= {"dropout": user.dropout} if "dropout" in explicit else {}
    return replace(stored, rank=rank, alpha=alpha, **changes)
