"""Padded rows of tokens or of an image's patches: encoders, and decoders that cannot run packed rows.

Attention that sees both ways goes through the compiled kernel. Each row becomes two segments, its tokens and
its padding, so that nothing is computed across. It reaches a model as transformers' own attention does and
leaves to torch's whatever is asked beyond that: other masks, causal attention, dropout, processors without
the kernel. So its results are the model's own. Blocks that are recognized run fused (``fused_blocks``), those
of decoders too.

Knows transformers' models; not data, losses or training.
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
from deltaw.runtime.attention_choice import attending_by
from deltaw.runtime.fused_blocks import FusedBlocks, Mode, fused_in_mode, note

ATTENTION = "deltaw_padded"
# Rows and tokens a row of the sample on which blocks are verified, the last row shorter by some.
SAMPLE = (3, 14)


def _attend(
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
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query (rows, heads, length, d) in, (rows, length, heads, d) out."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    told = query.shape[-1] ** -0.5 if scaling is None else scaling
    note(module, told, sliding_window, softcap)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    plain = query.shape[2] == key.shape[2] and sliding_window is None and softcap is None
    layout = None
    if plain and not causal and dropout == 0.0 and is_compiled(q, k, v):
        layout = layout_of_mask(attention_mask, query.shape[0], query.shape[2], causal=False)
    if layout is None:
        options = {"sliding_window": sliding_window, "softcap": softcap, **others}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    out = packed_attention(
        q.transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        layout,
        scaling=told,
        causal=False,
    )
    return out.transpose(0, 1).unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

# The layout of the last mask, and whether it is causal: all layers of a forward are given the same one.
_LAST: list[tuple[weakref.ref[Tensor], bool, Layout | None]] = []


def layout_of_mask(mask: Tensor | None, rows: int, length: int, *, causal: bool) -> Layout | None:
    """The segments that a mask stands for; None where it is more than padding at the end of rows.

    Args:
        mask: True where a query sees a key, (rows, 1, length or 1, length); None where nothing is padded.
        causal: whether queries see no later keys.
    """
    if mask is None:
        return _whole_rows(rows, length)
    if _LAST and _LAST[0][0]() is mask and _LAST[0][1] is causal:
        return _LAST[0][2]
    layout = None
    if mask.dtype == torch.bool and mask.shape in ((rows, 1, length, length), (rows, 1, 1, length)):
        seen = mask[:, 0, -1]  # by the last query, which a causal mask lets see every key
        counts = seen.sum(-1)
        places = torch.arange(length)
        expected = seen[:, None, None]
        if causal:
            expected = expected & (places[:, None] >= places)
        padded_at_end = seen == (places < counts[:, None])
        same = (mask == expected).all() if mask.shape[2] == length or not causal else torch.tensor(False)
        if bool(padded_at_end.all() & same & (counts > 0).all()):
            lengths = [part for n in counts.tolist() for part in (n, length - n) if part]
            layout = Layout.of_lengths(lengths)
    _LAST[:] = [(weakref.ref(mask), causal, layout)]
    return layout


@functools.lru_cache(maxsize=16)
def _whole_rows(rows: int, length: int) -> Layout:
    return Layout.of_lengths([length] * rows)


@contextlib.contextmanager
def padded_rows(model: PreTrainedModel, *, fused: bool = True) -> Iterator[None]:
    """While open, attention both ways goes through the compiled kernel where it can, and with ``fused``
    recognized blocks run fused."""
    if attention_name(model.config) != "sdpa" or model.device.type != "cpu" or loader.library() is None:
        yield
        return
    # Falcon and its like compute attention in their own code: blocks alone stand in for it.
    dispatched = dispatches_attention(model)
    with contextlib.ExitStack() as stack:
        if dispatched:
            stack.enter_context(attending_by(model, ATTENTION, must=False))
        if fused:
            stack.enter_context(fused_padded_blocks(model).installed())
        yield


def fused_padded_blocks(model: PreTrainedModel) -> FusedBlocks:
    """The model's fused blocks for padded rows, recognized and verified once."""
    return fused_in_mode(model, PADDED)


def _layout_of_call(hidden: Tensor, named: dict[str, Any], causal: bool) -> Layout | None:
    if named.get("packed_layout") is not None:
        return None
    return layout_of_mask(named.get("attention_mask"), hidden.shape[0], hidden.shape[1], causal=causal)


def _sample(model: PreTrainedModel) -> dict[str, Any]:
    """Padded rows of random tokens, or random images, as a backbone's inputs."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        shape = (SAMPLE[0], config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.dtype)}
    tokens = torch.randint(3, config.get_text_config().vocab_size, SAMPLE, generator=generator)
    lengths = torch.tensor([SAMPLE[1]] * (SAMPLE[0] - 1) + [SAMPLE[1] - 5])
    inputs = {"input_ids": tokens, "attention_mask": (torch.arange(SAMPLE[1]) < lengths[:, None]).long()}
    cached = "use_cache" in inspect.signature(model.forward).parameters
    return {**inputs, "use_cache": False} if cached else inputs


@contextlib.contextmanager
def _padded_attention_of(model: PreTrainedModel) -> Iterator[None]:
    with padded_rows(model, fused=False):
        yield


PADDED = Mode("padded", _layout_of_call, _padded_attention_of, _sample)
