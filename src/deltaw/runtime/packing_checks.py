"""Checks if a model computes the same outputs on packed rows as on separate rows, on a small copy of the model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.lora.adapted import ACTIVE_KEYWORD
from deltaw.machine.choices import Choice
from deltaw.runtime.fused_blocks import recording_configs
from deltaw.runtime.packed import INDEPENDENT, PREFIX_TREE, backbone_of, packed_rows, sample_rows, without_cache
from deltaw.runtime.partial import PartialLayout
from deltaw.runtime.recognition import TOLERANCE
from deltaw.runtime.recurrent_layers import RECURRENT_LAYER_TYPES, STATELESS_LAYER_TYPES, record_convolutions
from deltaw.runtime.small_copy import measure_once

# Supported layer types. Other types may differ only at distances beyond the test sample.
SUPPORTED_LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "attention",
    *RECURRENT_LAYER_TYPES,
    *STATELESS_LAYER_TYPES,
}


def can_pack(model: PreTrainedModel, parents: Sequence[int] = PREFIX_TREE) -> Choice:
    """Return True with the reason if the model computes the same outputs on packed rows as on separate rows.

    The model runs one packed row, which shows that the layout reaches attention in all layers. Equality of outputs is
    verified in fp32 on a small copy of the model. The result is therefore the same in a dry run on fake tensors, and
    does not depend on the precision of the weights.

    Args:
        parents: Parent segments of the sample. For an encoder, which attends to later tokens: :data:`INDEPENDENT`.
    """
    name = type(model).__name__
    layer_types = list(getattr(model.config.get_text_config(), "layer_types", None) or [])
    unsupported = sorted(set(layer_types) - SUPPORTED_LAYER_TYPES)
    if unsupported:
        return Choice(False, f"{name} has unsupported layer types: {', '.join(unsupported)}")
    try:
        calls = _count_layer_calls(model, parents)
    except Exception as error:  # any error of a third-party model means that it needs padded rows
        return Choice(False, f"{name} cannot run packed rows ({type(error).__name__}: {str(error)[:100]})")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    layers -= sum(kind in STATELESS_LAYER_TYPES for kind in layer_types)
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


def _count_layer_calls(model: PreTrainedModel, parents: Sequence[int]) -> int:
    """Return the number of calls of attention and of recurrent layers for a packed row."""
    _, inputs = sample_rows(model, parents)
    recorded = recording_configs(), record_convolutions()
    with torch.no_grad(), packed_rows(model, fused=False), recorded[0] as notes, recorded[1] as convolutions:
        backbone_of(model)(**inputs)
    return len(notes) + len(convolutions)


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
