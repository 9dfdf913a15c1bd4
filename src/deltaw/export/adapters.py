"""Conversion of an adapter folder to changes of a base model's parameters.

The model is a skeleton on the meta device. It defines weight layouts and tied weights, and the adapter's files contain
all values. LoRA adapters are loaded with :func:`deltaw.lora.load_adapter`. Methods that train parameters of the model
directly have a separate format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.lora import load_adapter
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.attachment import Attachment, require_attachment
from deltaw.lora.files import read_adapter
from deltaw.lora.fingerprint import FINGERPRINT_KEY
from deltaw.lora.layers import DoRALayer, LoRABias, LoRAConv, LoRAConv1D, LoRAEmbedding, LoRALayer
from deltaw.lora.layers_parts import LoRAParameter, TrainedTokens
from deltaw.methods.base import ADAPTER_CONFIG, REPLACED_KEY
from deltaw.methods.files import read_config, read_metadata, read_trained_parameters
from deltaw.methods.parameters import parameters_by_name
from deltaw.methods.single_weights import INDICES, VALUES
from deltaw.settings import method_registry

# A change maps rows of W to rows of W' = W + ΔW, in fp32 (fp64 for an fp64 weight). Low-rank updates are stored as
# ΔW = L·R in the layout of the weight, so that a block of rows of ΔW needs only the same rows of L, and the full ΔW is
# never computed.


Blocks = Callable[[], Iterable[tuple[int, Tensor]]]
"""Function that yields the weight in blocks of rows, as (index of the first row, rows)."""


class WeightChange:
    """Base class of changes of a weight.

    Attributes:
        needs_all_rows: True if all rows must be passed in one block.
    """

    needs_all_rows: bool = False

    def prepare(self, blocks: Blocks) -> None:
        """Read the weight once before the first call of :meth:`apply`."""

    def apply(self, rows: Tensor, start: int) -> Tensor:
        """Return rows of W' for (n, …) rows of W from index ``start``, in fp32 or fp64. May modify ``rows``."""
        raise NotImplementedError


@dataclass(frozen=True)
class WeightFactors:
    """Factors of ΔW = L·R in the layout of a weight. Dimensions after the first are flattened.

    Attributes:
        factor_L: (rows, r) or (experts, rows, r) factor L.
        factor_R: (r, columns) or (experts, r, columns) factor R.
        shape: Shape of the weight.
    """

    factor_L: Tensor
    factor_R: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return int(self.factor_L.shape[-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows of ΔW. For stacked experts, a row is an entire expert."""
        factor_R = self.factor_R[start:stop] if self.factor_R.dim() == 3 else self.factor_R
        return (self.factor_L[start:stop] @ factor_R).view(stop - start, *self.shape[1:])

    def scaled(self, weight: float) -> WeightFactors:
        """Return the factors of weight · ΔW."""
        return WeightFactors(self.factor_L * weight, self.factor_R, self.shape)

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Return (L, R) of each matrix: one pair, or one pair per expert."""
        if self.factor_L.dim() == 2:
            return [(self.factor_L, self.factor_R)]
        return list(zip(self.factor_L, self.factor_R, strict=True))


@dataclass
class LowRankChange(WeightChange):
    """Low-rank update: W + L·R."""

    factors: WeightFactors

    def apply(self, rows: Tensor, start: int) -> Tensor:
        return rows.add_(self.factors.rows(start, start + len(rows)).to(rows.dtype))


@dataclass
class DoRAChange(WeightChange):
    """DoRA update: m∘(W + L·R) / ‖W + L·R‖ (arXiv 2402.09353, eq. 5).

    Attributes:
        factors: Factors of the directional update.
        magnitude: (outputs,) magnitudes m.
        outputs_are_rows: True if outputs are rows of the weight, False if they are columns.
    """

    factors: WeightFactors
    magnitude: Tensor
    outputs_are_rows: bool
    _norm: Tensor | None = field(default=None, repr=False)

    def prepare(self, blocks: Blocks) -> None:
        if self.outputs_are_rows:
            return
        squares = torch.zeros(self.magnitude.numel(), dtype=torch.float64)
        for start, rows in blocks():
            squares += self._sum(rows, start).double().square().sum(0)
        self._norm = squares.sqrt()

    def apply(self, rows: Tensor, start: int) -> Tensor:
        total = self._sum(rows, start)
        if self.outputs_are_rows:
            gain = _gain(self.magnitude[start : start + len(rows)].to(total.dtype), total.flatten(1).norm(dim=1))
            return total.mul_(gain.view(-1, *(1 for _ in total.shape[1:])))
        assert self._norm is not None, "call prepare first"
        return total.mul_(_gain(self.magnitude.to(total.dtype), self._norm.to(total.dtype)))

    def _sum(self, rows: Tensor, start: int) -> Tensor:
        return rows + self.factors.rows(start, start + len(rows)).to(rows.dtype)


def _gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return m / ‖·‖, or 0 for a zero row, which has no direction."""
    return torch.where(norm > 0, magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


@dataclass
class TokenRowChange(WeightChange):
    """Replacement of entire rows: (k,) row indices and (k, …) values."""

    tokens: Tensor
    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        inside = (self.tokens >= start) & (self.tokens < start + len(rows))
        return rows.index_copy_(0, self.tokens[inside] - start, self.values[inside].to(rows.dtype))


@dataclass
class EntryChange(WeightChange):
    """Replacement of single entries: (k,) ascending flat indices and (k,) values."""

    indices: Tensor
    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        width = rows[0].numel() if len(rows) else 0
        first = start * width
        inside = (self.indices >= first) & (self.indices < first + rows.numel())
        local_indices = (self.indices[inside] - first).long()
        return rows.flatten().index_copy_(0, local_indices, self.values[inside].to(rows.dtype)).view(rows.shape)


@dataclass
class ReplacedTensor(WeightChange):
    """Replacement of the entire tensor. The base model need not contain it."""

    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        values = self.values if self.values.dim() else self.values.view(1)
        return values[start : start + len(rows)].to(rows.dtype, copy=True)


@dataclass
class BiasChange(WeightChange):
    """Addition to a bias, from a trained bias on B."""

    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        return rows.add_(self.values[start : start + len(rows)].to(rows.dtype))


_IN_PLACE_METHODS = ("head", "input", "bias", "random", "last", "full")


@dataclass(frozen=True)
class ParameterChange:
    """Change of one parameter.

    Attributes:
        names: Names of the changed parameter. Other names of a tied weight retain the base's tensor.
        change: Change of the values.
        shape: Shape of the parameter.
        new: True if the base model's files may lack the parameter, for example a classification head.
    """

    names: tuple[str, ...]
    change: WeightChange
    shape: tuple[int, ...]
    new: bool = False


@dataclass(frozen=True)
class AdapterChanges:
    """All changes of a model by an adapter.

    Attributes:
        folder: Folder of the adapter.
        method: Training method.
        changes: Changed parameters.
        fingerprint: Fingerprint of the base model used in training, or None if the file does not contain it.
        replaced: Names of parameters that the adapter replaces entirely. Their base values are irrelevant.
        copies: Copies of unchanged base weights in the adapter's file, by name. They must equal the base's.
    """

    folder: Path
    method: str
    changes: list[ParameterChange]
    fingerprint: str | None = None
    replaced: frozenset[str] = frozenset()
    copies: Mapping[str, Tensor] = field(default_factory=dict)


def load_changes(folder: Path, model: PreTrainedModel) -> AdapterChanges:
    """Load the changes of a base model by an adapter.

    Args:
        folder: Folder of a run, or of an adapter in deltaw's or PEFT's format.
        model: Base model on the meta device, without an adapter. It cannot be used afterwards.

    Raises:
        UserError: if the adapter does not fit the model or does not change weights.
    """
    config = read_config(folder)
    kind = config.get("peft_type") or config.get("method")
    entry = method_registry.entry_of_adapter(kind)
    name = str(kind) if entry is None else entry.name
    if name == "prompt":
        hint = "serve it with the base model, or train with method lora"
        raise UserError("a soft prompt cannot be merged into weights", location=str(folder), hint=hint)
    if name == "lora":
        return _lora_changes(folder, model)
    if name not in _IN_PLACE_METHODS:
        hint = f"use lora, {', '.join(_IN_PLACE_METHODS)}"
        location = str(folder / ADAPTER_CONFIG)
        raise UserError(f"an adapter of method '{name}' cannot be merged", location=location, hint=hint)
    return _parameter_changes(folder, name, model)


def _parameter_changes(folder: Path, method: str, model: PreTrainedModel) -> AdapterChanges:
    """Load the changes of a method that trains parameters of the model directly."""
    tensors, saved = read_trained_parameters(folder, method)
    parameters = parameters_by_name(model)
    changes = []
    for key, tensor in tensors.items():
        if key.endswith(VALUES):
            continue
        name = key.removesuffix(INDICES)
        names = (name, *saved.tied.get(name, ()))
        bias_of = parameters.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
        shape = tuple(tensor.shape)
        if key.endswith(INDICES):
            values = tensors.get(name + VALUES)
            change: WeightChange | None = None if values is None else EntryChange(tensor, values)
            shape = tuple(parameters[name].shape) if name in parameters else shape
            if name in parameters and tensor.numel() and int(tensor.max()) >= parameters[name].numel():
                change = None
        else:
            change = ReplacedTensor(tensor)
            fits = all(tuple(parameters[n].shape) == shape for n in names if n in parameters)
            added = name not in parameters and bias_of is not None and len(shape) == 1
            change = change if fits and (name in parameters or added) else None
        if change is None or (name not in parameters and bias_of is None):
            message = f"the adapter trains '{name}' {shape}, which the model does not have"
            raise UserError(message, location=str(folder), hint="merge it into the base model that it was trained on")
        changes.append(ParameterChange(names, change, shape, new=isinstance(change, ReplacedTensor)))
    metadata = read_metadata(folder)
    replaced = frozenset(str(name) for name in json.loads(metadata.get(REPLACED_KEY, "[]")))
    return AdapterChanges(folder, method, changes, metadata.get(FINGERPRINT_KEY), replaced)


def _lora_changes(folder: Path, model: PreTrainedModel) -> AdapterChanges:
    load_adapter(model, folder)
    record = require_attachment(model)
    for name, layer in record.updated():
        reason = AdaptedLayer.merge_refusal(layer) if isinstance(layer, LoRABias) else layer.merge_refusal()
        if reason is not None:
            raise UserError(f"'{name}' cannot be merged: {reason}", location=str(folder), hint="keep it separate")
    changes: list[ParameterChange] = []
    for replacement in record.layers:
        if isinstance(replacement.current, LoRALayer):
            changes += _layer_changes(replacement.names, replacement.current)
    for update in record.parameters:
        layer = update.layer
        owner = next(name for name, module in model.named_modules() if module is layer.owner)
        name = f"{owner}.{layer.attribute}"
        changes.append(ParameterChange((name,), LowRankChange(factors_of(layer)), tuple(layer.weight.shape)))
    changes += _token_changes(record)
    for bias in record.biases:
        value = bias.parameter.detach()
        changes.append(ParameterChange((bias.name,), ReplacedTensor(value), tuple(value.shape)))
    for extra in record.extra_modules:
        for key, value in extra.current.state_dict().items():
            names = tuple(f"{name}.{key}" for name in extra.names)
            changes.append(ParameterChange(names, ReplacedTensor(value.detach()), tuple(value.shape), new=True))
    replaced = frozenset(name for change in changes if change.new for name in change.names)
    fingerprint = read_adapter(folder).metadata.get(FINGERPRINT_KEY)
    return AdapterChanges(folder, "lora", changes, fingerprint, replaced, dict(record.copies))


def _layer_changes(names: Sequence[str], layer: LoRALayer) -> list[ParameterChange]:
    """Return the changes of an adapted layer's weight and, if B has a trained bias, of its bias."""
    factors = factors_of(layer)
    change: WeightChange = LowRankChange(factors)
    if isinstance(layer, DoRALayer):
        change = DoRAChange(factors, layer.lora_magnitude.detach(), not isinstance(layer, LoRAConv1D | LoRAEmbedding))
    changes = [ParameterChange(tuple(f"{name}.weight" for name in names), change, tuple(layer.weight.shape))]
    if isinstance(layer, LoRABias):
        values = layer.lora_bias.detach() * layer.scaling
        changes.append(ParameterChange(tuple(f"{n}.bias" for n in names), BiasChange(values), tuple(values.shape)))
    return changes


@torch.no_grad()
def factors_of(layer: LoRALayer) -> WeightFactors:
    """Return the factors of a layer's ΔW in the layout of its weight. L includes the scaling."""
    shape = tuple(layer.weight.shape)
    factor_A = layer.lora_A.detach()
    factor_B = layer.lora_B.detach()
    if isinstance(layer, LoRAConv):
        return WeightFactors(factor_B.flatten(1) * layer.scaling, factor_A.flatten(1), shape)
    if has_input_rows(layer):
        return WeightFactors(factor_A * layer.scaling, factor_B, shape)
    return WeightFactors(factor_B.transpose(-1, -2) * layer.scaling, factor_A.transpose(-1, -2), shape)


def has_input_rows(layer: LoRALayer) -> bool:
    """Return True if rows of the layer's weight correspond to inputs instead of outputs."""
    by_parameter = isinstance(layer, LoRAParameter) and layer.weight_is_in_out
    return by_parameter or isinstance(layer, LoRAConv1D | LoRAEmbedding)


def _token_changes(record: Attachment) -> list[ParameterChange]:
    """Return the changes of trained token rows. An embedding and the head that follows it share one change."""
    changes = []
    layers = [(r.names, r.current) for r in record.tokens if isinstance(r.current, TrainedTokens)]
    for layer_names, layer in layers:
        if layer.tied_to is None:
            followers = [name for names, other in layers if other.tied_to is layer for name in names]
            names = tuple(f"{name}.weight" for name in (*layer_names, *followers))
            change = TokenRowChange(layer.tokens.cpu(), layer.trained_tokens.detach())
            changes.append(ParameterChange(names, change, tuple(layer.weight.shape)))
    return changes
