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
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltaw.kernels import rows
from deltaw.kernels.attention import attend, attend_backward, packed_attention, spread_rows
from deltaw.kernels.dropout import apply_dropout, derived_seed, new_seed
from deltaw.kernels.layout import Layout
from deltaw.kernels.rows import HalfNorms, Norm
from deltaw.kernels.torch_private import multiply_each
from deltaw.runtime.partial import PartialLayout, partial_attention
from deltaw.runtime.projections import Projection, RoundedInput, factors_of, head_views, merge_heads, select_rows

_Half = TypeVar("_Half", bound="Half")


@dataclass
class Half:
    """Parts of half a block: norms, input projections and output projection.

    Args:
        residual: True to add the result to the residual stream.
        multiplier: Factor of the result before it is added.
        dropout: Rate of dropout of the output projection's result.
        seed: Seed of the dropout of a call. None to apply none.
    """

    norms: HalfNorms
    inputs: Sequence[Projection]
    output: Projection
    residual: bool = field(default=True, kw_only=True)
    multiplier: float = field(default=1.0, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    seed: Tensor | None = field(default=None, kw_only=True)

    @property
    def projections(self) -> list[Projection]:
        return [*self.inputs, self.output]

    def with_layers(self: _Half, by_id: dict[int, Projection]) -> _Half:
        """Return a copy with replaced projections, by the id of the original."""
        inputs = [by_id.get(id(layer), layer) for layer in self.inputs]
        return replace(self, inputs=inputs, output=by_id.get(id(self.output), self.output))

    @property
    def has_dropout(self) -> bool:
        """True if a part of the half applies dropout."""
        return self.dropout > 0.0 or any(layer.dropout > 0.0 for layer in self.projections)

    def with_seeds(self: _Half, device: torch.device) -> _Half:
        """Return a copy with new random seeds of its dropout."""
        if not self.has_dropout:
            return self
        seed = new_seed(device)
        adapted = [layer for layer in self.projections if layer.dropout > 0.0]
        by_id = {id(layer): layer.with_seed(derived_seed(seed, number)) for number, layer in enumerate(adapted, 1)}
        return replace(self.with_layers(by_id), seed=seed if self.dropout > 0.0 else None)


@dataclass
class AttentionHalf(Half):
    """Attention half of a block. Inputs are the projections of queries, keys and values, or one combined projection.

    Args:
        grouped: Layout of a combined projection, see :func:`deltaw.runtime.projections.head_views`.
        options: Attention options: scaling, window, softcap, causal, sinks.
        pairs: True if adjacent numbers are rotated together.
        norms_after_rotary: True if queries and keys are normalized after their rotation.
        joint_gate: True if the query projection computes, for each head, its query and a gate of its output.
        gate: Projection of a gate of each head, or of each number, of the output.
        attention_dropout: Rate of dropout of the attention weights.
    """

    heads: int
    key_heads: int
    head_size: int
    grouped: bool
    query_norm: Norm | None
    key_norm: Norm | None
    value_norm: Norm | None
    options: dict[str, Any]
    pairs: bool = False
    norms_after_rotary: bool = False
    joint_gate: bool = False
    gate: Projection | None = None
    attention_dropout: float = 0.0

    @property
    def projections(self) -> list[Projection]:
        return [*self.input_layers, self.output]

    @property
    def input_layers(self) -> list[Projection]:
        """Projections of the half's input: those of queries, keys and values, and of the gate."""
        return [*self.inputs, *([] if self.gate is None else [self.gate])]

    def with_layers(self, by_id: dict[int, Projection]) -> AttentionHalf:
        half = super().with_layers(by_id)
        return half if self.gate is None else replace(half, gate=by_id.get(id(self.gate), self.gate))

    @property
    def has_dropout(self) -> bool:
        return self.attention_dropout > 0.0 or super().has_dropout

    def with_seeds(self, device: torch.device) -> AttentionHalf:
        half = super().with_seeds(device)
        if self.attention_dropout == 0.0:
            return half
        random = {"dropout": self.attention_dropout, "seed": new_seed(device)}
        return replace(half, options={**half.options, **random})


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
    """Run the second half of a block on rows x (T, hidden), and add it to ``stream`` (T, hidden) or to x, unless the
    half has no residual stream.
    """
    half = half.with_seeds(x.device)
    return _MLP.apply(x, stream, half, *factors_of(half.projections))


class _Attention(torch.autograd.Function):
    """First half of a block. ``factors`` are A and B of each adapted layer, in order, as inputs of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: AttentionHalf, context: AttentionContext, *factors: Tensor) -> Tensor:
        (q, k, v, gate), h, input_tensors = _attention_inputs(x, half, context)
        k, v = (k, v) if context.partial is None else context.partial.update_keys(context.layer_index, k, v)
        out, saved = attend(q, k, v, context.layout, rows=context.query_indices, **half.options)
        stream = select_rows(x, context.output_indices) if half.residual else None
        y, h_o, end_tensors = _finish_half(half, _apply_gate(out, gate), stream)
        ctx.half = half
        ctx.context = context
        ctx.count = len(h)
        ctx.save_for_backward(x, *h, h_o, q, k, v, gate, out, *input_tensors, *end_tensors, *saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: AttentionHalf = ctx.half
        context: AttentionContext = ctx.context
        x, *rest = ctx.saved_tensors
        h = rest[: ctx.count]
        h_o, q, k, v, gate, out, *rest = rest[ctx.count :]
        input_tensors = rest[:7]
        end_tensors = rest[7:11]
        saved = rest[11:]
        grad, output_grad = _finish_half_backward(grads[0].contiguous(), end_tensors, half)
        d_out, narrow = half.output.backward(output_grad, None, True)
        output_factor_grads = half.output.factors_backward(_apply_gate(out, gate), h_o, output_grad, narrow)
        d_out, d_gate = _gate_backward(d_out.view_as(out), out, gate)
        options = {"rows": context.query_indices, **half.options}
        d_q, d_k, d_v = attend_backward(d_out, q, k, v, out, saved, context.layout, **options)
        del d_out
        head_grads = [d_q, context.local_gradient(d_k), context.local_gradient(d_v), d_gate]
        del d_q, d_k, d_v, d_gate
        d_x, factor_grads = _attention_inputs_backward(ctx, x, h, input_tensors, head_grads, grad)
        return d_x, None, None, *_adapted_only(half.projections, [*factor_grads, *output_factor_grads])


class _AttentionInputs(torch.autograd.Function):
    """Queries, keys, values and gate, for attention that autograd differentiates, and the residual stream.

    The stream is a view of x. The backward adds its gradient in the kernel of the norm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: AttentionHalf, context: AttentionContext, *factors: Tensor) -> Any:
        (q, k, v, gate), h, input_tensors = _attention_inputs(x, half, context)
        ctx.half = half
        ctx.context = context
        ctx.count = len(h)
        ctx.save_for_backward(x, *h, *input_tensors)
        return q, k, v, gate, x.view_as(x) if half.residual else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        h = rest[: ctx.count]
        tensors = rest[ctx.count :]
        *head_grads, grad = grads
        d_x, factor_grads = _attention_inputs_backward(ctx, x, h, tensors, head_grads, grad)
        return d_x, None, None, *_adapted_only(ctx.half.input_layers, factor_grads)


class _AttentionOutput(torch.autograd.Function):
    """Output projection of the attention outputs (T, n), and the sum with the residual stream."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, stream: Tensor | None, half: AttentionHalf, *factors: Tensor) -> Tensor:
        y, h, end_tensors = _finish_half(half, out, stream)
        ctx.half = half
        ctx.save_for_backward(out, h, *end_tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out, h, *end_tensors = ctx.saved_tensors
        output: Projection = ctx.half.output
        grad, output_grad = _finish_half_backward(grads[0].contiguous(), end_tensors, ctx.half)
        d_out, narrow = output.backward(output_grad, None, True)
        factor_grads = output.factors_backward(out, h, output_grad, narrow)
        return d_out, grad if ctx.half.residual else None, None, *_adapted_only([output], factor_grads)


def run_attention(x: Tensor, half: AttentionHalf, context: AttentionContext) -> Tensor:
    """Run the first half of a block on rows x (T, hidden).

    On a device, attention is a separate function that autograd differentiates. Its kernels have no other interface.
    """
    half = half.with_seeds(x.device)
    if x.device.type == "cpu":
        return _Attention.apply(x, half, context, *factors_of(half.projections))
    indices = context.output_indices
    context = replace(context, output_indices=None)
    *heads, gate, stream = _AttentionInputs.apply(x, half, context, *factors_of(half.input_layers))
    q, k, v = (t.transpose(0, 1) for t in heads)
    if context.partial is not None:
        out = partial_attention(q, k, v, context.partial, context.layer_index, **half.options)
    else:
        out = packed_attention(q, k, v, context.layout, **half.options)
    out = select_rows(_apply_gate(out.transpose(0, 1), gate), indices)
    stream = None if stream is None else select_rows(stream, indices)
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
        y, h_o, end_tensors = _finish_half(half, rows.activation(gate, up, half.kind), residual)
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
        grad, above = _finish_half_backward(grads[0].contiguous(), end_tensors, half)
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
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], list[Tensor], tuple[Tensor | None, ...]]:
    """Return normalized and rotated queries and keys, values and gate, the x·A products of the layers, and tensors for
    :func:`_attention_inputs_backward`.
    """
    n, stats = (x, None) if half.norms.before is None else half.norms.before(x)
    (q, k, v, gate), h = _queries_keys_values(n, half, context.output_indices)
    del n
    if len(half.inputs) == 1 and (context.rotary or half.query_norm is not None):
        v = v.contiguous()  # queries and keys are replaced below; a view would keep the combined output alive
    if half.norms_after_rotary:
        q, k = _rotate(q, k, half, context)
    raw_q = raw_k = raw_v = stats_q = stats_k = stats_v = None
    if half.query_norm is not None:
        raw_q = q
        q, stats_q = half.query_norm.over_heads(q)
    if half.key_norm is not None:
        raw_k = k
        k, stats_k = half.key_norm.over_heads(k)
    if half.value_norm is not None:
        raw_v = v
        v, stats_v = half.value_norm.over_heads(v)
    if not half.norms_after_rotary:
        q, k = _rotate(q, k, half, context)
    return (q, k, v, gate), h, (stats, raw_q, raw_k, raw_v, stats_q, stats_k, stats_v)


def _rotate(
    q: Tensor, k: Tensor, half: AttentionHalf, context: AttentionContext, *, backward: bool = False
) -> tuple[Tensor, ...]:
    """Rotate queries and keys, if the half has rotary positions.

    Adjacent numbers that are rotated together are moved to two halves of a head. They stay there, because the products
    of queries and keys do not depend on the order of the numbers.
    """
    if not context.rotary:
        return q, k
    rotated = []
    for heads, tables in zip((q, k), context.rotary, strict=True):
        t = rows.split_pairs(heads, tables[0].shape[-1]) if half.pairs and not backward else heads
        t = rows.rotate(t, *tables, backward=backward)
        rotated.append(rows.join_pairs(t, tables[0].shape[-1]) if half.pairs and backward else t)
    return tuple(rotated)


def _attention_inputs_backward(
    ctx: Any, x: Tensor, h: Sequence[Tensor], tensors: Sequence[Tensor], head_grads: list[Any], grad: Tensor | None
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x plus ``grad`` of the residual stream, and gradients of the input layers' factors.

    Clears ``head_grads``, to release them as soon as possible.
    """
    stats, raw_q, raw_k, raw_v, stats_q, stats_k, stats_v = tensors
    d_q, d_k, d_v, d_gate = head_grads
    head_grads.clear()
    half: AttentionHalf = ctx.half
    context: AttentionContext = ctx.context
    need_x = ctx.needs_input_grad[0]
    before = half.norms.before
    output_indices = context.output_indices
    if not half.norms_after_rotary:
        d_q, d_k = _rotate(d_q, d_k, half, context, backward=True)
    if half.query_norm is not None:
        d_q = half.query_norm.over_heads_backward(d_q, raw_q, stats_q)
    if half.key_norm is not None:
        d_k = half.key_norm.over_heads_backward(d_k, raw_k, stats_k)
    if half.value_norm is not None:
        d_v = half.value_norm.over_heads_backward(d_v, raw_v, stats_v)
    if half.norms_after_rotary:
        d_q, d_k = _rotate(d_q, d_k, half, context, backward=True)
    stream_grad = None
    if need_x and half.residual and grad is not None:
        stream_grad = spread_rows(grad, output_indices, x.shape[0])
    initial = stream_grad if before is None else None
    n = _recompute_input(x, half.input_layers, before)
    layer_grads = _layer_grads(half, d_q, d_k, d_v, d_gate, output_indices)
    del d_q, d_k, d_v, d_gate
    d_n, factor_grads = _input_backward(n, h, layer_grads, half, initial, x.shape[0], need_x)
    if d_n is not None and before is not None:
        d_n = before.backward(d_n, x, stats, stream_grad)
    return d_n, factor_grads


def _queries_keys_values(
    n: Tensor, half: AttentionHalf, output_indices: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], list[Tensor]]:
    """Return queries (P or T, heads, d), keys and values (T, key heads, d), gate (P or T, heads, d or 1) or None, and
    the x·A products of the layers.
    """
    rounded = RoundedInput()
    n_p, rounded_p = (n, rounded) if output_indices is None else (select_rows(n, output_indices), RoundedInput())
    gate = None
    if len(half.inputs) == 1:
        y, h_q = half.inputs[0](n, rounded)
        q, k, v = head_views(y, half.heads, half.key_heads, half.grouped)
        q = select_rows(q, output_indices)
        h = [h_q]
    else:
        query, key, value = half.inputs
        (k, h_k), (v, h_v) = (layer(n, rounded) for layer in (key, value))
        q, h_q = query(n_p, rounded_p)
        q, k, v = (t.view(t.shape[0], -1, half.head_size) for t in (q, k, v))
        h = [h_q, h_k, h_v]
    if half.joint_gate:
        q, gate = q.unflatten(1, (half.heads, 2)).unbind(2)
    if half.gate is not None:
        y, h_gate = half.gate(n_p, rounded_p)
        gate = y.unflatten(1, (half.heads, -1))
        h.append(h_gate)
    return (q, k, v, gate), h


def _apply_gate(out: Tensor, gate: Tensor | None) -> Tensor:
    """Return attention outputs (P, heads · d), times the sigmoid of their gate."""
    return out.flatten(1) if gate is None else (out * torch.sigmoid(gate)).flatten(1)


def _gate_backward(grad: Tensor, out: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of attention outputs (P, heads, d) and of their gate."""
    if gate is None:
        return grad, None
    share = torch.sigmoid(gate)
    d_share = grad * out
    d_share = d_share.sum(-1, keepdim=True) if gate.shape[-1] == 1 else d_share
    return grad * share, torch.ops.aten.sigmoid_backward(d_share, share)


def _layer_grads(
    half: AttentionHalf, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_gate: Tensor | None, output_indices: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    """Return the gradient (P or T, n) of each input layer's outputs, and the indices of its rows or None for all."""
    if len(half.inputs) == 1:
        combined = merge_heads(spread_rows(d_q, output_indices, d_k.shape[0]), d_k, d_v, half.grouped)
        layer_grads: list[tuple[Tensor, Tensor | None]] = [(combined, None)]
    else:
        queries = torch.stack((d_q, d_gate), 2) if half.joint_gate and d_gate is not None else d_q
        grads = ((queries, output_indices), (d_k, None), (d_v, None))
        layer_grads = [(t.reshape(t.shape[0], -1), indices) for t, indices in grads]
    if half.gate is not None and d_gate is not None:
        layer_grads.append((d_gate.flatten(1), output_indices))
    return layer_grads


def _input_backward(
    n: Tensor | None,
    h: Sequence[Tensor],
    layer_grads: Sequence[tuple[Tensor, Tensor | None]],
    half: AttentionHalf,
    initial: Tensor | None,
    length: int,
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient (length, hidden) of the attention input, added to ``initial``, and gradients of the input
    layers' factors.
    """
    d_x = initial
    grads: list[Tensor | None] = []
    for layer, h_in, (grad, indices) in zip(half.input_layers, h, layer_grads, strict=True):
        d, narrow = layer.backward(grad, d_x if indices is None else None, need_x)
        if need_x and indices is not None:
            d = spread_rows(d, indices, length)
            d = d if d_x is None else d + d_x
        d_x = d if need_x else None
        grads += (None, None) if n is None else layer.factors_backward(select_rows(n, indices), h_in, grad, narrow)
    return d_x, grads


def _finish_half(half: Half, x: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Return the result of the half, x·A of its output projection, and tensors for :func:`_finish_half_backward`."""
    norms = half.norms
    is_added_last = norms.after is not None or half.multiplier != 1.0 or half.seed is not None
    y, h = half.output(x, RoundedInput(), None if is_added_last else stream)
    if half.seed is not None:
        y = apply_dropout(y, half.seed, half.dropout)
    before_after = stats_after = total = stats_post = None
    if norms.after is not None:
        before_after = y
        y, stats_after = norms.after(y)
    if is_added_last and stream is not None:
        y = torch.add(stream, y, alpha=half.multiplier)
    if norms.post is not None:
        total = y
        y, stats_post = norms.post(y)
    return y, h, (before_after, stats_after, total, stats_post)


def _finish_half_backward(grad: Tensor, tensors: Sequence[Tensor | None], half: Half) -> tuple[Tensor, Tensor]:
    """Return the gradients of the residual stream and of the output projection."""
    before_after, stats_after, total, stats_post = tensors
    norms = half.norms
    if norms.post is not None and total is not None and stats_post is not None:
        grad = norms.post.backward(grad, total, stats_post)
    output_grad = grad if half.multiplier == 1.0 else grad * half.multiplier
    if norms.after is not None and before_after is not None and stats_after is not None:
        output_grad = norms.after.backward(output_grad, before_after, stats_after)
    if half.seed is not None:
        output_grad = apply_dropout(output_grad, half.seed, half.dropout)
    return grad, output_grad


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
    attention, mlp = halves
    projections = [*attention.projections, *([] if mlp is None else mlp.projections)]
    layers = [layer for layer in projections if layer.factors is not None]
    if not layers:
        return halves
    with torch.no_grad():
        lora_A, lora_B = ([f.detach() for f in factors_of(layers)[part::2]] for part in (0, 1))
        converted = _convert([*lora_A, *multiply_each(lora_B, [layer.scaling for layer in layers])], dtype)
    pairs = zip(layers, converted[: len(layers)], converted[len(layers) :], strict=True)
    by_id = {id(layer): layer.with_factors(*factors) for layer, *factors in pairs}
    return attention.with_layers(by_id), None if mlp is None else mlp.with_layers(by_id)


# The MLP is None for attention without a residual stream.
Halves = tuple[AttentionHalf, MLPHalf | None]
