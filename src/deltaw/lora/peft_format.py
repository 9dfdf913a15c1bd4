"""PEFT's adapter format: how its settings and its tensors' names stand for ours.

It maps both ways between dictionaries and touches no file and no model's weights. Orientation differs: our
A is (in, r) and B (r, out); the file has them transposed, except for convolutions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.attachment import Attachment
from deltaw.lora.config import CHANGING_INITS, PEFT_NAMES, LoRAConfig
from deltaw.lora.initialize import from_peft, to_peft
from deltaw.lora.layers import LoRAConv1D, LoRALayer
from deltaw.lora.matching import endings

# Where PEFT's files have what a model trains: its wrappers nest, and each adds a part to the names below it.
#
# An adapted layer of ours has the name of the layer that it stands in for. In PEFT a wrapper has that name,
# with the layer inside of it as ``base_layer``. That shows in a tensor's name in three cases: a trained bias of
# an adapted layer; the two projections of ``nn.MultiheadAttention``, of which the second is inside the first's
# wrapper; and several adapted parameters of one module, where each has a wrapper around that of the one before
# it.


PREFIX = "base_model.model."
_INNER = ".base_layer"


class FilePaths:
    """The names in a file, without their last part, of what an attachment trains."""

    def __init__(self, record: Attachment) -> None:
        self._wrappers = {replacement.names[0]: 1 for replacement in record.layers}
        self._special: dict[str, str] = {}
        self._twice: set[str] = set()
        by_runner: dict[str, list[str]] = {}
        for update in record.parameters:
            name = update.names[0]
            if not update.of_attention:
                by_runner.setdefault(name, []).append(update.name)
            elif update.layer.holder is update.runner:
                self._wrappers[name] = 1
                self._special[update.name] = name
            else:
                self._wrappers[f"{name}.out_proj"] = 1
                self._special[update.name] = f"{name}.out_proj"
                self._twice.add(update.name)
        self._depth: dict[str, int] = {}
        for name, updates in by_runner.items():
            self._wrappers[name] = len(updates)
            for outside, update_name in enumerate(reversed(updates)):
                self._special[update_name] = name
                self._depth[update_name] = outside

    def of_layer(self, name: str) -> str:
        """For the factors of an adapted layer, or of a parameter's update, by its name in the model."""
        return PREFIX + self._nested(self._special.get(name, name)) + _INNER * self._depth.get(name, 0)

    def counts_twice(self, name: str) -> bool:
        """Whether PEFT adds this update to its weight twice: that of an attention's output projection.

        Its wrapper of ``nn.MultiheadAttention`` merges that update around each forward, and has the wrapper
        inside merge it once more (up to version 0.21.2; pull request 3774 of its repository). Here it counts
        once. So that outputs agree, a file has half of this B.
        """
        return name in self._twice

    def of_module(self, name: str) -> str:
        """For a module that is trained in full."""
        return PREFIX + self._nested(name)

    def of_parameter(self, name: str) -> str:
        """For a parameter of the base model itself, such as a trained bias: its full name."""
        owner, _, last = name.rpartition(".")
        if not owner:
            return PREFIX + name
        return f"{PREFIX}{self._nested(owner)}{_INNER * self._wrappers.get(owner, 0)}.{last}"

    def _nested(self, name: str) -> str:
        """``name`` with a part for every wrapper around one of the modules above it."""
        if not self._special:
            return name  # no module below an adapted layer can be trained
        parts = name.split(".")
        nested = parts[0]
        for end in range(1, len(parts)):
            nested += _INNER * self._wrappers.get(".".join(parts[:end]), 0) + "." + parts[end]
        return nested


def without_wrappers(name: str) -> str:
    """The model's own name for a name in a file."""
    return name.removeprefix(PREFIX).replace(_INNER, "")


PEFT_FORMAT = "0.21.2"
"""The version of PEFT whose files these are."""

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
"""Every key of PEFT's own file, and the value that it has there where nothing was set."""

_NAMES = {ours: theirs for theirs, ours in PEFT_NAMES.items()}
_READ = {_NAMES.get(field.name, field.name) for field in fields(LoRAConfig)} & DEFAULTS.keys()
_ORIGIN = """
    auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out inference_mode layers_pattern
    loftq_config lora_ga_config megatron_core peft_type peft_version qalora_group_size revision runtime_config
    task_type
"""
_NO_MATHEMATICS = frozenset(_ORIGIN.split())
"""Keys that say where an adapter comes from, or how it was initialized, and not what it computes."""

_READABLE_INITS = ("gaussian", "orthogonal", "eva", *CHANGING_INITS)
"""Initializations that leave W alone, and those whose W can be computed again."""


def settings_of(
    model: nn.Module, record: Attachment, base_model: str | None, task_type: str | None
) -> dict[str, object]:
    """The content of ``adapter_config.json`` for the adapter on ``model``.

    An adapter whose initialization changed W is written as a plain one of twice the rank (see
    :func:`file_tensors`), with alpha such that the scaling stays: 2·alpha, or √2·alpha under rsLoRA.
    """
    config = record.config
    changed = any(layer.changed_init is not None for _, layer in record.adapted())
    more_rank = 2 if changed else 1
    more_alpha = (math.sqrt(2) if config.rslora else 2) if changed else 1
    names = [name for name, _ in model.named_modules() if name]
    if getattr(model, "pooler", model) is None:
        names.append("pooler.dense")  # that other programs load, and would adapt by its last name
    whole = [replacement.names[0] for replacement in record.extra_modules]
    targets = [replacement.names[0] for replacement in record.layers]
    targets += [update.names[0] for update in record.parameters if update.of_attention]
    settings = DEFAULTS | {
        "alora_invocation_tokens": config.invocation_tokens,
        "alpha_pattern": {key: _plain(value * more_alpha) for key, value in config.alpha_pattern.items()},
        **base_settings(base_model),
        "bias": config.bias,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for _, layer in record.adapted()),
        "init_lora_weights": config.init if config.init in ("gaussian", "orthogonal") else True,
        "lora_alpha": _plain(config.alpha * more_alpha),
        "lora_bias": config.lora_bias,
        "lora_dropout": config.dropout,
        "modules_to_save": _extra_entries(names, whole) or None,
        "r": config.rank * more_rank,
        "rank_pattern": {key: value * more_rank for key, value in config.rank_pattern.items()},
        "target_modules": target_entries(names, list(dict.fromkeys(targets))),
        "target_parameters": config.target_parameters or None,
        "task_type": task_type,
        "trainable_token_indices": config.trainable_token_indices,
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
    if task_type is None:
        kind = type(model)
        settings["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return settings


def base_settings(base_model: str | None) -> dict[str, str | None]:
    """How PEFT names a base model: a hub id's revision, as in ``owner/name@revision``, has a key of its own."""
    found = _WITH_REVISION.fullmatch(base_model or "")
    name, revision = found.groups() if found else (base_model, None)
    return {"base_model_name_or_path": name, "revision": revision}


def base_reference(settings: Mapping[str, object]) -> str | None:
    """The base model that an ``adapter_config.json`` names, as one reference; None where it names none."""
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not isinstance(revision, str):
        return name if isinstance(name, str) else None
    joined = f"{name}@{revision}"
    return joined if _WITH_REVISION.fullmatch(joined) else name


def config_of(settings: Mapping[str, object], where: str) -> LoRAConfig:
    """The config that an ``adapter_config.json`` stands for.

    Raises:
        UserError: it is no LoRA adapter, or a setting changes what is computed and is not known here.
    """
    if settings.get("peft_type") != "LORA":
        what = f"the adapter is of kind {settings.get('peft_type')!r}, and only 'LORA' is read"
        raise UserError(what, where=where, hint="give a LoRA adapter's folder")
    for key, value in settings.items():
        if key not in _READ and key not in _NO_MATHEMATICS and value and value != DEFAULTS.get(key):
            what = f"the adapter was made with '{key}', which changes its mathematics and is not available"
            hint = "use an adapter without it, or have the program that made it merge it"
            raise UserError(what, where=f"{where}: {key}", hint=hint)
    known = {key: settings.get(key, DEFAULTS[key]) for key in _READ}
    init = known.pop("init_lora_weights")
    if isinstance(init, str) and init not in _READABLE_INITS:
        what = f"the adapter was initialized with '{init}', which changed its base model's weights too"
        hint = "have the program that made it convert it to a plain LoRA adapter"
        raise UserError(what, where=f"{where}: init_lora_weights", hint=hint)
    if init == "olora" and settings.get("fan_in_fan_out"):
        what = "the adapter was initialized with 'olora' on Conv1D layers, where PEFT takes Wᵀ's share out of W"
        raise UserError(what, where=f"{where}: init_lora_weights", hint="have the program that made it merge it")
    for key in ("layers_to_transform", "exclude_modules", "modules_to_save"):
        known[key] = known[key] or None
    if known["target_modules"] is None and (known["target_parameters"] or known["trainable_token_indices"]):
        known["target_modules"] = []
    try:
        return LoRAConfig.from_dict({**known, "init": init if init in CHANGING_INITS else "uniform"})
    except UserError as error:
        raise UserError(error.what, where=f"{where}: {error.where}", hint=error.hint) from error


def file_tensors(path: str, layer: AdaptedLayer) -> Iterator[tuple[str, Tensor]]:
    """(tensor name, tensor in the file's orientation) of all that the layer at ``path`` trains.

    After an initialization to A₀, B₀ that changed W the file holds [A, A₀] and [B; −B₀], of rank 2r: on the
    original base model s·(A·B − A₀·B₀) gives what the layer computes now, whose weight lacks s·A₀·B₀.
    """
    tensors = {attribute: getattr(layer, attribute).detach() for attribute in layer.trained}
    if isinstance(layer, LoRALayer) and (first := layer.changed_init) is not None:
        factor_A, factor_B = tensors["lora_A"], tensors["lora_B"]
        tensors["lora_A"] = torch.cat([factor_A, first.lora_A.to(factor_A)], dim=1)
        tensors["lora_B"] = torch.cat([factor_B, -first.lora_B.to(factor_B)], dim=0)
    for key, attribute in places(path, layer):
        yield key, as_in_file(tensors[attribute], attribute, layer)


_ENDINGS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "lora_magnitude": "lora_magnitude_vector",
    "trained_tokens": "token_adapter.trainable_tokens_delta",
}


def places(path: str, layer: AdaptedLayer) -> Iterator[tuple[str, str]]:
    """What a layer trains: the tensor's name in a file, and the layer's attribute."""
    for attribute in layer.trained:
        ending = _ENDINGS[attribute]
        if attribute in ("lora_A", "lora_B") and isinstance(layer, nn.Embedding):
            ending = f"lora_embedding_{attribute[-1]}"
        yield f"{path}.{ending}", attribute


def as_in_file(tensor: Tensor, attribute: str, layer: AdaptedLayer) -> Tensor:
    """What a layer trains as a file has it: factors in PEFT's layout, magnitudes (1, out, 1…) of kernels."""
    if attribute == "lora_magnitude" and layer.weight.dim() > 2:
        return tensor.view(1, -1, *(1 for _ in layer.weight.shape[2:]))
    if attribute in ("lora_A", "lora_B") and isinstance(layer, LoRALayer):
        return to_peft(tensor, attribute, layer.experts)
    return tensor


def as_in_layer(tensor: Tensor, attribute: str, layer: AdaptedLayer) -> Tensor:
    """The inverse of :func:`as_in_file`."""
    if attribute == "lora_magnitude":
        return tensor.flatten()
    if attribute in ("lora_A", "lora_B") and isinstance(layer, LoRALayer):
        return from_peft(tensor, attribute, layer.experts)
    return tensor


def attention_counts_twice(version: str | None) -> bool:
    """Whether the PEFT that made a file adds the update of an attention's output projection twice.

    True up to the version whose files are written here, and where none is given; see
    :meth:`~deltaw.lora.peft_format.FilePaths.counts_twice`. Later ones are taken to have it fixed.
    """
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", version or "")
    return numbers is None or (int(numbers[1]), int(numbers[2])) <= (0, 21)


def factor_module(tensor_name: str) -> str | None:
    """The module that a factor's tensor belongs to; None for a tensor that is no factor."""
    for ending in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
        if tensor_name.endswith(ending):
            return without_wrappers(tensor_name.removesuffix(ending))
    return None


def target_entries(names: Iterable[str], adapted: Iterable[str]) -> list[str] | str:
    """The shortest name endings that match exactly the ``adapted`` among ``names``, sorted.

    Where no ending of a name can tell it from another (``lin`` and ``block.lin``) a regular expression
    for all full names is returned instead.
    """
    wanted = list(adapted)
    inside, everywhere = (Counter(end for name in group for end in endings(name)) for group in (wanted, names))
    entries: set[str] = set()
    for name in wanted:
        exact = [end for end in endings(name) if inside[end] == everywhere[end]]
        if not exact:
            return "|".join(full.replace(".", r"\.") for full in sorted(wanted))
        entries.add(exact[-1])
    return sorted(entries)


def _extra_entries(names: list[str], whole: list[str]) -> list[str]:
    """Entries for extra trainable modules; PEFT matches them by how the name ends, dot or no dot."""
    entries = set()
    for name in whole:
        ends = [end for end in endings(name) if all(n in whole for n in names if n.endswith(end))]
        entries.add(ends[-1] if ends else name)
    return sorted(entries)


def _plain(value: float) -> float | int:
    """Whole numbers as JSON integers: some readers take no others for alpha."""
    return int(value) if float(value).is_integer() else value
