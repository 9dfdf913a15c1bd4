"""Packed rows of which only some tokens run, because the remaining keys and values are available.

The tokens that run attend to keys and values of the entire row. Each layer stores theirs at their indices, so that a
row can run in parts, parents before children. Available keys and values are constants without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.kernels.attention import attend, attend_backward, is_compiled
from deltaw.kernels.layout import Layout


@dataclass(eq=False)
class PartialLayout:
    """A packed row with T tokens, M of which run.

    Args:
        row_layout: Layout of the entire row.
        token_indices: (M,) ascending indices of the tokens that run.
        keys: Keys (T, key heads, d) and values (T, key heads, d_v) by layer, with undefined entries for tokens that
            have
            not run. Missing layers are added.
    """

    row_layout: Layout
    token_indices: Tensor
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cached_tensors: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """Number of tokens that run."""
        return int(self.token_indices.shape[0])

    def update_keys(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (M, …) of the tokens that run in a layer, and return those of the entire row."""
        if layer not in self.keys:
            empty = (t.new_zeros(self.row_layout.length, *t.shape[1:]) for t in (key, value))
            self.keys[layer] = tuple(empty)  # type: ignore[assignment]
        for stored, current in zip(self.keys[layer], (key, value), strict=True):
            stored.index_copy_(0, self.token_indices, current)
        return self.keys[layer]


def layer_index_of(module: nn.Module) -> int:
    """Return the index of a layer, or of the attention in a block.

    Raises:
        RuntimeError: if the module has no index.
    """
    for part in module.modules():
        index = getattr(part, "layer_idx", None)
        if isinstance(index, int):
            return index
    raise RuntimeError(f"{type(module).__name__} has no layer index")


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PartialLayout, layer: int, **options: Any
) -> Tensor:
    """Return :func:`deltaw.kernels.attention.packed_attention` of the tokens that run.

    Args:
        query: (heads, M, d).
        key: (key heads, M, d).
        value: (key heads, M, d_v).
        layer: Index of the layer.
        options: ``scaling``, ``window`` and ``softcap``.

    Returns:
        (heads, M, d_v).
    """
    rows = (t.transpose(0, 1) for t in (query, key, value))
    options["rows"] = layout.token_indices
    return _PartialAttention.apply(*rows, layout, layer, options).transpose(0, 1)


class _PartialAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PartialLayout, layer: int, options: dict[str, Any]
    ) -> Tensor:
        keys, values = layout.update_keys(layer, key, value)
        out, saved = attend(query, keys, values, layout.row_layout, **options)
        ctx.save_for_backward(query, keys, values, out if is_compiled(query, keys, values) else None, *saved)
        ctx.layout = layout
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, keys, values, out, *saved = ctx.saved_tensors
        d_q, *rest = attend_backward(grads[0], query, keys, values, out, saved, ctx.layout.row_layout, **ctx.options)
        d_k, d_v = (t.index_select(0, ctx.layout.token_indices) for t in rest)
        return d_q, d_k, d_v, None, None, None
