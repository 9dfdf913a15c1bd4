"""Fused, memory-efficient forward and backward of transformer blocks.

A :class:`FusedBlock` replaces the forward method of a block, based on a description of its parts (``BlockRoles``). If
the compiled kernels support the entire block and torch calls are not observed, forward and backward are one kernel call
each (``kernels.block``).

Parts are looked up on every call, and derived objects are cached until a part or its tensors change. The block runs the
model's code if parameters other than low-rank factors are trained, dropout is active, hooks are registered inside, or
the call has unsupported arguments.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.kernels import linear as products
from deltaw.kernels import quantize, rows
from deltaw.kernels.attention import attend, attend_backward, packed_attention, spread_rows
from deltaw.kernels.block import Block
from deltaw.kernels.block import supports as serves_block
from deltaw.kernels.layout import Layout
from deltaw.kernels.loader import supports as serves_compiled
from deltaw.kernels.operators import PLAIN_TYPES, can_call_directly
from deltaw.kernels.rows import HalfNorms, Norm
from deltaw.kernels.torch_private import are_hooked, direct_buffers, direct_modules, direct_parameters, multiply_each
from deltaw.lora.kinds import PLAIN_LINEAR_CLASSES, is_conv1d
from deltaw.lora.layers import LoRAConv1D, LoRALayer, LoRALinear
from deltaw.lora.stored import multiply_backward, product, stored_form
from deltaw.runtime.partial import PartialLayout, layer_index_of, partial_attention
from deltaw.runtime.recognition import (
    AttentionConfig,
    BlockRoles,
    Norms,
    activation_kind,
    by_column,
    module_at,
    norm_form,
    signature,
)


def make_norm(module: nn.Module) -> Norm | None:
    """Return the kernel form of a norm module, if supported."""
    form = norm_form(module)
    if form is None:
        return None
    tensors = direct_parameters(module)
    return Norm(tensors.get("weight"), tensors.get("bias"), form.eps, form.offset, form.centered)


class Projection:
    """A frozen linear layer of a block, with or without an update.

    Attributes:
        product: Layer in the form of the kernels.
        lora_A: Factor A of the update, if any.
        lora_B: Factor B of the update, if any.
        scaling: Scaling of the update. 1 without an update.
    """

    def __init__(self, module: nn.Module) -> None:
        weight, bias = direct_parameters(module)["weight"], direct_parameters(module).get("bias")
        assert weight is not None
        adapted = module if isinstance(module, LoRALayer) and module.adapting else None
        self.lora_A: Tensor | None = None if adapted is None else adapted.lora_A
        self.lora_B: Tensor | None = None if adapted is None else adapted.lora_B
        self.scaling: float = 1.0 if adapted is None else adapted.scaling
        update = self.lora_A, self.lora_B, self.scaling
        self.product = product(weight, stored_form(module), by_column(module), bias, *update)

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.lora_A is None or self.lora_B is None else (self.lora_A, self.lora_B)

    def __call__(self, x: Tensor, rounded: RoundedInput, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x·Wᵀ + b + s·(x·A)·B + added for rows x (M, in), and x·A."""
        return products.linear(x, self.product, added, *rounded.of(x, self.product))

    def backward(self, grad: Tensor, added: Tensor | None, need_x: bool) -> tuple[Tensor, Tensor]:
        """Return ∂L/∂x plus ``added``, and the narrow gradient for :meth:`factors_backward`."""
        return multiply_backward(grad, self.product, added, need_x)

    def factors_backward(
        self, x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return ∂L/∂A and ∂L/∂B, or None for each if they are not trained."""
        if self.lora_A is None or not self.lora_A.requires_grad:
            return None, None
        backward = products.factors_backward if x.device.type == "cpu" else products.factor_products
        return backward(x, h, grad, narrow, self.scaling)

    def with_factors(self, lora_A: Tensor, scaled_B: Tensor) -> Projection:
        """Return a copy that multiplies by converted factors. Gradients are still those of the original ones."""
        copied = copy.copy(self)
        copied.product = self.product._replace(lora_A=lora_A, lora_B=scaled_B, scaling=1.0)
        return copied


class RoundedInput:
    """An input that is rounded to int8 once for all layers with the same rounding."""

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._columns: Tensor | None = None
        self._in_blocks = False
        self._rounded: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor, layer: products.LinearProduct) -> tuple[Tensor | None, Tensor | None]:
        if layer.scale is None:
            return None, None
        is_valid = _is_same(self._columns, layer.smooth_scales) and self._in_blocks == layer.in_blocks
        if self._rounded is None or self._source is not x or not is_valid:
            self._source, self._columns, self._in_blocks = x, layer.smooth_scales, layer.in_blocks
            self._rounded = quantize.quantize_activations(x, layer.smooth_scales, layer.in_blocks)
        return self._rounded


def _is_same(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and left.data_ptr() == right.data_ptr())


def factors_of(layers: Sequence[Projection]) -> list[Tensor]:
    """Return A and B of each adapted layer, in order."""
    return [factor for layer in layers for factor in layer.factors or ()]


def can_project(layer: nn.Module) -> bool:
    """True if :class:`Projection` supports a layer: a frozen linear layer, plain or with low-rank factors without
    dropout.
    """
    kind = type(layer)
    if isinstance(layer, LoRALayer) and kind in (LoRALinear, LoRAConv1D):
        if layer.is_partially_active or (layer.training and vars(layer)["dropout"] > 0.0):
            return False
    elif not (kind is nn.Linear or kind.__name__ in PLAIN_LINEAR_CLASSES or is_conv1d(layer) or stored_form(layer)):
        return False
    weight, bias = direct_parameters(layer).get("weight"), direct_parameters(layer).get("bias")
    return weight is not None and not weight.requires_grad and (bias is None or not bias.requires_grad)


def select_rows(x: Tensor, indices: Tensor | None) -> Tensor:
    """Return the rows of x (T, …) at the indices, or all rows."""
    return x if indices is None else x.index_select(0, indices)


def head_views(y: Tensor, heads: int, key_heads: int, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Split outputs y (M, n) into queries (M, heads, d), keys and values (M, key heads, d), as views if possible.

    See :data:`deltaw.runtime.recognition.Split`.
    """
    length = y.shape[0]
    if not grouped:
        return y.view(length, heads + 2 * key_heads, -1).split([heads, key_heads, key_heads], 1)  # type: ignore[return-value]
    group = heads // key_heads
    by_group = y.view(length, key_heads, group + 2, -1)
    q = by_group[:, :, 0] if group == 1 else by_group[:, :, :group].reshape(length, heads, -1)
    return q, by_group[:, :, group], by_group[:, :, group + 1]


def merge_heads(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
    """Merge queries, keys and values into one tensor (M, n). Inverse of :func:`head_views`."""
    if not grouped:
        return torch.cat([q, k, v], 1).flatten(1)
    return torch.cat([q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]], 2).flatten(1)


# The two halves of a block are autograd functions with a custom backward.
#
# attention:  stream + [after](output(attention(rotate(queries, keys), values))),    all of [before](x)
# MLP:        stream + [after](output(f(gate)·up)), or output(f(inner)),             of [before](x)
#
# with [post] applied to the sum if the block has it (see ``roles``). The stream is x, or in a parallel block the sum of
# the attention half. The first half saves its input, queries, keys, values and attention output, the second half its
# input, gate and up. The backward recomputes norms and the activation. Inputs that layers share are saved once, and
# rounded once for int8-quantized weights.
#
# The last block may need outputs only at label positions. Then queries, attention outputs and the second half are
# computed only for these positions, and keys and values for all tokens.


_Half = TypeVar("_Half", bound="Half")


@dataclass
class Half:
    """Parts of half a block: norms, input projections and output projection."""

    norms: HalfNorms
    inputs: Sequence[Projection]
    output: Projection

    @property
    def projections(self) -> list[Projection]:
        return [*self.inputs, self.output]

    def with_layers(self: _Half, by_id: dict[int, Projection]) -> _Half:
        """Return a copy with replaced projections, by the id of the original."""
        inputs = [by_id.get(id(layer), layer) for layer in self.inputs]
        return replace(self, inputs=inputs, output=by_id.get(id(self.output), self.output))


@dataclass
class AttentionHalf(Half):
    """Attention half of a block. Inputs are the projections of queries, keys and values, or one combined projection.

    Args:
        grouped: Layout of a combined projection, see :func:`deltaw.runtime.fused.head_views`.
        options: Attention options: scaling, window, softcap, causal.
    """

    heads: int
    key_heads: int
    head_size: int
    grouped: bool
    query_norm: Norm | None
    key_norm: Norm | None
    options: dict[str, Any]


@dataclass
class MLPHalf(Half):
    """MLP half of a block. Inputs are gate and up projections, or one layer that computes both if ``gated``.

    Args:
        kind: Activation function, a name of :data:`deltaw.kernels.rows.ACTIVATIONS`.
    """

    gated: bool
    kind: str


@dataclass
class AttentionContext:
    """Inputs of attention in addition to the hidden states.

    Args:
        cosine: (T, n) fp32 cosines of rotary positions, if used.
        sine: (T, n) fp32 sines of rotary positions, if used.
        output_indices: (P,) ascending indices of the needed outputs, or None for all.
        partial: Layout of a row with available keys of other tokens. The T tokens here are those that run.
        layer_index: Index of the layer, for ``partial``.
    """

    layout: Layout
    cosine: Tensor | None = None
    sine: Tensor | None = None
    output_indices: Tensor | None = None
    partial: PartialLayout | None = None
    layer_index: int = 0

    @property
    def query_indices(self) -> Tensor | None:
        """Positions of the queries in the layout, or None if all tokens are queries."""
        return self.output_indices if self.partial is None else self.partial.token_indices

    def local_gradient(self, grad: Tensor) -> Tensor:
        """Return the part of a gradient of all keys or values that belongs to the tokens that run."""
        return grad if self.partial is None else grad.index_select(0, self.partial.token_indices)

    @property
    def rotary(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(cosine, sine) for queries and for keys, or an empty tuple without rotary positions."""
        if self.cosine is None or self.sine is None:
            return ()
        key_tables = self.cosine, self.sine
        return (select_rows(self.cosine, self.output_indices), select_rows(self.sine, self.output_indices)), key_tables


def run_mlp(x: Tensor, stream: Tensor | None, half: MLPHalf) -> Tensor:
    """Run the second half of a block on rows x (T, hidden), and add it to ``stream`` (T, hidden) or to x."""
    return _MLP.apply(x, stream, half, *factors_of(half.projections))


class _Attention(torch.autograd.Function):
    """First half of a block. ``factors`` are A and B of each adapted layer, in order, as inputs of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: AttentionHalf, context: AttentionContext, *factors: Tensor) -> Tensor:
        norms, output_indices = half.norms, context.output_indices
        (q, k, v), h, input_tensors = _attention_inputs(x, half, context)
        k, v = (k, v) if context.partial is None else context.partial.update_keys(context.layer_index, k, v)
        out, saved = attend(q, k, v, context.layout, rows=context.query_indices, **half.options)
        y, h_o, end_tensors = _finish_half(half.output, out.flatten(1), select_rows(x, output_indices), norms)
        ctx.half, ctx.context, ctx.count = half, context, len(h)
        ctx.save_for_backward(x, *h, h_o, q, k, v, out, *input_tensors, *end_tensors, *saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: AttentionHalf = ctx.half
        context: AttentionContext = ctx.context
        x, *rest = ctx.saved_tensors
        h, (h_o, q, k, v, out, *rest) = rest[: ctx.count], rest[ctx.count :]
        input_tensors, end_tensors, saved = rest[:5], rest[5:9], rest[9:]
        grad, output_grad = _finish_half_backward(grads[0].contiguous(), end_tensors, half.norms)
        d_out, narrow = half.output.backward(output_grad, None, True)
        output_factor_grads = half.output.factors_backward(out.flatten(1), h_o, output_grad, narrow)
        options = {"rows": context.query_indices, **half.options}
        d_q, d_k, d_v = attend_backward(d_out.view_as(out), q, k, v, out, saved, context.layout, **options)
        del d_out
        head_grads = [d_q, context.local_gradient(d_k), context.local_gradient(d_v)]
        del d_q, d_k, d_v
        d_x, factor_grads = _attention_inputs_backward(ctx, x, h, input_tensors, head_grads, grad)
        return d_x, None, None, *_adapted_only(half.projections, [*factor_grads, *output_factor_grads])


class _AttentionInputs(torch.autograd.Function):
    """Queries, keys and values, for attention that autograd differentiates, and the residual stream (a view of x).

    The backward adds the gradient of the stream in the kernel of the norm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: AttentionHalf, context: AttentionContext, *factors: Tensor) -> Any:
        (q, k, v), h, input_tensors = _attention_inputs(x, half, context)
        ctx.half, ctx.context, ctx.count = half, context, len(h)
        ctx.save_for_backward(x, *h, *input_tensors)
        return q, k, v, x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        h, tensors, (*head_grads, grad) = rest[: ctx.count], rest[ctx.count :], grads
        d_x, factor_grads = _attention_inputs_backward(ctx, x, h, tensors, head_grads, grad)
        return d_x, None, None, *_adapted_only(ctx.half.inputs, factor_grads)


class _AttentionOutput(torch.autograd.Function):
    """Output projection of the attention outputs (T, n), and the sum with the residual stream."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, stream: Tensor, half: AttentionHalf, *factors: Tensor) -> Tensor:
        y, h, end_tensors = _finish_half(half.output, out, stream, half.norms)
        ctx.half = half
        ctx.save_for_backward(out, h, *end_tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out, h, *end_tensors = ctx.saved_tensors
        output: Projection = ctx.half.output
        grad, output_grad = _finish_half_backward(grads[0].contiguous(), end_tensors, ctx.half.norms)
        d_out, narrow = output.backward(output_grad, None, True)
        factor_grads = output.factors_backward(out, h, output_grad, narrow)
        return d_out, grad, None, *_adapted_only([output], factor_grads)


def run_attention(x: Tensor, half: AttentionHalf, context: AttentionContext) -> Tensor:
    """Run the first half of a block on rows x (T, hidden).

    On a device, attention is a function of its own that autograd differentiates. Its kernels have no other interface.
    """
    if x.device.type == "cpu":
        return _Attention.apply(x, half, context, *factors_of(half.projections))
    indices, context = context.output_indices, replace(context, output_indices=None)
    *heads, stream = _AttentionInputs.apply(x, half, context, *factors_of(half.inputs))
    q, k, v = (t.transpose(0, 1) for t in heads)
    if context.partial is not None:
        out = partial_attention(q, k, v, context.partial, context.layer_index, **half.options)
    else:
        out = packed_attention(q, k, v, context.layout, **half.options)
    out, stream = (select_rows(t, indices) for t in (out.transpose(0, 1).flatten(1), stream))
    return _AttentionOutput.apply(out, stream, half, *factors_of([half.output]))


class _MLP(torch.autograd.Function):
    """Second half of a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stream: Tensor | None, half: MLPHalf, *factors: Tensor) -> Tensor:
        norms = half.norms
        rounded = RoundedInput()
        n, stats = (x, None) if norms.before is None else norms.before(x)
        inner, h = zip(*(layer(n, rounded) for layer in half.inputs), strict=True)
        del n, rounded
        gate, up = _gate_and_up(inner, half)
        end_tensors: tuple[Tensor | None, ...]
        residual = x if stream is None else stream
        y, h_o, end_tensors = _finish_half(half.output, rows.activation(gate, up, half.kind), residual, norms)
        ctx.half, ctx.has_stream, ctx.count = half, stream is not None, len(inner)
        ctx.save_for_backward(x, stats, *inner, *h, h_o, *end_tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: MLPHalf = ctx.half
        norms = half.norms
        x, stats, *rest = ctx.saved_tensors
        inner, h, (h_o, *end_tensors) = rest[: ctx.count], rest[ctx.count : 2 * ctx.count], rest[2 * ctx.count :]
        grad, above = _finish_half_backward(grads[0].contiguous(), end_tensors, norms)
        d_y, narrow = half.output.backward(above, None, True)
        d_gate, d_up, y = rows.activation_backward(d_y, *_gate_and_up(inner, half), half.kind)
        del d_y
        output_factor_grads = half.output.factors_backward(y, h_o, above, narrow)
        del y
        is_combined = half.gated and ctx.count == 1
        d_inner = (torch.cat([d_gate, d_up], 1),) if is_combined else (d_gate, d_up)[: ctx.count]
        del d_gate, d_up
        n = _recompute_input(x, half.inputs, norms.before)
        need_x, stream_grad = ctx.needs_input_grad[0], None if ctx.has_stream else grad
        d_n = stream_grad if need_x and norms.before is None else None
        input_factor_grads: list[Tensor | None] = []
        for layer, h_in, d in zip(half.inputs, h, d_inner, strict=True):
            d_n, narrow = layer.backward(d, d_n, need_x)
            d_n = d_n if need_x else None
            input_factor_grads += layer.factors_backward(n, h_in, d, narrow) if n is not None else (None, None)
        if d_n is not None and norms.before is not None:
            d_n = norms.before.backward(d_n, x, stats, stream_grad)
        d_stream = grad if ctx.has_stream and ctx.needs_input_grad[1] else None
        return d_n, d_stream, None, *_adapted_only(half.projections, [*input_factor_grads, *output_factor_grads])


def _attention_inputs(
    x: Tensor, half: AttentionHalf, context: AttentionContext
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor], tuple[Tensor | None, ...]]:
    """Return normalized and rotated queries, keys and values, the x·A products of the layers, and tensors for
    :func:`_attention_inputs_backward`.
    """
    n, stats = (x, None) if half.norms.before is None else half.norms.before(x)
    (q, k, v), h = _queries_keys_values(n, half, context.output_indices)
    del n
    raw_q = raw_k = stats_q = stats_k = None
    if len(half.inputs) == 1 and (context.rotary or half.query_norm is not None):
        v = v.contiguous()  # queries and keys are replaced below; a view would keep the combined output alive
    if half.query_norm is not None:
        raw_q, (q, stats_q) = q, half.query_norm.over_heads(q)
    if half.key_norm is not None:
        raw_k, (k, stats_k) = k, half.key_norm.over_heads(k)
    if context.rotary:
        q, k = (rows.rotate(t, *tables) for t, tables in zip((q, k), context.rotary, strict=True))
    return (q, k, v), h, (stats, raw_q, raw_k, stats_q, stats_k)


def _attention_inputs_backward(
    ctx: Any, x: Tensor, h: Sequence[Tensor], tensors: Sequence[Tensor], head_grads: list[Tensor], grad: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x plus ``grad`` of the residual stream, and gradients of the input layers' factors.

    Clears ``head_grads``, to release them as soon as possible.
    """
    (stats, raw_q, raw_k, stats_q, stats_k), (d_q, d_k, d_v) = tensors, head_grads
    head_grads.clear()
    half, context, need_x = ctx.half, ctx.context, ctx.needs_input_grad[0]
    before, output_indices = half.norms.before, context.output_indices
    if context.rotary:
        pairs = zip((d_q, d_k), context.rotary, strict=True)
        d_q, d_k = (rows.rotate(t, *tables, backward=True) for t, tables in pairs)
    if half.query_norm is not None:
        d_q = half.query_norm.over_heads_backward(d_q, raw_q, stats_q)
    if half.key_norm is not None:
        d_k = half.key_norm.over_heads_backward(d_k, raw_k, stats_k)
    stream_grad = spread_rows(grad, output_indices, x.shape[0]) if need_x else grad
    initial = stream_grad if need_x and before is None else None
    n = _recompute_input(x, half.inputs, before)
    d_n, factor_grads = _input_backward(n, h, (d_q, d_k, d_v), half, output_indices, initial, need_x)
    if d_n is not None and before is not None:
        d_n = before.backward(d_n, x, stats, stream_grad)
    return d_n, factor_grads


def _queries_keys_values(
    n: Tensor, half: AttentionHalf, output_indices: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """Return queries (P or T, heads, d), keys and values (T, key heads, d), and the x·A products of the layers."""
    rounded = RoundedInput()
    if len(half.inputs) == 1:
        y, h = half.inputs[0](n, rounded)
        q, k, v = head_views(y, half.heads, half.key_heads, half.grouped)
        return (select_rows(q, output_indices), k, v), [h]
    query, key, value = half.inputs
    (k, h_k), (v, h_v) = (layer(n, rounded) for layer in (key, value))
    q, h_q = query(n, rounded) if output_indices is None else query(select_rows(n, output_indices), RoundedInput())
    q, k, v = (t.view(t.shape[0], -1, half.head_size) for t in (q, k, v))
    return (q, k, v), [h_q, h_k, h_v]


def _input_backward(
    n: Tensor | None,
    h: Sequence[Tensor],
    head_grads: tuple[Tensor, Tensor, Tensor],
    half: AttentionHalf,
    output_indices: Tensor | None,
    initial: Tensor | None,
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of the attention input, added to ``initial``, and gradients of the input layers' factors."""
    length = head_grads[1].shape[0]
    if len(half.inputs) == 1:
        combined = merge_heads(spread_rows(head_grads[0], output_indices, length), *head_grads[1:], half.grouped)
        d_n, narrow = half.inputs[0].backward(combined, initial, need_x)
        factor_grads = (None, None) if n is None else half.inputs[0].factors_backward(n, h[0], combined, narrow)
        return (d_n if need_x else None), list(factor_grads)
    d_x = None if output_indices is not None else initial
    grads: list[Tensor | None] = []
    for layer, h_in, d, indices in zip(half.inputs, h, head_grads, (output_indices, None, None), strict=True):
        flat = d.reshape(d.shape[0], -1)
        d_x, narrow = layer.backward(flat, d_x, need_x)
        d_x = spread_rows(d_x, indices, length) if need_x else None
        if indices is not None and initial is not None and d_x is not None:
            d_x = d_x + initial
        grads += (None, None) if n is None else layer.factors_backward(select_rows(n, indices), h_in, flat, narrow)
    return d_x, grads


def _finish_half(
    output: Projection, x: Tensor, stream: Tensor, norms: HalfNorms
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Return the result of the half, x·A of its output projection, and tensors for :func:`_finish_half_backward`."""
    y, h = output(x, RoundedInput(), stream if norms.after is None else None)
    before_after = stats_after = total = stats_post = None
    if norms.after is not None:
        before_after = y
        y, stats_after = norms.after(y)
        y = stream + y
    if norms.post is not None:
        total = y
        y, stats_post = norms.post(y)
    return y, h, (before_after, stats_after, total, stats_post)


def _finish_half_backward(grad: Tensor, tensors: Sequence[Tensor | None], norms: HalfNorms) -> tuple[Tensor, Tensor]:
    """Return the gradients of the residual stream and of the output projection."""
    before_after, stats_after, total, stats_post = tensors
    if norms.post is not None and total is not None and stats_post is not None:
        grad = norms.post.backward(grad, total, stats_post)
    if norms.after is not None and before_after is not None and stats_after is not None:
        return grad, norms.after.backward(grad, before_after, stats_after)
    return grad, grad


def _recompute_input(x: Tensor, inputs: Sequence[Projection], before: Norm | None) -> Tensor | None:
    """Recompute the input of the input layers if a factor needs it."""
    if not any(layer.factors is not None for layer in inputs):
        return None
    return x if before is None else before(x)[0]


def _gate_and_up(inner: Sequence[Tensor], half: MLPHalf) -> tuple[Tensor, Tensor | None]:
    if not half.gated:
        return inner[0], None
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, 1)
    return gate, up


def _adapted_only(layers: Sequence[Projection], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of layers with factors, in the factors' type."""
    pairs = zip(grads[::2], grads[1::2], strict=True)
    adapted = [grad for layer, pair in zip(layers, pairs, strict=True) if layer.factors is not None for grad in pair]
    factors, known = factors_of(layers), [grad for grad in adapted if grad is not None]
    if not known or known[0].dtype == factors[0].dtype:
        return adapted
    converted = iter(_convert(known, factors[0].dtype))
    return [None if grad is None else next(converted) for grad in adapted]


def _convert(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Convert tensors of one type in two kernels."""
    flat = torch.cat([t.flatten() for t in tensors]).to(dtype)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def convert_factors(halves: Halves, dtype: torch.dtype) -> Halves:
    """Return the halves with the factors in another type, and with B multiplied by the scaling."""
    layers = [layer for half in halves for layer in half.projections if layer.factors is not None]
    if not layers:
        return halves
    with torch.no_grad():
        lora_A, lora_B = ([f.detach() for f in factors_of(layers)[part::2]] for part in (0, 1))
        converted = _convert([*lora_A, *multiply_each(lora_B, [layer.scaling for layer in layers])], dtype)
    pairs = zip(layers, converted[: len(layers)], converted[len(layers) :], strict=True)
    by_id = {id(layer): layer.with_factors(*factors) for layer, *factors in pairs}
    return halves[0].with_layers(by_id), halves[1].with_layers(by_id)


Halves = tuple[AttentionHalf, MLPHalf]
# Up to this share of outputs, only the needed outputs of a block are computed.
MAX_OUTPUT_SHARE = 0.9
# Supported arguments of a block. With any other argument, except None and False, the block runs the model's code.
_SUPPORTED = {"attention_mask", "position_ids", "position_embeddings", "packed_layout", "use_cache", "cache_position"}
_REQUIRES_GRAD = attrgetter("requires_grad")


class Layouts(Protocol):
    """Returns the layout of a block's call from its hidden states and named arguments.

    The layout contains the segments of all rows, concatenated. Unsupported calls have no layout.
    """

    def __call__(self, hidden: Tensor, kwargs: dict[str, Any], causal: bool) -> Layout | PartialLayout | None: ...


class _NormFunction(torch.autograd.Function):
    """A norm with frozen weight. Saves its input and two numbers per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        y, stats = norm(x)
        ctx.norm = norm
        ctx.save_for_backward(x, stats)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, stats = ctx.saved_tensors
        return ctx.norm.backward(grads[0].contiguous(), x, stats), None


class FusedNorm:
    """Replaces the forward of a norm module by the kernel if its weight is frozen."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original_forward = module.forward
        self._cached: tuple[list[int], Norm | None] = ([], None)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = direct_parameters(self.module).get("weight")
        trained = any(p is not None and p.requires_grad for p in direct_parameters(self.module).values())
        if (
            trained
            or weight is None
            or weight.dtype != hidden_states.dtype
            or not _is_on_supported_device(hidden_states)
        ):
            return self.original_forward(hidden_states)
        ids = [id(tensor) for tensor in direct_parameters(self.module).values()]
        if self._cached[0] != ids:
            self._cached = ids, make_norm(self.module)
        norm = self._cached[1]
        if norm is None:
            return self.original_forward(hidden_states)
        return _NormFunction.apply(hidden_states.flatten(0, -2), norm).view(hidden_states.shape)


class _FullBlock(torch.autograd.Function):
    """A block in one kernel call per direction. Results are bitwise equal to those of its halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compiled: Block, context: AttentionContext, *factors: Tensor) -> Tensor:
        arguments = context.layout.segments(), context.cosine, context.sine, context.output_indices
        y, saved = compiled.forward(x, *arguments)
        ctx.compiled, ctx.arguments = compiled, arguments
        ctx.save_for_backward(x, saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, saved = ctx.saved_tensors
        need_x, *_, need_factors = ctx.needs_input_grad
        compiled: Block = ctx.compiled.refreshed()
        segments, cosine, sine, output_indices = ctx.arguments
        grad, needed = grads[0].contiguous(), (need_x, need_factors)
        d_x, factor_grads = compiled.backward(grad, x, saved, segments, cosine, sine, output_indices, *needed)
        return d_x, None, None, *factor_grads


class FusedBlock:
    """Replacement of a block's forward, with the same signature.

    Args:
        block: Block to replace.
        roles: Description of the block.
        config: Attention parameters of the block.
        layouts: Returns the layout of a call.

    If the signature of the block changes, it runs the model's code.

    Attributes:
        output_indices: (P,) ascending indices of the needed outputs, or None for all. If they are a small share, other
            outputs become 0.
    """

    def __init__(self, block: nn.Module, roles: BlockRoles, config: AttentionConfig, layouts: Layouts) -> None:
        self.block, self.roles, self.config, self.layouts = block, roles, config, layouts
        self.original_forward: Callable[..., Any] = block.forward
        self.output_indices: Tensor | None = None
        self._signature = signature(block)
        self._names = list(inspect.signature(type(block).forward).parameters)[2:]  # after self and the hidden states
        self.reset()

    def reset(self) -> None:
        """Release cached modules and tensors."""
        self._modules: list[nn.Module] = []
        self._classes: list[type] = []
        self._children: list[dict[str, nn.Module | None]] = []
        self._tables: list[dict[str, Any]] = []
        self._norms: list[nn.Module] = []
        self._layers: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._state: list[Any] = []
        self._halves: Halves | None = None
        self._compiled: Block | None = None
        self._factors: list[Tensor] = []

    @property
    def checkpointing(self) -> bool:
        """True if activation checkpointing is enabled for the block."""
        return bool(getattr(self.block, "gradient_checkpointing", False)) and self.block.training

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        arguments = {**kwargs, **dict(zip(self._names, args, strict=False))} if args else kwargs
        layout = self._layout(hidden_states, arguments)
        embeddings = arguments.get("position_embeddings")
        rotary = self.roles.attention.rotary
        halves = None if layout is None or (rotary and embeddings is None) else self._current_halves(hidden_states)
        if halves is None or layout is None:
            return self.original_forward(hidden_states, *args, **kwargs)
        cosine, sine = _rotary_tables(embeddings, layout) if rotary and embeddings is not None else (None, None)
        if isinstance(layout, PartialLayout):
            context = AttentionContext(layout.row_layout, cosine, sine, None, layout, layer_index_of(self.block))
        else:
            indices = self.output_indices
            is_small_share = indices is not None and 0 < len(indices) <= MAX_OUTPUT_SHARE * layout.length
            output_indices = indices.contiguous() if is_small_share and indices is not None else None
            context = AttentionContext(layout, cosine, sine, output_indices)
        inputs = (hidden_states, halves, context)
        if self.checkpointing and torch.is_grad_enabled():
            y = checkpoint(self._run, *inputs, True, use_reentrant=False)
        else:
            y = self._run(*inputs, False)
        extra = self.roles.extra_outputs
        return y if extra is None else (y, *[None] * extra)

    def _layout(self, hidden: Tensor, arguments: dict[str, Any]) -> Layout | PartialLayout | None:
        """Return the layout of a call, or None if the call is not supported."""
        unsupported = (v is not None and v is not False and name not in _SUPPORTED for name, v in arguments.items())
        if hidden.dim() != 3 or not _is_on_supported_device(hidden) or any(unsupported):
            return None
        return self.layouts(hidden, arguments, self.roles.attention.causal)

    def _current_halves(self, hidden: Tensor) -> Halves | None:
        """Return the halves for the block's current parts, or None to run the model's code."""
        if not self._has_same_modules():
            self._look_up()
        state: list[Any] = [self.config, hidden.dtype]
        for layer in self._layers:
            _append_settings(layer, state)
        _append_tensors([*self._norms, *self._layers], state)
        state += map(_REQUIRES_GRAD, self._parameters)
        if state != self._state:
            self._state, self._compiled, self._factors = state, None, []
            self._halves = self._build_halves() if self._can_run(hidden) else None
        return None if self._halves is None or self._is_observed() else self._halves

    def _has_same_modules(self) -> bool:
        """True if the block has the cached modules with the same classes."""
        if not self._modules or list(map(type, self._modules)) != self._classes:
            return False
        return list(map(direct_modules, self._modules)) == self._children

    def _look_up(self) -> None:
        """Cache the block's parts. Caches no layers if the block's code differs from the verified code."""
        self.reset()
        self._modules = list(self.block.modules())
        self._classes = list(map(type, self._modules))
        self._children = [dict(direct_modules(module)) for module in self._modules]
        self._tables = [vars(m) for m in self._modules if m is not self.block]
        self._parameters = list(self.block.parameters())
        if signature(self.block) == self._signature:
            self._layers = [module_at(self.block, path) for path in self.roles.layers]
            self._norms = [module_at(self.block, path) for path in self.roles.norms]

    def _can_run(self, hidden: Tensor) -> bool:
        """True if all layers are supported, only their factors are trained, and norms have the type of the input."""
        if not self._layers or not all(can_project(layer) for layer in self._layers):
            return False
        if any(direct_parameters(norm)["weight"].dtype != hidden.dtype for norm in self._norms):  # type: ignore[union-attr]
            return False
        # Only the compiled kernel supports bidirectional attention.
        attention = self.roles.attention
        if not attention.causal and not (serves_compiled(hidden) and attention.head_size % 2 == 0):
            return False
        adapted = [layer for layer in self._layers if isinstance(layer, LoRALinear | LoRAConv1D)]
        factors = {id(factor) for layer in adapted for factor in (layer.lora_A, layer.lora_B)}
        return all(id(p) in factors for p in self._parameters if p.requires_grad)

    def _build_halves(self) -> Halves | None:
        attention, mlp = self.roles.attention, self.roles.mlp
        norms = {p: make_norm(m) for p, m in zip(self.roles.norms, self._norms, strict=True)}
        kind = activation_kind(module_at(self.block, mlp.activation))
        if kind is None or any(norm is None for norm in norms.values()):
            return None
        layers = [Projection(layer) for layer in self._layers]
        count = len(attention.inputs)
        options = {**vars(self.config), "causal": attention.causal}
        heads = (*attention.heads(self.block), attention.head_size, attention.split == "grouped")
        query_norm, key_norm = (norms.get(path or "") for path in (attention.query_norm, attention.key_norm))
        attention_arguments = (*heads, query_norm, key_norm, options)
        first = AttentionHalf(_half_norms(attention.norms, norms), layers[:count], layers[count], *attention_arguments)
        return first, MLPHalf(_half_norms(mlp.norms, norms), layers[count + 1 : -1], layers[-1], mlp.gated, kind)

    def _is_observed(self) -> bool:
        """True if modules inside the block have hooks, a replaced forward or active dropout."""
        if are_hooked(self._tables):
            return True
        for table in self._tables:
            if "forward" in table or (table["training"] and _has_dropout(table)):
                return True
        return self.block.training and _has_dropout(vars(self.block))

    def _run(self, hidden: Tensor, halves: Halves, context: AttentionContext, checkpointed: bool) -> Tensor:
        x, indices = hidden.flatten(0, 1), context.output_indices
        use_compiled = context.partial is None and can_call_directly(hidden) and hidden.is_contiguous()
        compiled = self._compiled_block(x, halves, context) if use_compiled else None
        if compiled is not None:
            if checkpointed:  # recomputation may run after the weights have moved
                compiled = compiled.refreshed()
            y = _FullBlock.apply(x, compiled, context, *self._factors)
        else:
            if x.device.type != "cpu":
                halves = convert_factors(halves, x.dtype)
            y = run_attention(x, halves[0], context)
            y = run_mlp(select_rows(x, indices), y, halves[1]) if self.roles.parallel else run_mlp(y, None, halves[1])
        y = y if indices is None else y.new_zeros(x.shape).index_copy(0, indices, y)
        return y.view(hidden.shape)

    def _compiled_block(self, hidden: Tensor, halves: Halves, context: AttentionContext) -> Block | None:
        """Return the block as a single kernel call, if supported."""
        if self._compiled is not None:
            return self._compiled
        attention, mlp = halves
        parallel = self.roles.parallel
        if not serves_block(hidden, attention, mlp, parallel):
            return None
        layers = [*attention.projections, *mlp.projections]
        if len({layer.lora_A.requires_grad for layer in layers if layer.lora_A is not None}) > 1:
            return None
        self._factors = factors_of(layers)
        rotary_dims = 0 if context.cosine is None else context.cosine.shape[-1]
        self._compiled = Block(attention, mlp, dtype=hidden.dtype, parallel=parallel, rotary_dims=rotary_dims)
        return self._compiled


def _half_norms(paths: Norms, norms: dict[str, Norm | None]) -> HalfNorms:
    return HalfNorms(*(norms.get(path or "") for path in (paths.before, paths.after, paths.post)))


def _is_on_supported_device(hidden: Tensor) -> bool:
    return hidden.device.type in ("cpu", "cuda") and not torch.is_autocast_enabled(hidden.device.type)


def _has_dropout(table: dict[str, Any]) -> bool:
    """True if a module in training applies dropout: as ``nn.Dropout``, or by an attribute with a dropout rate."""
    if table.get("p", 0.0) and "inplace" in table:
        return True
    return any(isinstance(value, float) and value > 0 for name, value in table.items() if "dropout" in name)


def _append_settings(layer: nn.Module, state: list[Any]) -> None:
    """Append the identity and the settings of a layer that affect the fused block."""
    get = vars(layer).get
    state += (id(layer), get("training"), get("enabled"), get("merged"), get("scaling"), get("dropout"))
    activation = get("activation")
    state.append(None if activation is None else activation.kind)


def _append_tensors(modules: list[nn.Module], state: list[Any]) -> None:
    """Append identity, address and trainability of the modules' tensors."""
    tables = [table for module in modules for table in (direct_parameters(module), direct_buffers(module))]
    tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
    state += map(id, tensors)
    state += [t.data_ptr() if type(t) in PLAIN_TYPES else 0 for t in tensors]
    state += map(_REQUIRES_GRAD, tensors)


def _rotary_tables(embeddings: tuple[Tensor, Tensor], layout: Layout | PartialLayout) -> tuple[Tensor, Tensor]:
    """Return fp32 cosines and sines (T, n) of all rows, concatenated. Computed once per forward pass for all blocks."""
    cached = layout.cached_tensors.get(id(embeddings[0]))
    if cached is None or cached[0] is not embeddings[0]:
        if len(layout.cached_tensors) >= 8:  # bound the memory of reused layouts
            layout.cached_tensors.clear()
        length = embeddings[0].shape[1]
        tables = tuple(t.expand(layout.length // length, -1, -1).flatten(0, 1).float().contiguous() for t in embeddings)
        cached = layout.cached_tensors[id(embeddings[0])] = (embeddings[0], *tables)
    return cached[1], cached[2]
