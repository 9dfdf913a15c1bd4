"""Attention over a prefix tree of segments, forward and backward, without padding and without a whole mask.

Three ways give the same: a compiled kernel where it serves (``csrc/attention_*.cpp``), torch's FlexAttention
on devices that it is compiled on (:mod:`deltaw.kernels.flex`), and tiles of torch's own products elsewhere.
Of the last, each tile of the layout is a few matrix products of its queries against its own keys; tiles of
one shape are computed together. The heads that share a key (grouped-query attention) are folded into the rows
of one product, so that nothing is expanded. Kept for the backward are queries, keys and values; the weights
are computed again, batch by batch, unless they are small beside those (see KEPT_WEIGHTS).

Knows tensors and tiles; not models, tokens or caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.kernels import flex, loader
from deltaw.kernels.bounds import check_places, check_shape
from deltaw.kernels.layout import Layout, TileBatch, Tiles
from deltaw.kernels.operators import define
from deltaw.kernels.torch_private import softmax_backward

# Attention weights are kept for the backward where they take at most so many times the room of q, k and v.
KEPT_WEIGHTS = 2.0


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """softmax(scaling · Q Kᵀ) V where each query sees what the layout lets it see.

    Args:
        query: (heads, T, d). key, value: (key heads, T, d) and (key heads, T, d_v), where key heads divides
            heads and query heads ``i·g … i·g + g - 1`` share key head ``i``.
        window: sliding window in positions, as in :meth:`Layout.visible`.
        causal: without it a query sees all of its own segment; by the compiled kernel alone.
        softcap: scores become ``softcap · tanh(scores / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).

    Returns:
        (heads, T, d_v), in the dtype of ``value``. Scores and soft-max are computed in fp32 (fp64 for fp64
        inputs), the products with the values in the inputs' own dtype.
    """
    if causal:
        _check_inputs(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), layout, None)
        served = flex.served(
            query,
            key,
            value,
            layout,
            packed_attention_reference,
            scaling=scaling,
            window=window,
            softcap=softcap,
        )
        if served is not None:
            return served
    out = _PackedAttention.apply(
        *(t.transpose(0, 1) for t in (query, key, value)), layout, scaling, window, softcap, causal
    )
    return out.transpose(0, 1)


def packed_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The reference implementation of :func:`packed_attention`: all T × T scores at once, by autograd."""
    group = query.shape[0] // key.shape[0]
    wide = _score_dtype(query)
    keys, values = (t.repeat_interleave(group, dim=0) for t in (key, value))
    scores = scaling * (query.to(wide) @ keys.to(wide).transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.from_numpy(layout.visible(window)).to(query.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return weights.to(value.dtype) @ values


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, scaling, window, softcap, causal):  # type: ignore[override]
        how = {"scaling": scaling, "window": window, "softcap": softcap, "causal": causal}
        out, kept = attend(query, key, value, layout, **how)
        # The tiles need no outputs for their backward.
        ctx.save_for_backward(query, key, value, out if is_compiled(query, key, value) else None, *kept)
        ctx.layout, ctx.how = layout, how
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # type: ignore[override]
        query, key, value, out, *kept = ctx.saved_tensors
        grads = attend_backward(
            grad_out,
            query,
            key,
            value,
            out,
            kept,
            ctx.layout,
            **ctx.how,
        )
        return *grads, None, None, None, None, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    picked: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """:func:`packed_attention` of (T, heads, d) tensors, without a graph.

    Args:
        picked: (P), ascending: the places of the T at which the P queries stand; None where each one asks.

    Returns:
        (P or T, heads, d_v), and what :func:`attend_backward` needs of it.

    Raises:
        ValueError: the shapes do not fit each other or the layout, or the picked places do not ascend.
        IndexError: a picked place lies outside of the row.
        NotImplementedError: attention both ways without the compiled kernel.
    """
    _check_inputs(query, key, value, layout, picked)
    if is_compiled(query, key, value):
        segments = layout.segments()
        out, logs = _attention(
            query, key, value, segments, window or 0, causal, scaling, softcap or 0.0, picked
        )
        return out, [logs]
    if not causal:
        raise NotImplementedError("attention both ways needs the compiled kernel")
    q, k, v = (t.transpose(0, 1) for t in (_at_all_places(query, picked, len(key)), key, value))
    out, kept = _tiles_forward(q, k, v, layout.tiles(window), scaling, softcap)
    out = out.transpose(0, 1)
    return (out if picked is None else out.index_select(0, picked)), kept


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    kept: Sequence[Tensor],
    layout: Layout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    picked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, like them, from what :func:`attend` gave.

    Raises:
        ValueError: the gradient is not like the outputs.
    """
    check_shape("the gradient", grad, *query.shape[:2], value.shape[-1])
    if out is not None and is_compiled(query, key, value):
        (logs,) = kept
        segments, cap = layout.segments(), softcap or 0.0
        return _attention_backward(
            grad, query, key, value, out, logs, segments, window or 0, causal, scaling, cap, picked
        )
    spread = (_at_all_places(t, picked, len(key)) for t in (grad, query))
    d, q, k, v = (t.transpose(0, 1) for t in (*spread, key, value))
    of_q, of_k, of_v = (
        t.transpose(0, 1) for t in _tiles_backward(d, q, k, v, kept, layout.tiles(window), scaling, softcap)
    )
    return (of_q if picked is None else of_q.index_select(0, picked)), of_k, of_v


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, layout: Layout, picked: Tensor | None) -> None:
    """That (T, heads, d) tensors fit each other and the layout, and the queries their places."""
    length, key_heads, size = key.shape
    if length != layout.length:
        raise ValueError(f"there are {length} keys, and the layout has {layout.length} tokens")
    if not key_heads or query.shape[1] % key_heads:
        raise ValueError(f"{query.shape[1]} heads cannot share {key_heads} key heads")
    check_shape("the queries", query, length if picked is None else len(picked), query.shape[1], size)
    check_shape("the values", value, length, key_heads, value.shape[-1])
    # A fake tensor holds no positions to check. A device would be waited for, and torch checks indices there.
    if picked is not None and type(picked) is Tensor and picked.device.type == "cpu":
        check_places(picked, length)


def _at_all_places(rows: Tensor, picked: Tensor | None, length: int) -> Tensor:
    """(P, …) rows at their places of ``length``, zeros elsewhere."""
    return rows if picked is None else rows.new_zeros(length, *rows.shape[1:]).index_copy_(0, picked, rows)


def is_compiled(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the compiled kernel takes these: heads of an even size whose numbers lie side by side."""
    if not loader.serves(query, key, value):
        return False
    even = query.shape[-1] % 2 == 0 and value.shape[-1] % 2 == 0
    return even and query.shape[0] > 0 and all(t.stride(-1) == 1 for t in (query, key, value))


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([step for t in tensors for step in t.stride()[:2]], dtype=torch.int64)


def _compute_attention(query, key, value, segments, window, causal, scaling, softcap, picked):  # type: ignore[no-untyped-def]
    queries, heads, size = query.shape
    length, key_heads, value_size = value.shape
    out = query.new_empty(queries, heads, value_size)
    logs = torch.empty(heads, queries)
    strides = _strides(query, key, value, out)
    loader.kernels().dw_attention(
        loader.number(query.dtype), segments.data_ptr(), segments.shape[1], length, window, causal, heads,
        key_heads, size, value_size, scaling, softcap, loader.address(picked), queries,
        *(t.data_ptr() for t in (query, key, value, out, strides, logs)),
    )  # fmt: skip
    return out, logs


def _compute_attention_backward(  # type: ignore[no-untyped-def]
    grad, query, key, value, out, logs, segments, window, causal, scaling, softcap, picked
):
    queries, heads, size = query.shape
    length, key_heads, value_size = value.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grads = [t.new_empty(t.shape) for t in (query, key, value)]
    strides = _strides(query, key, value, out, grad, *grads)
    loader.kernels().dw_attention_backward(
        loader.number(query.dtype), segments.data_ptr(), segments.shape[1], length, window, causal, heads,
        key_heads, size, value_size, scaling, softcap, loader.address(picked), queries,
        *(t.data_ptr() for t in (query, key, value, out, grad, *grads)),
        strides.data_ptr(), logs.data_ptr(),
    )  # fmt: skip
    return tuple(grads)


def _pairs(segments: Tensor, window: int, causal: bool, picked: Tensor | None) -> int:
    """(query, key) pairs that are seen."""
    starts, stops, _, offsets = segments.tolist()
    if picked is not None and causal:
        positions = [0] * stops[-1]
        for start, stop, offset in zip(starts, stops, offsets, strict=True):
            positions[start:stop] = range(offset + 1, offset + 1 + stop - start)
        return sum(min(window, positions[at]) if window else positions[at] for at in picked.tolist())
    total = 0
    for start, stop, offset in zip(starts, stops, offsets, strict=True):
        size = stop - start
        if window and offset + size > window:
            total += sum(min(window, offset + at + 1) for at in range(size))
        else:
            total += size * offset + (size * (size + 1) // 2 if causal else size * size)
    return total


_attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor segments, int window, bool causal, "
    "float scaling, float softcap, Tensor? picked) -> (Tensor, Tensor)",
    _compute_attention,
    lambda query, key, value, *_: (
        query.new_empty(*query.shape[:2], value.shape[-1]),
        query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32),
    ),
    lambda query, key, value, segments, window, causal, scaling, softcap, picked: (
        2 * _pairs(segments, window, causal, picked) * query.shape[1] * (query.shape[2] + value.shape[2])
    ),
)
_attention_backward = define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logs, "
    "Tensor segments, int window, bool causal, float scaling, float softcap, Tensor? picked) "
    "-> (Tensor, Tensor, Tensor)",
    _compute_attention_backward,
    lambda grad, query, key, value, *_: tuple(t.new_empty(t.shape) for t in (query, key, value)),
    lambda grad, query, key, value, out, logs, segments, window, causal, scaling, softcap, picked: (
        2
        * _pairs(segments, window, causal, picked)
        * query.shape[1]
        * (3 * query.shape[2] + 2 * value.shape[2])
    ),
)


def _tiles_forward(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, scaling: float, softcap: float | None
) -> tuple[Tensor, list[Tensor]]:
    """(heads, T, d_v), and the weights of each batch of tiles where they are small enough to be kept."""
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
    return torch.cat(products, dim=1).index_select(1, tiles.slots), kept


def _tiles_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Sequence[Tensor],
    tiles: Tiles,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    key_heads = key.shape[0]
    wide = _score_dtype(query)
    # Several tiles write into the keys that they share: their sum is kept wide and rounded once.
    grad_key, grad_value = (
        torch.zeros(t.shape, dtype=wide, device=t.device).flatten(0, 1) for t in (key, value)
    )
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
            weights, slope = _weights(rows.to(wide).mul(scaling), keys.to(wide), batch, softcap)
        places = _places(batch, key_heads, key.shape[1])
        _scatter(grad_value, places, torch.bmm(weights.to(value.dtype).transpose(1, 2), grad))
        grad_weights = torch.bmm(grad, values.transpose(1, 2)).to(wide)
        grad_scores = softmax_backward(grad_weights, weights, -1, wide)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_scores = grad_scores.mul_(scaling).to(query.dtype)
        _scatter(grad_key, places, torch.bmm(grad_scores.transpose(1, 2), rows))
        grad_queries.append(_unfolded(torch.bmm(grad_scores, keys), key_heads, batch))
    grad_query = torch.cat(grad_queries, dim=1).index_select(1, tiles.slots)
    grad_key, grad_value = grad_key.view_as(key), grad_value.view_as(value)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


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
