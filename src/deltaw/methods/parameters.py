"""Find a model's parameters by name, train them in place, untie them, and load them from a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from deltaw.errors import UserError, did_you_mean
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.replacements import ReplacedParameter, find_spots, originals_restored
from deltaw.lora.stored import block_weight, describe_quantization


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by name. A tied parameter occurs under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def names_inside(modules: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the names of the parameters inside one of the modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return [name for name in names if name.startswith(prefixes)] if prefixes else []


def find_modules(model: nn.Module, entries: Iterable[str], location: str) -> list[str]:
    """Return the full names of the modules whose name equals an entry or ends with it after a dot.

    Raises:
        UserError: if an entry matches no module. The hint suggests similar names.
    """
    names = [name for name, _ in model.named_modules() if name]
    matches: dict[str, None] = {}
    for entry in entries:
        entry_matches = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not entry_matches:
            raise UserError(f"the model has no module '{entry}'", location=location, hint=did_you_mean(entry, names))
        matches.update(dict.fromkeys(entry_matches))
    return list(matches)


def make_trainable(model: nn.Module, names: Iterable[str]) -> list[ReplacedParameter]:
    """Freeze the model and make the named parameters trainable in place.

    A parameter that is tied to a name outside ``names`` is copied first, so that training it does not change the other.
    """
    unique_names = list(dict.fromkeys(names))
    parameters = parameters_by_name(model)
    _reject_quantized(model, unique_names)
    model.requires_grad_(False)
    selected = set(unique_names)
    other_ids = {id(p) for name, p in parameters.items() if name not in selected}
    names_by_parameter: dict[int, list[str]] = {}
    for name in unique_names:
        if parameters[name].is_floating_point():
            names_by_parameter.setdefault(id(parameters[name]), []).append(name)
    replacements: list[ReplacedParameter] = []
    for aliases in names_by_parameter.values():
        original = parameters[aliases[0]]
        current = nn.Parameter(original.detach().clone()) if id(original) in other_ids else original
        current.requires_grad_(True)
        replacements.append(ReplacedParameter(tuple(aliases), find_spots(model, aliases), original, current))
        replacements[-1].put_current()
    return replacements


def _reject_quantized(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute == "weight" and block_weight(module) is not None:
            message = f"the weight of '{path}' is {describe_quantization(module)} and cannot be trained"
            raise UserError(message, location="method", hint="use method lora, bias or prompt, or precision: bf16")


def add_biases(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> list[ReplacedParameter]:
    """Add a trainable zero bias (out,) to linear layers without bias."""
    replacements = []
    for name, module in modules:
        weight = direct_parameters(module)["weight"]
        assert weight is not None
        dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
        bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=dtype, device=weight.device))
        replacements.append(ReplacedParameter((f"{name}.bias",), [(module, "bias")], None, bias))
        replacements[-1].put_current()
    return replacements


def has_base(replacements: Iterable[ReplacedParameter]) -> bool:
    """True if no parameter was trained in place, so that the base model's values still exist."""
    return all(replacement.current is not replacement.original for replacement in replacements)


def base_restored(model: nn.Module, replaced: Sequence[ReplacedParameter], method: str) -> AbstractContextManager[None]:
    """Context manager in which the model has the base model's parameters.

    Raises:
        UserError: if a parameter was trained in place.
    """
    if not has_base(replaced):
        message = f"method '{method}' trained the base model's parameters in place, without a copy of the originals"
        raise UserError(message, location="method", hint="open the saved adapter on the base model")
    return originals_restored(model, replaced)


def load_parameters(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], tied: Mapping[str, Sequence[str]], location: str
) -> list[ReplacedParameter]:
    """Put tensors from a file into the model under their names, frozen.

    The base model's parameters are retained so that they can be restored. A bias is added if the layer has none.

    Args:
        model: Model to change.
        tensors: Tensors by parameter name.
        tied: Further names of a tensor's parameter, by its name in ``tensors``.
        location: Folder of the adapter, for error messages.

    Raises:
        UserError: if a name or a shape does not match the model, which is then unchanged.
    """
    replacements: list[ReplacedParameter] = []
    hint = "load it onto the base model that it was trained on"
    for name, tensor in tensors.items():
        names = (name, *tied.get(name, ()))
        try:
            spots = find_spots(model, names)
        except AttributeError:
            spots = []
        if not spots or any(attribute not in direct_parameters(module) for module, attribute in spots):
            raise UserError(f"the adapter trains '{name}', which the model does not have", location=location, hint=hint)
        module, attribute = spots[0]
        original = direct_parameters(module)[attribute]
        reference = direct_parameters(module).get("weight") if original is None and attribute == "bias" else original
        shape = None if reference is None else tuple(reference.shape[:1] if original is None else reference.shape)
        if reference is None or tuple(tensor.shape) != shape:
            message = f"'{name}' is {tuple(tensor.shape)} in the adapter and {shape} in the model"
            raise UserError(message, location=location, hint=hint)
        parameter = nn.Parameter(tensor.to(device=reference.device, dtype=reference.dtype), requires_grad=False)
        replacements.append(ReplacedParameter(names, spots, original, parameter))
    for replacement in replacements:
        replacement.put_current()
    return replacements
