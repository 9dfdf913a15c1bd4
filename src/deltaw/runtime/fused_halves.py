"""The two halves of a decoder's block as functions, each with a backward of its own that keeps what it must.

    x₁ = x  + [norm](output(attention(rotate(queries, keys), values)))     all of norm(x)
    x₂ = x₁ + [norm](down(f(gate) · up))                                    both of norm(x₁)

Kept of the first half are its input, queries, keys, values and the attention's output; of the second its
input, gate and up. Norms and the activation are computed again in the backward. Inputs that layers share
stand once, and with weights in int8 they are rounded once.

Of the last block only some outputs may be asked for: those that predict a label. Then queries, the
attention's output and the second half are computed at these places alone, keys and values at all.

Knows LoRA layers and kernels; not when a block may run so (``fused``), nor how a model's parts are called
(``fused_blocks``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.kernels import linear as products
from deltaw.kernels import rows
from deltaw.kernels.attention import attend, attend_backward
from deltaw.kernels.layout import Layout
from deltaw.lora.layers import LoRALinear
from deltaw.lora.layers_int8 import weight_scales


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension: (x - mean)·rstd·(weight + offset)."""

    module: nn.Module
    eps: float
    offset: float
    centred: bool

    @property
    def weight(self) -> Tensor | None:
        return self.module._parameters.get("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.module._parameters.get("bias")

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return rows.norm(x, self.weight, self.bias, offset=self.offset, eps=self.eps, centred=self.centred)

    def backward(self, grad: Tensor, x: Tensor, stats: Tensor, added: Tensor | None = None) -> Tensor:
        return rows.norm_backward(
            grad, x, self.weight, stats, offset=self.offset, centred=self.centred, added=added
        )


class Projection:
    """A linear layer of a block with its update, or without."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.weight: Tensor = module.weight
        self.bias: Tensor | None = module.bias
        self.scale: Tensor | None
        self.columns: Tensor | None
        self.scale, self.columns = weight_scales(module) or (None, None)
        adapted = module if isinstance(module, LoRALinear) and module.adapting else None
        self.lora_A: Tensor | None = None if adapted is None else adapted.lora_A
        self.lora_B: Tensor | None = None if adapted is None else adapted.lora_B
        self.scaling: float = 1.0 if adapted is None else adapted.scaling

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.lora_A is None or self.lora_B is None else (self.lora_A, self.lora_B)

    def __call__(self, x: Tensor, steps: Steps, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_int8, x_scales = steps.of(x, self)
        return products.linear(
            x,
            self.weight,
            True,
            self.scale,
            self.columns,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            added,
            x_int8,
            x_scales,
        )

    def backward(self, grad: Tensor, added: Tensor | None, need_x: bool) -> tuple[Tensor, Tensor]:
        return products.linear_backward(
            grad,
            self.weight,
            True,
            self.scale,
            self.columns,
            self.lora_A,
            self.lora_B,
            self.scaling,
            added,
            need_x,
        )

    def factors_backward(
        self, x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.lora_A is None or not self.lora_A.requires_grad:
            return None, None
        return products.factors_backward(x, h, grad, narrow, self.scaling)


class Steps:
    """An input rounded to bytes once for all layers that take it so."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._columns: Tensor | None = None
        self._made: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor, layer: Projection) -> tuple[Tensor | None, Tensor | None]:
        if layer.scale is None:
            return None, None
        if self._made is None or self._of is not x or not _same(self._columns, layer.columns):
            self._of, self._columns = x, layer.columns
            self._made = products.quantized(x, layer.columns)
        return self._made


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or one.data_ptr() == other.data_ptr()


@dataclass
class AttentionHalf:
    """What the first half of a block is made of; layers are looked up each time, as adapters come and go."""

    norm: Norm
    holder: nn.Module
    head_size: int
    query_norm: Norm | None
    key_norm: Norm | None
    after: Norm | None
    scaling: float = 1.0
    window: int | None = None
    softcap: float | None = None

    @property
    def layers(self) -> list[nn.Linear]:
        inside = self.holder._modules
        return [inside[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]  # type: ignore[misc]

    @property
    def how(self) -> dict[str, Any]:
        """What attention is told."""
        return {"scaling": self.scaling, "window": self.window, "softcap": self.softcap}


@dataclass
class GatedHalf:
    """What the second half of a block is made of."""

    norm: Norm
    holder: nn.Module
    kind: str
    after: Norm | None

    @property
    def layers(self) -> list[nn.Linear]:
        inside = self.holder._modules
        return [inside[name] for name in ("gate_proj", "up_proj", "down_proj")]  # type: ignore[misc]


@dataclass
class Half:
    """A half of a block at work: its projections, and what the forward is told beside the tokens."""

    parts: Any
    projections: list[Projection]
    cosine: Tensor | None = None
    sine: Tensor | None = None
    layout: Layout | None = None
    picked: Tensor | None = None

    @property
    def rotary(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(cosine, sine) for queries and for keys; nothing without rotary positions."""
        if self.cosine is None or self.sine is None:
            return ()
        of_keys = self.cosine, self.sine
        return tuple(_at(t, self.picked) for t in of_keys), of_keys  # type: ignore[return-value]


def factors_of(layers: Sequence[Projection]) -> list[Tensor]:
    """A and B of each layer that has them, in order."""
    return [factor for layer in layers for factor in layer.factors or ()]


def run_attention(x: Tensor, half: Half) -> Tensor:
    """The first half of a block over rows x (T, hidden)."""
    return _Attention.apply(x, half, *factors_of(half.projections))


def run_gated(x: Tensor, half: Half) -> Tensor:
    """The second half of a block over rows x (T, hidden)."""
    return _Gated.apply(x, half, *factors_of(half.projections))


class _Attention(torch.autograd.Function):
    """The first half; ``factors`` are A and B of each adapted layer, in order, for autograd to know them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: Half, *factors: Tensor) -> Tensor:
        parts: AttentionHalf = half.parts
        query, key, value, output = half.projections
        steps = Steps()
        n, stats = parts.norm(x)
        (k, h_k), (v, h_v) = (layer(n, steps) for layer in (key, value))
        q, h_q = query(n, steps) if half.picked is None else query(_at(n, half.picked), Steps())
        del n, steps
        q, k, v = (t.view(t.shape[0], -1, parts.head_size) for t in (q, k, v))
        raw_q = raw_k = stats_q = stats_k = None
        if parts.query_norm is not None:
            raw_q, (q, stats_q) = q, _over_heads(parts.query_norm, q)
        if parts.key_norm is not None:
            raw_k, (k, stats_k) = k, _over_heads(parts.key_norm, k)
        if half.rotary:
            q, k = (rows.rotate(t, *turn) for t, turn in zip((q, k), half.rotary, strict=True))
        assert half.layout is not None
        out, kept = attend(q, k, v, half.layout, picked=half.picked, **parts.how)
        stream = _at(x, half.picked)
        o, h_o = output(out.flatten(1), Steps(), stream if parts.after is None else None)
        before_after = stats_after = None
        if parts.after is not None:
            before_after = o
            o, stats_after = parts.after(o)
            o = stream + o
        ctx.half = half
        ctx.save_for_backward(
            x, stats, h_q, h_k, h_v, h_o, q, k, v, out, raw_q, raw_k, stats_q, stats_k,
            before_after, stats_after, *kept,
        )  # fmt: skip
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: Half = ctx.half
        parts: AttentionHalf = half.parts
        query, key, value, output = half.projections
        (
            x, stats, h_q, h_k, h_v, h_o, q, k, v, out, raw_q, raw_k, stats_q, stats_k,
            before_after, stats_after, *kept,
        ) = ctx.saved_tensors  # fmt: skip
        grad = grads[0].contiguous()
        above = grad
        if parts.after is not None:
            above = parts.after.backward(grad, before_after, stats_after)
        d_out, narrow = output.backward(above, None, True)
        of_output = output.factors_backward(out.flatten(1), h_o, above, narrow)
        assert half.layout is not None
        d_q, d_k, d_v = attend_backward(
            d_out.view_as(out), q, k, v, out, kept, half.layout, picked=half.picked, **parts.how
        )
        del d_out
        if half.rotary:
            d_q, d_k = (
                rows.rotate(t, *turn, backward=True) for t, turn in zip((d_q, d_k), half.rotary, strict=True)
            )
        if parts.query_norm is not None:
            d_q = _over_heads_backward(parts.query_norm, d_q, raw_q, stats_q)
        if parts.key_norm is not None:
            d_k = _over_heads_backward(parts.key_norm, d_k, raw_k, stats_k)
        n = None
        if any(layer.factors is not None for layer in (query, key, value)):
            n, _ = parts.norm(x)
        needs_input = ctx.needs_input_grad[0]
        d_n: Tensor | None = None
        of_layers: list[tuple[Tensor | None, Tensor | None]] = []
        for layer, h, d, places in (
            (query, h_q, d_q, half.picked), (key, h_k, d_k, None), (value, h_v, d_v, None)
        ):  # fmt: skip
            flat = d.reshape(d.shape[0], -1)
            d_n, narrow = layer.backward(flat, d_n, needs_input)
            d_n = _spread(d_n, places, x.shape[0]) if needs_input else None
            of_layers.append(
                (None, None) if n is None else layer.factors_backward(_at(n, places), h, flat, narrow)
            )
        d_x = None
        if d_n is not None:
            d_x = parts.norm.backward(d_n, x, stats, _spread(grad, half.picked, x.shape[0]))
        of_inputs = [grad for pair in of_layers for grad in pair]
        return d_x, None, *_of_adapted(half, [*of_inputs, *of_output])


class _Gated(torch.autograd.Function):
    """The second half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: Half, *factors: Tensor) -> Tensor:
        parts: GatedHalf = half.parts
        gate, up, down = half.projections
        steps = Steps()
        n, stats = parts.norm(x)
        (g, h_g), (u, h_u) = (layer(n, steps) for layer in (gate, up))
        del n, steps
        y, h_d = down(rows.activation(g, u, parts.kind), Steps(), x if parts.after is None else None)
        before_after = stats_after = None
        if parts.after is not None:
            before_after = y
            y, stats_after = parts.after(y)
            y = x + y
        ctx.half = half
        ctx.save_for_backward(x, stats, h_g, h_u, h_d, g, u, before_after, stats_after)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: Half = ctx.half
        parts: GatedHalf = half.parts
        gate, up, down = half.projections
        x, stats, h_g, h_u, h_d, g, u, before_after, stats_after = ctx.saved_tensors
        grad = grads[0].contiguous()
        above = grad
        if parts.after is not None:
            above = parts.after.backward(grad, before_after, stats_after)
        d_y, narrow = down.backward(above, None, True)
        d_g, d_u, y = rows.activation_backward(d_y, g, u, parts.kind)
        del d_y
        of_down = down.factors_backward(y, h_d, above, narrow)
        del y
        n = None
        if gate.factors is not None or up.factors is not None:
            n, _ = parts.norm(x)
        needs_input = ctx.needs_input_grad[0]
        d_n: Tensor | None = None
        of_inputs: list[Tensor | None] = []
        for layer, h, d in ((gate, h_g, d_g), (up, h_u, d_u)):
            d_n, narrow = layer.backward(d, d_n, needs_input)
            d_n = d_n if needs_input else None
            of_inputs += layer.factors_backward(n, h, d, narrow) if n is not None else (None, None)
        d_x = parts.norm.backward(d_n, x, stats, grad) if d_n is not None else None
        return d_x, None, *_of_adapted(half, [*of_inputs, *of_down])


def _at(x: Tensor, places: Tensor | None) -> Tensor:
    """The rows of (T, …) at these places, or all."""
    return x if places is None else x.index_select(0, places)


def _spread(rows: Tensor, places: Tensor | None, length: int) -> Tensor:
    """Rows (P, D) at their places of (T, D), zeros elsewhere; as they are where they stand at all."""
    return rows if places is None else rows.new_zeros(length, rows.shape[1]).index_copy_(0, places, rows)


def _over_heads(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    """A norm of each head (M, heads, d)."""
    y, stats = norm(x.reshape(-1, x.shape[-1]))
    return y.view(x.shape), stats


def _over_heads_backward(norm: Norm, grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    size = x.shape[-1]
    return norm.backward(grad.reshape(-1, size), x.reshape(-1, size), stats).view(x.shape)


def _of_adapted(half: Half, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of those layers that have factors."""
    kept: list[Tensor | None] = []
    for layer, (of_A, of_B) in zip(half.projections, zip(grads[::2], grads[1::2], strict=True), strict=True):
        if layer.factors is not None:
            kept += [of_A, of_B]
    return kept
