"""Tensors of a model in the form that llama.cpp reads.

Most tensors are stored unchanged, with the name that the ``gguf`` package gives them. Each family lists the exceptions
as :class:`TensorRule`: tensors with another name, and tensors that are split, stacked, reordered or changed.

Functions of rows or columns also apply to the factors of an update ΔW = B·A: functions of rows to the rows of B, and
functions of columns to the columns of A.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import gguf
import torch
from gguf import MODEL_ARCH
from torch import Tensor

from deltaw.export.merged import MergedTensor

TensorFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TensorRule:
    """Form of some tensors in a GGUF file. A tensor that matches several rules is stored once per rule.

    Attributes:
        pattern: Regular expression of the end of a tensor's name. Tensors whose names differ only in the group
            ``expert`` are stacked, sorted by this number.
        name: Name in the file, without the number of the block. None for the name of the ``gguf`` package.
        rows: Linear function of the rows of a weight, of a bias or of a factor B, such as an order or a selection.
        columns: Linear function of the columns of a weight or of a factor A.
        values: Any other function of the values. Adapters cannot update such a tensor.
        layout: Function of a complete weight that does not apply to the factors of an update. An example is the
            transpose of weights that the model's files store as (in, out).
        outside_blocks: True if the name in the file contains no block number.
        adaptable: False if llama.cpp ignores updates of the tensor.
    """

    pattern: str
    name: str | None = None
    rows: TensorFunction | None = None
    columns: TensorFunction | None = None
    values: TensorFunction | None = None
    layout: TensorFunction | None = None
    outside_blocks: bool = False
    adaptable: bool = True

    def match(self, tensor: str) -> re.Match[str] | None:
        """Match a complete tensor name."""
        return re.fullmatch(rf"(?:.*\.)?(?:{self.pattern})", tensor)

    def convert(self, tensor: Tensor) -> Tensor:
        """Return the stored values of a tensor in fp32."""
        tensor = tensor.float()
        for function in (self.layout, self.rows, self.columns, self.values):
            if function is not None:
                tensor = function(tensor)
        return tensor.contiguous()


_UNCHANGED = TensorRule("")


@dataclass(frozen=True)
class StoredForm:
    """Name of a tensor in a GGUF file, and the rule that creates its values.

    Attributes:
        name: Complete name in the file.
        rule: Rule of the values.
        expert: Index in a stack of tensors, or None.
    """

    name: str
    rule: TensorRule
    expert: int | None = None


@dataclass
class GGUFTensor:
    """Tensor of a GGUF file.

    Attributes:
        rule: Rule of the values.
        sources: Tensors of the merged model by their index in the stack, or one tensor with the index None.
    """

    rule: TensorRule
    sources: dict[int | None, MergedTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file, slowest dimension first."""
        first = next(iter(self.sources.values()))
        shape = tuple(self.rule.convert(torch.empty(first.shape, device="meta")).shape)
        return shape if None in self.sources else (len(self.sources), *shape)

    def load(self) -> Tensor:
        """Return the values in fp32. Sources are loaded one at a time to save memory."""
        if None in self.sources:
            return self.rule.convert(self.sources[None].load())
        stack = torch.empty(self.shape)
        for index in range(len(self.sources)):
            stack[index] = self.rule.convert(self.sources[index].load())
        return stack


class TensorForms:
    """Maps tensors of a model to those of a GGUF file.

    Args:
        arch: Identifier of the architecture in the ``gguf`` package.
        layers: Number of layers.
        rules: Rules of the family.
    """

    def __init__(self, arch: MODEL_ARCH, layers: int, rules: Sequence[TensorRule]) -> None:
        self._map = gguf.get_tensor_name_map(arch, layers)
        self._rules = rules

    def of_tensor(self, tensor: str) -> list[StoredForm]:
        """Return the forms of a tensor of the model. The list is empty if the architecture has no such tensor."""
        forms = []
        for rule in self._rules:
            if (match := rule.match(tensor)) is None:
                continue
            expert = match.groupdict().get("expert")
            name = self._name(tensor, rule)
            if name is not None:
                forms.append(StoredForm(name, rule, None if expert is None else int(expert)))
        if not forms and (name := self._name(tensor, _UNCHANGED)) is not None:
            forms.append(StoredForm(name, _UNCHANGED))
        return forms

    def _name(self, tensor: str, rule: TensorRule) -> str | None:
        if rule.name is not None:
            block = re.search(r"\.(\d+)\.", tensor)
            return rule.name if rule.outside_blocks or block is None else f"blk.{block[1]}.{rule.name}"
        module, _, attribute = tensor.rpartition(".")
        name = self._map.get_name(module) if attribute in ("weight", "bias") else None
        return None if name is None else f"{name}.{attribute}"


_LANGUAGE_MODEL = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?P<name>.+)")


def is_in_language_model(name: str) -> bool:
    """True for a tensor of the language model in the files of a vision-language model."""
    return name == "lm_head.weight" or _LANGUAGE_MODEL.fullmatch(name) is not None


def language_name(name: str) -> str:
    """Convert the name of a tensor or module in a vision-language model to its name in the text-only model."""
    match = _LANGUAGE_MODEL.fullmatch(name)
    if match is None:
        return name
    return match["name"] if match["name"].startswith("lm_head") else f"model.{match['name']}"


def half_selectors(dim: int = 0) -> tuple[TensorFunction, TensorFunction]:
    """Return functions that select the first and the second half of a tensor."""
    return (lambda tensor: tensor.chunk(2, dim)[0]), (lambda tensor: tensor.chunk(2, dim)[1])


def split_rules(pattern: str, names: Iterable[str], *, stacked: bool = False) -> list[TensorRule]:
    """Return rules for a weight whose rows are the gate projection of an MLP, followed by its up projection.

    Args:
        pattern: Pattern of the weight.
        names: Names of the gate and up projections in the file.
        stacked: True for a weight (experts, rows, columns).
    """
    parts = zip(names, half_selectors(1 if stacked else 0), strict=True)
    if stacked:
        return [TensorRule(pattern, name, values=half) for name, half in parts]
    return [TensorRule(pattern, name, rows=half) for name, half in parts]


def adjacent_pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from halves (xᵢ, xᵢ₊d/2) to adjacent pairs (x₂ᵢ, x₂ᵢ₊₁).

    Args:
        rows: (heads · d, …) rows with even d.
        heads: Number of heads.
    """
    by_half = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return torch.movedim(by_half, 1, 2).reshape(rows.shape)


def exchange_groups(tensor: Tensor, groups: int, members: int, dim: int = 0) -> Tensor:
    """Reorder equal parts along a dimension from (groups, members) to (members, groups).

    Args:
        tensor: Tensor whose size in ``dim`` is a multiple of groups · members.
        groups: Number of groups.
        members: Number of parts per group.
        dim: Dimension.
    """
    dim = dim % tensor.dim()
    parts = tensor.unflatten(dim, (groups, members, -1))
    return parts.transpose(dim, dim + 1).flatten(dim, dim + 2)
