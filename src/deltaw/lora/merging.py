"""Add ΔW to the weights and take it out again.

The sum is formed in fp32 and rounded once; taking ΔW out again gives back the very weights from before, not
W + ΔW − ΔW. All refusals come before the first change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.attachment import adapted_layers, unwrapped
from deltaw.lora.fingerprint import has_values


def merge(model: nn.Module, keep_original: bool = True) -> None:
    """Put W + ΔW into the weight of every adapted layer; outputs stay the same up to rounding.

    Args:
        model: has an adapter attached.
        keep_original: keep the weights from before, for :func:`unmerge` and ``disabled``, at the price of a
            second copy of the adapted weights.

    Raises:
        UserError: the adapter is merged already; a weight is used by another module as well (a tied head),
            whose outputs would change too; a kernel is grouped; or a sum is not finite. The model is then
            unchanged.
    """
    model = unwrapped(model)
    layers = adapted_layers(model)
    shared = shared_weights(model)
    for name, layer in layers:
        if layer.merged:
            raise UserError("the adapter is merged already", where=name, hint="call unmerge first")
        if others := _other_users(model, layer, shared):
            raise UserError(
                f"the weight of '{name}' is also that of '{others[0]}', whose outputs merging would change",
                where=name,
                hint="untie the two, or keep the adapter separate",
            )
        if reason := layer.merge_refusal():
            raise UserError(
                f"'{name}' cannot be merged: {reason}", where=name, hint="keep the adapter separate"
            )
    # Without room for all sums at once, they are computed twice: to check them, and to store them.
    sums: dict[str, Tensor] = {}
    for name, layer in layers:
        total = layer.merged_weight()
        if not torch.isfinite(total).all():
            raise UserError(
                f"the merged weight of '{name}' is not finite",
                where=name,
                hint="the adapter's factors are broken, or its values too large for the weight's type",
            )
        if keep_original:
            sums[name] = total
    for name, layer in layers:
        layer.set_merged(sums[name] if keep_original else layer.merged_weight(), keep_original)


def unmerge(model: nn.Module) -> None:
    """Give every adapted layer the weight it had before :func:`merge`, to the bit.

    Raises:
        UserError: nothing is merged, or the weights from before were not kept.
    """
    layers = adapted_layers(unwrapped(model))
    merged = [(name, layer) for name, layer in layers if layer.merged]
    if not merged:
        raise UserError("the adapter is not merged", hint="call merge first")
    for name, layer in merged:
        if layer._unmerged_weight is None:
            raise UserError(
                "the weights from before the merge were not kept",
                where=name,
                hint="merge with keep_original=True",
            )
    for _, layer in merged:
        layer.unset_merged()


def _other_users(model: nn.Module, layer: AdaptedLayer, shared: dict[int, list[str]]) -> list[str]:
    """The modules with the same weight that would not expect the merged one."""
    users = [(name, model.get_submodule(name)) for name in shared.get(id(layer.weight), ())]
    return [
        name
        for name, user in users
        if user is not layer.holder and not (isinstance(user, AdaptedLayer) and user.follows is layer)
    ]


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """For every parameter that more than one module uses: its id, and those modules' names."""
    users: dict[object, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in own_parameters(module).values():
            if parameter is not None:
                names = users.setdefault(_place(parameter), [])
                if name not in names:
                    names.append(name)
    return {
        id(parameter): users[_place(parameter)]
        for module in model.modules()
        for parameter in own_parameters(module).values()
        if parameter is not None and len(users[_place(parameter)]) > 1
    }


def _place(parameter: Tensor) -> object:
    """Where a parameter's numbers lie: two Parameters over the same memory are one weight."""
    if not has_values(parameter) or parameter.data_ptr() == 0:
        return id(parameter)
    return (parameter.device, parameter.data_ptr())
