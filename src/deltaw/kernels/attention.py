"""Attention over a prefix tree of segments, forward and backward, without padding and without a dense mask.

There are three implementations with the same results: the compiled kernels (``csrc/attention_*.cpp``) on CPUs that they
support, torch's kernels on GPUs that pass a trial (:mod:`deltaw.kernels.gpu_attention`), and tiles of torch matrix
products elsewhere.

Tiles: Each tile of the layout is a few matrix products of its queries and keys. Tiles of one shape are batched. Query
heads that share a key head (grouped-query attention) are folded into the rows of one product, so keys are not expanded.
The backward pass gets queries, keys and values and recomputes the attention weights batch by batch, unless they are
small enough to be saved (see MAX_SAVED_WEIGHTS).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from deltaw.kernels import gpu_attention, loader
from deltaw.kernels.dropout import apply_dropout, derived_seed
from deltaw.kernels.layout import Layout, TileBatch, Tiles
from deltaw.kernels.operators import accumulation_dtype, check_positions, check_shape, define, simulated_device
from deltaw.kernels.torch_private import softmax_backward

if TYPE_CHECKING:
    from typing import Unpack  # not available at runtime in Python 3.10


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of every packed-attention implementation.

    Attributes:
        scaling: Factor applied to the attention scores. Required.
        window: Sliding-window size in positions (see :meth:`Layout.visible`), or None for full attention.
        softcap: If set, scores become ``softcap · tanh(scores / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
        causal: Apply a causal mask within each segment. Without dropout, only the compiled kernel supports False.
        sinks: (heads) frozen logits that take part in the softmax of each head without a value, or None.
        dropout: Rate of dropout of the attention weights, which are then computed in tiles.
        seed: Seed of the dropout, see :func:`deltaw.kernels.dropout.apply_dropout`.
    """

    scaling: float
    window: int | None
    softcap: float | None
    causal: bool
    sinks: Tensor | None
    dropout: float
    seed: Tensor | None


# Attention weights are saved for the backward if they take at most this multiple of the memory of q, k and v.
MAX_SAVED_WEIGHTS = 2.0


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, **options: Unpack[AttentionOptions]
) -> Tensor:
    """Return softmax(scaling · Q Kᵀ) V with the visibility of a layout.

    Args:
        query: (heads, T, d) queries. Query heads ``i·g … i·g + g - 1`` share key head ``i``.
        key: (key heads, T, d) keys. The number of key heads divides the number of heads.
        value: (key heads, T, d_v) values.
        layout: Layout of the T tokens.
        **options: See :class:`AttentionOptions`.

    Returns:
        (heads, T, d_v) in the dtype of ``value``. Scores and softmax are computed in fp32 (fp64 for fp64 inputs),
        products
        with the values in the inputs' dtype.
    """
    of_tokens = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    score_options = options["scaling"], options.get("window"), options.get("softcap")
    causal = options.get("causal", True)
    sinks = options.get("sinks")
    dropout = options.get("dropout", 0.0)
    if sinks is not None and sinks.requires_grad:
        raise NotImplementedError("trained attention sinks require padded rows")
    if causal and sinks is None and not dropout:
        _check_inputs(*of_tokens, layout, None)
        if (out := gpu_attention.attend(query, key, value, layout, packed_reference, *score_options)) is not None:
            return out
    random = dropout, options.get("seed")
    return _PackedAttention.apply(*of_tokens, layout, *score_options, causal, sinks, *random).transpose(0, 1)


def packed_reference(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, **options: Unpack[AttentionOptions]
) -> Tensor:
    """Reference implementation of :func:`packed_attention`. Computes all T × T scores at once and supports autograd."""
    group = query.shape[0] // key.shape[0]
    softcap = options.get("softcap")
    dtype = accumulation_dtype(query)
    keys, values = (t.repeat_interleave(group, dim=0) for t in (key, value))
    scores = options["scaling"] * (query.to(dtype) @ keys.to(dtype).transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.from_numpy(layout.visible(options.get("window"))).to(query.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    if (sinks := options.get("sinks")) is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    return scores.softmax(dim=-1)[..., : keys.shape[1]].to(value.dtype) @ values


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, query, key, value, layout, scaling, window, softcap, causal, sinks, dropout, seed
    ):
        options = {"scaling": scaling, "window": window, "softcap": softcap, "causal": causal, "sinks": sinks}
        options |= {"dropout": dropout, "seed": seed}
        with torch.autocast(query.device.type, enabled=False):  # scores of tiles are fp32
            out, saved = attend(query, key, value, layout, **options)
        # The backward pass of the tiles does not use the outputs.
        needs_out = not dropout and is_compiled(query, key, value)
        ctx.save_for_backward(query, key, value, out if needs_out else None, *saved)
        ctx.layout = layout
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # type: ignore[override]
        query, key, value, out, *saved = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            grads = attend_backward(grad_out, query, key, value, out, saved, ctx.layout, **ctx.options)
        return *grads, *[None] * 8


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    rows: Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, list[Tensor]]:
    """Compute :func:`packed_attention` of (T, heads, d) tensors without recording a graph.

    Args:
        query: (P or T, heads, d) queries.
        key: (T, key heads, d) keys.
        value: (T, key heads, d_v) values.
        layout: Layout of the T tokens.
        rows: (P) ascending positions of the queries, or None if every token is a query.
        **options: See :class:`AttentionOptions`.

    Returns:
        (P or T, heads, d_v) outputs, and tensors to pass to :func:`attend_backward`.

    Raises:
        ValueError: if shapes do not match each other or the layout, or positions are not ascending.
        IndexError: if a position is out of bounds.
        NotImplementedError: if attention is bidirectional and the compiled kernel is not available.
    """
    _check_inputs(query, key, value, layout, rows)
    dropout = options.get("dropout", 0.0)
    causal = options.get("causal", True)
    if not dropout and is_compiled(query, key, value):
        out, logs = _attention(query, key, value, layout.segments(), *_kernel_options(options), rows)
        sinks = options.get("sinks")
        return (out, [logs]) if sinks is None else _add_sinks(out, logs, sinks)
    if not causal and not dropout:
        raise NotImplementedError("bidirectional attention requires the compiled kernel")
    q, k, v = (t.transpose(0, 1) for t in (spread_rows(query, rows, len(key)), key, value))
    out, saved = _forward(q, k, v, layout.tiles(options.get("window"), causal=causal), options)
    out = out.transpose(0, 1)
    return (out if rows is None else out.index_select(0, rows)), saved


def _add_sinks(out: Tensor, logs: Tensor, sinks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return outputs (P, heads, d) and log-sum-exp (heads, P), to base 2, with an additional logit of each head.

    The backward needs no further change: it computes the weights from the log-sum-exp.
    """
    total = torch.logaddexp2(logs, sinks.to(logs.dtype)[:, None] * math.log2(math.e))
    return out.mul_(torch.exp2(logs - total).t()[:, :, None]), [total]


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    saved: Sequence[Tensor],
    layout: Layout,
    *,
    rows: Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    Args:
        grad: (P or T, heads, d_v) gradient of the output.
        query: (P or T, heads, d) queries.
        key: (T, key heads, d) keys.
        value: (T, key heads, d_v) values.
        out: Output of :func:`attend`, required by the compiled kernel.
        saved: Saved tensors returned by :func:`attend`.
        layout: Layout of the T tokens.
        rows: As for :func:`attend`.
        **options: See :class:`AttentionOptions`.

    Raises:
        ValueError: if the shape of ``grad`` is not that of the outputs.
    """
    check_shape("the gradient", grad, *query.shape[:2], value.shape[-1])
    if out is not None and not options.get("dropout") and is_compiled(query, key, value):
        (logs,) = saved
        segments = layout.segments()
        return _attention_backward(grad, query, key, value, out, logs, segments, *_kernel_options(options), rows)
    scattered = (spread_rows(t, rows, len(key)) for t in (grad, query))
    d, q, k, v = (t.transpose(0, 1) for t in (*scattered, key, value))
    tiles = layout.tiles(options.get("window"), causal=options.get("causal", True))
    grads = _backward(d, q, k, v, saved, tiles, options)
    grad_query, grad_key, grad_value = (t.transpose(0, 1) for t in grads)
    return (grad_query if rows is None else grad_query.index_select(0, rows)), grad_key, grad_value


def _kernel_options(options: AttentionOptions) -> tuple[int, bool, float, float]:
    """Return window, causal, scaling and soft cap as passed to the kernels."""
    return options.get("window") or 0, options.get("causal", True), options["scaling"], options.get("softcap") or 0.0


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, layout: Layout, output_rows: Tensor | None) -> None:
    """Check the shapes of (T, heads, d) tensors against each other, the layout and the query positions."""
    length, key_heads, size = key.shape
    if length != layout.length:
        raise ValueError(f"got {length} keys, but the layout has {layout.length} tokens")
    if not key_heads or query.shape[1] % key_heads:
        raise ValueError(f"{query.shape[1]} heads cannot share {key_heads} key heads")
    check_shape("the queries", query, length if output_rows is None else len(output_rows), query.shape[1], size)
    check_shape("the values", value, length, key_heads, value.shape[-1])
    # Fake tensors have no values. On a device the check would synchronize, and torch checks indices there anyway.
    if output_rows is not None and type(output_rows) is Tensor and output_rows.device.type == "cpu":
        check_positions(output_rows, length)


def spread_rows(rows: Tensor, output_rows: Tensor | None, length: int) -> Tensor:
    """Scatter rows (P, …) to the positions ``output_rows`` of zeros (length, …). None returns ``rows``."""
    return rows if output_rows is None else rows.new_zeros(length, *rows.shape[1:]).index_copy_(0, output_rows, rows)


def is_compiled(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if the compiled kernel supports these tensors: even head sizes with contiguous elements.

    In a dry run for a GPU it represents the GPU's kernels, which save the same tensors.
    """
    if simulated_device.compiles and query.device.type != "cpu":
        return True
    if not loader.supports(query, key, value):
        return False
    even = query.shape[-1] % 2 == 0 and value.shape[-1] % 2 == 0
    return even and query.shape[0] > 0 and all(t.stride(-1) == 1 for t in (query, key, value))


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([step for t in tensors for step in t.stride()[:2]], dtype=torch.int64)


def _pairs(segments: Tensor, window: int, causal: bool, output_rows: Tensor | None) -> int:
    """Return the number of visible (query, key) pairs."""
    starts, stops, _, offsets = segments.tolist()
    if output_rows is not None and causal:
        positions = [0] * stops[-1]
        for start, stop, offset in zip(starts, stops, offsets, strict=True):
            positions[start:stop] = range(offset + 1, offset + 1 + stop - start)
        return sum(min(window, positions[index]) if window else positions[index] for index in output_rows.tolist())
    total = 0
    for start, stop, offset in zip(starts, stops, offsets, strict=True):
        size = stop - start
        if window and offset + size > window:
            total += sum(min(window, offset + index + 1) for index in range(size))
        else:
            total += size * offset + (size * (size + 1) // 2 if causal else size * size)
    return total


@define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor segments, int window, bool causal, "
    "float scaling, float softcap, Tensor? output_rows) -> (Tensor, Tensor)",
    lambda query, key, value, *_: (
        query.new_empty(*query.shape[:2], value.shape[-1]),
        query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32),
    ),
    lambda query, key, value, segments, window, causal, scaling, softcap, output_rows: (
        2 * _pairs(segments, window, causal, output_rows) * query.shape[1] * (query.shape[2] + value.shape[2])
    ),
)
def _attention(query, key, value, segments, window, causal, scaling, softcap, output_rows):  # type: ignore[no-untyped-def]
    queries, heads, size = query.shape
    length, key_heads, value_size = value.shape
    out = query.new_empty(queries, heads, value_size)
    logs = torch.empty(heads, queries)
    strides = _strides(query, key, value, out)
    loader.kernels().dw_attention(
        loader.dtype_code(query.dtype), segments.data_ptr(), segments.shape[1], length, window, causal, heads,
        key_heads, size, value_size, scaling, softcap, loader.address(output_rows), queries,
        *(t.data_ptr() for t in (query, key, value, out, strides, logs)),
    )  # fmt: skip
    return out, logs


@define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logs, "
    "Tensor segments, int window, bool causal, float scaling, float softcap, Tensor? output_rows) "
    "-> (Tensor, Tensor, Tensor)",
    lambda grad, query, key, value, *_: tuple(t.new_empty(t.shape) for t in (query, key, value)),
    lambda grad, query, key, value, out, logs, segments, window, causal, scaling, softcap, output_rows: (
        2 * _pairs(segments, window, causal, output_rows) * query.shape[1] * (3 * query.shape[2] + 2 * value.shape[2])
    ),
)
def _attention_backward(  # type: ignore[no-untyped-def]
    grad, query, key, value, out, logs, segments, window, causal, scaling, softcap, output_rows
):
    queries, heads, size = query.shape
    length, key_heads, value_size = value.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grads = [t.new_empty(t.shape) for t in (query, key, value)]
    strides = _strides(query, key, value, out, grad, *grads)
    loader.kernels().dw_attention_backward(
        loader.dtype_code(query.dtype), segments.data_ptr(), segments.shape[1], length, window, causal, heads,
        key_heads, size, value_size, scaling, softcap, loader.address(output_rows), queries,
        *(t.data_ptr() for t in (query, key, value, out, grad, *grads)),
        strides.data_ptr(), logs.data_ptr(),
    )  # fmt: skip
    return tuple(grads)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, options: AttentionOptions
) -> tuple[Tensor, list[Tensor]]:
    """Return (heads, T, d_v) outputs, and the weights of each batch of tiles if they are small enough to be saved."""
    scaling = options["scaling"]
    softcap = options.get("softcap")
    key_heads = key.shape[0]
    dtype = accumulation_dtype(query)
    queries = query.to(dtype).mul(scaling).index_select(1, tiles.gather)
    cast_key = key.to(dtype)
    products = []
    saved = []
    start = 0
    num_weights = query.shape[0] * sum(batch.count * batch.queries * batch.keys.shape[1] for batch in tiles.batches)
    max_bytes = MAX_SAVED_WEIGHTS * sum(t.nbytes for t in (query, key, value))
    save_weights = softcap is None and num_weights * dtype.itemsize <= max_bytes
    for index, batch in enumerate(tiles.batches):
        rows = _folded(queries[:, start : start + batch.count * batch.queries], key_heads, batch)
        weights, _ = _weights(rows, _gathered(cast_key, batch), batch, softcap, options.get("sinks"))
        kept = _dropped(weights, index, options).to(value.dtype)
        products.append(_unfolded(torch.bmm(kept, _gathered(value, batch)), key_heads, batch))
        if save_weights:
            saved.append(weights)
        start += batch.count * batch.queries
    return torch.cat(products, dim=1).index_select(1, tiles.slots), saved


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Sequence[Tensor],
    tiles: Tiles,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    scaling = options["scaling"]
    softcap = options.get("softcap")
    key_heads = key.shape[0]
    dtype = accumulation_dtype(query)
    # Tiles that share keys add to the same rows: accumulate in higher precision and round once.
    grad_key, grad_value = (torch.zeros(t.shape, dtype=dtype, device=t.device).flatten(0, 1) for t in (key, value))
    queries = query.index_select(1, tiles.gather)
    grads = grad_out.index_select(1, tiles.gather)
    grads.index_fill_(1, tiles.filling, 0)  # padding queries must not contribute to the keys' gradients
    grad_queries = []
    start = 0
    for batch_index, batch in enumerate(tiles.batches):
        query_slice = slice(start, start + batch.count * batch.queries)
        start = query_slice.stop
        grad = _folded(grads[:, query_slice], key_heads, batch)
        rows = _folded(queries[:, query_slice], key_heads, batch)
        keys = _gathered(key, batch)
        values = _gathered(value, batch)
        if saved:
            weights = saved[batch_index]
            slope = None
        else:
            weights, slope = _weights(rows.to(dtype).mul(scaling), keys.to(dtype), batch, softcap, options.get("sinks"))
        key_indices = _key_indices(batch, key_heads, key.shape[1])
        kept = _dropped(weights, batch_index, options).to(value.dtype)
        _scatter(grad_value, key_indices, torch.bmm(kept.transpose(1, 2), grad))
        grad_weights = _dropped(torch.bmm(grad, values.transpose(1, 2)).to(dtype), batch_index, options)
        grad_scores = softmax_backward(grad_weights, weights, -1, dtype)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_scores = grad_scores.mul_(scaling).to(query.dtype)
        _scatter(grad_key, key_indices, torch.bmm(grad_scores.transpose(1, 2), rows))
        grad_queries.append(_unfolded(torch.bmm(grad_scores, keys), key_heads, batch))
    grad_query = torch.cat(grad_queries, dim=1).index_select(1, tiles.slots)
    grad_key = grad_key.view_as(key)
    grad_value = grad_value.view_as(value)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _dropped(weights: Tensor, batch_index: int, options: AttentionOptions) -> Tensor:
    """Apply the dropout to the weights of a batch of tiles, or to their gradient."""
    seed = options.get("seed")
    return (
        weights
        if seed is None
        else apply_dropout(weights, derived_seed(seed, batch_index), options.get("dropout", 0.0))
    )


def _folded(rows: Tensor, key_heads: int, batch: TileBatch) -> Tensor:
    """Reshape (heads, n·L, d) to (key heads · n, group · L, d): query heads that share a key head become rows."""
    size = rows.shape[-1]
    by_tile = rows.view(key_heads, -1, batch.count, batch.queries, size).transpose(1, 2)
    return by_tile.reshape(key_heads * batch.count, -1, size)


def _unfolded(rows: Tensor, key_heads: int, batch: TileBatch) -> Tensor:
    """Invert :func:`_folded`."""
    size = rows.shape[-1]
    by_head = rows.view(key_heads, batch.count, -1, batch.queries, size).transpose(1, 2)
    return by_head.reshape(-1, batch.count * batch.queries, size)


def _gathered(per_key: Tensor, batch: TileBatch) -> Tensor:
    """Return the keys or values of each tile, (key heads · n, K, d)."""
    return per_key.index_select(1, batch.keys.flatten()).view(-1, batch.keys.shape[1], per_key.shape[-1])


def _key_indices(batch: TileBatch, key_heads: int, length: int) -> Tensor:
    """Return the row of each gathered key in (key heads · T, d)."""
    return (torch.arange(key_heads, device=batch.keys.device)[:, None] * length + batch.keys.flatten()).flatten()


def _scatter(target: Tensor, indices: Tensor, values: Tensor) -> None:
    target.index_add_(0, indices, values.flatten(0, 1).to(target.dtype))


def _weights(
    rows: Tensor, keys: Tensor, batch: TileBatch, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return attention weights (key heads · n, group · L, K) of scaled queries, and the slope of the soft cap or None.

    Both inputs are already in the accumulation type.
    """
    scores = torch.bmm(rows, keys.transpose(1, 2))
    slope = None
    if softcap is not None:
        capped = torch.tanh_(scores / softcap)
        scores = softcap * capped
        slope = 1 - capped * capped
    if width := batch.hidden.shape[-1]:
        by_tile = scores.view(-1, batch.count, scores.shape[1] // batch.queries, batch.queries, scores.shape[2])
        by_tile[..., -width:].masked_fill_(batch.hidden[:, None], float("-inf"))
    if sinks is not None:
        of_tile = sinks.to(scores.dtype).view(len(scores) // batch.count, 1, -1, 1)
        column = of_tile.expand(-1, batch.count, -1, batch.queries).reshape(*scores.shape[:2], 1)
        scores = torch.cat([scores, column], -1)
    return torch.softmax(scores, dim=-1)[..., : keys.shape[1]], slope
