"""Padded rows of tokens or image patches, for encoders and for decoders without support for packed rows.

Bidirectional attention uses the compiled kernel: each row becomes two segments, its tokens and its padding. Other
masks, causal attention, dropout, and CPUs without the kernel use torch's attention. Recognized blocks run fused
(:mod:`deltaw.runtime.fused_blocks`), also in decoders.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deltaw.hub.transformers_private import attention_name, dispatches_attention
from deltaw.kernels import loader
from deltaw.kernels.attention import is_compiled, packed_attention
from deltaw.kernels.layout import Layout
from deltaw.runtime.attention_choice import use_attention
from deltaw.runtime.fused_blocks import FusedBlocks, Mode, fused_in_mode, record_config

PADDED_ATTENTION = "deltaw_padded"
# Shape (rows, tokens) of the sample for verifying blocks. The last row is shorter.
SAMPLE = (3, 14)


def _attend_padded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: query (rows, heads, length, d) to output (rows, length, heads, d)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    record_config(module, scale, sliding_window, softcap)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    plain = query.shape[2] == key.shape[2] and sliding_window is None and softcap is None
    is_supported = plain and not causal and dropout == 0.0 and is_compiled(q, k, v)
    layout = layout_of_mask(attention_mask, query.shape[0], query.shape[2], causal=False) if is_supported else None
    if layout is None:
        kwargs |= {"is_causal": is_causal, "sliding_window": sliding_window, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    out = packed_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), layout, scaling=scale, causal=False)
    return out.transpose(0, 1).unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(PADDED_ATTENTION, _attend_padded)
AttentionMaskInterface.register(PADDED_ATTENTION, sdpa_mask)

# The last mask with its causality and layout. All layers of a forward pass receive the same mask.
_last_mask: list[tuple[weakref.ref[Tensor], bool, Layout | None]] = []


def layout_of_mask(mask: Tensor | None, rows: int, length: int, *, causal: bool) -> Layout | None:
    """Return the layout of a mask, or None if it masks anything except padding at the end of rows.

    Args:
        mask: True if a query attends to a key, (rows, 1, length or 1, length). None without padding.
        causal: True if queries do not attend to later keys.
    """
    if mask is None:
        return _unpadded_layout(rows, length)
    if _last_mask and _last_mask[0][0]() is mask and _last_mask[0][1] is causal:
        return _last_mask[0][2]
    layout = None
    if mask.dtype == torch.bool and mask.shape in ((rows, 1, length, length), (rows, 1, 1, length)):
        visible = mask[:, 0, -1]  # of the last query, which attends to all keys also in a causal mask
        counts = visible.sum(-1)
        positions = torch.arange(length)
        expected = visible[:, None, None]
        if causal:
            expected = expected & (positions[:, None] >= positions)
        padded_at_end = visible == (positions < counts[:, None])
        is_equal = (mask == expected).all() if mask.shape[2] == length or not causal else torch.tensor(False)
        if bool(padded_at_end.all() & is_equal & (counts > 0).all()):
            layout = Layout.of_lengths([part for n in counts.tolist() for part in (n, length - n) if part])
    _last_mask[:] = [(weakref.ref(mask), causal, layout)]
    return layout


@functools.lru_cache(maxsize=16)
def _unpadded_layout(rows: int, length: int) -> Layout:
    return Layout.of_lengths([length] * rows)


@contextlib.contextmanager
def padded_rows(model: PreTrainedModel, *, fused: bool = True) -> Iterator[None]:
    """Context in which bidirectional attention uses the compiled kernel if possible, and recognized blocks run fused.

    Args:
        fused: False to run unfused blocks.
    """
    if attention_name(model.config) != "sdpa" or model.device.type != "cpu" or loader.library() is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        # Some models do not dispatch attention (Falcon before transformers 5.25), so only their blocks can be replaced.
        if dispatches_attention(model):
            stack.enter_context(use_attention(model, PADDED_ATTENTION, must=False))
        if fused:
            stack.enter_context(fused_padded_blocks(model).installed())
        yield


def fused_padded_blocks(model: PreTrainedModel) -> FusedBlocks:
    """Return the model's fused blocks for padded rows. Recognition runs once per model."""
    return fused_in_mode(model, PADDED)


def _padded_layout_of_call(hidden: Tensor, kwargs: dict[str, Any], causal: bool) -> Layout | None:
    if kwargs.get("packed_layout") is not None:
        return None
    return layout_of_mask(kwargs.get("attention_mask"), hidden.shape[0], hidden.shape[1], causal=causal)


def _sample(model: PreTrainedModel) -> dict[str, Any]:
    """Return padded rows of random tokens, or random images, as inputs of the backbone."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        shape = (SAMPLE[0], config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.dtype)}
    tokens = torch.randint(3, config.get_text_config().vocab_size, SAMPLE, generator=generator)
    lengths = torch.tensor([SAMPLE[1]] * (SAMPLE[0] - 1) + [SAMPLE[1] - 5])
    inputs = {"input_ids": tokens, "attention_mask": (torch.arange(SAMPLE[1]) < lengths[:, None]).long()}
    return {**inputs, "use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else inputs


PADDED = Mode("padded", _padded_layout_of_call, functools.partial(padded_rows, fused=False), _sample)
