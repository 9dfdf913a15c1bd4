"""The two halves of a fused block: autograd functions with a custom backward.

attention:  stream + [after](output(attention(rotate(queries, keys), values))),    all of [before](x)
MLP:        stream + [after](output(f(gate)·up)), or output(f(inner)),             of [before](x)

with [post] applied to the sum if the block has it (see :mod:`deltaw.runtime.block_roles`). The stream is x, or in a
parallel block the sum of the attention half. The first half saves its input, queries, keys, values and attention
output, the second half its input, gate and up. The backward recomputes norms and the activation. Inputs that layers
share are saved once, and rounded once for int8-quantized weights.

The last block may need outputs only at label positions. Then queries, attention outputs and the second half are
computed only for these positions, and keys and values for all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltaw.kernels import rows
from deltaw.kernels.attention import attend, attend_backward, packed_attention, spread_rows
from deltaw.kernels.layout import Layout
from deltaw.kernels.rows import HalfNorms, Norm
from deltaw.kernels.torch_private import multiply_each
from deltaw.runtime.partial import PartialLayout, partial_attention
from deltaw.runtime.projections import Projection, RoundedInput, factors_of, head_views, merge_heads, select_rows

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
        grouped: Layout of a combined projection, see :func:`deltaw.runtime.projections.head_views`.
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
        residual: True to add the result to the residual stream.
    """

    gated: bool
    kind: str
    residual: bool = True


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
    """Run the second half of a block on rows x (T, hidden), and add it to ``stream`` (T, hidden) or to x, unless the
    half has no residual stream.
    """
    return _MLP.apply(x, stream, half, *factors_of(half.projections))


class _Attention(torch.autograd.Function):
    """First half of a block. ``factors`` are A and B of each adapted layer, in order, as inputs of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: AttentionHalf, context: AttentionContext, *factors: Tensor) -> Tensor:
        norms = half.norms
        output_indices = context.output_indices
        (q, k, v), h, input_tensors = _attention_inputs(x, half, context)
        k, v = (k, v) if context.partial is None else context.partial.update_keys(context.layer_index, k, v)
        out, saved = attend(q, k, v, context.layout, rows=context.query_indices, **half.options)
        y, h_o, end_tensors = _finish_half(half.output, out.flatten(1), select_rows(x, output_indices), norms)
        ctx.half = half
        ctx.context = context
        ctx.count = len(h)
        ctx.save_for_backward(x, *h, h_o, q, k, v, out, *input_tensors, *end_tensors, *saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: AttentionHalf = ctx.half
        context: AttentionContext = ctx.context
        x, *rest = ctx.saved_tensors
        h = rest[: ctx.count]
        h_o, q, k, v, out, *rest = rest[ctx.count :]
        input_tensors = rest[:5]
        end_tensors = rest[5:9]
        saved = rest[9:]
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
        ctx.half = half
        ctx.context = context
        ctx.count = len(h)
        ctx.save_for_backward(x, *h, *input_tensors)
        return q, k, v, x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        h = rest[: ctx.count]
        tensors = rest[ctx.count :]
        *head_grads, grad = grads
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

    On a device, attention is a separate function that autograd differentiates. Its kernels have no other interface.
    """
    if x.device.type == "cpu":
        return _Attention.apply(x, half, context, *factors_of(half.projections))
    indices = context.output_indices
    context = replace(context, output_indices=None)
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
        residual = (x if stream is None else stream) if half.residual else None
        y, h_o, end_tensors = _finish_half(half.output, rows.activation(gate, up, half.kind), residual, norms)
        ctx.half = half
        ctx.has_stream = stream is not None
        ctx.count = len(inner)
        ctx.save_for_backward(x, stats, *inner, *h, h_o, *end_tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: MLPHalf = ctx.half
        norms = half.norms
        x, stats, *rest = ctx.saved_tensors
        inner = rest[: ctx.count]
        h = rest[ctx.count : 2 * ctx.count]
        h_o, *end_tensors = rest[2 * ctx.count :]
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
        need_x = ctx.needs_input_grad[0]
        stream_grad = None if ctx.has_stream or not half.residual else grad
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
        raw_q = q
        q, stats_q = half.query_norm.over_heads(q)
    if half.key_norm is not None:
        raw_k = k
        k, stats_k = half.key_norm.over_heads(k)
    if context.rotary:
        q, k = (rows.rotate(t, *tables) for t, tables in zip((q, k), context.rotary, strict=True))
    return (q, k, v), h, (stats, raw_q, raw_k, stats_q, stats_k)


def _attention_inputs_backward(
    ctx: Any, x: Tensor, h: Sequence[Tensor], tensors: Sequence[Tensor], head_grads: list[Tensor], grad: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x plus ``grad`` of the residual stream, and gradients of the input layers' factors.

    Clears ``head_grads``, to release them as soon as possible.
    """
    stats, raw_q, raw_k, stats_q, stats_k = tensors
    d_q, d_k, d_v = head_grads
    head_grads.clear()
    half = ctx.half
    context = ctx.context
    need_x = ctx.needs_input_grad[0]
    before = half.norms.before
    output_indices = context.output_indices
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
    output: Projection, x: Tensor, stream: Tensor | None, norms: HalfNorms
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Return the result of the half, x·A of its output projection, and tensors for :func:`_finish_half_backward`."""
    y, h = output(x, RoundedInput(), stream if norms.after is None else None)
    before_after = stats_after = total = stats_post = None
    if norms.after is not None:
        before_after = y
        y, stats_after = norms.after(y)
        y = y if stream is None else stream + y
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
    factors = factors_of(layers)
    known = [grad for grad in adapted if grad is not None]
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
