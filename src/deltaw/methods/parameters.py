"""Parameters of a model by name: found, trained in place, untied, and loaded from a file.

It knows modules and names; not which parameters a method wants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from deltaw.errors import UserError, did_you_mean
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.places import ParameterPlace, as_before, spots_of
from deltaw.lora.stored import block_weight, quantized_as


def names_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under every name that it has, tied ones several times."""
    return dict(model.named_parameters(remove_duplicate=False))


def inside(modules: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names of the parameters inside one of the modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return [name for name in names if name.startswith(prefixes)] if prefixes else []


def modules_named(model: nn.Module, entries: Iterable[str], where: str) -> list[str]:
    """Full names of the modules whose name is an entry or ends with it after a dot.

    Raises:
        UserError: an entry matches nothing; the message names the nearest.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for entry in entries:
        hits = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not hits:
            raise UserError(f"'{entry}' is no module of the model", where=where, hint=did_you_mean(entry, names))
        found.update(dict.fromkeys(hits))
    return list(found)


def train_places(model: nn.Module, names: Iterable[str]) -> list[ParameterPlace]:
    """Freeze the model and make the parameters of these names trainable in place.

    A parameter that is tied to a name outside ``names`` is copied first. So training one of the two leaves
    the other as it was.
    """
    wanted = list(dict.fromkeys(names))
    everywhere = names_of(model)
    _refuse_blocks(model, wanted)
    model.requires_grad_(False)
    chosen = set(wanted)
    outside = {id(p) for name, p in everywhere.items() if name not in chosen}
    together: dict[int, list[str]] = {}
    for name in wanted:
        if everywhere[name].is_floating_point():
            together.setdefault(id(everywhere[name]), []).append(name)
    places: list[ParameterPlace] = []
    for same in together.values():
        before = everywhere[same[0]]
        now = nn.Parameter(before.detach().clone()) if id(before) in outside else before
        now.requires_grad_(True)
        places.append(ParameterPlace(tuple(same), spots_of(model, same), before, now))
        places[-1].put_current()
    return places


def _refuse_blocks(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if last == "weight" and block_weight(module) is not None:
            what = f"the weight of '{path}' is {quantized_as(module)} and cannot be trained itself"
            raise UserError(what, where="method", hint="use method lora, bias or prompt, or precision: bf16")


def add_biases(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> list[ParameterPlace]:
    """Give linear layers that have no bias one of zeros (out,), trainable."""
    places = []
    for name, module in modules:
        weight = own_parameters(module)["weight"]
        assert weight is not None
        dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
        bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=dtype, device=weight.device))
        places.append(ParameterPlace((f"{name}.bias",), [(module, "bias")], None, bias))
        places[-1].put_current()
    return places


def keep_base(places: Iterable[ParameterPlace]) -> bool:
    """Whether every place still has the base model's own parameter: none was trained in place."""
    return all(place.current is not place.original for place in places)


def as_base(model: nn.Module, places: Sequence[ParameterPlace], method: str) -> contextlib.AbstractContextManager[None]:
    """Within the block every place has the base model's own parameter.

    Raises:
        UserError: one was trained in place.
    """
    if not keep_base(places):
        what = f"method '{method}' trained the base model's parameters in place, and kept no copy of them"
        raise UserError(what, where="method", hint="open the saved adapter on the base model")
    return as_before(model, places)


def put_loaded(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], tied: Mapping[str, Sequence[str]], where: str
) -> list[ParameterPlace]:
    """Put tensors from a file into the model under their names, frozen.

    The base model's own parameters are kept, so that they can be put back. A bias may be added where the
    model has none.

    Args:
        tied: further names that a tensor's parameter has.

    Raises:
        UserError: a name or a shape does not fit the model; nothing is changed then.
    """
    places: list[ParameterPlace] = []
    hint = "load it onto the base model that it was trained on"
    for name, tensor in tensors.items():
        names = (name, *tied.get(name, ()))
        try:
            spots = spots_of(model, names)
        except AttributeError:
            spots = []
        if not spots or any(attribute not in own_parameters(module) for module, attribute in spots):
            raise UserError(f"the adapter trains '{name}', which the model does not have", where=where, hint=hint)
        module, attribute = spots[0]
        before = own_parameters(module)[attribute]
        like = own_parameters(module).get("weight") if before is None and attribute == "bias" else before
        shape = None if like is None else tuple(like.shape[:1] if before is None else like.shape)
        if like is None or tuple(tensor.shape) != shape:
            what = f"'{name}' is {tuple(tensor.shape)} in the adapter and {shape} in the model"
            raise UserError(what, where=where, hint=hint)
        now = nn.Parameter(tensor.to(device=like.device, dtype=like.dtype), requires_grad=False)
        places.append(ParameterPlace(names, spots, before, now))
    for place in places:
        place.put_current()
    return places
