"""A transformers model run over packed rows without padding: its own code, with attention over a prefix tree.

The layout reaches attention as a keyword that the model passes down (transformers' ``AttentionInterface``),
and no mask is made. Nothing of the model is patched. Whether a model can be run so is not read off a list of
names: packed rows are compared with rows of their own.

Knows transformers' models and layouts; not data, losses or training.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from deltaw.host.choices import Choice
from deltaw.hub.transformers_private import attention_name
from deltaw.kernels import loader
from deltaw.kernels.attention import packed_attention
from deltaw.kernels.layout import Layout
from deltaw.lora.activation import PLACES, Activation
from deltaw.runtime.attention_choice import attending_by
from deltaw.runtime.fused_blocks import FusedBlocks, Mode, fused_in_mode, known_in_mode, note, noting
from deltaw.runtime.partial import PartialLayout, number_of, partial_attention
from deltaw.runtime.recognition import TOLERANCE
from deltaw.runtime.roles import real_tensors
from deltaw.runtime.small_copy import small_copy

ATTENTION = "deltaw_packed"
# Ways of attending that are told apart only far from each other, where a few tokens cannot show them.
PLAIN_LAYER_TYPES = {"full_attention", "sliding_attention"}
SAMPLE_TOKENS = 24
SAMPLE_VOCABULARY = 1024
# Parents of the sample's segments: two rows that begin alike, and one on its own.
TREE = (-1, 0, 0, -1)


def _attend(
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
    **others: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query (1, heads, T, d) in, (1, T, heads, d) out."""
    if packed_layout is None:
        raise RuntimeError(f"{type(module).__name__} does not hand the layout down to its attention")
    if query.shape[2] != packed_layout.length or key.shape[2] != packed_layout.length:
        raise RuntimeError("attention over a cache cannot run on packed rows")
    if dropout:
        raise RuntimeError("attention dropout is not drawn on packed rows; put the model in eval mode")
    told = query.shape[-1] ** -0.5 if scaling is None else scaling
    note(module, told, sliding_window, softcap)
    how: dict[str, Any] = {"scaling": told, "window": sliding_window, "softcap": softcap}
    q, k, v = query[0], key[0], value[0]
    if isinstance(packed_layout, PartialLayout):
        out = partial_attention(q, k, v, packed_layout, number_of(module), **how)
    else:
        out = packed_attention(q, k, v, packed_layout, **how)
    return out.transpose(0, 1)[None], None


# No mask function is registered under this name, so that transformers makes no mask: the layout says who sees
# whom. With one it would look among the positions for packed rows, and wait for the device to answer.
AttentionInterface.register(ATTENTION, _attend)


def one_row(model: PreTrainedModel, tokens: Tensor) -> dict[str, object]:
    """The model's inputs for one row of ``tokens`` (1, T), whichever attention is set at the moment."""
    if attention_name(model.config) != ATTENTION:
        return {"input_ids": tokens}
    layout = Layout.of_lengths([tokens.shape[1]])
    layout.device = tokens.device
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    inputs = {"input_ids": tokens, "position_ids": positions, "packed_layout": layout}
    return {**inputs, **_acting_everywhere(model)}


def _acting_everywhere(model: nn.Module) -> dict[str, object]:
    """For tokens that stand for no text: an activated adapter acts on all of them."""
    activated = any(isinstance(getattr(m, "activation", None), Activation) for m in model.modules())
    return {PLACES: True} if activated else {}


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model below its output head."""
    return model.base_model  # type: ignore[return-value]


@contextlib.contextmanager
def packed_rows(model: PreTrainedModel, *, fused: bool = True) -> Iterator[None]:
    """While open, the model's attention runs over packed rows, and with ``fused`` its blocks run fused where
    they can."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(attending_by(model, ATTENTION))
        if fused:
            stack.enter_context(fused_blocks(model).installed())
        yield


def fused_blocks(model: PreTrainedModel) -> FusedBlocks:
    """The model's fused blocks for packed rows, recognized and verified once."""
    return fused_in_mode(model, PACKED)


@contextlib.contextmanager
def outputs_at(model: PreTrainedModel, places: Tensor | None) -> Iterator[None]:
    """While open, only these outputs of the backbone on packed rows are asked for; others may be anything.

    A fused last block computes no others.

    Args:
        places: (P), ascending, each once; None for all.
    """
    fused = known_in_mode(model, PACKED.name)
    last = None if fused is None else fused.last
    if last is None:
        yield
        return
    last.picked = places
    try:
        yield
    finally:
        last.picked = None


def can_pack(model: PreTrainedModel) -> Choice:
    """Whether the model gives the same outputs on packed rows as on rows of their own, and how that is known.

    The model itself runs a packed row once, which shows that the layout reaches attention in all its layers.
    That outputs are the same is verified in fp32 on a small copy of it. So the answer is the same in a dry
    run on fake tensors, and does not hang on the precision of the weights.
    """
    name = type(model).__name__
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if types - PLAIN_LAYER_TYPES:
        return Choice(
            False, f"{name} has layers of another kind: {', '.join(sorted(types - PLAIN_LAYER_TYPES))}"
        )
    try:
        reached = _reached(model)
    except Exception as error:  # whatever a foreign model raises here, the padded path is right for it
        return Choice(False, f"{name} cannot run packed rows ({type(error).__name__}: {str(error)[:100]})")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    if reached < layers:
        return Choice(False, f"{name} hands the layout to {reached} of its {layers} layers")
    if "position_ids" not in inspect.signature(backbone_of(model).forward).parameters:
        return Choice(False, f"{name} takes no positions")
    try:
        difference = _difference(backbone_of(model))
    except Exception as error:
        return Choice(False, f"{name} cannot be compared ({type(error).__name__}: {str(error)[:100]})")
    if not difference < TOLERANCE:
        return Choice(
            False, f"{name} gives other outputs on packed rows (relative difference {difference:.1e})"
        )
    return Choice(
        True, f"{name} gives the same outputs on packed rows (relative difference {difference:.1e})"
    )


def sample_rows(model: PreTrainedModel, parents: Sequence[int]) -> tuple[Layout, dict[str, Any]]:
    """A few tokens in a prefix tree of four segments, longer than a small window, as a backbone's inputs."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    length = SAMPLE_TOKENS + (window if window is not None and window <= 64 else 0)
    layout = Layout.of_lengths([length - 5, 5, 7, 5], parents)
    layout.device = model.device
    generator = torch.Generator().manual_seed(0)
    # Tokens near each other: an embedding in a mapped file comes into memory where it is read.
    vocabulary = min(model.config.get_text_config().vocab_size, SAMPLE_VOCABULARY)
    tokens = torch.randint(0, vocabulary, (1, layout.length), generator=generator).to(model.device)
    positions = torch.from_numpy(layout.positions())[None].to(model.device)
    inputs = {"input_ids": tokens, "position_ids": positions, "packed_layout": layout, "use_cache": False}
    return layout, {**inputs, **_acting_everywhere(model)}


def _reached(model: PreTrainedModel) -> int:
    """How many times attention ran over the layout of a packed row."""
    _, inputs = sample_rows(model, TREE)
    with torch.no_grad(), packed_rows(model, fused=False), noting() as notes:
        backbone_of(model)(**inputs)
    return len(notes)


_DIFFERENCES: dict[tuple[Any, ...], float] = {}


def _difference(backbone: PreTrainedModel) -> float:
    """The relative difference (of norms) between a prefix tree in one packed row and its rows on their own,
    on a small fp32 copy; remembered by class and configuration."""
    config = backbone.config.to_json_string(use_diff=False)
    key = (type(backbone), config, loader.library() is not None, loader.arithmetic().approximating(()))
    if key not in _DIFFERENCES:
        with real_tensors(), torch.no_grad():
            _DIFFERENCES[key] = _packed_against_apart(small_copy(backbone))
    return _DIFFERENCES[key]


def _packed_against_apart(small: PreTrainedModel) -> float:
    layout, inputs = sample_rows(small, TREE)
    stem, left, right, alone = torch.split(inputs["input_ids"][0], (layout.stops - layout.starts).tolist())
    apart = [
        small(input_ids=row[None], use_cache=False).last_hidden_state[0]
        for row in (torch.cat([stem, left]), torch.cat([stem, right]), alone)
    ]
    with packed_rows(small, fused=False):
        packed = small(**inputs).last_hidden_state[0]
    expected = torch.cat([apart[0], apart[1][len(stem) :], apart[2]])
    return float((packed - expected).norm() / expected.norm())


def _layout_of_call(hidden: Tensor, named: dict[str, Any], causal: bool) -> Layout | PartialLayout | None:
    layout: Layout | PartialLayout | None = named.get("packed_layout")
    if layout is None or hidden.shape[0] != 1 or layout.length != hidden.shape[1]:
        return None
    return layout


@contextlib.contextmanager
def _packed_attention_of(model: PreTrainedModel) -> Iterator[None]:
    with packed_rows(model, fused=False):
        yield


PACKED = Mode("packed", _layout_of_call, _packed_attention_of, lambda model: sample_rows(model, TREE)[1])
