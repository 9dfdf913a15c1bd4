"""The two halves of a block as functions, each with a backward of its own that keeps what it must.

    attention:  stream + [after](output(attention(rotate(queries, keys), values))),    all of [before](x)
    MLP:        stream + [after](output(f(gate)·up)), or output(f(inner)),             of [before](x)

with [post] over the sum where there is one; see ``roles``. The stream is x itself, and in a parallel block
the attention's sum. Kept of the first half are its input, queries, keys, values and the attention's output;
of the second its input, gate and up. Norms and the activation are recomputed in the backward. Inputs that
layers share stand once, and with int8-quantized weights they are rounded once.

Of the last block only some outputs may be asked for: those that predict a label. Then queries, the
attention's output and the second half are computed at these places alone, keys and values at all.

Knows projections and kernels; not when a block may run so (``fused``), nor how a model's parts are called
(``roles``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels import rows
from deltaw.kernels.attention import attend, attend_backward
from deltaw.kernels.layout import Layout
from deltaw.runtime.partial import PartialLayout
from deltaw.runtime.projections import (
    Norm,
    Projection,
    Steps,
    at,
    factors_of,
    head_views,
    joined_heads,
    spread,
)


@dataclass
class HalfNorms:
    """The norms of a half over the hidden size."""

    before: Norm | None = None
    after: Norm | None = None
    post: Norm | None = None


@dataclass
class AttentionHalf:
    """What the first half of a block is made of.

    Args:
        inputs: queries', keys' and values' projections, or one that gives all.
        grouped: how one projection holds them; see :func:`deltaw.runtime.projections.head_views`.
        how: what attention is told: scaling, window, softcap, causal.
    """

    norms: HalfNorms
    inputs: Sequence[Projection]
    output: Projection
    heads: int
    key_heads: int
    head_size: int
    grouped: bool
    query_norm: Norm | None
    key_norm: Norm | None
    how: dict[str, Any]

    @property
    def projections(self) -> list[Projection]:
        return [*self.inputs, self.output]


@dataclass
class MLPHalf:
    """What the second half of a block is made of.

    Args:
        inputs: gate and up; or one layer, which gives both where ``gated``.
        kind: of the activation, a name of :data:`deltaw.kernels.rows.ACTIVATIONS`.
    """

    norms: HalfNorms
    inputs: Sequence[Projection]
    output: Projection
    gated: bool
    kind: str

    @property
    def projections(self) -> list[Projection]:
        return [*self.inputs, self.output]


@dataclass
class Around:
    """What attention is told besides the tokens.

    Args:
        cosine, sine: (T, n) in fp32; None without rotary positions.
        picked: (P), ascending: the places whose outputs are asked for; None for all.
        partial: of a row whose other tokens' keys are known; then all T tokens here are those that run, and
            ``number`` is the layer's.
    """

    layout: Layout
    cosine: Tensor | None = None
    sine: Tensor | None = None
    picked: Tensor | None = None
    partial: PartialLayout | None = None
    number: int = 0

    @property
    def queries(self) -> Tensor | None:
        """Where in the layout the queries stand; None where each token asks."""
        return self.picked if self.partial is None else self.partial.places

    def with_known(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens of the layout."""
        return (key, value) if self.partial is None else self.partial.joined(self.number, key, value)

    def own(self, grad: Tensor) -> Tensor:
        """Of the gradient of all keys, or values, that of the tokens which run."""
        return grad if self.partial is None else grad.index_select(0, self.partial.places)

    @property
    def rotary(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(cosine, sine) for queries and for keys; nothing without rotary positions."""
        if self.cosine is None or self.sine is None:
            return ()
        of_keys = self.cosine, self.sine
        return (at(self.cosine, self.picked), at(self.sine, self.picked)), of_keys


def run_attention(x: Tensor, half: AttentionHalf, around: Around) -> Tensor:
    """The first half of a block over rows x (T, hidden); (P or T, hidden)."""
    return _Attention.apply(x, half, around, *factors_of(half.projections))


def run_mlp(x: Tensor, stream: Tensor | None, half: MLPHalf) -> Tensor:
    """The second half of a block over rows x (T, hidden), added to ``stream`` (T, hidden), or to x."""
    return _MLP.apply(x, stream, half, *factors_of(half.projections))


class _Attention(torch.autograd.Function):
    """The first half; ``factors`` are A and B of each adapted layer, in order, for autograd to know them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: AttentionHalf, around: Around, *factors: Tensor) -> Tensor:
        norms, picked = half.norms, around.picked
        n, stats = (x, None) if norms.before is None else norms.before(x)
        (q, k, v), h = _queries_keys_values(n, half, picked)
        del n
        raw_q = raw_k = stats_q = stats_k = None
        if len(half.inputs) == 1 and (around.rotary or half.query_norm is not None):
            v = v.contiguous()  # queries and keys are made anew; a view would keep the wide output alive
        if half.query_norm is not None:
            raw_q, (q, stats_q) = q, half.query_norm.over_heads(q)
        if half.key_norm is not None:
            raw_k, (k, stats_k) = k, half.key_norm.over_heads(k)
        if around.rotary:
            q, k = (rows.rotate(t, *turn) for t, turn in zip((q, k), around.rotary, strict=True))
        k, v = around.with_known(k, v)
        out, kept = attend(q, k, v, around.layout, picked=around.queries, **half.how)
        y, h_o, ends = _end_of_half(half.output, out.flatten(1), at(x, picked), norms)
        ctx.half, ctx.around, ctx.count = half, around, len(h)
        ctx.save_for_backward(
            x, stats, *h, h_o, q, k, v, out, raw_q, raw_k, stats_q, stats_k, *ends, *kept
        )  # fmt: skip
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: AttentionHalf = ctx.half
        around: Around = ctx.around
        picked, norms = around.picked, half.norms
        x, stats, *rest = ctx.saved_tensors
        h, rest = rest[: ctx.count], rest[ctx.count :]
        h_o, q, k, v, out, raw_q, raw_k, stats_q, stats_k, *ends = rest
        kept = ends[4:]
        grad, above = _back_through_end(grads[0].contiguous(), ends[:4], norms)
        d_out, narrow = half.output.backward(above, None, True)
        of_output = half.output.factors_backward(out.flatten(1), h_o, above, narrow)
        d_q, d_k, d_v = attend_backward(
            d_out.view_as(out), q, k, v, out, kept, around.layout, picked=around.queries, **half.how
        )
        del d_out
        d_k, d_v = around.own(d_k), around.own(d_v)
        if around.rotary:
            d_q, d_k = (
                rows.rotate(t, *turn, backward=True)
                for t, turn in zip((d_q, d_k), around.rotary, strict=True)
            )
        if half.query_norm is not None:
            d_q = half.query_norm.over_heads_backward(d_q, raw_q, stats_q)
        if half.key_norm is not None:
            d_k = half.key_norm.over_heads_backward(d_k, raw_k, stats_k)
        need_x = ctx.needs_input_grad[0]
        above = spread(grad, picked, x.shape[0]) if need_x else grad
        begun = above if need_x and norms.before is None else None
        n = _input_again(x, half.inputs, norms.before)
        d_n, of_inputs = _back_to_input(n, h, (d_q, d_k, d_v), half, picked, begun, need_x)
        if d_n is not None and norms.before is not None:
            d_n = norms.before.backward(d_n, x, stats, above)
        return d_n, None, None, *_of_adapted(half.projections, [*of_inputs, *of_output])


class _MLP(torch.autograd.Function):
    """The second half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stream: Tensor | None, half: MLPHalf, *factors: Tensor) -> Tensor:
        norms = half.norms
        steps = Steps()
        n, stats = (x, None) if norms.before is None else norms.before(x)
        inner, h = zip(*(layer(n, steps) for layer in half.inputs), strict=True)
        del n, steps
        gate, up = _gate_and_up(inner, half)
        ends: tuple[Tensor | None, ...]
        y, h_o, ends = _end_of_half(
            half.output, rows.activation(gate, up, half.kind), x if stream is None else stream, norms
        )
        ctx.half, ctx.apart, ctx.count = half, stream is not None, len(inner)
        ctx.save_for_backward(x, stats, *inner, *h, h_o, *ends)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: MLPHalf = ctx.half
        norms = half.norms
        x, stats, *rest = ctx.saved_tensors
        inner, h, (h_o, *ends) = rest[: ctx.count], rest[ctx.count : 2 * ctx.count], rest[2 * ctx.count :]
        grad, above = _back_through_end(grads[0].contiguous(), ends, norms)
        d_y, narrow = half.output.backward(above, None, True)
        d_gate, d_up, y = rows.activation_backward(d_y, *_gate_and_up(inner, half), half.kind)
        del d_y
        of_output = half.output.factors_backward(y, h_o, above, narrow)
        del y
        d_inner = (d_gate, d_up)[: ctx.count]
        if half.gated and ctx.count == 1:
            d_inner = (torch.cat([d_gate, d_up], 1),)
        del d_gate, d_up
        n = _input_again(x, half.inputs, norms.before)
        need_x, of_stream = ctx.needs_input_grad[0], None if ctx.apart else grad
        d_n = of_stream if need_x and norms.before is None else None
        of_inputs: list[Tensor | None] = []
        for layer, h_in, d in zip(half.inputs, h, d_inner, strict=True):
            d_n, narrow = layer.backward(d, d_n, need_x)
            d_n = d_n if need_x else None
            of_inputs += layer.factors_backward(n, h_in, d, narrow) if n is not None else (None, None)
        if d_n is not None and norms.before is not None:
            d_n = norms.before.backward(d_n, x, stats, of_stream)
        d_stream = grad if ctx.apart and ctx.needs_input_grad[1] else None
        return d_n, d_stream, None, *_of_adapted(half.projections, [*of_inputs, *of_output])


def _queries_keys_values(
    n: Tensor, half: AttentionHalf, picked: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """Queries (P or T, heads, d), keys and values (T, key heads, d), and what each layer's update needs."""
    steps = Steps()
    if len(half.inputs) == 1:
        y, h = half.inputs[0](n, steps)
        q, k, v = head_views(y, half.heads, half.key_heads, half.grouped)
        return (at(q, picked), k, v), [h]
    query, key, value = half.inputs
    (k, h_k), (v, h_v) = (layer(n, steps) for layer in (key, value))
    q, h_q = query(n, steps) if picked is None else query(at(n, picked), Steps())
    q, k, v = (t.view(t.shape[0], -1, half.head_size) for t in (q, k, v))
    return (q, k, v), [h_q, h_k, h_v]


def _back_to_input(
    n: Tensor | None,
    h: Sequence[Tensor],
    of_heads: tuple[Tensor, Tensor, Tensor],
    half: AttentionHalf,
    picked: Tensor | None,
    begun: Tensor | None,
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of attention's input, added to ``begun``, and those of its input layers' factors."""
    length = of_heads[1].shape[0]
    if len(half.inputs) == 1:
        whole = joined_heads(spread(of_heads[0], picked, length), *of_heads[1:], half.grouped)
        d_n, narrow = half.inputs[0].backward(whole, begun, need_x)
        found = (None, None) if n is None else half.inputs[0].factors_backward(n, h[0], whole, narrow)
        return (d_n if need_x else None), list(found)
    d_x = None if picked is not None else begun
    of_layers: list[Tensor | None] = []
    for layer, h_in, d, places in zip(half.inputs, h, of_heads, (picked, None, None), strict=True):
        flat = d.reshape(d.shape[0], -1)
        d_x, narrow = layer.backward(flat, d_x, need_x)
        d_x = spread(d_x, places, length) if need_x else None
        if places is not None and begun is not None and d_x is not None:
            d_x = d_x + begun
        of_layers += (None, None) if n is None else layer.factors_backward(at(n, places), h_in, flat, narrow)
    return d_x, of_layers


def _end_of_half(
    output: Projection, x: Tensor, stream: Tensor, norms: HalfNorms
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The half's result, what the output's update needs, and what :func:`_back_through_end` wants."""
    y, h = output(x, Steps(), stream if norms.after is None else None)
    before_after = stats_after = total = stats_post = None
    if norms.after is not None:
        before_after = y
        y, stats_after = norms.after(y)
        y = stream + y
    if norms.post is not None:
        total = y
        y, stats_post = norms.post(y)
    return y, h, (before_after, stats_after, total, stats_post)


def _back_through_end(grad: Tensor, ends: Sequence[Tensor | None], norms: HalfNorms) -> tuple[Tensor, Tensor]:
    """The gradients of the residual stream and of the output projection."""
    before_after, stats_after, total, stats_post = ends
    if norms.post is not None and total is not None and stats_post is not None:
        grad = norms.post.backward(grad, total, stats_post)
    if norms.after is not None and before_after is not None and stats_after is not None:
        return grad, norms.after.backward(grad, before_after, stats_after)
    return grad, grad


def _input_again(x: Tensor, inputs: Sequence[Projection], before: Norm | None) -> Tensor | None:
    """What the input layers were given, recomputed; None where no factor wants it."""
    if not any(layer.factors is not None for layer in inputs):
        return None
    return x if before is None else before(x)[0]


def _gate_and_up(inner: Sequence[Tensor], half: MLPHalf) -> tuple[Tensor, Tensor | None]:
    if not half.gated:
        return inner[0], None
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, 1)
    return gate, up


def _of_adapted(layers: Sequence[Projection], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of those layers that have factors."""
    kept: list[Tensor | None] = []
    for layer, (of_A, of_B) in zip(layers, zip(grads[::2], grads[1::2], strict=True), strict=True):
        if layer.factors is not None:
            kept += [of_A, of_B]
    return kept
