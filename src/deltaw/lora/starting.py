"""Attach an adapter with trainable parameters that start at the values of saved adapters.

The new adapter may have a higher rank than the saved one: the additional directions have B = 0, so they do not change
the outputs. Several saved adapters are concatenated: their weighted sum is exact, and their ranks add up.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.lora.adapt import Summary, attach_selected, detach
from deltaw.lora.attachment import require_attachment
from deltaw.lora.config import CHANGING_INITS, LoRAConfig, scaling
from deltaw.lora.files import (
    AdapterFile,
    AdapterTensors,
    fill,
    stored_rank,
    stored_selection,
    task_type_of,
    unsupported_reason,
    with_model_names,
    write_adapter,
)
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_format import FilePaths, adapter_settings, factor_module, tensor_names
from deltaw.lora.select import Selection, select, unique_modules, values_by_pattern
from deltaw.tensor_files import has_values

# Settings that select modules. A file contains the modules by name, so settings are compared by the selected modules.
TARGET_KEYS = ("target_modules", "exclude_modules", "layers", "train_modules")
_FACTOR_A = re.compile(r"\.lora_(A\.weight|embedding_A)$")
_FACTOR_B = re.compile(r"\.lora_(B\.weight|embedding_B)$")


def check_factors(adapter: AdapterFile, location: str) -> None:
    """Check the shapes and types of low-rank factors, without reading their values.

    Args:
        adapter: Adapter, possibly with fake tensors.
        location: Setting, for messages.

    Raises:
        UserError: if a factor is missing, or the shapes of a pair do not belong together.
    """
    config = adapter.config

    def damaged(problem: str) -> UserError:
        return UserError(f"the adapter is damaged: {problem}", location=location, hint="copy the adapter again")

    if config.rank < 1:
        raise damaged(f"its rank is {config.rank}")
    names = {name: str(factor_module(name)) for name in adapter.tensors if _FACTOR_A.search(name)}
    if not names:
        raise damaged("it has no low-rank factors")
    ranks = values_by_pattern("rank_pattern", config.rank_pattern, names.values())
    for name, module in names.items():
        factor_A = adapter.tensors[name]
        factor_B = adapter.tensors.get(_name_of_B(name))
        if factor_B is None:
            raise damaged(f"'{_name_of_B(name)}' is missing")
        shapes = f"{tuple(factor_A.shape)} and {tuple(factor_B.shape)}"
        dimensions = min(factor_A.dim(), factor_B.dim())
        if dimensions < 2 or (dimensions == 2 and factor_A.shape[0] != factor_B.shape[1]):
            raise damaged(f"the factors of '{module}' have the shapes {shapes}")
        expected = ranks.get(module, config.rank)
        is_expert = bool(config.target_parameters)  # the factors of all experts of a parameter are concatenated
        if factor_A.shape[0] != expected and not (is_expert and factor_A.shape[0] % expected == 0):
            raise damaged(f"the factors of '{module}' have rank {factor_A.shape[0]}, and the settings {expected}")
        if not (factor_A.is_floating_point() and factor_B.is_floating_point()):
            raise damaged(f"the factors of '{module}' are of type {factor_A.dtype} and {factor_B.dtype}")
    for name in adapter.tensors:
        if _FACTOR_B.search(name) and name not in {_name_of_B(factor) for factor in names}:
            raise damaged(f"'{name}' has no factor A")


def require_finite(tensors: Mapping[str, Tensor], location: str) -> None:
    """Check that all values of an adapter are finite in fp32.

    Raises:
        UserError: if a value is not.
    """
    for name, tensor in tensors.items():
        if has_values(tensor) and tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            message = f"'{name}' of the adapter has values that are not finite"
            hint = "start from another adapter"
            raise UserError(message, location=location, hint=hint)


def concatenate(adapters: Sequence[AdapterFile], weights: Sequence[float], target: float, location: str) -> AdapterFile:
    """Return the weighted sum of adapters as one adapter with concatenated factors.

    Args:
        adapters: Adapters with low-rank factors only.
        weights: Factor of each adapter's update.
        target: Scaling of the result. It is included in B.
        location: Setting, for messages.

    Raises:
        UserError: if an adapter has other trained parameters, or the adapters belong to different base models.
    """
    factors_A: dict[str, list[Tensor]] = defaultdict(list)
    factors_B: dict[str, list[Tensor]] = defaultdict(list)
    sizes: dict[str, tuple[int, int]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        reason = unsupported_reason(adapter.config)
        if adapter.config.active != "always":
            reason = "it is activated by an invocation sequence"
        if reason is None and any(tensor.dim() > 2 for tensor in adapter.tensors.values()):
            reason = "it adapts convolutions"
        if reason is not None:
            message = f"an adapter cannot be combined with another one: {reason}"
            raise UserError(message, location=location, hint="continue this adapter alone (start_mode: continue)")
        if same_base(adapters[0].metadata.get(FINGERPRINT_KEY), adapter.metadata.get(FINGERPRINT_KEY)) is False:
            message = "the adapters were trained on different base models"
            raise UserError(message, location=location, hint="use adapters of one base model")
        names = {name: str(factor_module(name)) for name in adapter.tensors if _FACTOR_A.search(name)}
        if others := sorted(adapter.tensors.keys() - {*names, *map(_name_of_B, names)}):
            message = f"an adapter cannot be combined with another one: it contains '{others[0]}'"
            raise UserError(message, location=location, hint="continue this adapter alone (start_mode: continue)")
        alphas = values_by_pattern("alpha_pattern", adapter.config.alpha_pattern, names.values())
        for name, module in names.items():
            factor_A = adapter.tensors[name]
            factor_B = adapter.tensors[_name_of_B(name)]
            alpha = alphas.get(module, adapter.config.alpha)
            factor = weight * scaling(factor_A.shape[0], alpha, adapter.config.rslora) / target
            sizes.setdefault(name, (factor_A.shape[1], factor_B.shape[0]))
            if sizes[name] != (factor_A.shape[1], factor_B.shape[0]):
                message = f"the adapters have factors of other layer sizes for '{module}'"
                raise UserError(message, location=location, hint="use adapters of one base model")
            factors_A[name].append(factor_A)
            factors_B[_name_of_B(name)].append(factor_B * factor)
    tensors = {name: torch.cat(parts, dim=0) for name, parts in factors_A.items()}
    tensors |= {name: torch.cat(parts, dim=1) for name, parts in factors_B.items()}
    rank = max((tensors[name].shape[0] for name in factors_A), default=1)
    modules = "|".join(re.escape(str(factor_module(name))) for name in sorted(factors_A))
    config = LoRAConfig(
        rank=rank, alpha=target * rank, target_modules=modules or [], dropout=adapters[0].config.dropout
    )
    return AdapterFile(config, tensors, adapters[0].metadata)


def _name_of_B(name: str) -> str:
    return _FACTOR_A.sub(lambda match: f".lora_{match[1].replace('A', 'B')}", name)


def padded_alpha(config: LoRAConfig, rank: int) -> float:
    """Return the alpha with which an adapter of another rank has exactly the same scaling.

    Raises:
        UserError: if no such alpha exists.
    """
    exact = scaling(config.rank, config.alpha, config.rslora)
    estimate = exact / scaling(rank, 1.0, config.rslora)
    for alpha in (estimate, math.nextafter(estimate, 0.0), math.nextafter(estimate, math.inf)):
        if scaling(rank, alpha, config.rslora) == exact:
            return alpha
    message = f"rank {rank} has no alpha with the scaling {exact:g} of the adapter's rank {config.rank}"
    raise UserError(message, location="lora.rank", hint=f"use a multiple of {config.rank}")


def attach_from(
    model: nn.Module,
    adapter: AdapterFile,
    config: LoRAConfig,
    location: str,
    *,
    seed: int,
    new_modules: Sequence[str] = (),
) -> tuple[Summary, dict[str, int]]:
    """Attach a trainable adapter that starts with the values of ``adapter``.

    Args:
        model: Base model of the adapter.
        adapter: Adapter to start from.
        config: Settings of the new adapter. Only rank, alpha and dropout may differ, and the target settings if they
            select the same modules.
        location: File of the adapter, for messages.
        seed: Seed of the additional directions.
        new_modules: Modules to train in full that the adapter does not contain, such as a new classifier.

    Returns:
        Summary of the attachment, and the number of directions of ``adapter`` by layer.

    Raises:
        UserError: if the adapter does not fit the model or the settings.
    """
    adapter = with_model_names(model, adapter, location)
    unchanged = {key: getattr(adapter.config, key) for key in TARGET_KEYS}
    fitted = adapter._replace(config=replace(config, **unchanged))
    selection = stored_selection(model, fitted, location)
    if any(getattr(config, key) != value for key, value in unchanged.items()):
        _require_same_modules(select(model, config), selection, new_modules)
    present = {name for module in selection.extra_modules for name in module.names}
    added = [m for m in unique_modules(model) if m.names[0] in set(new_modules) - present]
    selection.extra_modules.extend(added)
    if config.rank > adapter.config.rank and (selection.parameters or config.init in CHANGING_INITS):
        reason = "parameters of experts" if selection.parameters else f"an adapter of init {config.init}"
        message = f"the rank of {reason} cannot be raised from {adapter.config.rank} to {config.rank}"
        raise UserError(message, location="lora.rank", hint="remove lora.rank to keep the adapter's")
    summary = attach_selected(model, fitted.config, selection, seed=seed)
    record = require_attachment(model)
    ranks: dict[str, int] = {}
    try:
        names = [module.names[0] for module in added]
        fill(model, record, fitted, location, pad=True, new_modules=names)
        paths = FilePaths(record)
        for name, layer in record.adapted():
            key = next(key for key, attribute in tensor_names(paths.of_layer(name), layer) if attribute == "lora_A")
            ranks[name] = stored_rank(layer, "lora_A", adapter.tensors[key]) or layer.rank
    except BaseException:
        detach(model)
        raise
    return summary, ranks


def _require_same_modules(wanted: Selection, stored: Selection, new_modules: Sequence[str]) -> None:
    """Reject target settings that select other modules than those of the adapter."""
    for key, attribute in (("target_modules", "targets"), ("train_modules", "extra_modules")):
        names = [{part.names[0] for part in getattr(group, attribute)} for group in (wanted, stored)]
        if difference := sorted((names[0] ^ names[1]) - set(new_modules)):
            owner = "settings select" if difference[0] in names[0] else "adapter of start_from has"
            message = f"the {owner} '{difference[0]}', which the other does not: {len(difference)} modules differ"
            hint = f"remove lora.{key}, lora.exclude_modules and lora.layers to use the adapter's modules"
            raise UserError(message, location=f"lora.{key}", hint=hint)


def save_new_directions(model: nn.Module, folder: Path, rank: int, *, base_model: str) -> None:
    """Save the adapter without its first ``rank`` directions, as a separate adapter."""
    record = require_attachment(model)
    parts = {}
    for key, value in AdapterTensors(record).items():
        is_factor_B = _FACTOR_A.search(key.replace("_B", "_A"))
        parts[key] = value[rank:] if _FACTOR_A.search(key) else value[:, rank:] if is_factor_B else value
    config = record.config
    new_rank = record.config.rank - rank
    settings = adapter_settings(model, record, base_model, task_type_of(model))
    settings |= {"r": new_rank, "lora_alpha": scaling(config.rank, config.alpha) * new_rank}
    fingerprint = {FINGERPRINT_KEY: record.fingerprint} if record.fingerprint else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, {key: value.contiguous() for key, value in parts.items()}, settings, fingerprint)
