"""Attention of padded rows that see both ways, by the compiled kernel: encoders of texts and images.

Each row becomes two segments, its tokens and its padding, so that nothing is computed across. Reaches a model
as transformers' own attention does and leaves to torch's whatever is asked beyond that: other masks, causal
attention, dropout, processors without the kernel. So its results are the model's own.

Knows transformers' models; not data, losses or training.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deltaw.hub.quiet import quiet
from deltaw.kernels import loader
from deltaw.kernels.attention import is_compiled, packed_attention
from deltaw.kernels.layout import Layout

ATTENTION = "deltaw_padded"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query (rows, heads, length, d) in, (rows, length, heads, d) out."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    same = query.shape[2] == key.shape[2]
    layout = None
    if same and not causal and dropout == 0.0 and is_compiled(q, k, v):
        layout = _layout(attention_mask, query.shape[0], query.shape[2])
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **others
        )
    out = packed_attention(
        q.transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        layout,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=False,
    )
    return out.transpose(0, 1).unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

# The layout of the mask that was looked at last: all layers of a pass are given the same one.
_LAST: list[tuple[weakref.ref[Tensor], Layout | None]] = []


def _layout(mask: Tensor | None, rows: int, length: int) -> Layout | None:
    """The segments that a mask stands for; None where it is more than padding at the end of rows."""
    if mask is None:
        return Layout.of_lengths([length] * rows)
    if _LAST and _LAST[0][0]() is mask:
        return _LAST[0][1]
    layout = None
    if mask.dtype == torch.bool and mask.shape in ((rows, 1, length, length), (rows, 1, 1, length)):
        seen = mask[:, 0, 0]
        counts = seen.sum(-1)
        plain = torch.arange(length) < counts[:, None]
        if bool((seen == plain).all() & (mask == seen[:, None, None]).all() & (counts > 0).all()):
            lengths = [part for n in counts.tolist() for part in (n, length - n) if part]
            layout = Layout.of_lengths(lengths)
    _LAST[:] = [(weakref.ref(mask), layout)]
    return layout


@contextlib.contextmanager
def padded_rows(model: PreTrainedModel) -> Iterator[None]:
    """While open, attention both ways goes through the compiled kernel where it can."""
    before = model.config._attn_implementation
    if before != "sdpa" or model.device.type != "cpu" or loader.library() is None:
        yield
        return
    try:
        with quiet():
            model.set_attn_implementation(ATTENTION)
        yield
    finally:
        with quiet():
            model.set_attn_implementation(before)
