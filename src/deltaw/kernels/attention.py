"""Attention over a forest of segments, forward and backward, without padding and without a whole mask.

Each tile of the layout is a few matrix products of its queries against its own keys; tiles of one shape are
computed together. The heads that share a key (grouped-query attention) are folded into the rows of one
product, so that nothing is expanded. Kept for the backward are queries, keys and values; the weights are
computed again, batch by batch, unless they are small beside those (see KEPT_WEIGHTS).

Knows tensors and tiles; not models, tokens or caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.kernels.layout import Layout, TileBatch, Tiles

# Attention weights are kept for the backward where they take at most so many times the room of q, k and v.
KEPT_WEIGHTS = 2.0


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
        inputs), the products with the values in the inputs' own dtype.
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
    def forward(ctx, query, key, value, tiles: Tiles, scaling, softcap):  # type: ignore[override]
        key_heads = key.shape[0]
        wide = _score_dtype(query)
        queries = query.to(wide).mul(scaling).index_select(1, tiles.gather)
        wide_key = key.to(wide)
        products, kept, at = [], [], 0
        keep = softcap is None and _weights_bytes(query, tiles) <= KEPT_WEIGHTS * _nbytes(query, key, value)
        for batch in tiles.batches:
            rows = _folded(queries[:, at : at + batch.count * batch.queries], key_heads, batch)
            weights, _ = _weights(rows, _gathered(wide_key, batch), batch, softcap)
            product = torch.bmm(weights.to(value.dtype), _gathered(value, batch))
            products.append(_unfolded(product, key_heads, batch))
            if keep:
                kept.append(weights)
            at += batch.count * batch.queries
        ctx.save_for_backward(query, key, value, *kept)
        ctx.tiles, ctx.scaling, ctx.softcap = tiles, scaling, softcap
        return torch.cat(products, dim=1).index_select(1, tiles.slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # type: ignore[override]
        query, key, value, *kept = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        key_heads = key.shape[0]
        wide = _score_dtype(query)
        # Several tiles write into the keys that they share: their sum is kept wide and rounded once.
        grad_key, grad_value = (torch.zeros_like(t, dtype=wide).flatten(0, 1) for t in (key, value))
        queries, grads = query.index_select(1, tiles.gather), grad_out.index_select(1, tiles.gather)
        grads.index_fill_(1, tiles.filling, 0)  # what only fills a tile up must not reach the keys
        grad_queries, at = [], 0
        for number, batch in enumerate(tiles.batches):
            there = slice(at, at + batch.count * batch.queries)
            at = there.stop
            grad = _folded(grads[:, there], key_heads, batch)
            rows = _folded(queries[:, there], key_heads, batch)
            keys, values = _gathered(key, batch), _gathered(value, batch)
            if kept:
                weights, slope = kept[number], None
            else:
                weights, slope = _weights(rows.to(wide).mul(ctx.scaling), keys.to(wide), batch, ctx.softcap)
            places = _places(batch, key_heads, key.shape[1])
            _scatter(grad_value, places, torch.bmm(weights.to(value.dtype).transpose(1, 2), grad))
            grad_weights = torch.bmm(grad, values.transpose(1, 2)).to(wide)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, wide)
            if slope is not None:
                grad_scores.mul_(slope)
            grad_scores = grad_scores.mul_(ctx.scaling).to(query.dtype)
            _scatter(grad_key, places, torch.bmm(grad_scores.transpose(1, 2), rows))
            grad_queries.append(_unfolded(torch.bmm(grad_scores, keys), key_heads, batch))
        grad_query = torch.cat(grad_queries, dim=1).index_select(1, tiles.slots)
        grad_key, grad_value = grad_key.view_as(key), grad_value.view_as(value)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _weights_bytes(query: Tensor, tiles: Tiles) -> int:
    pairs = sum(b.count * b.queries * b.keys.shape[1] for b in tiles.batches)
    return pairs * query.shape[0] * _score_dtype(query).itemsize


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _score_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _folded(rows: Tensor, key_heads: int, batch: TileBatch) -> Tensor:
    """(heads, n·L, d) as (key heads · n, group · L, d): heads that share a key laid below one another."""
    size = rows.shape[-1]
    by_tile = rows.view(key_heads, -1, batch.count, batch.queries, size).transpose(1, 2)
    return by_tile.reshape(key_heads * batch.count, -1, size)


def _unfolded(rows: Tensor, key_heads: int, batch: TileBatch) -> Tensor:
    """The reverse of :func:`_folded`."""
    size = rows.shape[-1]
    by_head = rows.view(key_heads, batch.count, -1, batch.queries, size).transpose(1, 2)
    return by_head.reshape(-1, batch.count * batch.queries, size)


def _gathered(per_key: Tensor, batch: TileBatch) -> Tensor:
    """The keys or values of each tile: (key heads · n, K, d)."""
    picked = per_key.index_select(1, batch.keys.flatten())
    return picked.view(-1, batch.keys.shape[1], per_key.shape[-1])


def _places(batch: TileBatch, key_heads: int, length: int) -> Tensor:
    """Where each gathered key stands in (key heads · T, d)."""
    heads = torch.arange(key_heads, device=batch.keys.device)[:, None] * length
    return (heads + batch.keys.flatten()).flatten()


def _scatter(into: Tensor, places: Tensor, part: Tensor) -> None:
    into.index_add_(0, places, part.flatten(0, 1).to(into.dtype))


def _weights(
    rows: Tensor, keys: Tensor, batch: TileBatch, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Attention weights (key heads · n, group · L, K) of scaled queries, and the soft cap's slope where there
    is one. Both inputs are wide already."""
    scores = torch.bmm(rows, keys.transpose(1, 2))
    slope = None
    if softcap is not None:
        capped = torch.tanh_(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    width = batch.hidden.shape[-1]
    if width:
        by_tile = scores.view(
            -1, batch.count, scores.shape[1] // batch.queries, batch.queries, scores.shape[2]
        )
        by_tile[..., -width:].masked_fill_(batch.hidden[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1), slope
