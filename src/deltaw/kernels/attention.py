"""Attention over a prefix tree of segments, forward and backward, without padding and without a whole mask.

Three ways give the same: a compiled kernel where it serves (``csrc/attention_*.cpp``), torch's FlexAttention
on devices that it is compiled on, and tiles of torch's own products elsewhere.
Of the last, each tile of the layout is a few matrix products of its queries against its own keys; tiles of
one shape are computed together. The heads that share a key (grouped-query attention) are folded into the rows
of one product, so that nothing is expanded. Kept for the backward are queries, keys and values; the weights
are computed again, batch by batch, unless they are small beside those (see KEPT_WEIGHTS).

FlexAttention (arXiv 2412.05496) takes a block mask, which says which blocks of 128 queries and 128 keys see each
other wholly, in part, or not at all; the last are skipped. Within a block seen in part, two numbers a token decide:
its rank, which is its place in the tree walked depth first, and the end of its segment's subtree in that order. A
query sees a key if rank[key] ≤ rank[query] < end[key]: later tokens of the key's own segment and of the segments
below it have just these ranks. Packed rows are laid out in this order anyway, so that ranks are places. Whether it
serves is tried, not listed: the first time that heads of some form come, two small trees go forward and backward
through it and through the reference. Where that fails or differs, attention runs in tiles, and :func:`notes` says why.

Knows tensors and tiles; not models, tokens or caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.bounds import check_places, check_shape
from deltaw.kernels.layout import Layout, TileBatch, Tiles
from deltaw.kernels.operators import define, sums_dtype
from deltaw.kernels.torch_private import compile_errors, in_dispatch_mode, softmax_backward
from deltaw.kernels.transfer import to_device

if TYPE_CHECKING:
    from typing import Unpack  # for type checkers alone: not in Python 3.10


class How(TypedDict, total=False):
    """What attention is told beside its tensors and the layout.

    Attributes:
        scaling: of the scores; always given.
        window: sliding window in positions, as in :meth:`Layout.visible`; None for no limit.
        softcap: scores become ``softcap · tanh(scores / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
        causal: without it a query sees all of its own segment; by the compiled kernel alone.
    """

    scaling: float
    window: int | None
    softcap: float | None
    causal: bool


# Queries and keys of a block; FlexAttention's own default, of which its kernels' tiles are parts.
BLOCK = 128
# Devices that FlexAttention has compiled kernels for, forward and backward.
DEVICES = ("cuda",)
# Queries whose pairs are counted at a time, so that a long row needs no large table.
COUNTED_AT_ONCE = 1024
# Relative difference (of norms) to the reference that a trial may show, by the type of the inputs.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Lengths and parents of the trees that a form of heads is tried on: more than a block, shared and alone. They
# are two of different lengths, since torch compiles anew, for any length, when it meets a second one.
TRIED = (((150, 40, 37, 30), (-1, 0, 0, -1)), ((300, 200, 65, 40), (-1, 0, -1, 2)))

# By what was tried: why FlexAttention does not serve it, or None where it does.
_TRIALS: dict[tuple[Any, ...], str | None] = {}


def notes() -> list[str]:
    """Why attention does not run by FlexAttention where it was tried, a line for each reason."""
    return [f"attention runs in tiles: {why}" for why in dict.fromkeys(_TRIALS.values()) if why is not None]


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, compiled: bool = True, **how: Unpack[How]
) -> Tensor:
    """As :func:`deltaw.kernels.attention.packed_attention`, by FlexAttention, with its own derivative.

    Args:
        query: (heads, T, d). key, value: (key heads, T, d) and (key heads, T, d_v).
        compiled: without it, all T × T scores are computed by torch's operations.
        how: all but ``causal``.

    Returns:
        (heads, T, d_v).

    Raises:
        ImportError: this torch has no FlexAttention.
    """
    attention = _compiled() if compiled else _function()
    mod, softcap = None, how.get("softcap")
    if softcap is not None:
        cap = float(softcap)

        def mod(score: Tensor, batch: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

    mask, grouped = tree_mask(layout, how.get("window")), query.shape[0] != key.shape[0]
    heads = (t[None] for t in (query, key, value))
    return attention(*heads, score_mod=mod, block_mask=mask, scale=how["scaling"], enable_gqa=grouped)[0]


def tree_mask(layout: Layout, window: int | None = None) -> Any:
    """The layout's ``BlockMask`` on its device, made once: all layers of a model use the same one."""
    if window not in layout.masks:
        layout.masks[window] = _block_mask(layout, window)
    return layout.masks[window]


def ranks(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Each token's place (T,) in the tree walked depth first, and the end (T,) of its segment's subtree."""
    lengths = layout.stops - layout.starts
    below = lengths.copy()
    for segment in range(len(lengths) - 1, -1, -1):
        if layout.parents[segment] >= 0:
            below[layout.parents[segment]] += below[segment]
    begin = np.zeros(len(lengths), np.int64)
    free, root = np.zeros(len(lengths), np.int64), 0  # where the next child begins
    for segment, parent in enumerate(layout.parents):
        if parent >= 0:
            begin[segment] = free[parent]
            free[parent] += below[segment]
        else:
            begin[segment], root = root, root + below[segment]
        free[segment] = begin[segment] + lengths[segment]
    rank = np.arange(layout.length) + np.repeat(begin - layout.starts, lengths)
    return rank, np.repeat(begin + below, lengths)


def visible_pairs(layout: Layout, window: int | None = None, block: int = BLOCK) -> np.ndarray:
    """How many (query, key) pairs are seen in each block of queries and keys: (n, n) for n blocks.

    The keys that a query sees of one segment stand side by side, so they are counted without listing them.
    """
    count = -(-layout.length // block)
    seen = np.zeros((count, count), np.int64)
    offsets, positions = layout.offsets(), layout.positions()
    for segment, (start, stop) in enumerate(zip(layout.starts, layout.stops, strict=True)):
        for begin in range(int(start), int(stop), COUNTED_AT_ONCE):
            queries = np.arange(begin, min(begin + COUNTED_AT_ONCE, int(stop)))
            at = segment
            while at >= 0:
                low = np.full(len(queries), layout.starts[at])
                if window is not None:
                    low += np.maximum(0, positions[queries] - window + 1 - offsets[at])
                high = queries + 1 if at == segment else np.full(len(queries), layout.stops[at])
                _count(seen, queries, low, high, block)
                at = int(layout.parents[at])
    return seen


def _count(seen: np.ndarray, queries: np.ndarray, low: np.ndarray, high: np.ndarray, block: int) -> None:
    """Add the pairs of each of these queries, which follow one another, with its keys ``low … high - 1``."""
    if low.min() >= high.max():
        return
    first, last = int(low.min()) // block, (int(high.max()) - 1) // block
    edges = np.arange(first, last + 2) * block
    pairs = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    rows = queries // block
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(rows)) + 1])
    seen[rows[0] : rows[-1] + 1, first : last + 1] += np.add.reduceat(np.maximum(pairs, 0), cuts, axis=0)


def _block_mask(layout: Layout, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    seen = visible_pairs(layout, window)
    whole = seen == BLOCK * BLOCK
    some, some_places = _listed((seen > 0) & ~whole, layout.device)
    all_of, all_places = _listed(whole, layout.device)
    rank, end, position = (
        to_device(torch.from_numpy(numbers.astype(np.int32)), layout.device)
        for numbers in (*ranks(layout), layout.positions())
    )

    reach = layout.length if window is None else window

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (rank[key] <= rank[query]) & (rank[query] < end[key])

    def sees_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch, head, query, key) & (position[query] - position[key] < reach)

    mod, lengths = sees if window is None else sees_near, (layout.length, layout.length)
    tables = (some, some_places, all_of, all_places)
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=mod, seq_lengths=lengths)


def _listed(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each row of an (n, n) bool table: how many are True, and all places, those of the True first.

    Shapes are FlexAttention's, with a batch and a head of one: (1, 1, n) and (1, 1, n, n).
    """
    places = np.argsort(~blocks, axis=1, kind="stable")
    tables = (torch.from_numpy(table.astype(np.int32)) for table in (blocks.sum(1), places))
    count, place = (to_device(table, device)[None, None] for table in tables)
    return count, place


def serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference: Callable[..., Tensor],
    window: int | None = None,
    softcap: float | None = None,
) -> bool:
    """Whether FlexAttention serves (heads, T, d) tensors like these; tried once for each form of them.

    Never on fake tensors, nor while a dispatch mode watches: a dry run must not compile anything.

    Args:
        reference: what :func:`tree_attention` must give, called likewise.
    """
    plain = query.device.type in DEVICES and type(query) in (Tensor, torch.nn.Parameter)
    if not plain or query.dtype not in TOLERANCE or in_dispatch_mode():
        return False
    form = _form(query, key, value, window, softcap)
    if form not in _TRIALS:
        inputs, trees = (query, key, value), (Layout.of_lengths(*tree) for tree in TRIED)
        each = (_tried_on(tree, inputs, reference, window is not None, softcap) for tree in trees)
        _TRIALS[form] = next(filter(None, each), None)
    return _TRIALS[form] is None


def _attend_compiled(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None, softcap: float | None
) -> Tensor | None:
    """:func:`tree_attention` where FlexAttention serves; None where it does not.

    Nor does it any longer if torch cannot compile it for a later shape.
    """
    if not serves(query, key, value, packed_attention_reference, window, softcap):
        return None
    try:
        return tree_attention(query, key, value, layout, scaling=scaling, window=window, softcap=softcap)
    except compile_errors() as error:
        _TRIALS[_form(query, key, value, window, softcap)] = _failed(error)
        return None


def _form(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> tuple[Any, ...]:
    """What a trial is remembered by."""
    heads, sizes = (query.shape[0], key.shape[0]), (query.shape[-1], value.shape[-1])
    return query.device, query.dtype, *heads, *sizes, window is not None, softcap is not None


def _failed(error: Exception) -> str:
    brief = (str(error).splitlines() or [""])[0][:100]
    return f"FlexAttention failed ({type(error).__name__}: {brief})"


def _tried_on(
    layout: Layout, inputs: tuple[Tensor, ...], reference: Callable[..., Tensor], window: bool, softcap: float | None
) -> str | None:
    """Why FlexAttention does not serve inputs of this form; None where a small tree shows that it does."""
    device, dtype, size = inputs[0].device, inputs[0].dtype, inputs[0].shape[-1]
    layout.device = device
    generator = torch.Generator(device=device).manual_seed(0)
    leaves = [torch.randn(t.shape[0], layout.length, t.shape[-1], generator=generator, device=device) for t in inputs]
    how = {"scaling": size**-0.5, "window": 100 if window else None, "softcap": softcap}
    try:
        ours = _with_gradients(tree_attention, [t.to(dtype) for t in leaves], layout, how)
    except Exception as error:  # whatever a compiler raises here, tiles do without one
        return _failed(error)
    expected = _with_gradients(reference, leaves, layout, how)
    for one, other in zip(ours, expected, strict=True):
        difference = float((one.float() - other).norm() / other.norm())
        if not difference <= TOLERANCE[dtype]:
            return f"FlexAttention gave another result (relative difference {difference:.1e})"
    return None


def _with_gradients(
    attention: Callable[..., Tensor], inputs: list[Tensor], layout: Layout, how: dict[str, Any]
) -> list[Tensor]:
    """The output, and the gradients of the inputs under one that grows along it."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = attention(*leaves, layout, **how)
        slope = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def _function() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_function())


# Attention weights are kept for the backward where they take at most so many times the room of q, k and v.
KEPT_WEIGHTS = 2.0


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **how: Unpack[How]) -> Tensor:
    """softmax(scaling · Q Kᵀ) V where each query sees what the layout lets it see.

    Args:
        query: (heads, T, d). key, value: (key heads, T, d) and (key heads, T, d_v), where key heads divides
            heads and query heads ``i·g … i·g + g - 1`` share key head ``i``.

    Returns:
        (heads, T, d_v), in the dtype of ``value``. Scores and soft-max are computed in fp32 (fp64 for fp64
        inputs), the products with the values in the inputs' own dtype.
    """
    of_tokens = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    told = how["scaling"], how.get("window"), how.get("softcap")
    causal = how.get("causal", True)
    if causal:
        _check_inputs(*of_tokens, layout, None)
        if (served := _attend_compiled(query, key, value, layout, *told)) is not None:
            return served
    return _PackedAttention.apply(*of_tokens, layout, *told, causal).transpose(0, 1)


def packed_attention_reference(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **how: Unpack[How]) -> Tensor:
    """The reference implementation of :func:`packed_attention`: all T × T scores at once, by autograd."""
    group, softcap = query.shape[0] // key.shape[0], how.get("softcap")
    wide = sums_dtype(query)
    keys, values = (t.repeat_interleave(group, dim=0) for t in (key, value))
    scores = how["scaling"] * (query.to(wide) @ keys.to(wide).transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.from_numpy(layout.visible(how.get("window"))).to(query.device)
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
        grads = attend_backward(grad_out, query, key, value, out, kept, ctx.layout, **ctx.how)
        return *grads, None, None, None, None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, picked: Tensor | None = None, **how: Unpack[How]
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
        out, logs = _attention(query, key, value, layout.segments(), *_numbers(how), picked)
        return out, [logs]
    if not how.get("causal", True):
        raise NotImplementedError("attention both ways needs the compiled kernel")
    q, k, v = (t.transpose(0, 1) for t in (spread_rows(query, picked, len(key)), key, value))
    out, kept = _tiles_forward(q, k, v, layout.tiles(how.get("window")), how)
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
    picked: Tensor | None = None,
    **how: Unpack[How],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, like them, from what :func:`attend` gave.

    Raises:
        ValueError: the gradient is not like the outputs.
    """
    check_shape("the gradient", grad, *query.shape[:2], value.shape[-1])
    if out is not None and is_compiled(query, key, value):
        (logs,) = kept
        return _attention_backward(grad, query, key, value, out, logs, layout.segments(), *_numbers(how), picked)
    spread = (spread_rows(t, picked, len(key)) for t in (grad, query))
    d, q, k, v = (t.transpose(0, 1) for t in (*spread, key, value))
    grads = _tiles_backward(d, q, k, v, kept, layout.tiles(how.get("window")), how)
    of_q, of_k, of_v = (t.transpose(0, 1) for t in grads)
    return (of_q if picked is None else of_q.index_select(0, picked)), of_k, of_v


def _numbers(how: How) -> tuple[int, bool, float, float]:
    """Window, causal, scaling and soft cap as the kernels take them."""
    return how.get("window") or 0, how.get("causal", True), how["scaling"], how.get("softcap") or 0.0


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


def spread_rows(rows: Tensor, picked: Tensor | None, length: int) -> Tensor:
    """Return (length, …) with rows (P, …) at the positions ``picked``, zeros elsewhere; ``rows`` if that is None."""
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
        2 * _pairs(segments, window, causal, picked) * query.shape[1] * (3 * query.shape[2] + 2 * value.shape[2])
    ),
)


def _tiles_forward(query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, how: How) -> tuple[Tensor, list[Tensor]]:
    """(heads, T, d_v), and the weights of each batch of tiles where they are small enough to be kept."""
    scaling, softcap = how["scaling"], how.get("softcap")
    key_heads, wide = key.shape[0], sums_dtype(query)
    queries = query.to(wide).mul(scaling).index_select(1, tiles.gather)
    wide_key = key.to(wide)
    products, kept, at = [], [], 0
    pairs = query.shape[0] * sum(batch.count * batch.queries * batch.keys.shape[1] for batch in tiles.batches)
    keep = softcap is None and pairs * wide.itemsize <= KEPT_WEIGHTS * sum(t.nbytes for t in (query, key, value))
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
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Sequence[Tensor], tiles: Tiles, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    scaling, softcap = how["scaling"], how.get("softcap")
    key_heads, wide = key.shape[0], sums_dtype(query)
    # Several tiles write into the keys that they share: their sum is kept wide and rounded once.
    grad_key, grad_value = (torch.zeros(t.shape, dtype=wide, device=t.device).flatten(0, 1) for t in (key, value))
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
    return per_key.index_select(1, batch.keys.flatten()).view(-1, batch.keys.shape[1], per_key.shape[-1])


def _places(batch: TileBatch, key_heads: int, length: int) -> Tensor:
    """Where each gathered key stands in (key heads · T, d)."""
    heads = torch.arange(key_heads, device=batch.keys.device)[:, None] * length
    return (heads + batch.keys.flatten()).flatten()


def _scatter(into: Tensor, places: Tensor, part: Tensor) -> None:
    into.index_add_(0, places, part.flatten(0, 1).to(into.dtype))


def _weights(rows: Tensor, keys: Tensor, batch: TileBatch, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Attention weights (key heads · n, group · L, K) of scaled queries, and the soft cap's slope where there
    is one. Both inputs are wide already."""
    scores = torch.bmm(rows, keys.transpose(1, 2))
    slope = None
    if softcap is not None:
        capped = torch.tanh_(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    if width := batch.hidden.shape[-1]:
        by_tile = scores.view(-1, batch.count, scores.shape[1] // batch.queries, batch.queries, scores.shape[2])
        by_tile[..., -width:].masked_fill_(batch.hidden[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1), slope
