"""A transformers model run over a flat row of tokens: its own code, with the forest's attention.

The layout reaches attention as a keyword that the model passes down (transformers' ``AttentionInterface``);
the mask interface answers that no mask is needed. Nothing of the model is patched. Whether a model can be run
so is not read off a list of names: it is tried on a few tokens and compared with the padded run.

Knows transformers' models and layouts; not data, losses or training.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from deltaw.host.choices import Choice
from deltaw.hub.quiet import quiet
from deltaw.hub.skeleton import has_values
from deltaw.kernels.attention import packed_attention
from deltaw.kernels.layout import Layout, Tiles
from deltaw.runtime.fused_blocks import FusedBlocks, NotingLayout, recognize, try_blocks

ATTENTION = "deltaw_packed"
# Ways of attending that are told apart only far from each other, where a short trial cannot see them.
PLAIN_LAYER_TYPES = {"full_attention", "sliding_attention"}
TRIAL_TOKENS = 24


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
    packed_layout: Layout | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query (1, heads, T, d) in, (1, T, heads, d) out."""
    if packed_layout is None:
        raise RuntimeError(f"{type(module).__name__} does not hand the layout down to its attention")
    if query.shape[2] != packed_layout.length or key.shape[2] != packed_layout.length:
        raise RuntimeError("attention over a cache cannot run on a flat row")
    if dropout:
        raise RuntimeError("attention dropout is not drawn on a flat row; put the model in eval mode")
    told = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(packed_layout, NotingLayout):
        packed_layout.note(told, sliding_window, softcap)
    out = packed_attention(
        query[0],
        key[0],
        value[0],
        packed_layout,
        scaling=told,
        window=sliding_window,
        softcap=softcap,
    )
    return out.transpose(0, 1)[None], None


def _no_mask(*args: object, **kwargs: object) -> None:
    """The layout says who sees whom: no mask is made."""
    return None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def one_row(model: PreTrainedModel, tokens: Tensor) -> dict[str, object]:
    """The model's inputs for one row of ``tokens`` (1, T), whichever attention is set at the moment."""
    if model.config._attn_implementation != ATTENTION:
        return {"input_ids": tokens}
    layout = Layout.of_lengths([tokens.shape[1]])
    layout.device = tokens.device
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return {"input_ids": tokens, "position_ids": positions, "packed_layout": layout}


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of the model below its output head."""
    return model.base_model


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch to another attention implementation, and check that the whole model followed."""
    with quiet():
        model.set_attn_implementation(name)
    if model.config.get_text_config()._attn_implementation != name:
        raise RuntimeError(f"{type(model).__name__} does not take another attention implementation")


@contextlib.contextmanager
def packed_rows(model: PreTrainedModel, *, fused: bool = True) -> Iterator[None]:
    """While open, the model's attention runs over packed rows, and with ``fused`` its blocks run fused where
    they can."""
    before = model.config._attn_implementation
    try:
        set_attention(model, ATTENTION)
        with fused_blocks(model).installed() if fused else contextlib.nullcontext():
            yield
    finally:
        with quiet():
            model.set_attn_implementation(before)


_FUSED: weakref.WeakKeyDictionary[PreTrainedModel, FusedBlocks] = weakref.WeakKeyDictionary()


def fused_blocks(model: PreTrainedModel) -> FusedBlocks:
    """The model's fused blocks, recognized and tried once; the model's attention runs over flat rows."""
    known = _FUSED.get(model)
    if known is None:
        known = _FUSED[model] = _tried(model)
    return known


@contextlib.contextmanager
def outputs_at(model: PreTrainedModel, places: Tensor | None) -> Iterator[None]:
    """While open, only these outputs of the backbone on flat rows are asked for; the others may be anything.

    A fused last block computes no others.

    Args:
        places: (P), ascending, each once; None for all.
    """
    fused = _FUSED.get(model)
    if fused is None or not fused.choice.value or not fused.blocks:
        yield
        return
    last = fused.blocks[-1]
    last.picked = places
    try:
        yield
    finally:
        last.picked = None


def _tried(model: PreTrainedModel) -> FusedBlocks:
    if model.device.type != "cpu":
        return FusedBlocks([], Choice(False, "on this device the model's own code runs"))
    fused = recognize(backbone_of(model))
    if not fused.choice.value:
        return fused
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    lengths = [TRIAL_TOKENS + (window if window is not None and window <= 64 else 0), 5, 7]
    plain = Layout.of_lengths(lengths, [-1, 0, 0])
    layout = NotingLayout(plain.starts, plain.stops, plain.parents)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    inputs = {
        "input_ids": torch.randint(0, vocabulary, (1, layout.length), generator=generator),
        "position_ids": torch.from_numpy(layout.positions())[None],
        "packed_layout": layout,
        "use_cache": False,
    }
    # Of what a block adds to its input, known to some per cent in bf16; another block is off by more.
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.3
    try:
        return try_blocks(fused, lambda: backbone_of(model)(**inputs), layout, tolerance)
    except Exception as error:  # whatever foreign code raises here, it runs itself
        return FusedBlocks([], Choice(False, f"{type(error).__name__}: {str(error)[:100]}"))


def can_pack(model: PreTrainedModel) -> Choice:
    """Whether the model gives the same outputs on a flat row as on padded rows, and how that is known."""
    name = type(model).__name__
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if types - PLAIN_LAYER_TYPES:
        return Choice(
            False, f"{name} has layers of another kind: {', '.join(sorted(types - PLAIN_LAYER_TYPES))}"
        )
    try:
        difference, reached = _trial(model)
    except Exception as error:  # whatever a foreign model raises here, the padded path is right for it
        return Choice(False, f"{name} cannot run a flat row ({type(error).__name__}: {str(error)[:100]})")
    if not has_values(model):
        return _by_structure(model, reached)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 6e-2
    if any(p.dtype == torch.int8 for p in model.parameters()) and not difference < tolerance:
        # The last digit of an input decides between two bytes in every layer anew: outputs drift apart.
        return _by_structure(model, reached)
    if not difference < tolerance:
        return Choice(
            False, f"{name} gives other outputs on a flat row (relative difference {difference:.1e})"
        )
    return Choice(True, f"{name} gives the same outputs on a flat row (relative difference {difference:.1e})")


def _by_structure(model: PreTrainedModel, reached: int) -> Choice:
    """The answer for a model on fake tensors, whose outputs cannot be compared.

    What is known is that a flat row ran. It means something if every layer attended over the layout, and the
    model takes positions as they are given.
    """
    name = type(model).__name__
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    if reached < layers:
        return Choice(False, f"{name} hands the layout to {reached} of its {layers} layers")
    if "position_ids" not in inspect.signature(backbone_of(model).forward).parameters:
        return Choice(False, f"{name} takes no positions")
    return Choice(True, f"{name} attends over the layout in all its layers")


class _WatchedLayout(Layout):
    """A layout that counts how often attention asked it for its tiles."""

    asked = 0

    def tiles(self, window: int | None = None) -> Tiles:
        self.asked += 1
        return super().tiles(window)

    def forest(self) -> Tensor:
        self.asked += 1
        return super().forest()


def _trial(model: PreTrainedModel) -> tuple[float, int]:
    """A small forest on a flat row, and its rows run on their own: the relative difference (of norms) between
    the two, and how many times attention ran over the forest."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    length = TRIAL_TOKENS + (window if window is not None and window <= 64 else 0)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (length + 12,), generator=generator).to(model.device)
    forest = Layout.of_lengths([length - 5, 5, 7, 5], [-1, 0, 0, -1])
    layout = _WatchedLayout(forest.starts, forest.stops, forest.parents)
    layout.device = model.device
    positions = torch.from_numpy(layout.positions()).to(model.device)
    stem, left, right, alone = torch.split(tokens, [length - 5, 5, 7, 5])
    backbone = backbone_of(model)
    with torch.no_grad():
        apart = [
            backbone(input_ids=row[None], use_cache=False).last_hidden_state[0]
            for row in (torch.cat([stem, left]), torch.cat([stem, right]), alone)
        ]
        with packed_rows(model, fused=False):
            flat = backbone(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False, packed_layout=layout
            ).last_hidden_state[0]
    expected = torch.cat([apart[0], apart[1][len(stem) :], apart[2]]).float()
    return float((flat.float() - expected).norm() / expected.norm()), layout.asked
