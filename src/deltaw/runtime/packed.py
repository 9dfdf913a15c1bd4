"""Run transformers models on packed rows, with deltaw's attention kernels.

Packed rows are concatenated without padding, and rows may share prefixes. The layout reaches the attention function as
a keyword argument that the model passes on (transformers' ``AttentionInterface``). No mask is created. Layers with a
recurrent state get it the same way (:mod:`deltaw.runtime.recurrent_layers`).
:mod:`deltaw.runtime.packing_checks` tests if a model supports packed rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from deltaw.hub.transformers_private import attention_name
from deltaw.kernels.attention import packed_attention
from deltaw.kernels.dropout import new_seed
from deltaw.kernels.layout import Layout
from deltaw.lora.adapted import ACTIVE_KEYWORD, Activation
from deltaw.runtime.attention_choice import use_attention
from deltaw.runtime.fused_blocks import FusedBlocks, Mode, cached_in_mode, fused_in_mode, record_config
from deltaw.runtime.partial import PartialLayout, layer_index_of, partial_attention
from deltaw.runtime.recurrent_layers import use_packed_operators

ATTENTION = "deltaw_packed"
SAMPLE_TOKENS = 24
SAMPLE_VOCABULARY = 1024
# Parent segments of the sample: two rows with a common prefix and a separate row, or only separate rows.
PREFIX_TREE = (-1, 0, 0, -1)
INDEPENDENT = (-1, -1, -1, -1)


def _attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_layout: Layout | PartialLayout | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers: query (1, heads, T, d) to output (1, T, heads, d)."""
    if packed_layout is None:
        raise RuntimeError(f"{type(module).__name__} does not pass the layout to its attention")
    if query.shape[2] != packed_layout.length or key.shape[2] != packed_layout.length:
        raise RuntimeError("attention over a cache cannot run on packed rows")
    if torch.is_autocast_enabled(query.device.type):  # as torch's attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    record_config(module, scale, sliding_window, softcap)
    options: dict[str, Any] = {"scaling": scale, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
    if not getattr(module, "is_causal", True):
        options["causal"] = False
    q = query[0]
    k = key[0]
    v = value[0]
    if dropout:
        options |= {"dropout": dropout, "seed": new_seed(query.device)}
    if isinstance(packed_layout, PartialLayout):
        out = partial_attention(q, k, v, packed_layout, layer_index_of(module), **options)
    else:
        out = packed_attention(q, k, v, packed_layout, **options)
    return out.transpose(0, 1)[None], None


# No mask function: it would make transformers search the positions for packed rows and synchronize with the device.
AttentionInterface.register(ATTENTION, _attend_packed)


def one_row(model: PreTrainedModel, tokens: Tensor) -> dict[str, object]:
    """Return the model's inputs for one row of ``tokens`` (1, T), for the current attention implementation."""
    if attention_name(model.config) != ATTENTION:
        return {"input_ids": tokens}
    layout = Layout.of_lengths([tokens.shape[1]])
    layout.device = tokens.device
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return {"input_ids": tokens, "position_ids": positions, "packed_layout": layout, **fully_active(model)}


def fully_active(model: nn.Module) -> dict[str, object]:
    """Return the keyword that applies an activated adapter to all tokens, for tokens that do not represent text."""
    activated = any(isinstance(getattr(m, "activation", None), Activation) for m in model.modules())
    return {ACTIVE_KEYWORD: True} if activated else {}


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model below its output head."""
    return model.base_model  # type: ignore[return-value]


@contextlib.contextmanager
def packed_rows(model: PreTrainedModel, *, fused: bool = True, independent: bool = False) -> Iterator[None]:
    """Context in which the model runs packed rows.

    Contexts of one model may overlap in several threads only with ``fused=False``, because fused blocks are stored in
    the model. See :func:`deltaw.runtime.attention_choice.use_attention`.

    Args:
        fused: True to run supported blocks fused.
        independent: True if rows have no shared prefixes, as for encoders.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_attention(model, ATTENTION))
        use_packed_operators(model)
        if fused:
            stack.enter_context(fused_in_mode(model, PACKED_INDEPENDENT if independent else PACKED).installed())
        yield


def fused_blocks(model: PreTrainedModel) -> FusedBlocks:
    """Return the model's fused blocks for packed rows. Recognition runs once per model."""
    return fused_in_mode(model, PACKED)


@contextlib.contextmanager
def outputs_at(model: PreTrainedModel, indices: Tensor | None) -> Iterator[None]:
    """Context in which only some outputs of the backbone on packed rows are needed.

    The values of other outputs are undefined.

    A fused last block computes only these outputs.

    Args:
        indices: (P,) ascending, without duplicates, or None for all outputs.
    """
    fused = cached_in_mode(model, PACKED.name)
    last = None if fused is None else fused.last
    if last is None:
        yield
        return
    last.output_indices = indices
    try:
        yield
    finally:
        last.output_indices = None


def first_position(model: nn.Module) -> int:
    """Return the position of a row's first token. RoBERTa and related models count from the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def sample_rows(model: PreTrainedModel, parents: Sequence[int]) -> tuple[Layout, dict[str, Any]]:
    """Return tokens in a prefix tree of four segments, longer than a small window, as a layout and inputs of the
    backbone.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    length = SAMPLE_TOKENS + (window if window is not None and window <= 64 else 0)
    layout = Layout.of_lengths([length - 5, 5, 7, 5], parents)
    layout.device = model.device
    generator = torch.Generator().manual_seed(0)
    # Adjacent token ids, because pages of a memory-mapped embedding are loaded when they are read.
    vocabulary = min(model.config.get_text_config().vocab_size, SAMPLE_VOCABULARY)
    tokens = torch.randint(0, vocabulary, (1, layout.length), generator=generator).to(model.device)
    positions = torch.from_numpy(layout.positions())[None].to(model.device) + first_position(model)
    inputs = {"input_ids": tokens, "position_ids": positions, "packed_layout": layout, **without_cache(model)}
    return layout, {**inputs, **fully_active(model)}


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return the argument that disables the KV cache, if the model has one."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def _packed_layout_of_call(hidden: Tensor, kwargs: dict[str, Any], causal: bool) -> Layout | PartialLayout | None:
    layout: Layout | PartialLayout | None = kwargs.get("packed_layout")
    return None if layout is None or hidden.shape[0] != 1 or layout.length != hidden.shape[1] else layout


def _tree_rows(model: PreTrainedModel, parents: Sequence[int] = PREFIX_TREE) -> dict[str, Any]:
    return sample_rows(model, parents)[1]


PACKED, PACKED_INDEPENDENT = (
    Mode(name, _packed_layout_of_call, functools.partial(packed_rows, fused=False), sample)
    for name, sample in (("packed", _tree_rows), ("packed apart", functools.partial(_tree_rows, parents=INDEPENDENT)))
)
