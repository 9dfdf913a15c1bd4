"""A transformers model run over packed rows without padding: its own code, with attention over a prefix tree.

The layout reaches attention as a keyword that the model passes down (transformers' ``AttentionInterface``),
and no mask is made. Nothing of the model is patched. Whether a model can be run so is not read off a list of
names: packed rows are compared with rows of their own.

Knows transformers' models and layouts; not data, losses or training.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deltaw.hub.quiet import quiet
from deltaw.hub.transformers_private import attention_name, dispatches_attention, set_attention_name
from deltaw.kernels import loader
from deltaw.kernels.attention import is_compiled, packed_attention
from deltaw.kernels.layout import Layout
from deltaw.lora.adapted import PLACES, Activation
from deltaw.machine.choices import Choice
from deltaw.runtime.fused_blocks import FusedBlocks, Mode, fused_in_mode, known_in_mode, note, noting
from deltaw.runtime.partial import PartialLayout, number_of, partial_attention
from deltaw.runtime.recognition import TOLERANCE, asked_once

# Each module reads the name of its attention from the configuration object that it holds. These are all one,
# unless a module was copied: a copy that is trained whole brings its own, which transformers does not know of.


def set_attention(model: PreTrainedModel, name: str, *, must: bool = True) -> None:
    """Switch to another attention implementation, and check with ``must`` that the whole model followed.

    Raises:
        RuntimeError: the model's own code does not take it.
    """
    with quiet():
        model.set_attn_implementation(name)
    if must and attention_name(model.config.get_text_config()) != name:
        raise RuntimeError(f"{type(model).__name__} does not take another attention implementation")
    for config in _copied(model):
        set_attention_name(config, name)


@contextlib.contextmanager
def attending_by(model: PreTrainedModel, name: str, *, must: bool = True) -> Iterator[None]:
    """While open, the model attends by the function of this name; afterwards as before.

    Raises:
        RuntimeError: with ``must``, where the model does not take it.
    """
    before = attention_name(model.config)
    if before is None:
        if must:
            raise RuntimeError(f"{type(model).__name__} does not tell by which function it attends")
        yield
        return
    try:
        set_attention(model, name, must=must)
        yield
    finally:
        with quiet():
            model.set_attn_implementation(before)
        for config in _copied(model):
            set_attention_name(config, before)


def _copied(model: nn.Module) -> list[PretrainedConfig]:
    """Configurations within the model that are copies of those that transformers switches."""
    known: set[int] = set()
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
        if isinstance(module, PreTrainedModel):
            parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
            known |= {id(config), *(id(part) for part in parts)}
    return [config for key, config in found.items() if key not in known]


# Padded rows of tokens or of an image's patches are for encoders, and decoders that cannot run packed rows. Attention
# that sees both ways goes through the compiled kernel. Each row becomes two segments, its tokens and its padding, so
# that nothing is computed across. It reaches a model as transformers' own attention does and leaves to torch's whatever
# is asked beyond that: other masks, causal attention, dropout, processors without the kernel. So its results are the
# model's own. Blocks that are recognized run fused (``fused_blocks``), those of decoders too.


PADDED_ATTENTION = "deltaw_padded"
# Rows and tokens a row of the sample on which blocks are verified, the last row shorter by some.
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
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query (rows, heads, length, d) in, (rows, length, heads, d) out."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    told = query.shape[-1] ** -0.5 if scaling is None else scaling
    note(module, told, sliding_window, softcap)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    plain = query.shape[2] == key.shape[2] and sliding_window is None and softcap is None
    known = plain and not causal and dropout == 0.0 and is_compiled(q, k, v)
    layout = layout_of_mask(attention_mask, query.shape[0], query.shape[2], causal=False) if known else None
    if layout is None:
        others |= {"is_causal": is_causal, "sliding_window": sliding_window, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    out = packed_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), layout, scaling=told, causal=False)
    return out.transpose(0, 1).unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(PADDED_ATTENTION, _attend_padded)
AttentionMaskInterface.register(PADDED_ATTENTION, sdpa_mask)

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
            layout = Layout.of_lengths([part for n in counts.tolist() for part in (n, length - n) if part])
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
            stack.enter_context(attending_by(model, PADDED_ATTENTION, must=False))
        if fused:
            stack.enter_context(fused_padded_blocks(model).installed())
        yield


def fused_padded_blocks(model: PreTrainedModel) -> FusedBlocks:
    """The model's fused blocks for padded rows, recognized and verified once."""
    return fused_in_mode(model, PADDED)


def _padded_layout_of_call(hidden: Tensor, named: dict[str, Any], causal: bool) -> Layout | None:
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


PADDED = Mode("padded", _padded_layout_of_call, functools.partial(padded_rows, fused=False), _sample)


ATTENTION = "deltaw_packed"
# Ways of attending that are told apart only far from each other, where a few tokens cannot show them.
PLAIN_LAYER_TYPES = {"full_attention", "sliding_attention"}
SAMPLE_TOKENS = 24
SAMPLE_VOCABULARY = 1024
# Parents of the sample's segments: two rows that begin alike, and one on its own; or rows that share nothing.
TREE, APART = (-1, 0, 0, -1), (-1, -1, -1, -1)


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
    if not getattr(module, "is_causal", True):
        how["causal"] = False
    q, k, v = query[0], key[0], value[0]
    if isinstance(packed_layout, PartialLayout):
        out = partial_attention(q, k, v, packed_layout, number_of(module), **how)
    else:
        out = packed_attention(q, k, v, packed_layout, **how)
    return out.transpose(0, 1)[None], None


# No mask function is registered under this name, so that transformers makes no mask: the layout says who sees
# whom. With one it would look among the positions for packed rows, and wait for the device to answer.
AttentionInterface.register(ATTENTION, _attend_packed)


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
def packed_rows(model: PreTrainedModel, *, fused: bool = True, apart: bool = False) -> Iterator[None]:
    """While open, the model's attention runs over packed rows, and with ``fused`` its blocks run fused where
    they can.

    Args:
        apart: whether the rows share nothing, as an encoder's.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(attending_by(model, ATTENTION))
        if fused:
            stack.enter_context(fused_in_mode(model, PACKED_APART if apart else PACKED).installed())
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


def can_pack(model: PreTrainedModel, parents: Sequence[int] = TREE) -> Choice:
    """Whether the model gives the same outputs on packed rows as on rows of their own, and how that is known.

    The model itself runs a packed row once, which shows that the layout reaches attention in all its layers.
    That outputs are the same is verified in fp32 on a small copy of it. So the answer is the same in a dry
    run on fake tensors, and does not hang on the precision of the weights.

    Args:
        parents: of the rows' segments. An encoder, whose tokens see what follows them, takes rows :data:`APART`.
    """
    name = type(model).__name__
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if types - PLAIN_LAYER_TYPES:
        return Choice(False, f"{name} has layers of another kind: {', '.join(sorted(types - PLAIN_LAYER_TYPES))}")
    try:
        reached = _reached(model, parents)
    except Exception as error:  # whatever a foreign model raises here, the padded path is right for it
        return Choice(False, f"{name} cannot run packed rows ({type(error).__name__}: {str(error)[:100]})")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    if reached < layers:
        return Choice(False, f"{name} hands the layout to {reached} of its {layers} layers")
    if "position_ids" not in inspect.signature(backbone_of(model).forward).parameters:
        return Choice(False, f"{name} takes no positions")
    ask = functools.partial(_packed_against_apart, parents=parents)
    try:
        difference = asked_once(_DIFFERENCES, backbone_of(model), ask, str(parents))
    except Exception as error:
        return Choice(False, f"{name} cannot be compared ({type(error).__name__}: {str(error)[:100]})")
    if not difference < TOLERANCE:
        return Choice(False, f"{name} gives other outputs on packed rows (relative difference {difference:.1e})")
    return Choice(True, f"{name} gives the same outputs on packed rows (relative difference {difference:.1e})")


def can_pack_apart(model: PreTrainedModel) -> Choice:
    """:func:`can_pack` for an encoder's rows. Where tokens see only those near them, on either side, they are padded:
    a few rows cannot show how far."""
    if getattr(model.config.get_text_config(), "sliding_window", None) or hasattr(model.config, "local_attention"):
        return Choice(False, f"{type(model).__name__} attends in windows both ways")
    return can_pack(model, APART)


def first_position(model: nn.Module) -> int:
    """The position of a row's first token: RoBERTa and its kin count from behind the id of padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


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
    positions = torch.from_numpy(layout.positions())[None].to(model.device) + first_position(model)
    inputs = {"input_ids": tokens, "position_ids": positions, "packed_layout": layout, **without_cache(model)}
    return layout, {**inputs, **_acting_everywhere(model)}


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """What tells a model to keep no keys and values, if it can keep any."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def _reached(model: PreTrainedModel, parents: Sequence[int]) -> int:
    """How many times attention ran over the layout of a packed row."""
    _, inputs = sample_rows(model, parents)
    with torch.no_grad(), packed_rows(model, fused=False), noting() as notes:
        backbone_of(model)(**inputs)
    return len(notes)


_DIFFERENCES: dict[tuple[Any, ...], float] = {}


@torch.no_grad()
def _packed_against_apart(small: PreTrainedModel, parents: Sequence[int]) -> float:
    """The relative difference (of norms) between segments in one packed row and their rows on their own."""
    layout, inputs = sample_rows(small, parents)
    parts = torch.split(inputs["input_ids"][0], (layout.stops - layout.starts).tolist())
    apart = []
    for place, part in enumerate(parts):
        row = part if parents[place] < 0 else torch.cat([parts[parents[place]], part])
        apart.append(small(input_ids=row[None], **without_cache(small)).last_hidden_state[0, -len(part) :])
    with packed_rows(small, fused=False):
        packed = small(**inputs).last_hidden_state[0]
    expected = torch.cat(apart)
    return float((packed - expected).norm() / expected.norm())


def _packed_layout_of_call(hidden: Tensor, named: dict[str, Any], causal: bool) -> Layout | PartialLayout | None:
    layout: Layout | PartialLayout | None = named.get("packed_layout")
    return None if layout is None or hidden.shape[0] != 1 or layout.length != hidden.shape[1] else layout


def _packed_sample(model: PreTrainedModel, parents: Sequence[int] = TREE) -> dict[str, Any]:
    return sample_rows(model, parents)[1]


PACKED, PACKED_APART = (
    Mode(name, _packed_layout_of_call, functools.partial(packed_rows, fused=False), sample)
    for name, sample in (("packed", _packed_sample), ("packed apart", functools.partial(_packed_sample, parents=APART)))
)
