"""A fused, memory-efficient block: a block under its own name, run by its description.

``fused_halves`` describes what its halves compute and save. If the compiled kernels support all of a block
and nothing observes torch's calls, forward and backward are one call each (``kernels.block``).

The parts are looked up through the block's description (``roles``) on every call. What was made of them is
kept until one of them, or what hangs on them, is another. A block with anything trained in it but low-rank
factors, with dropout that is drawn, with hooks inside, or called with what is not known here, runs the
model's own code.

Knows LoRA layers and kernels; not how a description is found (``recognition``), data or training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.kernels import rows
from deltaw.kernels.attention import attend, attend_backward, spread_rows
from deltaw.kernels.block import Block
from deltaw.kernels.block import serves as serves_block
from deltaw.kernels.layout import Layout
from deltaw.kernels.loader import serves as serves_compiled
from deltaw.kernels.operators import ORDINARY, unwatched
from deltaw.kernels.rows import HalfNorms, Norm
from deltaw.kernels.torch_private import are_hooked, own_buffers, own_modules, own_parameters
from deltaw.lora.layers import LoRAConv1D, LoRALinear
from deltaw.runtime.partial import PartialLayout, number_of
from deltaw.runtime.projections import Projection, Steps, at, can_project, factors_of, head_views, joined_heads, norm_of
from deltaw.runtime.recognition import BlockRoles, Norms, Told, activation_kind, part, signature

# The two halves of a block are functions, each with a backward of its own that keeps what it must.
#
# attention:  stream + [after](output(attention(rotate(queries, keys), values))),    all of [before](x)
# MLP:        stream + [after](output(f(gate)·up)), or output(f(inner)),             of [before](x)
#
# with [post] over the sum where there is one; see ``roles``. The stream is x itself, and in a parallel block
# the attention's sum. Kept of the first half are its input, queries, keys, values and the attention's output;
# of the second its input, gate and up. Norms and the activation are recomputed in the backward. Inputs that
# layers share stand once, and with int8-quantized weights they are rounded once.
#
# Of the last block only some outputs may be asked for: those that predict a label. Then queries, the
# attention's output and the second half are computed at these places alone, keys and values at all.


@dataclass
class Half:
    """What a half of a block is made of: its norms, the projections of its input, and that of its output."""

    norms: HalfNorms
    inputs: Sequence[Projection]
    output: Projection

    @property
    def projections(self) -> list[Projection]:
        return [*self.inputs, self.output]


@dataclass
class AttentionHalf(Half):
    """The first half of a block; its inputs are queries', keys' and values' projections, or one that gives all.

    Args:
        grouped: how one projection holds them; see :func:`deltaw.runtime.projections.head_views`.
        how: what attention is told: scaling, window, softcap, causal.
    """

    heads: int
    key_heads: int
    head_size: int
    grouped: bool
    query_norm: Norm | None
    key_norm: Norm | None
    how: dict[str, Any]


@dataclass
class MLPHalf(Half):
    """The second half of a block; its inputs are gate and up, or one layer, which gives both where ``gated``.

    Args:
        kind: of the activation, a name of :data:`deltaw.kernels.rows.ACTIVATIONS`.
    """

    gated: bool
    kind: str


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
            d_q, d_k = (rows.rotate(t, *turn, backward=True) for t, turn in zip((d_q, d_k), around.rotary, strict=True))
        if half.query_norm is not None:
            d_q = half.query_norm.over_heads_backward(d_q, raw_q, stats_q)
        if half.key_norm is not None:
            d_k = half.key_norm.over_heads_backward(d_k, raw_k, stats_k)
        need_x = ctx.needs_input_grad[0]
        above = spread_rows(grad, picked, x.shape[0]) if need_x else grad
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
        joined = half.gated and ctx.count == 1
        d_inner = (torch.cat([d_gate, d_up], 1),) if joined else (d_gate, d_up)[: ctx.count]
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
        whole = joined_heads(spread_rows(of_heads[0], picked, length), *of_heads[1:], half.grouped)
        d_n, narrow = half.inputs[0].backward(whole, begun, need_x)
        found = (None, None) if n is None else half.inputs[0].factors_backward(n, h[0], whole, narrow)
        return (d_n if need_x else None), list(found)
    d_x = None if picked is not None else begun
    of_layers: list[Tensor | None] = []
    for layer, h_in, d, places in zip(half.inputs, h, of_heads, (picked, None, None), strict=True):
        flat = d.reshape(d.shape[0], -1)
        d_x, narrow = layer.backward(flat, d_x, need_x)
        d_x = spread_rows(d_x, places, length) if need_x else None
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
    pairs = zip(grads[::2], grads[1::2], strict=True)
    return [grad for layer, pair in zip(layers, pairs, strict=True) if layer.factors is not None for grad in pair]


# Outputs of a block are computed at the places that are asked for where these are at most this share of all.
FEW = 0.9
# What a block may be called with; anything else that is not None or False is left to its own code.
_KNOWN = {"attention_mask", "position_ids", "position_embeddings", "packed_layout", "use_cache", "cache_position"}
_TRAINED = attrgetter("requires_grad")


class Layouts(Protocol):
    """Finds the layout of a call of a block, by its hidden states and named arguments: the segments of all
    rows laid end to end; None where the call asks for something else."""

    def __call__(self, hidden: Tensor, named: dict[str, Any], causal: bool) -> Layout | PartialLayout | None: ...


class _Normed(torch.autograd.Function):
    """A norm whose weight is frozen, keeping its input and two numbers a row."""

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
    """A norm module's own forward with the kernels' inside, where its weight is frozen."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.forward
        self._made: tuple[list[int], Norm | None] = ([], None)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = own_parameters(self.module).get("weight")
        trained = any(p is not None and p.requires_grad for p in own_parameters(self.module).values())
        if trained or weight is None or weight.dtype != hidden_states.dtype or not _on_processor(hidden_states):
            return self.own(hidden_states)
        ids = [id(tensor) for tensor in own_parameters(self.module).values()]
        if self._made[0] != ids:
            self._made = ids, norm_of(self.module)
        norm = self._made[1]
        if norm is None:
            return self.own(hidden_states)
        return _Normed.apply(hidden_states.flatten(0, -2), norm).view(hidden_states.shape)


class _Whole(torch.autograd.Function):
    """A block in one call each way, to the bit what its two halves give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Block, around: Around, *factors: Tensor) -> Tensor:
        how = around.layout.segments(), around.cosine, around.sine, around.picked
        y, kept = whole.forward(x, *how)
        ctx.whole, ctx.how = whole, how
        ctx.save_for_backward(x, kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, kept = ctx.saved_tensors
        need_x, *_, need_factors = ctx.needs_input_grad
        whole: Block = ctx.whole.settled()
        segments, cosine, sine, picked = ctx.how
        grad, needs = grads[0].contiguous(), (need_x, need_factors)
        d_x, of_factors = whole.backward(grad, x, kept, segments, cosine, sine, picked, *needs)
        return d_x, None, None, *of_factors


class FusedBlock:
    """A block's own forward with another inside; called as the block is.

    Args:
        block: whose forward it stands for.
        roles: its description.
        told: what its attention is told.
        layouts: finds a call's layout.

    The block must keep the signature that it has now; with another it runs its own code.

    Attributes:
        picked: the outputs (P, ascending) that are asked for of it, or None for all. Where they are few, the
            others become 0.
    """

    def __init__(self, block: nn.Module, roles: BlockRoles, told: Told, layouts: Layouts) -> None:
        self.block, self.roles, self.told, self.layouts = block, roles, told, layouts
        self.own: Callable[..., Any] = block.forward
        self.picked: Tensor | None = None
        self._signature = signature(block)
        self._names = list(inspect.signature(type(block).forward).parameters)[2:]  # behind self and its input
        self.forget()

    def forget(self) -> None:
        """Let go of the modules and tensors that were noted."""
        self._modules: list[nn.Module] = []
        self._classes: list[type] = []
        self._children: list[dict[str, nn.Module | None]] = []
        self._tables: list[dict[str, Any]] = []
        self._norms: list[nn.Module] = []
        self._layers: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._state: list[Any] = []
        self._halves: tuple[AttentionHalf, MLPHalf] | None = None
        self._whole: Block | None = None
        self._factors: list[Tensor] = []

    @property
    def checkpointing(self) -> bool:
        """Whether the block is told to keep its input alone, as transformers tells it."""
        return bool(getattr(self.block, "gradient_checkpointing", False)) and self.block.training

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {**kwargs, **dict(zip(self._names, args, strict=False))} if args else kwargs
        layout = self._layout(hidden_states, named)
        turns = named.get("position_embeddings")
        rotary = self.roles.attention.rotary
        halves = None if layout is None or (rotary and turns is None) else self._found(hidden_states)
        if halves is None or layout is None:
            return self.own(hidden_states, *args, **kwargs)
        cosine, sine = _wide_turns(turns, layout) if rotary and turns is not None else (None, None)
        if isinstance(layout, PartialLayout):
            around = Around(layout.whole, cosine, sine, None, layout, number_of(self.block))
        else:
            few = self.picked is not None and 0 < len(self.picked) <= FEW * layout.length
            picked = self.picked.contiguous() if few and self.picked is not None else None
            around = Around(layout, cosine, sine, picked)
        how = (hidden_states, halves, around)
        if self.checkpointing and torch.is_grad_enabled():
            y = checkpoint(self._run, *how, True, use_reentrant=False)
        else:
            y = self._run(*how, False)
        extra = self.roles.extra_outputs
        return y if extra is None else (y, *[None] * extra)

    def _layout(self, hidden: Tensor, named: dict[str, Any]) -> Layout | PartialLayout | None:
        """The call's layout; None where it asks for what only the block's own code knows."""
        other = (v is not None and v is not False and name not in _KNOWN for name, v in named.items())
        if hidden.dim() != 3 or not _on_processor(hidden) or any(other):
            return None
        return self.layouts(hidden, named, self.roles.attention.causal)

    def _found(self, hidden: Tensor) -> tuple[AttentionHalf, MLPHalf] | None:
        """The block's halves made of its parts as they are now; None where it must run its own code."""
        if not self._has_same_modules():
            self._look_up()
        state: list[Any] = [self.told, hidden.dtype]
        for layer in self._layers:
            _note(layer, state)
        _note_tensors([*self._norms, *self._layers], state)
        state += map(_TRAINED, self._parameters)
        if state != self._state:
            self._state, self._whole, self._factors = state, None, []
            self._halves = self._made() if self._can_run(hidden) else None
        return None if self._halves is None or self._watched() else self._halves

    def _has_same_modules(self) -> bool:
        """Whether the block has the modules that were noted, each of the class that it had."""
        if not self._modules or list(map(type, self._modules)) != self._classes:
            return False
        return list(map(own_modules, self._modules)) == self._children

    def _look_up(self) -> None:
        """Note the block's parts anew; none where its code is no longer the one that was verified."""
        self.forget()
        self._modules = list(self.block.modules())
        self._classes = list(map(type, self._modules))
        self._children = [dict(own_modules(module)) for module in self._modules]
        self._tables = [vars(m) for m in self._modules if m is not self.block]
        self._parameters = list(self.block.parameters())
        if signature(self.block) == self._signature:
            self._layers = [part(self.block, path) for path in self.roles.layers]
            self._norms = [part(self.block, path) for path in self.roles.norms]

    def _can_run(self, hidden: Tensor) -> bool:
        """Whether the fused form can run: every trained parameter is a factor of a known layer,
        and norms are of the input's type."""
        if not self._layers or not all(can_project(layer) for layer in self._layers):
            return False
        if any(own_parameters(norm)["weight"].dtype != hidden.dtype for norm in self._norms):  # type: ignore[union-attr]
            return False
        # The compiled kernel alone lets tokens see both ways.
        attention = self.roles.attention
        if not attention.causal and not (serves_compiled(hidden) and attention.head_size % 2 == 0):
            return False
        adapted = [layer for layer in self._layers if isinstance(layer, LoRALinear | LoRAConv1D)]
        factors = {id(factor) for layer in adapted for factor in (layer.lora_A, layer.lora_B)}
        return all(id(p) in factors for p in self._parameters if p.requires_grad)

    def _made(self) -> tuple[AttentionHalf, MLPHalf] | None:
        attention, mlp = self.roles.attention, self.roles.mlp
        norms = {p: norm_of(m) for p, m in zip(self.roles.norms, self._norms, strict=True)}
        kind = activation_kind(part(self.block, mlp.activation))
        if kind is None or any(norm is None for norm in norms.values()):
            return None
        layers = [Projection(layer) for layer in self._layers]
        count = len(attention.inputs)
        how = {**vars(self.told), "causal": attention.causal}
        heads = (*attention.heads(self.block), attention.head_size, attention.split == "grouped")
        query_norm, key_norm = (norms.get(path or "") for path in (attention.query_norm, attention.key_norm))
        of_heads = (*heads, query_norm, key_norm, how)
        first = AttentionHalf(_half_norms(attention.norms, norms), layers[:count], layers[count], *of_heads)
        second = MLPHalf(_half_norms(mlp.norms, norms), layers[count + 1 : -1], layers[-1], mlp.gated, kind)
        return first, second

    def _watched(self) -> bool:
        """Whether somebody looks at, or has changed, what goes on inside the block, or dropout is drawn."""
        if are_hooked(self._tables):
            return True
        for table in self._tables:
            if "forward" in table or (table["training"] and _drops(table)):
                return True
        return self.block.training and _drops(vars(self.block))

    def _run(self, hidden: Tensor, halves: tuple[AttentionHalf, MLPHalf], around: Around, checkpointed: bool) -> Tensor:
        x, picked = hidden.flatten(0, 1), around.picked
        at_once = around.partial is None and unwatched(hidden) and hidden.is_contiguous()
        whole = self._as_whole(x, halves, around) if at_once else None
        if whole is not None:
            if checkpointed:  # it may be running again, when its weights lie elsewhere
                whole = whole.settled()
            y = _Whole.apply(x, whole, around, *self._factors)
        else:
            y = _Attention.apply(x, halves[0], around, *factors_of(halves[0].projections))
            y = run_mlp(at(x, picked), y, halves[1]) if self.roles.parallel else run_mlp(y, None, halves[1])
        y = y if picked is None else y.new_zeros(x.shape).index_copy(0, picked, y)
        return y.view(hidden.shape)

    def _as_whole(self, hidden: Tensor, halves: tuple[AttentionHalf, MLPHalf], around: Around) -> Block | None:
        """The block for one call, where it can be had so."""
        if self._whole is not None:
            return self._whole
        attention, mlp = halves
        parallel = self.roles.parallel
        if not serves_block(hidden, attention, mlp, parallel):
            return None
        layers = [*attention.projections, *mlp.projections]
        if len({layer.lora_A.requires_grad for layer in layers if layer.lora_A is not None}) > 1:
            return None
        self._factors = factors_of(layers)
        turned = 0 if around.cosine is None else around.cosine.shape[-1]
        self._whole = Block(attention, mlp, dtype=hidden.dtype, parallel=parallel, turned=turned)
        return self._whole


def _half_norms(places: Norms, norms: dict[str, Norm | None]) -> HalfNorms:
    return HalfNorms(*(norms.get(path or "") for path in (places.before, places.after, places.post)))


def _on_processor(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _drops(table: dict[str, Any]) -> bool:
    """Whether a module in training draws dropout: as ``nn.Dropout``, or by a rate among its own numbers."""
    if table.get("p", 0.0) and "inplace" in table:
        return True
    return any(isinstance(value, float) and value > 0 for name, value in table.items() if "dropout" in name)


def _note(layer: nn.Module, state: list[Any]) -> None:
    """Note what a layer's part in a block depends on beside its tensors: who it is, and how it is set."""
    of = vars(layer).get
    state += (id(layer), of("training"), of("enabled"), of("merged"), of("scaling"), of("dropout"))
    activation = of("activation")
    state.append(None if activation is None else activation.kind)


def _note_tensors(modules: list[nn.Module], state: list[Any]) -> None:
    """Note which tensors modules have, where their numbers lie, and whether they are trained."""
    tables = [table for module in modules for table in (own_parameters(module), own_buffers(module))]
    tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
    state += map(id, tensors)
    state += [t.data_ptr() if type(t) in ORDINARY else 0 for t in tensors]
    state += map(_TRAINED, tensors)


def _wide_turns(turns: tuple[Tensor, Tensor], layout: Layout | PartialLayout) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, n) in fp32 of all rows laid end to end, made once for all blocks of a forward."""
    made = layout.made_of.get(id(turns[0]))
    if made is None or made[0] is not turns[0]:
        if len(layout.made_of) >= 8:  # a layout that is used again must not gather what it was used with
            layout.made_of.clear()
        length = turns[0].shape[1]
        wide = tuple(t.expand(layout.length // length, -1, -1).flatten(0, 1).float().contiguous() for t in turns)
        made = layout.made_of[id(turns[0])] = (turns[0], *wide)
    return made[1], made[2]
