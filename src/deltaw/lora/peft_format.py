"""Conversion between PEFT's adapter format and deltaw's settings and tensor names.

Converts dictionaries only and reads no files and no weights of a model. Layers have A (in, r) and B (r, out). Files
contain the transposed factors, except for convolutions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.attachment import Attachment
from deltaw.lora.complete_names import NameMap
from deltaw.lora.config import CHANGING_INITS, PEFT_NAMES, LoRAConfig
from deltaw.lora.initialize import from_peft, to_peft
from deltaw.lora.layers import LoRAConv1D, LoRALayer
from deltaw.lora.select import endings, values_by_pattern

# Tensor names in PEFT's files. PEFT nests wrappers, and each adds a part to the names below it.
#
# An adapted layer of deltaw has the name of the layer that it replaces. In PEFT, a wrapper has that name and contains
# the layer as ``base_layer``. This affects tensor names in three cases:
# - a trained bias of an adapted layer,
# - the two projections of ``nn.MultiheadAttention``, of which the second is inside the wrapper of the first, and
# - several adapted parameters of one module, with nested wrappers.


PREFIX = "base_model.model."
_INNER = ".base_layer"


class FilePaths:
    """Names in a file, without their last part, of the trained parts of an attachment."""

    def __init__(self, record: Attachment) -> None:
        self._wrappers = {replacement.names[0]: 1 for replacement in record.layers}
        self._special: dict[str, str] = {}
        self._doubled: set[str] = set()
        by_runner: dict[str, list[str]] = {}
        for update in record.parameters:
            name = update.names[0]
            if not update.is_attention:
                by_runner.setdefault(name, []).append(update.name)
            elif update.layer.owner is update.runner:
                self._wrappers[name] = 1
                self._special[update.name] = name
            else:
                self._wrappers[f"{name}.out_proj"] = 1
                self._special[update.name] = f"{name}.out_proj"
                self._doubled.add(update.name)
        self._depth: dict[str, int] = {}
        for name, updates in by_runner.items():
            self._wrappers[name] = len(updates)
            for depth, update_name in enumerate(reversed(updates)):
                self._special[update_name] = name
                self._depth[update_name] = depth

    def of_layer(self, name: str) -> str:
        """Return the path of the factors of an adapted layer, or of a parameter's update, by its name in the model."""
        return PREFIX + self._nested(self._special.get(name, name)) + _INNER * self._depth.get(name, 0)

    def counts_twice(self, name: str) -> bool:
        """True if PEFT adds this update to its weight twice, as it does for an attention's output projection.

        PEFT's wrapper of ``nn.MultiheadAttention`` merges that update around each forward, and makes the inner wrapper
        merge it again (up to version 0.21.2, see pull request 3774 of its repository). deltaw adds it once, so files
        contain half of this B to make the outputs match.
        """
        return name in self._doubled

    def of_module(self, name: str) -> str:
        """Return the path of a module that is trained in full."""
        return PREFIX + self._nested(name)

    def of_parameter(self, name: str) -> str:
        """Return the full name of a base model's parameter, such as a trained bias."""
        owner, _, attribute = name.rpartition(".")
        if not owner:
            return PREFIX + name
        return f"{PREFIX}{self._nested(owner)}{_INNER * self._wrappers.get(owner, 0)}.{attribute}"

    def _nested(self, name: str) -> str:
        """Insert a part into ``name`` for every wrapper around one of its parent modules."""
        if not self._special:
            return name  # modules below an adapted layer cannot be trained
        parts = name.split(".")
        nested = parts[0]
        for end in range(1, len(parts)):
            nested += _INNER * self._wrappers.get(".".join(parts[:end]), 0) + "." + parts[end]
        return nested


def without_wrappers(name: str) -> str:
    """Return the model's name of a tensor from its name in a file."""
    return name.removeprefix(PREFIX).replace(_INNER, "")


PEFT_FORMAT = "0.21.2"
"""Version of PEFT whose format is written."""

# A hub id with a revision.
_WITH_REVISION = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@(\w[\w./-]*)")

_UNSET = """
    alora_invocation_tokens arrow_config auto_mapping base_model_name_or_path corda_config eva_config
    exclude_modules kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config megatron_config
    modules_to_save monteclora_config revision target_modules target_parameters task_type trainable_token_indices
    use_bdlora velora_config
"""
_OFF = "ensure_weight_tying fan_in_fan_out lora_bias use_dora use_qalora use_rslora"
_SET: dict[str, object] = {
    **dict.fromkeys(_OFF.split(), False),
    "alpha_pattern": {},
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "peft_version": PEFT_FORMAT,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
}
DEFAULTS: dict[str, object] = dict(sorted({**dict.fromkeys(_UNSET.split()), **_SET}.items()))
"""All keys of PEFT's ``adapter_config.json`` with their default values."""

_NAMES = {name: peft_name for peft_name, name in PEFT_NAMES.items()}
_READ = {_NAMES.get(field.name, field.name) for field in fields(LoRAConfig)} & DEFAULTS.keys()
_ORIGIN = """
    auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out inference_mode layers_pattern
    loftq_config lora_ga_config megatron_core peft_type peft_version qalora_group_size revision runtime_config
    task_type
"""
_PROVENANCE_KEYS = frozenset(_ORIGIN.split())
"""Keys about the origin or the initialization of an adapter, which do not affect its computation."""

_READABLE_INITS = ("gaussian", "orthogonal", "eva", *CHANGING_INITS)
"""Initializations that do not change W, and those whose W can be recomputed."""


def adapter_settings(model: nn.Module, record: Attachment, base: str | None, task: str | None) -> dict[str, object]:
    """Return the content of ``adapter_config.json`` for the adapter on ``model``.

    If the initialization changed W, the adapter is saved as a plain adapter of twice the rank (see
    :func:`file_tensors`). Its alpha is 2·alpha, or √2·alpha with rsLoRA, so that the scaling is unchanged.
    """
    config = record.config
    changed = any(layer.changed_init is not None for _, layer in record.adapted())
    rank_factor = 2 if changed else 1
    alpha_factor = (math.sqrt(2) if config.rslora else 2) if changed else 1
    names = [name for name, _ in model.named_modules() if name]
    if getattr(model, "pooler", model) is None:
        names.append("pooler.dense")  # other programs load it, and would adapt it by the last part of its name
    extra_names = [replacement.names[0] for replacement in record.extra_modules]
    mapping = record.complete_names
    patterns: list[Mapping[str, float]] = [config.rank_pattern, config.alpha_pattern]
    if mapping is not None:
        patterns = [_complete_pattern(key, record, mapping) for key in ("rank_pattern", "alpha_pattern")]
    targets = [replacement.names[0] for replacement in record.layers]
    targets += [update.names[0] for update in record.parameters if update.is_attention]
    settings = DEFAULTS | {
        "alora_invocation_tokens": config.invocation_tokens,
        "alpha_pattern": {key: _integer_if_whole(value * alpha_factor) for key, value in patterns[1].items()},
        **base_settings(base),
        "bias": config.bias,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for _, layer in record.adapted()),
        "init_lora_weights": config.init if config.init in ("gaussian", "orthogonal") else True,
        "lora_alpha": _integer_if_whole(config.alpha * alpha_factor),
        "lora_bias": config.lora_bias,
        "lora_dropout": config.dropout,
        "modules_to_save": _extra_entries(names, extra_names) or None,
        "r": config.rank * rank_factor,
        "rank_pattern": {key: int(value) * rank_factor for key, value in patterns[0].items()},
        "target_modules": target_entries(names, list(dict.fromkeys(targets))),
        "target_parameters": config.target_parameters or None,
        "task_type": task,
        "trainable_token_indices": config.trainable_token_indices,
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
    if mapping is not None:
        settings |= _complete_settings(model, record, mapping)
    if task is None:
        kind = type(model)
        settings["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return settings


def _complete_settings(model: nn.Module, record: Attachment, mapping: NameMap) -> dict[str, object]:
    """Return the settings that name modules of a text view, with the names of the complete model."""
    names = [mapping.to_complete(name) for name, _ in model.named_modules()]
    targets = [mapping.to_complete(layer.name) for layer in record.layers]
    tokens = record.config.trainable_token_indices
    if isinstance(tokens, Mapping):
        tokens = {mapping.to_complete(name): ids for name, ids in tokens.items()}
    return {
        "modules_to_save": sorted(mapping.to_complete(extra.name) for extra in record.extra_modules) or None,
        "target_modules": complete_targets(names, targets, mapping.prefix),
        "target_parameters": [mapping.to_complete(name) for name in record.config.target_parameters] or None,
        "trainable_token_indices": tokens,
    }


def complete_targets(names: Sequence[str], adapted: Sequence[str], prefix: str) -> str | list[str]:
    """Return a regular expression for the names in the complete model of adapted modules of a text view.

    Endings such as ``q_proj`` would also match modules of the vision tower.

    Args:
        names: Names in the complete model of all modules of the view.
        adapted: Those of the adapted modules.
        prefix: Name of the language model.
    """
    dotted = f"{prefix}."
    inside, targets = ([n.removeprefix(dotted) for n in group if n.startswith(dotted)] for group in (names, adapted))
    expressions = [re.escape(name) for name in adapted if not name.startswith(dotted)]
    if targets:
        entries = target_entries(inside, targets)
        start = r"\."
        choice = entries
        if not isinstance(entries, str):
            start = r"\.(.*\.)?"
            choice = "|".join(map(re.escape, entries))
        expressions.insert(0, f"{re.escape(prefix)}{start}({choice})")
    return "|".join(expressions) or []


def _complete_pattern(key: str, record: Attachment, mapping: NameMap) -> Mapping[str, float]:
    """Return a pattern whose keys match the same modules by their names in the complete model."""
    pattern: Mapping[str, float] = getattr(record.config, key)
    names = [name for name, _ in record.adapted()]
    values = values_by_pattern(key, pattern, names, mapping)
    values = {mapping.to_complete(name): value for name, value in values.items()}
    if values == values_by_pattern(key, pattern, map(mapping.to_complete, names)):
        return pattern
    return {re.escape(name): value for name, value in values.items()}


def base_settings(base_model: str | None) -> dict[str, str | None]:
    """Return PEFT's keys for a base model. The revision of a hub id ``owner/name@revision`` has a separate key."""
    match = _WITH_REVISION.fullmatch(base_model or "")
    name, revision = match.groups() if match else (base_model, None)
    return {"base_model_name_or_path": name, "revision": revision}


def base_reference(settings: Mapping[str, object]) -> str | None:
    """Return the base model in an ``adapter_config.json`` as one reference, or None."""
    name = settings.get("base_model_name_or_path")
    revision = settings.get("revision")
    if not isinstance(name, str) or not isinstance(revision, str):
        return name if isinstance(name, str) else None
    joined = f"{name}@{revision}"
    return joined if _WITH_REVISION.fullmatch(joined) else name


def parse_config(settings: Mapping[str, object], location: str) -> LoRAConfig:
    """Convert the content of an ``adapter_config.json`` to a config.

    Raises:
        UserError: if it is not a LoRA adapter, or an unsupported setting changes the computation.
    """
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") or settings.get("method")
        message = f"the adapter is of kind {kind!r}, but only 'LORA' is supported"
        raise UserError(message, location=location, hint="use the folder of a LoRA adapter")
    for key, value in settings.items():
        if key not in _READ and key not in _PROVENANCE_KEYS and value and value != DEFAULTS.get(key):
            message = f"the adapter uses '{key}', which changes its computation and is not supported"
            hint = "use an adapter without it, or merge it with the program that created it"
            raise UserError(message, location=f"{location}: {key}", hint=hint)
    values = {key: settings.get(key, DEFAULTS[key]) for key in _READ}
    init = values.pop("init_lora_weights")
    if isinstance(init, str) and init not in _READABLE_INITS:
        message = f"the adapter was initialized with '{init}', which changed its base model's weights too"
        hint = "convert it to a plain LoRA adapter with the program that created it"
        raise UserError(message, location=f"{location}: init_lora_weights", hint=hint)
    if init == "olora" and settings.get("fan_in_fan_out"):
        message = "the adapter was initialized with 'olora' on Conv1D layers, where PEFT subtracts a share of Wᵀ from W"
        raise UserError(message, location=f"{location}: init_lora_weights", hint="merge it with PEFT")
    for key in ("layers_to_transform", "exclude_modules", "modules_to_save"):
        values[key] = values[key] or None
    if values["target_modules"] is None and (values["target_parameters"] or values["trainable_token_indices"]):
        values["target_modules"] = []
    try:
        return LoRAConfig.from_dict({**values, "init": init if init in CHANGING_INITS else "uniform"})
    except UserError as error:
        raise UserError(error.message, location=f"{location}: {error.location}", hint=error.hint) from error


def file_tensors(path: str, layer: AdaptedLayer) -> Iterator[tuple[str, Tensor]]:
    """Yield (tensor name, tensor in the file's orientation) of the trained parameters of the layer at ``path``.

    After an initialization to A₀, B₀ that changed W, the file contains [A, A₀] and [B; −B₀] of rank 2r. On the original
    base model, s·(A·B − A₀·B₀) gives the layer's output, whose weight lacks s·A₀·B₀.
    """
    tensors = {attribute: getattr(layer, attribute).detach() for attribute in layer.trained}
    if isinstance(layer, LoRALayer) and (first := layer.changed_init) is not None:
        factor_A = tensors["lora_A"]
        factor_B = tensors["lora_B"]
        tensors["lora_A"] = torch.cat([factor_A, first.lora_A.to(factor_A)], dim=1)
        tensors["lora_B"] = torch.cat([factor_B, -first.lora_B.to(factor_B)], dim=0)
    for key, attribute in tensor_names(path, layer):
        yield key, to_file_layout(tensors[attribute], attribute, layer)


_ENDINGS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "lora_magnitude": "lora_magnitude_vector",
    "trained_tokens": "token_adapter.trainable_tokens_delta",
}


def tensor_names(path: str, layer: AdaptedLayer) -> Iterator[tuple[str, str]]:
    """Yield (tensor name in a file, attribute of the layer) of a layer's trained parameters."""
    for attribute in layer.trained:
        ending = _ENDINGS[attribute]
        if attribute in ("lora_A", "lora_B") and isinstance(layer, nn.Embedding):
            ending = f"lora_embedding_{attribute[-1]}"
        yield f"{path}.{ending}", attribute


def to_file_layout(tensor: Tensor, attribute: str, layer: AdaptedLayer) -> Tensor:
    """Convert a layer's trained parameter to the file's layout: factors to PEFT's, magnitudes of kernels to (1, out,
    1…).
    """
    if attribute == "lora_magnitude" and layer.weight.dim() > 2:
        return tensor.view(1, -1, *(1 for _ in layer.weight.shape[2:]))
    if attribute in ("lora_A", "lora_B") and isinstance(layer, LoRALayer):
        return to_peft(tensor, attribute, layer.experts)
    return tensor


def from_file_layout(tensor: Tensor, attribute: str, layer: AdaptedLayer) -> Tensor:
    """Convert a tensor from the file's layout, the inverse of :func:`to_file_layout`."""
    if attribute == "lora_magnitude":
        return tensor.flatten()
    if attribute in ("lora_A", "lora_B") and isinstance(layer, LoRALayer):
        return from_peft(tensor, attribute, layer.experts)
    return tensor


def attention_counts_twice(version: str | None) -> bool:
    """True if the version of PEFT that wrote a file adds the update of an attention's output projection twice.

    True up to the version whose format is written, and if no version is given. Later versions are assumed to be fixed.
    See :meth:`~deltaw.lora.peft_format.FilePaths.counts_twice`.
    """
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", version or "")
    return numbers is None or (int(numbers[1]), int(numbers[2])) <= (0, 21)


def factor_module(tensor_name: str) -> str | None:
    """Return the module of a factor's tensor, or None if the tensor is not a factor."""
    for ending in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
        if tensor_name.endswith(ending):
            return without_wrappers(tensor_name.removesuffix(ending))
    return None


def target_entries(names: Iterable[str], adapted: Iterable[str]) -> list[str] | str:
    """Return the shortest name endings that match exactly the ``adapted`` among ``names``, sorted.

    If endings cannot distinguish the names (``lin`` and ``block.lin``), returns a regular expression for all full
    names.
    """
    adapted_names = list(adapted)
    adapted_counts, all_counts = (Counter(end for name in g for end in endings(name)) for g in (adapted_names, names))
    entries: set[str] = set()
    for name in adapted_names:
        exact = [end for end in endings(name) if adapted_counts[end] == all_counts[end]]
        if not exact:
            return "|".join(full.replace(".", r"\.") for full in sorted(adapted_names))
        entries.add(exact[-1])
    return sorted(entries)


def _extra_entries(names: list[str], extra_names: list[str]) -> list[str]:
    """Return entries for extra trainable modules. PEFT matches them as suffixes, with or without a preceding dot."""
    entries = set()
    for name in extra_names:
        exact_endings = [end for end in endings(name) if all(n in extra_names for n in names if n.endswith(end))]
        entries.add(exact_endings[-1] if exact_endings else name)
    return sorted(entries)


def _integer_if_whole(value: float) -> float | int:
    """Convert integral values to int, because some readers accept only integers for alpha."""
    return int(value) if float(value).is_integer() else value
