"""Packed rows of which only some tokens run through a model: keys and values of the others are known.

The tokens that run see the whole row's keys and values. Each layer puts those of its own tokens in their
places, so that whoever runs a row part by part (parents before what hangs under them) has all of them in the
end. The known ones are constants: no gradient flows into them.

Knows layouts, attention and the numbers of layers; not where known keys come from, nor models.
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
        whole: the row's layout. places: (M,) ascending, of the tokens that run.
        keys: by layer, keys (T, key heads, d) and values (T, key heads, d_v), anything where nothing is
            known yet; layers that are missing are added.
    """

    whole: Layout
    places: Tensor
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    made_of: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """Tokens that run."""
        return int(self.places.shape[0])

    def joined(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The whole row's keys and values in layer ``number``, with those of the tokens that run, (M, …)."""
        if number not in self.keys:
            empty = (t.new_zeros(self.whole.length, *t.shape[1:]) for t in (key, value))
            self.keys[number] = tuple(empty)  # type: ignore[assignment]
        for whole, own in zip(self.keys[number], (key, value), strict=True):
            whole.index_copy_(0, self.places, own)
        return self.keys[number]


def number_of(module: nn.Module) -> int:
    """The number that a layer, or the attention in a block, has in its model.

    Raises:
        RuntimeError: it has none.
    """
    for part in module.modules():
        number = getattr(part, "layer_idx", None)
        if isinstance(number, int):
            return number
    raise RuntimeError(f"{type(module).__name__} does not say which layer it is")


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PartialLayout, number: int, **how: Any
) -> Tensor:
    """:func:`deltaw.kernels.attention.packed_attention` of the tokens that run, in layer ``number``.

    Args:
        query: (heads, M, d). key, value: (key heads, M, d) and (key heads, M, d_v).
        how: scaling, window and softcap.

    Returns:
        (heads, M, d_v).
    """
    rows = (t.transpose(0, 1) for t in (query, key, value))
    return _PartialAttention.apply(*rows, layout, number, {**how, "picked": layout.places}).transpose(0, 1)


class _PartialAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PartialLayout, number: int, how: dict[str, Any]
    ) -> Tensor:
        keys, values = layout.joined(number, key, value)
        out, kept = attend(query, keys, values, layout.whole, **how)
        compiled = is_compiled(query, keys, values)
        ctx.save_for_backward(query, keys, values, out if compiled else None, *kept)
        ctx.layout, ctx.how = layout, how
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, keys, values, out, *kept = ctx.saved_tensors
        d_q, *others = attend_backward(grads[0], query, keys, values, out, kept, ctx.layout.whole, **ctx.how)
        d_k, d_v = (t.index_select(0, ctx.layout.places) for t in others)
        return d_q, d_k, d_v, None, None, None
