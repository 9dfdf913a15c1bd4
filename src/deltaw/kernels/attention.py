"""Attention over a prefix tree of segments, forward and backward, without padding and without a dense mask.

There are three implementations with the same results: the compiled kernels (``csrc/attention_*.cpp``) on CPUs that they
support, torch's FlexAttention on devices that it compiles for, and tiles of torch matrix products elsewhere.

Tiles: Each tile of the layout is a few matrix products of its queries and keys. Tiles of one shape are batched. Query
heads that share a key head (grouped-query attention) are folded into the rows of one product, so keys are not expanded.
The backward pass gets queries, keys and values and recomputes the attention weights batch by batch, unless they are
small enough to be saved (see MAX_SAVED_WEIGHTS).

FlexAttention (arXiv 2412.05496) takes a block mask: each block of 128 queries and 128 keys is fully visible, partially
visible or skipped. Within a partial block two numbers per token decide: its rank, which is its index in a depth-first
walk of the tree, and the end of its segment's subtree in that order. A query sees a key if rank[key] ≤ rank[query] <
end[key]. Packed rows are usually laid out in this order, so ranks equal positions.

FlexAttention is used only after a trial: the first time that heads of some shape occur, two small trees are compared
with the reference, forward and backward. If the trial fails, attention runs in tiles and :func:`notes` reports the
reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.layout import Layout, TileBatch, Tiles, to_device
from deltaw.kernels.operators import accumulation_dtype, check_positions, check_shape, define, simulated_device
from deltaw.kernels.torch_private import compile_errors, in_dispatch_mode, softmax_backward

if TYPE_CHECKING:
    from typing import Unpack  # not available at runtime in Python 3.10


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of every packed-attention implementation.

    Attributes:
        scaling: Factor applied to the attention scores. Required.
        window: Sliding-window size in positions (see :meth:`Layout.visible`), or None for full attention.
        softcap: If set, scores become ``softcap · tanh(scores / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
        causal: Apply a causal mask within each segment. Only the compiled kernel supports False.
    """

    scaling: float
    window: int | None
    softcap: float | None
    causal: bool


# Queries and keys per block of a block mask. FlexAttention's default, a multiple of its kernels' tile sizes.
BLOCK = 128
# Device types that FlexAttention can compile forward and backward kernels for.
DEVICES = ("cuda",)
# Queries per chunk when visible pairs are counted. Limits the memory of a long row.
QUERIES_PER_COUNT = 1024
# Maximum relative difference (of norms) from the reference in a trial, by input type.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Segment lengths and parents of the trial trees. They span several blocks, with and without shared prefixes.
# Two lengths are tried because torch recompiles with dynamic shapes when it sees a second one.
TRIAL_TREES = (((150, 40, 37, 30), (-1, 0, 0, -1)), ((300, 200, 65, 40), (-1, 0, -1, 2)))

# Results of trials by key: the reason why FlexAttention is not used, or None if it is.
_TRIALS: dict[tuple[Any, ...], str | None] = {}


def notes() -> list[str]:
    """Return why attention does not use FlexAttention after a failed trial, one line per reason."""
    return [f"attention runs in tiles: {reason}" for reason in dict.fromkeys(_TRIALS.values()) if reason is not None]


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    compiled: bool = True,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    """Compute :func:`packed_attention` with FlexAttention, which also provides the derivative.

    Args:
        query: (heads, T, d) queries.
        key: (key heads, T, d) keys.
        value: (key heads, T, d_v) values.
        layout: Layout of the T tokens.
        compiled: Compile FlexAttention. If False, torch's operators compute all T × T scores.
        **options: Options without ``causal``.

    Returns:
        (heads, T, d_v).

    Raises:
        ImportError: if this version of torch does not include FlexAttention.
    """
    attention = _compiled() if compiled else _function()
    score_mod, softcap = None, options.get("softcap")
    if softcap is not None:
        cap = float(softcap)

        def score_mod(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

    mask, grouped = tree_mask(layout, options.get("window")), query.shape[0] != key.shape[0]
    heads = (t[None] for t in (query, key, value))
    return attention(*heads, score_mod=score_mod, block_mask=mask, scale=options["scaling"], enable_gqa=grouped)[0]


def tree_mask(layout: Layout, window: int | None = None) -> Any:
    """Return the layout's ``BlockMask`` on its device. It is cached, so all layers of a model share it."""
    if window not in layout.masks:
        layout.masks[window] = _block_mask(layout, window)
    return layout.masks[window]


def ranks(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's index (T) in a depth-first walk of the tree, and the end (T) of its segment's subtree."""
    lengths = layout.stops - layout.starts
    subtree_sizes = lengths.copy()
    for segment in range(len(lengths) - 1, -1, -1):
        if layout.parents[segment] >= 0:
            subtree_sizes[layout.parents[segment]] += subtree_sizes[segment]
    first = np.zeros(len(lengths), np.int64)
    next_child, root = np.zeros(len(lengths), np.int64), 0
    for segment, parent in enumerate(layout.parents):
        if parent >= 0:
            first[segment] = next_child[parent]
            next_child[parent] += subtree_sizes[segment]
        else:
            first[segment], root = root, root + subtree_sizes[segment]
        next_child[segment] = first[segment] + lengths[segment]
    rank = np.arange(layout.length) + np.repeat(first - layout.starts, lengths)
    return rank, np.repeat(first + subtree_sizes, lengths)


def visible_pairs(layout: Layout, window: int | None = None, block: int = BLOCK) -> np.ndarray:
    """Count the visible (query, key) pairs in each block of queries and keys: (n, n) for n blocks.

    The visible keys of a query within one segment are contiguous, so they are counted as ranges.
    """
    count = -(-layout.length // block)
    counts = np.zeros((count, count), np.int64)
    offsets, positions = layout.offsets(), layout.positions()
    for segment, (start, stop) in enumerate(zip(layout.starts, layout.stops, strict=True)):
        for first in range(int(start), int(stop), QUERIES_PER_COUNT):
            queries = np.arange(first, min(first + QUERIES_PER_COUNT, int(stop)))
            ancestor = segment
            while ancestor >= 0:
                low = np.full(len(queries), layout.starts[ancestor])
                if window is not None:
                    low += np.maximum(0, positions[queries] - window + 1 - offsets[ancestor])
                high = queries + 1 if ancestor == segment else np.full(len(queries), layout.stops[ancestor])
                _count_pairs(counts, queries, low, high, block)
                ancestor = int(layout.parents[ancestor])
    return counts


def _count_pairs(counts: np.ndarray, queries: np.ndarray, low: np.ndarray, high: np.ndarray, block: int) -> None:
    """Add the visible pairs of consecutive queries, whose keys are ``low … high - 1``, to the counts."""
    if low.min() >= high.max():
        return
    first, last = int(low.min()) // block, (int(high.max()) - 1) // block
    edges = np.arange(first, last + 2) * block
    pairs = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    rows = queries // block
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(rows)) + 1])
    counts[rows[0] : rows[-1] + 1, first : last + 1] += np.add.reduceat(np.maximum(pairs, 0), cuts, axis=0)


def _block_mask(layout: Layout, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    pairs = visible_pairs(layout, window)
    is_full = pairs == BLOCK * BLOCK
    partial_counts, partial_indices = _block_indices((pairs > 0) & ~is_full, layout.device)
    full_counts, full_indices = _block_indices(is_full, layout.device)
    rank, end, position = (
        to_device(torch.from_numpy(numbers.astype(np.int32)), layout.device)
        for numbers in (*ranks(layout), layout.positions())
    )

    reach = layout.length if window is None else window

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (rank[key] <= rank[query]) & (rank[query] < end[key])

    def is_visible_in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_visible(batch, head, query, key) & (position[query] - position[key] < reach)

    mask_mod, lengths = is_visible if window is None else is_visible_in_window, (layout.length, layout.length)
    tables = (partial_counts, partial_indices, full_counts, full_indices)
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=lengths)


def _block_indices(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each row of an (n, n) bool table the number of True entries, and all column indices, True entries
    first.

    Shapes are FlexAttention's with batch size and heads of 1: (1, 1, n) and (1, 1, n, n).
    """
    order = np.argsort(~blocks, axis=1, kind="stable")
    tables = (torch.from_numpy(table.astype(np.int32)) for table in (blocks.sum(1), order))
    count, indices = (to_device(table, device)[None, None] for table in tables)
    return count, indices


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference: Callable[..., Tensor],
    window: int | None = None,
    softcap: float | None = None,
) -> bool:
    """True if FlexAttention is used for (heads, T, d) tensors like these. Runs a trial once per combination of shapes.

    Always False for fake tensors and inside dispatch modes, because a dry run must not compile anything.

    Args:
        query: (heads, T, d) queries.
        key: (key heads, T, d) keys.
        value: (key heads, T, d_v) values.
        reference: Reference implementation with the signature of :func:`tree_attention`.
        window: Sliding-window size or None.
        softcap: Soft cap of the scores or None.
    """
    is_real = query.device.type in DEVICES and type(query) in (Tensor, torch.nn.Parameter)
    if not is_real or query.dtype not in TOLERANCE or in_dispatch_mode():
        return False
    trial_key = _trial_key(query, key, value, window, softcap)
    if trial_key not in _TRIALS:
        inputs, trees = (query, key, value), (Layout.of_lengths(*tree) for tree in TRIAL_TREES)
        reasons = (_run_trial(tree, inputs, reference, window is not None, softcap) for tree in trees)
        _TRIALS[trial_key] = next(filter(None, reasons), None)
    return _TRIALS[trial_key] is None


def _attend_compiled(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None, softcap: float | None
) -> Tensor | None:
    """Return :func:`tree_attention`, or None if FlexAttention is not used.

    If torch cannot compile it for a later shape, the failure is recorded and FlexAttention is not used again for this
    key.
    """
    if not supports(query, key, value, packed_reference, window, softcap):
        return None
    try:
        return tree_attention(query, key, value, layout, scaling=scaling, window=window, softcap=softcap)
    except compile_errors() as error:
        _TRIALS[_trial_key(query, key, value, window, softcap)] = _failure_message(error)
        return None


def _trial_key(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> tuple[Any, ...]:
    """Return the key that a trial's result is cached under."""
    heads, sizes = (query.shape[0], key.shape[0]), (query.shape[-1], value.shape[-1])
    return query.device, query.dtype, *heads, *sizes, window is not None, softcap is not None


def _failure_message(error: Exception) -> str:
    brief = (str(error).splitlines() or [""])[0][:100]
    return f"FlexAttention failed ({type(error).__name__}: {brief})"


def _run_trial(
    layout: Layout, inputs: tuple[Tensor, ...], reference: Callable[..., Tensor], window: bool, softcap: float | None
) -> str | None:
    """Compare FlexAttention with the reference on a small tree. Returns the reason if it cannot be used, else None."""
    device, dtype, size = inputs[0].device, inputs[0].dtype, inputs[0].shape[-1]
    layout.device = device
    generator = torch.Generator(device=device).manual_seed(0)
    leaves = [torch.randn(t.shape[0], layout.length, t.shape[-1], generator=generator, device=device) for t in inputs]
    options = {"scaling": size**-0.5, "window": 100 if window else None, "softcap": softcap}
    try:
        actual = _with_gradients(tree_attention, [t.to(dtype) for t in leaves], layout, options)
    except Exception as error:  # compilers raise many types; tiles remain as fallback
        return _failure_message(error)
    for result, reference_result in zip(actual, _with_gradients(reference, leaves, layout, options), strict=True):
        difference = float((result.float() - reference_result).norm() / reference_result.norm())
        if not difference <= TOLERANCE[dtype]:
            return f"FlexAttention returned a different result (relative difference {difference:.1e})"
    return None


def _with_gradients(
    attention: Callable[..., Tensor], inputs: list[Tensor], layout: Layout, options: dict[str, Any]
) -> list[Tensor]:
    """Return the output and the gradients of the inputs for an output gradient that increases linearly."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = attention(*leaves, layout, **options)
        output_gradient = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, output_gradient)]


def _function() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_function())


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
    if causal:
        _check_inputs(*of_tokens, layout, None)
        if (out := _attend_compiled(query, key, value, layout, *score_options)) is not None:
            return out
    return _PackedAttention.apply(*of_tokens, layout, *score_options, causal).transpose(0, 1)


def packed_reference(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, **options: Unpack[AttentionOptions]
) -> Tensor:
    """Reference implementation of :func:`packed_attention`. Computes all T × T scores at once and supports autograd."""
    group, softcap = query.shape[0] // key.shape[0], options.get("softcap")
    dtype = accumulation_dtype(query)
    keys, values = (t.repeat_interleave(group, dim=0) for t in (key, value))
    scores = options["scaling"] * (query.to(dtype) @ keys.to(dtype).transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.from_numpy(layout.visible(options.get("window"))).to(query.device)
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1).to(value.dtype) @ values


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, scaling, window, softcap, causal):  # type: ignore[override]
        options = {"scaling": scaling, "window": window, "softcap": softcap, "causal": causal}
        out, saved = attend(query, key, value, layout, **options)
        # The backward pass of the tiles does not use the outputs.
        ctx.save_for_backward(query, key, value, out if is_compiled(query, key, value) else None, *saved)
        ctx.layout, ctx.options = layout, options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # type: ignore[override]
        query, key, value, out, *saved = ctx.saved_tensors
        grads = attend_backward(grad_out, query, key, value, out, saved, ctx.layout, **ctx.options)
        return *grads, None, None, None, None, None


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
    if is_compiled(query, key, value):
        out, logs = _attention(query, key, value, layout.segments(), *_kernel_options(options), rows)
        return out, [logs]
    if not options.get("causal", True):
        raise NotImplementedError("bidirectional attention requires the compiled kernel")
    q, k, v = (t.transpose(0, 1) for t in (spread_rows(query, rows, len(key)), key, value))
    out, saved = _forward(q, k, v, layout.tiles(options.get("window")), options)
    out = out.transpose(0, 1)
    return (out if rows is None else out.index_select(0, rows)), saved


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
    if out is not None and is_compiled(query, key, value):
        (logs,), segments = saved, layout.segments()
        return _attention_backward(grad, query, key, value, out, logs, segments, *_kernel_options(options), rows)
    scattered = (spread_rows(t, rows, len(key)) for t in (grad, query))
    d, q, k, v = (t.transpose(0, 1) for t in (*scattered, key, value))
    grads = _backward(d, q, k, v, saved, layout.tiles(options.get("window")), options)
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
    scaling, softcap = options["scaling"], options.get("softcap")
    key_heads, dtype = key.shape[0], accumulation_dtype(query)
    queries = query.to(dtype).mul(scaling).index_select(1, tiles.gather)
    cast_key = key.to(dtype)
    products, saved, start = [], [], 0
    num_weights = query.shape[0] * sum(batch.count * batch.queries * batch.keys.shape[1] for batch in tiles.batches)
    max_bytes = MAX_SAVED_WEIGHTS * sum(t.nbytes for t in (query, key, value))
    save_weights = softcap is None and num_weights * dtype.itemsize <= max_bytes
    for batch in tiles.batches:
        rows = _folded(queries[:, start : start + batch.count * batch.queries], key_heads, batch)
        weights, _ = _weights(rows, _gathered(cast_key, batch), batch, softcap)
        products.append(_unfolded(torch.bmm(weights.to(value.dtype), _gathered(value, batch)), key_heads, batch))
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
    scaling, softcap = options["scaling"], options.get("softcap")
    key_heads, dtype = key.shape[0], accumulation_dtype(query)
    # Tiles that share keys add to the same rows: accumulate in higher precision and round once.
    grad_key, grad_value = (torch.zeros(t.shape, dtype=dtype, device=t.device).flatten(0, 1) for t in (key, value))
    queries, grads = query.index_select(1, tiles.gather), grad_out.index_select(1, tiles.gather)
    grads.index_fill_(1, tiles.filling, 0)  # padding queries must not contribute to the keys' gradients
    grad_queries, start = [], 0
    for batch_index, batch in enumerate(tiles.batches):
        query_slice = slice(start, start + batch.count * batch.queries)
        start = query_slice.stop
        grad = _folded(grads[:, query_slice], key_heads, batch)
        rows = _folded(queries[:, query_slice], key_heads, batch)
        keys, values = _gathered(key, batch), _gathered(value, batch)
        if saved:
            weights, slope = saved[batch_index], None
        else:
            weights, slope = _weights(rows.to(dtype).mul(scaling), keys.to(dtype), batch, softcap)
        key_indices = _key_indices(batch, key_heads, key.shape[1])
        _scatter(grad_value, key_indices, torch.bmm(weights.to(value.dtype).transpose(1, 2), grad))
        grad_scores = softmax_backward(torch.bmm(grad, values.transpose(1, 2)).to(dtype), weights, -1, dtype)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_scores = grad_scores.mul_(scaling).to(query.dtype)
        _scatter(grad_key, key_indices, torch.bmm(grad_scores.transpose(1, 2), rows))
        grad_queries.append(_unfolded(torch.bmm(grad_scores, keys), key_heads, batch))
    grad_query = torch.cat(grad_queries, dim=1).index_select(1, tiles.slots)
    grad_key, grad_value = grad_key.view_as(key), grad_value.view_as(value)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


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


def _weights(rows: Tensor, keys: Tensor, batch: TileBatch, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return attention weights (key heads · n, group · L, K) of scaled queries, and the slope of the soft cap or None.

    Both inputs are already in the accumulation type.
    """
    scores = torch.bmm(rows, keys.transpose(1, 2))
    slope = None
    if softcap is not None:
        capped = torch.tanh_(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    if width := batch.hidden.shape[-1]:
        by_tile = scores.view(-1, batch.count, scores.shape[1] // batch.queries, batch.queries, scores.shape[2])
        by_tile[..., -width:].masked_fill_(batch.hidden[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1), slope
