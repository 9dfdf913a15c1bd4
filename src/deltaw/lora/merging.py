"""Merging of ΔW into the weights of a model, and unmerging.

Merging adds ΔW in fp32 and rounds once. Unmerging restores the original weights, it does not compute W + ΔW − ΔW. All
checks precede the first change.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.attachment import adapted_layers, unwrap_model
from deltaw.lora.math import relative_errors
from deltaw.tensor_files import has_values

# Share of the update above which a merge warns about rounding.
_MAX_ROUNDING = 0.5


@dataclass(frozen=True)
class MergeSummary:
    """Result of :func:`merge`: the part of the update that rounding to the dtype of the weights changed.

    Attributes:
        error: Relative error of ΔW over all layers, 0 for weights in fp32.
        errors: Relative error of ΔW of each layer with a weight of a narrower dtype.
    """

    error: float
    errors: Mapping[str, float]

    def __str__(self) -> str:
        return f"rounding changed {self.error:.0%} of the update; keep the adapter unmerged, or load the model in fp32"


def merge(model: nn.Module, keep_original: bool = True) -> MergeSummary:
    """Set the weight of every adapted layer to W + ΔW. Outputs are unchanged up to rounding.

    Warns if rounding to the dtype of the weights changes most of the update.

    Args:
        model: Model with an attached adapter.
        keep_original: Retain the original weights for :func:`unmerge` and ``disabled``, which needs memory for a second
            copy of the adapted weights.

    Raises:
        UserError: if the adapter is merged already, another module shares a weight (a tied head), a convolution is
            grouped, or a sum is not finite. The model is then unchanged.
    """
    model = unwrap_model(model)
    layers = adapted_layers(model)
    shared = shared_weights(model)
    for name, layer in layers:
        if layer.merged:
            raise UserError("the adapter is merged already", location=name, hint="call unmerge first")
        if users := _users_of_unmerged_weight(model, layer, shared):
            message = f"the weight of '{name}' is shared with '{users[0]}', whose outputs would change"
            raise UserError(message, location=name, hint="untie the weights, or do not merge the adapter")
        if reason := layer.merge_refusal():
            raise UserError(f"'{name}' cannot be merged: {reason}", location=name, hint="do not merge the adapter")
    # To save memory, sums that are not retained are computed twice: to check them, and to store them.
    sums: dict[str, Tensor] = {}
    squares: dict[str, tuple[float, float]] = {}
    for name, layer in layers:
        total = layer.merged_weight()
        if not torch.isfinite(total).all():
            hint = "the adapter's factors are invalid, or too large for the weight's dtype"
            raise UserError(f"the merged weight of '{name}' is not finite", location=name, hint=hint)
        if keep_original:
            sums[name] = total
        if layer.weight.element_size() < 4 and has_values(total):
            exact = layer.merged_weight(rounded=False)
            rounding, update = total - exact, exact - layer.weight
            squares[name] = float(rounding.square().sum()), float(update.square().sum())
    for name, layer in layers:
        layer.set_merged(sums[name] if keep_original else layer.merged_weight(), keep_original)
    errors, error = relative_errors(squares)
    summary = MergeSummary(error, errors)
    if error > _MAX_ROUNDING:
        warnings.warn(str(summary), stacklevel=2)
    return summary


def unmerge(model: nn.Module) -> None:
    """Restore the exact weights from before :func:`merge`.

    Raises:
        UserError: if the adapter is not merged, or the original weights were not stored.
    """
    if not (merged := [(name, layer) for name, layer in adapted_layers(unwrap_model(model)) if layer.merged]):
        raise UserError("the adapter is not merged", hint="call merge first")
    for name, layer in merged:
        if layer._unmerged_weight is None:
            message = "the weights from before the merge were not kept"
            raise UserError(message, location=name, hint="merge with keep_original=True")
    for _, layer in merged:
        layer.unset_merged()


def _users_of_unmerged_weight(model: nn.Module, layer: AdaptedLayer, shared: dict[int, list[str]]) -> list[str]:
    """Return the names of modules that share the layer's weight but expect it unmerged."""
    users = [(name, model.get_submodule(name)) for name in shared.get(id(layer.weight), ())]
    return [name for name, user in users if user is not layer.owner and getattr(user, "tied_to", None) is not layer]


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the using modules by parameter id, for each parameter that more than one module uses."""
    users: dict[object, dict[str, None]] = {}
    keys: dict[int, object] = {}
    for name, module in model.named_modules():
        for parameter in direct_parameters(module).values():
            if parameter is not None:
                key = keys[id(parameter)] = _storage_key(parameter)
                users.setdefault(key, {})[name] = None
    return {parameter: list(users[key]) for parameter, key in keys.items() if len(users[key]) > 1}


def _storage_key(parameter: Tensor) -> object:
    """Return a key that is equal for parameters that share memory, which count as one weight."""
    if not has_values(parameter) or parameter.data_ptr() == 0:
        return id(parameter)
    return (parameter.device, parameter.data_ptr())
