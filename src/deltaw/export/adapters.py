"""An adapter's folder becomes changes of a base model's parameters, by the parameters' names.

The model is a skeleton on the meta device: its classes say how a weight lies in memory and which weights are
tied, and the adapter's files bring all numbers. LoRA in all its forms goes through the same loading as
everywhere (:func:`deltaw.lora.load_adapter`); methods that train the model's own parameters have a format
of their own.
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
from deltaw.lora.attachment import Attachment, attached
from deltaw.lora.files import read_adapter
from deltaw.lora.fingerprint import FINGERPRINT_KEY
from deltaw.lora.layers import DoRALayer, LoRABias, LoRAConv, LoRAConv1D, LoRAEmbedding, LoRALayer
from deltaw.lora.layers_parts import LoRAParameter, TrainedTokens
from deltaw.methods import registry
from deltaw.methods.base import ADAPTER_CONFIG, REPLACED_KEY
from deltaw.methods.files import metadata_of, read_config, read_trained
from deltaw.methods.in_place import INDICES, VALUES
from deltaw.methods.parameters import names_of

# Every change turns rows of W into rows of W' = W + ΔW, in fp32 (fp64 for an fp64 weight). All layers'
# updates have one form here, ΔW = L·R over the weight's own layout, so that a block of rows of ΔW needs the
# same rows of L alone and ΔW is never formed whole.
#
# It knows tensors: no files, no names, no models.


Blocks = Callable[[], Iterable[tuple[int, Tensor]]]
"""The weight in blocks of rows: (the first row's number, the rows)."""


class Change:
    """How rows of a weight change.

    Attributes:
        whole: whether it needs all rows in one block.
    """

    whole: bool = False

    def prepare(self, blocks: Blocks) -> None:
        """Be shown the weight before the first :meth:`apply`."""

    def apply(self, rows: Tensor, start: int) -> Tensor:
        """Rows ``start`` and on of W, (n, …) in fp32 or fp64, to those of W'; the argument may be changed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Factors:
    """ΔW = L·R in the layout of a weight of ``shape``, its dimensions behind the first one flattened.

    Attributes:
        left: L (rows, r), or (experts, rows, r).
        right: R (r, columns), or (experts, r, columns).
        shape: of the weight.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return int(self.left.shape[-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of ΔW; of stacked experts a row is an expert."""
        right = self.right[start:stop] if self.right.dim() == 3 else self.right
        return (self.left[start:stop] @ right).view(stop - start, *self.shape[1:])

    def scaled(self, weight: float) -> Factors:
        """weight · ΔW."""
        return Factors(self.left * weight, self.right, self.shape)

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """(L, R) of each matrix: one, or one for each expert."""
        return [(self.left, self.right)] if self.left.dim() == 2 else list(zip(self.left, self.right, strict=True))


@dataclass
class LowRank(Change):
    """W + L·R."""

    factors: Factors

    def apply(self, rows: Tensor, start: int) -> Tensor:
        return rows.add_(self.factors.rows(start, start + len(rows)).to(rows.dtype))


@dataclass
class Direction(Change):
    """m∘(W + L·R) / ‖W + L·R‖ (DoRA, arXiv 2402.09353, eq. 5).

    Attributes:
        factors: of the update of the direction.
        magnitude: m, one for each output.
        outputs_are_rows: whether an output is a row of the weight, or a column of it.
    """

    factors: Factors
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
        assert self._norm is not None, "prepare comes first"
        return total.mul_(_gain(self.magnitude.to(total.dtype), self._norm.to(total.dtype)))

    def _sum(self, rows: Tensor, start: int) -> Tensor:
        return rows + self.factors.rows(start, start + len(rows)).to(rows.dtype)


def _gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / ‖·‖; 0 where a row is zero and has no direction."""
    return torch.where(norm > 0, magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


@dataclass
class TokenRows(Change):
    """W with some rows replaced: tokens (k), their rows (k, …)."""

    tokens: Tensor
    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        inside = (self.tokens >= start) & (self.tokens < start + len(rows))
        return rows.index_copy_(0, self.tokens[inside] - start, self.values[inside].to(rows.dtype))


@dataclass
class Entries(Change):
    """W with single entries replaced: ascending flat positions (k), their values (k)."""

    indices: Tensor
    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        width = rows[0].numel() if len(rows) else 0
        first = start * width
        inside = (self.indices >= first) & (self.indices < first + rows.numel())
        places = (self.indices[inside] - first).long()
        return rows.flatten().index_copy_(0, places, self.values[inside].to(rows.dtype)).view(rows.shape)


@dataclass
class Replaced(Change):
    """Another tensor in place of W; W need not exist."""

    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        values = self.values if self.values.dim() else self.values.view(1)
        return values[start : start + len(rows)].to(rows.dtype, copy=True)


@dataclass
class Added(Change):
    """b + c, for a bias on B that goes into the base layer's bias."""

    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        return rows.add_(self.values[start : start + len(rows)].to(rows.dtype))


_IN_PLACE = ("head", "input", "bias", "random", "last", "full")


@dataclass(frozen=True)
class Trained:
    """One changed parameter.

    Attributes:
        names: under which the model is to find the changed one; others of a tied weight keep the base's.
        change: what becomes of it.
        shape: of the parameter.
        new: whether the base model's files need not hold it, such as a classifier's head.
    """

    names: tuple[str, ...]
    change: Change
    shape: tuple[int, ...]
    new: bool = False


@dataclass(frozen=True)
class AdapterChanges:
    """All that an adapter changes in a model.

    Attributes:
        folder: of the adapter. method: that trained it.
        trained: each changed parameter.
        fingerprint: of the base model that it was trained on; None where the file does not say.
        replaced: names of parameters whose values the adapter has itself, so that the base's may be any.
        copies: the base's own values that the file has too, by name; they must be the same.
    """

    folder: Path
    method: str
    trained: list[Trained]
    fingerprint: str | None = None
    replaced: frozenset[str] = frozenset()
    copies: Mapping[str, Tensor] = field(default_factory=dict)


def changes_of(folder: Path, model: PreTrainedModel) -> AdapterChanges:
    """The changes that the adapter in ``folder`` makes to a model of the class and shape of ``model``.

    Args:
        folder: a run's folder, an adapter of deltaw's or one of PEFT's.
        model: on the meta device and without an adapter; afterwards it has this one, and is of no more use.

    Raises:
        UserError: the adapter does not fit the model, or is no change of weights.
    """
    config = read_config(folder)
    kind = config.get("peft_type") or config.get("method")
    entry = registry.entry_of_adapter(kind)
    name = str(kind) if entry is None else entry.name
    if name == "prompt":
        hint = "serve it beside the base model, or train with method lora to have weights to merge"
        raise UserError("a soft prompt is no weight: it is rows before each text", where=str(folder), hint=hint)
    if name == "lora":
        return _of_lora(folder, model)
    if name not in _IN_PLACE:
        hint, where = f"use lora, {', '.join(_IN_PLACE)}", str(folder / ADAPTER_CONFIG)
        raise UserError(f"an adapter of method '{name}' cannot be merged", where=where, hint=hint)
    return _of_parameters(folder, name, model)


def _of_parameters(folder: Path, method: str, model: PreTrainedModel) -> AdapterChanges:
    """Of a method that trains the model's own parameters."""
    tensors, saved = read_trained(folder, method)
    own = names_of(model)
    trained = []
    for key, tensor in tensors.items():
        if key.endswith(VALUES):
            continue
        name = key.removesuffix(INDICES)
        names = (name, *saved.tied.get(name, ()))
        bias_of = own.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
        shape = tuple(tensor.shape)
        if key.endswith(INDICES):
            values = tensors.get(name + VALUES)
            change: Change | None = None if values is None else Entries(tensor, values)
            shape = tuple(own[name].shape) if name in own else shape
            if name in own and tensor.numel() and int(tensor.max()) >= own[name].numel():
                change = None
        else:
            change = Replaced(tensor)
            fits = all(tuple(own[n].shape) == shape for n in names if n in own)
            added = name not in own and bias_of is not None and len(shape) == 1
            change = change if fits and (name in own or added) else None
        if change is None or (name not in own and bias_of is None):
            what = f"the adapter trains '{name}' {shape}, which the model does not have"
            raise UserError(what, where=str(folder), hint="merge it into the base model that it was trained on")
        trained.append(Trained(names, change, shape, new=isinstance(change, Replaced)))
    metadata = metadata_of(folder)
    replaced = frozenset(str(name) for name in json.loads(metadata.get(REPLACED_KEY, "[]")))
    return AdapterChanges(folder, method, trained, metadata.get(FINGERPRINT_KEY), replaced)


def _of_lora(folder: Path, model: PreTrainedModel) -> AdapterChanges:
    load_adapter(model, folder)
    record = attached(model)
    for name, layer in record.updated():
        if (reason := _refusal(layer)) is not None:
            raise UserError(f"'{name}' cannot be merged: {reason}", where=str(folder), hint="keep the adapter separate")
    trained: list[Trained] = []
    for replacement in record.layers:
        if isinstance(replacement.current, LoRALayer):
            trained += _of_layer(replacement.names, replacement.current)
    for update in record.parameters:
        layer = update.layer
        owner = next(name for name, module in model.named_modules() if module is layer.holder)
        trained.append(Trained((f"{owner}.{layer.attribute}",), LowRank(factors_of(layer)), tuple(layer.weight.shape)))
    trained += _of_tokens(record)
    for bias in record.biases:
        trained.append(Trained((bias.name,), Replaced(bias.parameter.detach()), tuple(bias.parameter.shape)))
    replaced: list[str] = []
    for whole in record.extra_modules:
        for key, value in whole.current.state_dict().items():
            names = tuple(f"{name}.{key}" for name in whole.names)
            replaced += names
            trained.append(Trained(names, Replaced(value.detach()), tuple(value.shape), new=True))
    metadata = read_adapter(folder).metadata
    fingerprint, copies = metadata.get(FINGERPRINT_KEY), dict(record.copies)
    return AdapterChanges(folder, "lora", trained, fingerprint, frozenset(replaced), copies)


def _refusal(layer: AdaptedLayer) -> str | None:
    if isinstance(layer, LoRABias):
        return None if layer.activation is None else AdaptedLayer.merge_refusal(layer)
    return layer.merge_refusal()


def _of_layer(names: Sequence[str], layer: LoRALayer) -> list[Trained]:
    """The weight of an adapted layer, and its bias where B has one."""
    factors = factors_of(layer)
    change: Change = LowRank(factors)
    if isinstance(layer, DoRALayer):
        columns = isinstance(layer, LoRAConv1D | LoRAEmbedding)
        change = Direction(factors, layer.lora_magnitude.detach(), not columns)
    found = [Trained(tuple(f"{name}.weight" for name in names), change, tuple(layer.weight.shape))]
    if isinstance(layer, LoRABias):
        values = layer.lora_bias.detach() * layer.scaling
        found.append(Trained(tuple(f"{name}.bias" for name in names), Added(values), tuple(values.shape)))
    return found


@torch.no_grad()
def factors_of(layer: LoRALayer) -> Factors:
    """ΔW of an adapted layer, in the layout of its weight: scaling is in the left factor."""
    shape = tuple(layer.weight.shape)
    factor_A, factor_B = layer.lora_A.detach(), layer.lora_B.detach()
    if isinstance(layer, LoRAConv):
        return Factors(factor_B.flatten(1) * layer.scaling, factor_A.flatten(1), shape)
    if rows_are_inputs(layer):
        return Factors(factor_A * layer.scaling, factor_B, shape)
    return Factors(factor_B.transpose(-1, -2) * layer.scaling, factor_A.transpose(-1, -2), shape)


def rows_are_inputs(layer: LoRALayer) -> bool:
    """Whether a row of the layer's weight is an input, not an output."""
    by_parameter = isinstance(layer, LoRAParameter) and layer.weight_is_in_out
    return by_parameter or isinstance(layer, LoRAConv1D | LoRAEmbedding)


def _of_tokens(record: Attachment) -> list[Trained]:
    """Trained rows of tokens: one change for an embedding and the head that follows it."""
    found = []
    layers = [(place.names, place.current) for place in record.tokens if isinstance(place.current, TrainedTokens)]
    for own, layer in layers:
        if layer.follows is None:
            followers = [name for names, other in layers if other.follows is layer for name in names]
            names = tuple(f"{name}.weight" for name in (*own, *followers))
            change = TokenRows(layer.tokens.cpu(), layer.trained_tokens.detach())
            found.append(Trained(names, change, tuple(layer.weight.shape)))
    return found
