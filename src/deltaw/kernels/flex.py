"""Attention over a prefix tree by torch's FlexAttention (arXiv 2412.05496), on devices it is compiled for.

A block mask says which blocks of 128 queries and 128 keys see each other wholly, in part, or not at all; the
last are skipped. Within a block seen in part, two numbers a token decide: its rank, which is its place in the
tree walked depth first, and the end of its segment's subtree in that order. A query sees a key if

    rank[key] ≤ rank[query] < end[key].

Later tokens of the key's own segment and of the segments below it have just these ranks. Packed rows are laid
out in this order anyway, so that ranks are places.

Whether FlexAttention serves is tried, not listed: the first time that heads of some form come, two small
trees go forward and backward through it and through the reference. Where that fails or differs, attention
runs in tiles (:mod:`deltaw.kernels.attention`), and :func:`notes` says why.

Knows tensors and layouts; not models, tokens or caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.layout import Layout
from deltaw.kernels.torch_private import compile_errors, in_dispatch_mode
from deltaw.kernels.transfer import to_device

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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    compiled: bool = True,
) -> Tensor:
    """As :func:`deltaw.kernels.attention.packed_attention`, by FlexAttention, with its own derivative.

    Args:
        query: (heads, T, d). key, value: (key heads, T, d) and (key heads, T, d_v).
        compiled: without it, all T × T scores are computed by torch's operations.

    Returns:
        (heads, T, d_v).

    Raises:
        ImportError: this torch has no FlexAttention.
    """
    attention = _compiled() if compiled else _function()
    mod = None
    if softcap is not None:
        cap = float(softcap)

        def mod(score: Tensor, batch: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

    out = attention(
        query[None],
        key[None],
        value[None],
        score_mod=mod,
        block_mask=tree_mask(layout, window),
        scale=scaling,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out[0]


def tree_mask(layout: Layout, window: int | None = None) -> Any:
    """The layout's ``BlockMask`` on its device, made once: all layers of a model use the same one."""
    found = layout.masks.get(window)
    if found is None:
        found = layout.masks[window] = _block_mask(layout, window)
    return found


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

    return BlockMask.from_kv_blocks(
        some,
        some_places,
        all_of,
        all_places,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees if window is None else sees_near,
        seq_lengths=(layout.length, layout.length),
    )


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
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> bool:
    """Whether FlexAttention serves (heads, T, d) tensors like these; tried once for each form of them.

    Never on fake tensors, nor while a dispatch mode watches: a dry run must not compile anything.

    Args:
        reference: what :func:`tree_attention` must give, called likewise.
    """
    if query.device.type not in DEVICES or type(query) not in (Tensor, torch.nn.Parameter):
        return False
    if query.dtype not in TOLERANCE or in_dispatch_mode():
        return False
    form = _form(query, key, value, window, softcap)
    if form not in _TRIALS:
        _TRIALS[form] = _tried((query, key, value), reference, window is not None, softcap)
    return _TRIALS[form] is None


def served(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    reference: Callable[..., Tensor],
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor | None:
    """:func:`tree_attention` where FlexAttention serves; None where it does not.

    Nor does it any longer if torch cannot compile it for a later shape.
    """
    if not serves(query, key, value, reference, window=window, softcap=softcap):
        return None
    try:
        return tree_attention(query, key, value, layout, scaling=scaling, window=window, softcap=softcap)
    except compile_errors() as error:
        _TRIALS[_form(query, key, value, window, softcap)] = _failed(error)
        return None


def _form(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None
) -> tuple[Any, ...]:
    """What a trial is remembered by."""
    heads, sizes = (query.shape[0], key.shape[0]), (query.shape[-1], value.shape[-1])
    return query.device, query.dtype, *heads, *sizes, window is not None, softcap is not None


def _failed(error: Exception) -> str:
    brief = (str(error).splitlines() or [""])[0][:100]
    return f"FlexAttention failed ({type(error).__name__}: {brief})"


def _tried(
    inputs: tuple[Tensor, ...], reference: Callable[..., Tensor], window: bool, softcap: float | None
) -> str | None:
    """Why FlexAttention does not serve inputs of this form; None where small trees show that it does."""
    each = (_tried_on(Layout.of_lengths(*tree), inputs, reference, window, softcap) for tree in TRIED)
    return next((why for why in each if why is not None), None)


def _tried_on(
    layout: Layout,
    inputs: tuple[Tensor, ...],
    reference: Callable[..., Tensor],
    window: bool,
    softcap: float | None,
) -> str | None:
    device, dtype, size = inputs[0].device, inputs[0].dtype, inputs[0].shape[-1]
    layout.device = device
    generator = torch.Generator(device=device).manual_seed(0)
    leaves = [
        torch.randn(t.shape[0], layout.length, t.shape[-1], generator=generator, device=device)
        for t in inputs
    ]
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
