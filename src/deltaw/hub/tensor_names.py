"""Which tensor of a model's weight files is which of its parameters.

Files are not always named as the model's modules are: the base model's prefix may be missing, transformers
renames, and it may build one parameter of several tensors (experts that are fused while they are loaded).
Its own rules say which (``conversion_mapping``), applied to the names alone; no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Names:
    """How a checkpoint's tensors and a model's parameters belong together.

    Attributes:
        stored: by a parameter's or buffer's name, its name on disk.
        converted: by a parameter that is built of several tensors, or of one that is changed on the way: the
            tensors' names on disk.
        unused: on disk, and not in the model.
    """

    stored: dict[str, str]
    converted: dict[str, list[str]]
    unused: list[str]


def names_on_disk(model: PreTrainedModel, tensors: Mapping[str, object]) -> Names:
    """Which tensor of a checkpoint is which parameter of ``model``.

    Args:
        model: need not have values; its weights' names and its class count.
        tensors: by their names on disk.
    """
    known: dict[str, Tensor] = dict(model.state_dict())
    stored: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    unused = []
    renamed = Renaming(model, known)
    for name in tensors:
        target, changed = renamed(name)
        if target not in known:
            unused.append(name)
        elif changed:
            converted.setdefault(target, []).append(name)
        else:
            stored[target] = name
    return Names(stored, converted, unused)


class Renaming:
    """transformers' own renaming of a name on disk, and whether the tensor itself is changed."""

    def __init__(self, model: PreTrainedModel, known: dict[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(model)
        self._rename = rename_source_key
        self._renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self._converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = known

    def __call__(self, name: str) -> tuple[str, bool]:
        target, converter = self._rename(name, self._renamings, self._converters, self._prefix, self._known)
        return target, converter is not None
