"""FlexAttention over a prefix tree of segments: the block mask of a layout, and the compiled function.

FlexAttention (arXiv 2412.05496) takes a block mask: each block of 128 queries and 128 keys is fully visible, partially
visible or skipped. Within a partial block two numbers per token decide: its rank, which is its index in a depth-first
walk of the tree, and the end of its segment's subtree in that order. A query sees a key if rank[key] ≤ rank[query] <
end[key]. Packed rows are usually laid out in this order, so ranks equal positions.

All values that depend on the layout are in tensors, so layouts of other lengths and windows reuse the compiled kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.layout import Layout, to_device
from deltaw.kernels.torch_private import compile_errors, inductor_backend, unrecorded_view

# Queries and keys per block of a block mask. FlexAttention's default, a multiple of its kernels' tile sizes.
BLOCK = 128
# Queries per chunk when visible pairs are counted. Limits the memory of a long row.
QUERIES_PER_COUNT = 1024
# Always use the main kernel: the one for fewer than 128 queries fails for most ratios of query to key heads.
KERNEL_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}

_names = itertools.count()


class UnfusedError(RuntimeError):
    """torch would run FlexAttention without generated kernels."""


def compile_failures() -> tuple[type[Exception], ...]:
    """Return the exception types of a failed compilation. Importing them is slow."""
    return (UnfusedError, *compile_errors())


class CompiledAttention:
    """FlexAttention, compiled with constant scaling and soft cap.

    Each instance has a separate code object, because torch limits the number of compilations per code object. Exceeding
    the limit is an error, because torch would otherwise run the unfused form, which stores all T × T scores.

    Args:
        scaling: Factor applied to the attention scores.
        softcap: Soft cap of the scores or None.
        kernel_options: Options of the kernels in addition to :data:`KERNEL_OPTIONS`.

    Attributes:
        kernel_options: Options of the kernels.
        compilations: Number of times that torch compiled the function.
    """

    def __init__(self, scaling: float, softcap: float | None, kernel_options: dict[str, Any]) -> None:
        self.compilations = 0
        self.kernel_options = kernel_options
        function = attention_function(scaling, softcap, {**KERNEL_OPTIONS, **kernel_options})
        backend = inductor_backend()

        def compiled(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
            if not torch.compiler.is_compiling():
                raise UnfusedError("torch.compile is disabled, and FlexAttention would be unfused")
            return function(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), mask)

        def counting(graph: Any, inputs: Any) -> Any:
            self.compilations += 1
            return backend(graph, inputs)

        compiled.__code__ = compiled.__code__.replace(co_name=f"attention_{next(_names)}")
        self._compiled: Callable[..., Tensor] = torch.compile(compiled, backend=counting, dynamic=True, fullgraph=True)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None) -> Tensor:
        """Compute attention of (heads, T, d) tensors.

        torch compiles each combination of strides, views and ``requires_grad`` separately. So the compiled function
        gets contiguous tensors that are not views, and either all or none of them require a gradient.
        """
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        with torch.set_grad_enabled(tracked):
            tensors = [_tracked(t) if tracked else t for t in (query, key, value)]
            tensors = [t.transpose(0, 1).contiguous() for t in tensors]
            return self._compiled(*[unrecorded_view(t, t.shape) for t in tensors], tree_mask(layout, window))


def _tracked(t: Tensor) -> Tensor:
    """Return the tensor if it requires a gradient, or a copy that does and whose gradient is discarded."""
    if t.requires_grad:
        return t
    leaf = t.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    return leaf


def attention_function(
    scaling: float, softcap: float | None, kernel_options: dict[str, Any] | None = None
) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
    """Return FlexAttention of (heads, T, d) queries, keys and values and a block mask.

    Without torch.compile, torch's operators compute all T × T scores.

    Raises:
        ImportError: if this version of torch does not include FlexAttention.
    """
    from torch.nn.attention.flex_attention import flex_attention

    scale_text = repr(float(scaling))
    cap_text = None if softcap is None else repr(float(softcap))

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        # torch.compile would turn captured floats into kernel arguments. Floats parsed from strings are constants.
        score_mod = None
        if cap_text is not None:
            cap = float(cap_text)

            def score_mod(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
                return cap * torch.tanh(score / cap)

        options = {"score_mod": score_mod, "block_mask": mask, "kernel_options": kernel_options}
        grouped = query.shape[0] != key.shape[0]
        tensors = (query[None], key[None], value[None])
        return flex_attention(*tensors, scale=float(scale_text), enable_gqa=grouped, **options).squeeze(0)

    return attend


def tree_mask(layout: Layout, window: int | None = None) -> Any:
    """Return the layout's ``BlockMask`` on its device. It is cached, so all layers of a model share it."""
    if window not in layout.masks:
        with torch.inference_mode(False):  # later calls may train
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
    next_child = np.zeros(len(lengths), np.int64)
    root = 0
    for segment, parent in enumerate(layout.parents):
        if parent >= 0:
            first[segment] = next_child[parent]
            next_child[parent] += subtree_sizes[segment]
        else:
            first[segment] = root
            root = root + subtree_sizes[segment]
        next_child[segment] = first[segment] + lengths[segment]
    rank = np.arange(layout.length) + np.repeat(first - layout.starts, lengths)
    return rank, np.repeat(first + subtree_sizes, lengths)


def visible_pairs(layout: Layout, window: int | None = None, block: int = BLOCK) -> np.ndarray:
    """Count the visible (query, key) pairs in each block of queries and keys: (n, n) for n blocks.

    The visible keys of a query within one segment are contiguous, so they are counted as ranges.
    """
    count = -(-layout.length // block)
    counts = np.zeros((count, count), np.int64)
    offsets = layout.offsets()
    positions = layout.positions()
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
    first = int(low.min()) // block
    last = (int(high.max()) - 1) // block
    edges = np.arange(first, last + 2) * block
    pairs = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    rows = queries // block
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(rows)) + 1])
    counts[rows[0] : rows[-1] + 1, first : last + 1] += np.add.reduceat(np.maximum(pairs, 0), cuts, axis=0)


def _block_mask(layout: Layout, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    # At least two blocks, because torch compiles a size of 1 separately.
    pairs = np.pad(visible_pairs(layout, window), (0, max(0, 2 - -(-layout.length // BLOCK))))
    is_full = pairs == BLOCK * BLOCK
    partial_counts, partial_indices = _block_indices((pairs > 0) & ~is_full, layout.device)
    full_counts, full_indices = _block_indices(is_full, layout.device)
    positions = layout.positions()
    rank, end, position, first = (
        to_device(torch.from_numpy(numbers.astype(np.int32)), layout.device)
        for numbers in (*ranks(layout), positions, positions - (window or 0) + 1)
    )

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (rank[key] <= rank[query]) & (rank[query] < end[key])

    def is_visible_in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_visible(batch, head, query, key) & (first[query] <= position[key])

    mask_mod = is_visible if window is None else is_visible_in_window
    lengths = (layout.length, layout.length)
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
