"""Mapping between tensors in weight files and parameters of a model.

Names in files can differ from those in the model: the prefix of the base model may be missing, and transformers renames
tensors or assembles a parameter from several tensors (fused experts). The mapping uses the rules of transformers
(``conversion_mapping``) and reads only names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from deltaw.hub.transformers_private import complete_skeleton
from deltaw.lora.complete_names import NameMap, complete_names


@dataclass(frozen=True)
class ParameterNames:
    """Mapping between a checkpoint's tensors and a model's parameters.

    Attributes:
        stored: Name on disk by name of the parameter or buffer.
        converted: Names on disk by parameter, for parameters that transformers assembles from several tensors or
            converts while loading.
        unused: Names on disk that the model does not use.
    """

    stored: dict[str, str]
    converted: dict[str, list[str]]
    unused: list[str]


def match_names(model: PreTrainedModel, tensors: Mapping[str, object]) -> ParameterNames:
    """Match the tensors of a checkpoint to the parameters of ``model``.

    Args:
        model: Model, which may be on the meta device.
        tensors: Tensors by name on disk. Only the names are used.
    """
    if (mapping := complete_names(model)) is not None:
        return _match_view(mapping, match_names(complete_skeleton(mapping.config), tensors))
    parameters: dict[str, Tensor] = dict(model.state_dict())
    stored: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    unused = []
    rename = _renaming(model, parameters)
    for name in tensors:
        target, is_converted = rename(name)
        if target not in parameters:
            unused.append(name)
        elif is_converted:
            converted.setdefault(target, []).append(name)
        else:
            stored[target] = name
    return ParameterNames(stored, converted, unused)


def _match_view(mapping: NameMap, names: ParameterNames) -> ParameterNames:
    """Return the names of a text view from those of its complete model."""
    view = {name: mapping.from_complete(name) for name in (*names.stored, *names.converted)}
    outside = [stored for name, stored in names.stored.items() if view[name] is None]
    outside += [stored for name, several in names.converted.items() if view[name] is None for stored in several]
    return ParameterNames(
        stored={key: stored for name, stored in names.stored.items() if (key := view[name]) is not None},
        converted={key: stored for name, stored in names.converted.items() if (key := view[name]) is not None},
        unused=names.unused + outside,
    )


def _renaming(model: PreTrainedModel, parameters: dict[str, Tensor]) -> Callable[[str], tuple[str, bool]]:
    """Return a function that maps a name on disk to a parameter, and to True if transformers converts the tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]

    def rename(name: str) -> tuple[str, bool]:
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        return target, converter is not None

    return rename


def find_stored_name(model: PreTrainedModel, parameter: str, names: ParameterNames) -> str | None:
    """Return a name on disk that transformers loads as ``parameter``, or None.

    It can be used for new tensors, for example an untied head.
    """
    if parameter in names.stored:
        return names.stored[parameter]
    rename = _renaming(model, dict(model.state_dict()))
    used_names = {*names.stored.values(), *names.unused, *(n for some in names.converted.values() for n in some)}
    candidates = [parameter, parameter.removeprefix(f"{model.base_model_prefix}.")]
    module, _, attribute = parameter.rpartition(".")
    for sibling, name in names.stored.items():
        if sibling.rpartition(".")[0] == module:  # a bias has the same prefix as its weight
            candidates.insert(0, f"{name.rpartition('.')[0]}.{attribute}")
    for candidate in candidates:
        if candidate not in used_names and rename(candidate) == (parameter, False):
            return candidate
    return None
