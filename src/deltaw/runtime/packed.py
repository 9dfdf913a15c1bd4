"""Run transformers models on packed and padded rows, with deltaw's attention kernels.

Packed rows are concatenated without padding, and rows may share prefixes. The layout reaches the attention function as
a keyword argument that the model passes on (transformers' ``AttentionInterface``). No mask is created and no model code
is patched. Support for packed rows is tested by comparing their outputs with those of separate rows.
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

from deltaw.hub.transformers_private import attention_name, dispatches_attention, quiet, set_attention_name
from deltaw.kernels import loader
from deltaw.kernels.attention import is_compiled, packed_attention
from deltaw.kernels.layout import Layout
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.lora.adapted import ACTIVE_KEYWORD, Activation
from deltaw.machine.choices import Choice
from deltaw.runtime.fused_blocks import (
    FusedBlocks,
    Mode,
    cached_in_mode,
    fused_in_mode,
    record_config,
    recording_configs,
)
from deltaw.runtime.partial import PartialLayout, layer_index_of, partial_attention
from deltaw.runtime.recognition import TOLERANCE, measure_once


def set_attention(model: PreTrainedModel, name: str, *, must: bool = True) -> None:
    """Switch the model to another attention implementation.

    Configurations of copied modules, such as fully trained copies, are not shared with the model and are updated too.

    Args:
        must: True to check that the entire model uses the implementation.

    Raises:
        RuntimeError: if the model does not support the implementation.
    """
    with quiet():
        model.set_attn_implementation(name)
    if must and attention_name(model.config.get_text_config()) != name:
        raise RuntimeError(f"{type(model).__name__} does not support another attention implementation")
    for config in _copied_configs(model):
        set_attention_name(config, name)


@contextlib.contextmanager
def use_attention(model: PreTrainedModel, name: str, *, must: bool = True) -> Iterator[None]:
    """Context in which the model uses another attention implementation.

    Raises:
        RuntimeError: if ``must`` is True and the model does not support the implementation.
    """
    previous = attention_name(model.config)
    if previous is None:
        if must:
            raise RuntimeError(f"{type(model).__name__} does not specify its attention implementation")
        yield
        return
    try:
        set_attention(model, name, must=must)
        yield
    finally:
        with quiet():
            model.set_attn_implementation(previous)
        for config in _copied_configs(model):
            set_attention_name(config, previous)


def _copied_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Return configurations of copied modules, which transformers does not update."""
    shared_ids: set[int] = set()
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig):
            configs[id(config)] = config
        if isinstance(module, PreTrainedModel):
            parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
            shared_ids |= {id(config), *(id(part) for part in parts)}
    return [config for key, config in configs.items() if key not in shared_ids]


# Padded rows of tokens or image patches are used for encoders, and for decoders without support for packed rows.
# Bidirectional attention uses the compiled kernel: each row becomes two segments, its tokens and its padding. Other
# masks, causal attention, dropout, and CPUs without the kernel use torch's attention. Recognized blocks run fused
# (``fused_blocks``), also in decoders.


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
        # Falcon and similar models do not dispatch attention, so only their blocks can be replaced.
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


ATTENTION = "deltaw_packed"
# Supported layer types. Other types may differ only at distances beyond the test sample.
PLAIN_LAYER_TYPES = {"full_attention", "sliding_attention"}
SAMPLE_TOKENS = 24
SAMPLE_VOCABULARY = 1024
# Parent segments of the sample: two rows with a common prefix and a separate row, or only separate rows.
PREFIX_TREE, INDEPENDENT = (-1, 0, 0, -1), (-1, -1, -1, -1)


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
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers: query (1, heads, T, d) to output (1, T, heads, d)."""
    if packed_layout is None:
        raise RuntimeError(f"{type(module).__name__} does not pass the layout to its attention")
    if query.shape[2] != packed_layout.length or key.shape[2] != packed_layout.length:
        raise RuntimeError("attention over a cache cannot run on packed rows")
    if dropout:
        raise RuntimeError("attention dropout is not supported on packed rows. Put the model in eval mode")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    record_config(module, scale, sliding_window, softcap)
    options: dict[str, Any] = {"scaling": scale, "window": sliding_window, "softcap": softcap}
    if not getattr(module, "is_causal", True):
        options["causal"] = False
    q, k, v = query[0], key[0], value[0]
    if isinstance(packed_layout, PartialLayout):
        out = partial_attention(q, k, v, packed_layout, layer_index_of(module), **options)
    else:
        out = packed_attention(q, k, v, packed_layout, **options)
    return out.transpose(0, 1)[None], None


# No mask function is registered under this name, because the layout replaces the mask. With a mask function,
# transformers would search the positions for packed rows and synchronize with the device.
AttentionInterface.register(ATTENTION, _attend_packed)


def one_row(model: PreTrainedModel, tokens: Tensor) -> dict[str, object]:
    """Return the model's inputs for one row of ``tokens`` (1, T), for the current attention implementation."""
    if attention_name(model.config) != ATTENTION:
        return {"input_ids": tokens}
    layout = Layout.of_lengths([tokens.shape[1]])
    layout.device = tokens.device
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return {"input_ids": tokens, "position_ids": positions, "packed_layout": layout, **_fully_active(model)}


def _fully_active(model: nn.Module) -> dict[str, object]:
    """Return the keyword that applies an activated adapter to all tokens, for tokens that do not represent text."""
    activated = any(isinstance(getattr(m, "activation", None), Activation) for m in model.modules())
    return {ACTIVE_KEYWORD: True} if activated else {}


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model below its output head."""
    return model.base_model  # type: ignore[return-value]


@contextlib.contextmanager
def packed_rows(model: PreTrainedModel, *, fused: bool = True, independent: bool = False) -> Iterator[None]:
    """Context in which the model runs packed rows.

    Args:
        fused: True to run supported blocks fused.
        independent: True if rows have no shared prefixes, as for encoders.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_attention(model, ATTENTION))
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


def can_pack(model: PreTrainedModel, parents: Sequence[int] = PREFIX_TREE) -> Choice:
    """Return True with the reason if the model computes the same outputs on packed rows as on separate rows.

    The model runs one packed row, which shows that the layout reaches attention in all layers. Equality of outputs is
    verified in fp32 on a small copy of the model. The result is therefore the same in a dry run on fake tensors, and
    does not depend on the precision of the weights.

    Args:
        parents: Parent segments of the sample. For an encoder, which attends to later tokens: :data:`INDEPENDENT`.
    """
    name = type(model).__name__
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if types - PLAIN_LAYER_TYPES:
        return Choice(False, f"{name} has unsupported layer types: {', '.join(sorted(types - PLAIN_LAYER_TYPES))}")
    try:
        calls = _count_attention_calls(model, parents)
    except Exception as error:  # any error of a third-party model means that it needs padded rows
        return Choice(False, f"{name} cannot run packed rows ({type(error).__name__}: {str(error)[:100]})")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    if calls < layers:
        return Choice(False, f"{name} passes the layout to {calls} of its {layers} layers")
    if "position_ids" not in inspect.signature(backbone_of(model).forward).parameters:
        return Choice(False, f"{name} does not accept position_ids")
    measure = functools.partial(_packing_error, parents=parents)
    try:
        difference = measure_once(_DIFFERENCES, backbone_of(model), measure, str(parents))
    except Exception as error:
        return Choice(False, f"{name} cannot be compared ({type(error).__name__}: {str(error)[:100]})")
    if not difference < TOLERANCE:
        return Choice(False, f"{name} has different outputs on packed rows (relative difference {difference:.1e})")
    return Choice(True, f"{name} has the same outputs on packed rows (relative difference {difference:.1e})")


def can_pack_independent(model: PreTrainedModel) -> Choice:
    """Return the result of :func:`can_pack` for rows of an encoder.

    Encoders with bidirectional windows are padded, because a short sample cannot verify the window.
    """
    if getattr(model.config.get_text_config(), "sliding_window", None) or hasattr(model.config, "local_attention"):
        return Choice(False, f"{type(model).__name__} uses bidirectional sliding windows")
    return can_pack(model, INDEPENDENT)


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
    return layout, {**inputs, **_fully_active(model)}


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return the argument that disables the KV cache, if the model has one."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def _count_attention_calls(model: PreTrainedModel, parents: Sequence[int]) -> int:
    """Return the number of attention calls for a packed row."""
    _, inputs = sample_rows(model, parents)
    with torch.no_grad(), packed_rows(model, fused=False), recording_configs() as notes:
        backbone_of(model)(**inputs)
    return len(notes)


_DIFFERENCES: dict[tuple[Any, ...], float] = {}


@torch.no_grad()
def _packing_error(small: PreTrainedModel, parents: Sequence[int]) -> float:
    """Return the relative difference of norms between outputs of a packed row and of separate rows."""
    layout, inputs = sample_rows(small, parents)
    parts = torch.split(inputs["input_ids"][0], (layout.stops - layout.starts).tolist())
    separate = []
    for index, part in enumerate(parts):
        row = part if parents[index] < 0 else torch.cat([parts[parents[index]], part])
        separate.append(small(input_ids=row[None], **without_cache(small)).last_hidden_state[0, -len(part) :])
    with packed_rows(small, fused=False):
        packed = small(**inputs).last_hidden_state[0]
    expected = torch.cat(separate)
    return float((packed - expected).norm() / expected.norm())


def _packed_layout_of_call(hidden: Tensor, kwargs: dict[str, Any], causal: bool) -> Layout | PartialLayout | None:
    layout: Layout | PartialLayout | None = kwargs.get("packed_layout")
    return None if layout is None or hidden.shape[0] != 1 or layout.length != hidden.shape[1] else layout


def _tree_rows(model: PreTrainedModel, parents: Sequence[int] = PREFIX_TREE) -> dict[str, Any]:
    return sample_rows(model, parents)[1]


PACKED, PACKED_INDEPENDENT = (
    Mode(name, _packed_layout_of_call, functools.partial(packed_rows, fused=False), sample)
    for name, sample in (("packed", _tree_rows), ("packed apart", functools.partial(_tree_rows, parents=INDEPENDENT)))
)


# Number of tokens at the end of a sample row on which the adapter is active.
ACTIVE_TOKENS = 3


def can_run_separately(model: PreTrainedModel) -> Choice[bool]:
    """Return True with the reason if tokens before an activated adapter can run first and be replaced by their keys and
    values.
    """
    name = type(model).__name__
    try:
        error_norm = measure_once(_DIFFERENCES, backbone_of(model), _separate_run_error)
    except Exception as error:  # any error of a third-party model means that it needs complete rows
        return Choice(False, f"{name} cannot run prompts separately ({type(error).__name__}: {str(error)[:100]})")
    difference = f"relative difference {error_norm:.1e}"
    if not error_norm < TOLERANCE:
        return Choice(False, f"{name} has different outputs if prompts run separately ({difference})")
    return Choice(True, f"{name} has the same outputs if prompts run separately ({difference})")


def _separate_run_error(small: PreTrainedModel) -> float:
    """Return the maximum relative difference of outputs and gradients."""
    attach(small, LoRAConfig(rank=4, alpha=8, active="completion", invocation_tokens=[0]), seed=0)
    factors = [p for _, p in adapter_parameters(small)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in factors:
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[0] ** -0.5)
    layout, inputs = sample_rows(small, PREFIX_TREE)
    active = torch.zeros(layout.length, dtype=torch.bool)
    for n, stop in enumerate(layout.stops.tolist()):
        active[stop - ACTIVE_TOKENS : stop] = n not in PREFIX_TREE
    slopes = torch.randn(int(active.sum()), small.config.get_text_config().hidden_size, generator=generator)
    with packed_rows(small, fused=False):
        expected_outputs = small(**{**inputs, ACTIVE_KEYWORD: active[None]}).last_hidden_state[0][active]
        expected_grads = torch.autograd.grad((expected_outputs * slopes).sum(), factors)
    keys: dict[int, tuple[Tensor, Tensor]] = {}
    with packed_rows(small):
        with torch.no_grad():
            _run(small, inputs, ~active, keys, acting=False)
        outputs = _run(small, inputs, active, keys, acting=True)
        grads = torch.autograd.grad((outputs * slopes).sum(), factors)
    differences = []
    for computed, references in (((outputs,), (expected_outputs,)), (grads, expected_grads)):
        flat, expected = (torch.cat([tensor.detach().flatten() for tensor in t]) for t in (computed, references))
        differences.append(float((flat - expected).norm() / expected.norm()))
    return max(differences)


def _run(
    small: PreTrainedModel, inputs: dict[str, Any], mask: Tensor, keys: dict[int, tuple[Tensor, Tensor]], acting: bool
) -> Tensor:
    """Return the outputs (M, hidden) of the selected tokens."""
    indices = mask.nonzero()[:, 0]
    layout = PartialLayout(inputs["packed_layout"], indices, keys)
    part = {name: inputs[name][:, indices] for name in ("input_ids", "position_ids")}
    options = {"packed_layout": layout, ACTIVE_KEYWORD: acting, "use_cache": False}
    outputs: Tensor = small(**part, **options).last_hidden_state[0]
    return outputs
