"""Lean blocks: a decoder's block as two functions, each with a backward of its own that keeps what it must.

    x₁ = x  + [norm](output(attention(rotate(queries, keys), values)))     all of norm(x)
    x₂ = x₁ + [norm](down(f(gate) · up))                                    both of norm(x₁)

Kept of the first half are its input, queries, keys, values and the attention's output; of the second its
input, gate and up. Norms and the activation are computed again in the backward. Inputs that layers share stand
once, and with weights in bytes they are rounded once.

Blocks are recognised by what they have, not by name, and tried: on a few tokens a lean block must give what the
model's own gives. A block with anything trained in it but low-rank factors, with dropout that is drawn, or
called with a cache, runs the model's own code. Nothing of the model is changed for good.

Knows transformers' decoder blocks and LoRA layers; not data, losses or training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.kernels import linear as products
from deltaw.kernels import rows
from deltaw.kernels.attention import attend, attend_backward
from deltaw.kernels.layout import Layout
from deltaw.lora.layers import LoRALinear
from deltaw.lora.layers_bytes import weight_scales
from deltaw.models.blocks import blocks_of
from deltaw.models.machine import Choice

# Names of activation functions in transformers' modules, and the kernels' names for them.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "ReLU": "relu",
}


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension: (x - mean)·rstd·(weight + offset)."""

    module: nn.Module
    eps: float
    offset: float
    centred: bool

    @property
    def weight(self) -> Tensor | None:
        return getattr(self.module, "weight", None)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bias = getattr(self.module, "bias", None)
        return rows.norm(x, self.weight, bias, offset=self.offset, eps=self.eps, centred=self.centred)

    def backward(self, grad: Tensor, x: Tensor, stats: Tensor, added: Tensor | None = None) -> Tensor:
        return rows.norm_backward(
            grad, x, self.weight, stats, offset=self.offset, centred=self.centred, added=added
        )


def norm_of(module: nn.Module | None) -> Norm | None:
    """The norm that a module is, found by trying it; None where it is none that is known here."""
    weight = getattr(module, "weight", None)
    if module is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    if list(module.children()):
        return None
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not isinstance(eps, float):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm(module, eps, 0.0, True)
    if getattr(module, "bias", None) is not None:
        return None
    # Whether the weight is kept as such or as its difference from one, its own forward says.
    with torch.no_grad(), _real():
        sample = torch.linspace(-1.5, 2.0, weight.numel(), dtype=torch.float32)[None]
        copy = type(module).__new__(type(module))
        copy.__dict__.update(module.__dict__)
        copy._parameters = {"weight": nn.Parameter(torch.full((weight.numel(),), 0.5), requires_grad=False)}
        given = copy(sample)
        for offset in (0.0, 1.0):
            expected, _ = rows.norm_twin(
                sample, torch.full((weight.numel(),), 0.5), None, offset=offset, eps=eps, centred=False
            )
            if torch.allclose(given, expected, rtol=1e-4, atol=1e-5):
                return Norm(module, eps, offset, False)
    return None


@contextlib.contextmanager
def _real() -> Iterator[None]:
    """Tensors with values, whatever mode is on."""
    with torch._C._DisableTorchDispatch():
        yield


class Projection:
    """A linear layer of a block with its update, or without."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.weight: Tensor = module.weight
        self.bias: Tensor | None = module.bias
        self.scale, self.columns = weight_scales(module) or (None, None)
        adapted = isinstance(module, LoRALinear) and module.adapting
        self.lora_A: Tensor | None = module.lora_A if adapted else None
        self.lora_B: Tensor | None = module.lora_B if adapted else None
        self.scaling: float = module.scaling if adapted else 1.0

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.lora_A is None or self.lora_B is None else (self.lora_A, self.lora_B)

    def __call__(self, x: Tensor, steps: Steps, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_bytes, x_scales = steps.of(x, self)
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
            x_bytes,
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

    def factors_backward(self, x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor) -> tuple[Tensor | None, Tensor | None]:
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
            self._made = products.quantised(x, layer.columns)
        return self._made


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or one.data_ptr() == other.data_ptr()


@dataclass
class AttentionHalf:
    """What the first half of a block is made of; layers are looked up anew each time, since adapters come and go."""

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
        return [getattr(self.holder, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]


@dataclass
class GatedHalf:
    """What the second half of a block is made of."""

    norm: Norm
    holder: nn.Module
    kind: str
    after: Norm | None

    @property
    def layers(self) -> list[nn.Linear]:
        return [getattr(self.holder, name) for name in ("gate_proj", "up_proj", "down_proj")]


@dataclass
class Half:
    """A half of a block at work: its projections, and what the forward is told beside the tokens."""

    parts: Any
    projections: list[Projection]
    cosine: Tensor | None = None
    sine: Tensor | None = None
    layout: Layout | None = None
    needs_input: bool = True
    factors: list[Tensor] = field(default_factory=list)


class _Attention(torch.autograd.Function):
    """The first half; ``factors`` are A and B of each adapted layer, in order, so that autograd knows them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: Half, *factors: Tensor) -> Tensor:
        parts: AttentionHalf = half.parts
        query, key, value, output = half.projections
        steps = Steps()
        n, stats = parts.norm(x)
        (q, h_q), (k, h_k), (v, h_v) = (layer(n, steps) for layer in (query, key, value))
        del n, steps
        q, k, v = (t.view(t.shape[0], -1, parts.head_size) for t in (q, k, v))
        raw_q = raw_k = stats_q = stats_k = None
        if parts.query_norm is not None:
            raw_q, (q, stats_q) = q, _over_heads(parts.query_norm, q)
        if parts.key_norm is not None:
            raw_k, (k, stats_k) = k, _over_heads(parts.key_norm, k)
        if half.cosine is not None and half.sine is not None:
            q, k = (rows.rotate(t, half.cosine, half.sine) for t in (q, k))
        assert half.layout is not None
        out, kept = attend(
            q, k, v, half.layout, scaling=parts.scaling, window=parts.window, softcap=parts.softcap
        )
        o, h_o = output(out.flatten(1), Steps(), x if parts.after is None else None)
        before_after = stats_after = None
        if parts.after is not None:
            before_after = o
            o, stats_after = parts.after(o)
            o = x + o
        ctx.half = half
        ctx.save_for_backward(
            x, stats, h_q, h_k, h_v, h_o, q, k, v, out, raw_q, raw_k, stats_q, stats_k, before_after, stats_after, *kept
        )  # fmt: skip
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half: Half = ctx.half
        parts: AttentionHalf = half.parts
        query, key, value, output = half.projections
        (x, stats, h_q, h_k, h_v, h_o, q, k, v, out, raw_q, raw_k, stats_q, stats_k, before_after, stats_after, *kept) = (
            ctx.saved_tensors
        )  # fmt: skip
        grad = grads[0].contiguous()
        above = grad
        if parts.after is not None:
            above = parts.after.backward(grad, before_after, stats_after)
        d_out, narrow = output.backward(above, None, True)
        of_output = output.factors_backward(out.flatten(1), h_o, above, narrow)
        assert half.layout is not None
        d_q, d_k, d_v = attend_backward(
            d_out.view_as(out),
            q,
            k,
            v,
            out,
            kept,
            half.layout,
            scaling=parts.scaling,
            window=parts.window,
            softcap=parts.softcap,
        )
        del d_out
        if half.cosine is not None and half.sine is not None:
            d_q, d_k = (rows.rotate(t, half.cosine, half.sine, backward=True) for t in (d_q, d_k))
        if parts.query_norm is not None:
            d_q = _over_heads_backward(parts.query_norm, d_q, raw_q, stats_q)
        if parts.key_norm is not None:
            d_k = _over_heads_backward(parts.key_norm, d_k, raw_k, stats_k)
        n = None
        if any(layer.factors is not None for layer in (query, key, value)):
            n, _ = parts.norm(x)
        needs_input = ctx.needs_input_grad[0]
        d_n, of_inputs = None, []
        for layer, h, d in zip((query, key, value), (h_q, h_k, h_v), (d_q, d_k, d_v), strict=True):
            flat = d.reshape(d.shape[0], -1)
            d_n, narrow = layer.backward(flat, d_n, needs_input)
            d_n = d_n if needs_input else None
            of_inputs += layer.factors_backward(n, h, flat, narrow) if n is not None else (None, None)
        d_x = parts.norm.backward(d_n, x, stats, grad) if d_n is not None else None
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
        d_n, of_inputs = None, []
        for layer, h, d in ((gate, h_g, d_g), (up, h_u, d_u)):
            d_n, narrow = layer.backward(d, d_n, needs_input)
            d_n = d_n if needs_input else None
            of_inputs += layer.factors_backward(n, h, d, narrow) if n is not None else (None, None)
        d_x = parts.norm.backward(d_n, x, stats, grad) if d_n is not None else None
        return d_x, None, *_of_adapted(half, [*of_inputs, *of_down])


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


class LeanBlock:
    """A block's own forward with another inside; called as the block is."""

    def __init__(self, block: nn.Module, attention: AttentionHalf, gated: GatedHalf) -> None:
        self.block = block
        self.attention, self.gated = attention, gated
        self.own = block.forward

    @property
    def layers(self) -> list[nn.Linear]:
        return [*self.attention.layers, *self.gated.layers]

    @property
    def recompute(self) -> bool:
        """Whether the block is told to keep its input alone, as transformers tells it."""
        return bool(getattr(self.block, "gradient_checkpointing", False)) and self.block.training

    def serves(self, hidden: Tensor, layout: Layout | None) -> bool:
        """Whether this call can go the lean way."""
        if layout is None or hidden.shape[0] != 1 or layout.length != hidden.shape[1]:
            return False
        if hidden.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        if self.attention.norm.weight is None or self.attention.norm.weight.dtype != hidden.dtype:
            return False
        return all(layer_is_lean(layer) for layer in self.layers)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layout = kwargs.get("forest_layout")
        turns = kwargs.get("position_embeddings")
        if not self.serves(hidden_states, layout) or turns is None:
            return self.own(hidden_states, *args, **kwargs)
        cosine, sine = (t[0].float().contiguous() for t in turns)
        x = hidden_states[0]
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x, cosine, sine, layout, use_reentrant=False)[None]
        return self._run(x, cosine, sine, layout)[None]

    def _run(self, x: Tensor, cosine: Tensor, sine: Tensor, layout: Layout) -> Tensor:
        first = Half(self.attention, [Projection(m) for m in self.attention.layers], cosine, sine, layout)
        second = Half(self.gated, [Projection(m) for m in self.gated.layers])
        x = _Attention.apply(x, first, *_factors(first))
        return _Gated.apply(x, second, *_factors(second))


def _factors(half: Half) -> list[Tensor]:
    return [factor for layer in half.projections for factor in layer.factors or ()]


def layer_is_lean(layer: nn.Module) -> bool:
    """A linear layer whose own weights are frozen, plain or with low-rank factors without dropout."""
    if type(layer) is LoRALinear:
        if layer.training and layer.dropout > 0.0:
            return False
    elif type(layer) is not nn.Linear and weight_scales(layer) is None:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return False
    bias = getattr(layer, "bias", None)
    return not layer.weight.requires_grad and not (bias is not None and bias.requires_grad)


class NotingLayout(Layout):
    """A layout that notes what attention is told beside it: scaling, window and soft cap of each layer."""

    noted: list[tuple[float, int | None, float | None]]

    def note(self, scaling: float, window: int | None, softcap: float | None) -> None:
        self.noted.append((scaling, window, softcap))


@dataclass
class Lean:
    """The lean blocks of a model, and what is known of them.

    Attributes:
        blocks: those that were recognised; may be none.
        choice: whether they are used, and why or why not.
    """

    blocks: list[LeanBlock]
    choice: Choice[bool]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While open, the blocks' forward is the lean one; afterwards it is what it was."""
        used = [b for b in self.blocks if self.choice.value and "forward" not in vars(b.block)]
        for lean in used:
            vars(lean.block)["forward"] = lean
        try:
            yield
        finally:
            for lean in used:
                del vars(lean.block)["forward"]


def recognise(model: nn.Module) -> Lean:
    """The blocks that have the parts of a lean one, not yet tried."""
    found = blocks_of(model)
    if found is None:
        return Lean([], Choice(False, "the model has no list of blocks"))
    blocks: list[LeanBlock] = []
    for block in found[1]:
        lean = _recognised(block)
        if isinstance(lean, str):
            return Lean([], Choice(False, f"{type(block).__name__} is not known here: {lean}"))
        blocks.append(lean)
    return Lean(blocks, Choice(True, "not tried"))


def _recognised(block: nn.Module) -> LeanBlock | str:
    """The lean form of a block, or what it lacks."""
    children = dict(block.named_children())
    attention = next((m for m in children.values() if _has(m, "q_proj", "k_proj", "v_proj", "o_proj")), None)
    gated = next((m for m in children.values() if _has(m, "gate_proj", "up_proj", "down_proj")), None)
    if attention is None or gated is None:
        return "no attention with queries, keys and values apart, or no gated MLP"
    activation = getattr(gated, "act_fn", None)
    kind = _ACTIVATIONS.get(type(activation).__name__)
    if kind is None:
        return f"the activation {type(activation).__name__}"
    names = ["input_layernorm", "post_attention_layernorm"]
    if "pre_feedforward_layernorm" in children:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    norms = [norm_of(children.get(name)) for name in names]
    if any(norm is None for norm in norms):
        return "a norm"
    before, behind = norms[0], norms[1]
    head_size = getattr(attention, "head_dim", None)
    heads = [norm_of(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
    if not isinstance(head_size, int) or any(n and n.weight.numel() != head_size for n in heads):  # type: ignore[union-attr]
        return "the size of its heads"
    known = {id(p) for n in (*norms, *heads) if n is not None for p in n.module.parameters()}
    layers = [*(getattr(attention, f"{x}_proj") for x in "qkvo"), *(getattr(gated, f"{x}_proj") for x in ("gate", "up", "down"))]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return "a projection that is no linear layer"
    known |= {id(p) for layer in layers for p in layer.parameters()}
    if any(id(p) not in known for p in block.parameters()):
        return "parameters beside its norms and projections"
    assert before is not None and behind is not None
    if len(norms) == 2:
        halves = AttentionHalf(before, attention, head_size, *heads, None), GatedHalf(behind, gated, kind, None)
    else:
        assert norms[2] is not None
        halves = (
            AttentionHalf(before, attention, head_size, *heads, behind),
            GatedHalf(norms[2], gated, kind, norms[3]),
        )
    return LeanBlock(block, *halves)


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def try_blocks(lean: Lean, run: Any, layout: NotingLayout, tolerance: float) -> Lean:
    """Run the model's own blocks once, note what their attention is told, and compare.

    Args:
        run: runs the model's backbone over ``layout``.
        tolerance: of the relative difference of norms between a lean block's output and the block's own.
    """
    seen: list[tuple[LeanBlock, Tensor, tuple[Any, ...], dict[str, Any], Tensor]] = []
    layout.noted = []

    def watch(block: LeanBlock) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            result = output[0] if isinstance(output, tuple) else output
            seen.append((block, hidden, args[1:], kwargs, result))

        return hook

    hooks = [b.block.register_forward_hook(watch(b), with_kwargs=True) for b in lean.blocks]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if len(layout.noted) != len(lean.blocks) or len(seen) != len(lean.blocks):
        return Lean([], Choice(False, "attention is not called once in each block"))
    worst = 0.0
    for (block, hidden, args, kwargs, own), told in zip(seen, layout.noted, strict=True):
        block.attention.scaling, block.attention.window, block.attention.softcap = told
        named = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        if not block.serves(hidden, layout):
            continue
        with torch.no_grad():
            ours = block(hidden, *args, **named)
        if not isinstance(own, Tensor) or ours.shape != own.shape:
            return Lean([], Choice(False, "a block gives more than its output"))
        if has_values_of(own):
            change = (own.float() - hidden.float()).norm()
            worst = max(worst, float((ours.float() - own.float()).norm() / change))
    if not worst < tolerance:
        return Lean([], Choice(False, f"outputs differ from the model's own by {worst:.1e}"))
    return Lean(lean.blocks, Choice(True, f"same outputs as the model's own (relative difference {worst:.1e})"))


def has_values_of(tensor: Tensor) -> bool:
    """Whether there are numbers to compare."""
    return type(tensor) is Tensor or isinstance(tensor, nn.Parameter)
