"""Layers with a recurrent state on packed rows: short convolutions, gated delta rule and state-space scans.

transformers' models call module-level functions for the parts that carry a state from token to token. They pass their
keyword arguments on, including the layout of a packed row. A call with a layout runs the operators of
:mod:`deltaw.kernels` instead, so rows do not mix and shared prefixes are computed once. In decoding, the layout is a
:class:`ContinuedRows`, which contains the states to continue. Calls without a layout are unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.hub.transformers_private import (
    CONVOLUTION_FUNCTION,
    DELTA_RULE_FUNCTION,
    STATE_SPACE_FUNCTION,
    replace_functions,
    silence_missing_kernels,
)
from deltaw.kernels.continued import ContinuedRows
from deltaw.kernels.layout import Layout
from deltaw.kernels.recurrence import packed_recurrence
from deltaw.kernels.short_convolution import packed_convolution

# Layer types of transformers' configurations that these operators compute.
RECURRENT_LAYER_TYPES = frozenset({"linear_attention", "conv", "mamba", "hybrid"})
# Layer types without attention or a state.
STATELESS_LAYER_TYPES = frozenset({"mlp", "moe"})

# Maximum chunk of transformers' state-space scan. Its memory is proportional to the chunk (1.6 GB in a layer of
# Granite 4 with 256 tokens), and its result does not depend on it.
MAX_CHUNK = 64

# Attributes of recurrent layers whose product is the size of a state.
_STATE_DIMENSIONS = (("num_v_heads", "head_k_dim", "head_v_dim"), ("num_heads", "head_dim", "ssm_state_size"))


# Lists of active :func:`record_convolutions` contexts.
_RECORDED_CHANNELS: list[list[int]] = []


@contextlib.contextmanager
def record_convolutions() -> Iterator[list[int]]:
    """Context that lists the number of channels of each convolution call on packed rows. A recurrent layer has one."""
    channels: list[int] = []
    _RECORDED_CHANNELS.append(channels)
    try:
        yield channels
    finally:
        _RECORDED_CHANNELS.remove(channels)


def state_size(model: nn.Module) -> int:
    """Return how many fp32 numbers the states of all recurrent layers of ``model`` have per sequence."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Conv1d) and module.groups == module.in_channels:
            total += module.in_channels * (module.kernel_size[0] - 1)
        for names in _STATE_DIMENSIONS:
            sizes = [getattr(module, name, 0) for name in names]
            if all(isinstance(size, int) for size in sizes):
                total += math.prod(sizes)
    return total


def use_packed_operators(model: nn.Module) -> None:
    """Make the recurrent layers of ``model`` support packed rows. Other layers and other rows are unaffected."""
    silence_missing_kernels()
    for name, operator in _OPERATORS.items():
        replace_functions(model, name, functools.partial(_dispatch, operator))


def _dispatch(operator: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    layout = kwargs.get("packed_layout")
    if layout is None:
        if "chunk_size" in kwargs:
            kwargs["chunk_size"] = min(kwargs["chunk_size"], MAX_CHUNK)
        return original(*args, **kwargs)
    if not isinstance(layout, Layout | ContinuedRows):
        raise RuntimeError("a recurrent layer needs all tokens of a row")
    return operator(*args, **kwargs)


def _convolve(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    packed_layout: Layout | ContinuedRows,
    **unused: object,
) -> Tensor:
    """Causal convolution of (1, channels, T)."""
    if activation not in (None, "silu", "swish"):
        raise RuntimeError(f"the activation {activation} of a convolution is not supported on packed rows")
    rows = _only_row(hidden_states).transpose(0, 1)
    for channels in _RECORDED_CHANNELS:
        channels.append(rows.shape[1])
    silu = activation is not None
    if isinstance(packed_layout, ContinuedRows):
        y = packed_layout.convolution(rows, weight, bias, silu=silu)
    else:
        y = packed_convolution(rows, weight, bias, packed_layout, silu=silu)
    return y.transpose(0, 1)[None]


def _apply_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    packed_layout: Layout | ContinuedRows,
    use_qk_l2norm_in_kernel: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **unused: object,
) -> tuple[Tensor, None]:
    """Gated delta rule of (1, T, heads, d)."""
    if initial_state is not None or output_final_state:
        raise RuntimeError("recurrent layers on packed rows do not support a cache")
    y = _recurrence(packed_layout)(
        _only_row(query),
        _only_row(key),
        _only_row(value),
        _only_row(g),
        _only_row(beta),
        scaling=query.shape[-1] ** -0.5,
        unit_vectors=use_qk_l2norm_in_kernel,
    )
    return y[None], None


def _scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    packed_layout: Layout | ContinuedRows,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **unused: object,
) -> Tensor:
    """State-space scan of Mamba-2 of (1, T, heads, d). The result is in fp32, as in transformers."""
    if initial_states is not None or return_final_states:
        raise RuntimeError("recurrent layers on packed rows do not support a cache")
    steps = _only_row(dt)
    if dt_bias is not None:
        steps = steps + dt_bias.to(steps.dtype)
    if dt_softplus:
        steps = F.softplus(steps)
    steps = steps.clamp(min=dt_limit[0], max=dt_limit[1])
    x = _only_row(hidden_states).float()
    decay = A.float() * steps.float()
    values = x * steps[..., None].float()
    y = _recurrence(packed_layout)(_only_row(C).float(), _only_row(B).float(), values, decay, None)
    return (y if D is None else y + D[..., None] * x)[None]


def _recurrence(layout: Layout | ContinuedRows) -> Callable[..., Tensor]:
    """Return the function that computes the recurrence over a layout."""
    if isinstance(layout, ContinuedRows):
        return layout.recurrence
    return functools.partial(packed_recurrence, layout=layout)


def _only_row(tensor: Tensor) -> Tensor:
    if tensor.shape[0] != 1:
        raise RuntimeError(f"packed rows must have the batch size 1, not {tensor.shape[0]}")
    return tensor[0]


_OPERATORS: dict[str, Callable[..., Any]] = {
    CONVOLUTION_FUNCTION: _convolve,
    DELTA_RULE_FUNCTION: _apply_delta_rule,
    STATE_SPACE_FUNCTION: _scan,
}
