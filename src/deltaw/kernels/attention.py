"""Attention over a forest of segments, forward and backward, without padding and without a whole mask.

Each tile of the layout is a few matrix products of its queries against its own keys. The heads that share a
key (grouped-query attention) are folded into the rows of one product, so that nothing is expanded. Nothing is
kept for the backward but queries, keys and values: the weights are computed again, tile by tile.

Knows tensors and tiles; not models, tokens or caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.kernels.layout import Layout, Tile

# Up to so many (query, key) pairs a tile's products are computed in fp32 even for bf16 inputs: low-precision
# libraries build a kernel for every shape, which for a small tile takes longer than it saves, and keep it.
SMALL_TILE = 128 * 256


def forest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scaling · Q Kᵀ) V where each query sees what the layout lets it see.

    Args:
        query: (heads, T, d). key, value: (key heads, T, d) and (key heads, T, d_v), where key heads divides
            heads and query heads ``i·g … i·g + g - 1`` share key head ``i``.
        window: sliding window in positions, as in :meth:`Layout.visible`.
        softcap: scores become ``softcap · tanh(scores / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).

    Returns:
        (heads, T, d_v), in the dtype of ``value``. Scores and soft-max are computed in fp32 (fp64 for fp64
        inputs), the other products in the inputs' own dtype, or in fp32 too where a tile is small.
    """
    return _ForestAttention.apply(query, key, value, layout.tiles(window), scaling, softcap)


def forest_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The plain twin of :func:`forest_attention`: all T × T scores at once, by autograd."""
    group = query.shape[0] // key.shape[0]
    wide = _score_dtype(query)
    keys, values = (t.repeat_interleave(group, dim=0) for t in (key, value))
    scores = scaling * (query.to(wide) @ keys.to(wide).transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.from_numpy(layout.visible(window)).to(query.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return weights.to(value.dtype) @ values


class _ForestAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, tiles: Sequence[Tile], scaling, softcap):  # type: ignore[override]
        heads, length, _ = query.shape
        out = value.new_empty(heads, length, value.shape[-1])
        for tile in tiles:
            dtype = _product_dtype(query, tile)
            rows = _folded(query, key, tile)
            weights, _ = _weights(rows, _gathered(key, tile), tile, scaling, softcap)
            product = torch.bmm(weights.to(dtype), _gathered(value, tile).to(dtype))
            out[:, tile.start : tile.stop] = product.view(heads, tile.stop - tile.start, -1)
        ctx.save_for_backward(query, key, value)
        ctx.tiles, ctx.scaling, ctx.softcap = tiles, scaling, softcap
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        heads = query.shape[0]
        wide = _score_dtype(query)
        grad_query = torch.empty_like(query)
        # Several tiles write into the keys that they share: their sum is kept wide and rounded once.
        grad_key = torch.zeros_like(key, dtype=wide)
        grad_value = torch.zeros_like(value, dtype=wide)
        for tile in ctx.tiles:
            dtype = _product_dtype(query, tile)
            rows = _folded(query, key, tile).to(dtype)
            keys, values = _gathered(key, tile).to(dtype), _gathered(value, tile).to(dtype)
            weights, slope = _weights(rows, keys, tile, ctx.scaling, ctx.softcap)
            grad = _folded(grad_out, key, tile).to(dtype)
            _scatter(grad_value, torch.bmm(weights.to(dtype).transpose(1, 2), grad), tile)
            grad_weights = torch.bmm(grad, values.transpose(1, 2)).to(wide)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, wide)
            if slope is not None:
                grad_scores.mul_(slope)
            grad_scores = grad_scores.mul_(ctx.scaling).to(dtype)
            grad_query[:, tile.start : tile.stop] = torch.bmm(grad_scores, keys).view(
                heads, tile.stop - tile.start, -1
            )
            _scatter(grad_key, torch.bmm(grad_scores.transpose(1, 2), rows), tile)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _score_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _product_dtype(query: Tensor, tile: Tile) -> torch.dtype:
    """What a tile's products are computed in (see SMALL_TILE)."""
    small = (tile.stop - tile.start) * tile.key_count <= SMALL_TILE
    return _score_dtype(query) if small and query.device.type == "cpu" else query.dtype


def _folded(per_head: Tensor, key: Tensor, tile: Tile) -> Tensor:
    """Rows of the tile with the heads of a group laid below one another: (key heads, group · rows, d)."""
    rows = per_head[:, tile.start : tile.stop]
    return rows.reshape(key.shape[0], -1, per_head.shape[-1])


def _gathered(per_key: Tensor, tile: Tile) -> Tensor:
    """The tile's keys or values side by side: (key heads, keys, d); a view where they lie in one piece."""
    if len(tile.keys) == 1:
        return per_key[:, tile.keys[0][0] : tile.keys[0][1]]
    return torch.cat([per_key[:, start:stop] for start, stop in tile.keys], dim=1)


def _scatter(into: Tensor, part: Tensor, tile: Tile) -> None:
    at = 0
    for start, stop in tile.keys:
        into[:, start:stop] += part[:, at : at + stop - start]
        at += stop - start


def _weights(
    rows: Tensor, keys: Tensor, tile: Tile, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Attention weights (key heads, group · rows, keys), and the soft cap's slope where there is one."""
    wide = _score_dtype(rows)
    scores = torch.bmm(rows.to(wide) * scaling, keys.to(wide).transpose(1, 2))
    slope = None
    if softcap is not None:
        capped = torch.tanh_(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    if tile.hidden is not None:
        height = tile.stop - tile.start
        scores.view(scores.shape[0], -1, height, scores.shape[-1]).masked_fill_(tile.hidden, float("-inf"))
    return torch.softmax(scores, dim=-1), slope
