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
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.kernels.block import Block
from deltaw.kernels.block import serves as serves_block
from deltaw.kernels.layout import Layout
from deltaw.kernels.loader import serves as serves_compiled
from deltaw.kernels.operators import ORDINARY, unwatched
from deltaw.kernels.torch_private import are_hooked, own_buffers, own_modules, own_parameters
from deltaw.lora.layers import LoRAConv1D, LoRALinear
from deltaw.runtime.fused_halves import (
    Around,
    AttentionHalf,
    HalfNorms,
    MLPHalf,
    run_attention,
    run_mlp,
)
from deltaw.runtime.partial import PartialLayout, number_of
from deltaw.runtime.projections import Norm, Projection, can_project, factors_of
from deltaw.runtime.recognition import Told, signature
from deltaw.runtime.roles import BlockRoles, Norms, activation_kind, part

# Outputs of a block are computed at the places that are asked for where these are at most this share of all.
FEW = 0.9
# What a block may be called with; anything else that is not None or False is left to its own code.
_KNOWN = {
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "packed_layout",
    "use_cache",
    "cache_position",
}
_TRAINED = attrgetter("requires_grad")


class Layouts(Protocol):
    """Finds the layout of a call of a block, by its hidden states and named arguments: the segments of all
    rows laid end to end; None where the call asks for something else."""

    def __call__(
        self, hidden: Tensor, named: dict[str, Any], causal: bool
    ) -> Layout | PartialLayout | None: ...


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
        if weight is None or weight.dtype != hidden_states.dtype or not _on_processor(hidden_states):
            return self.own(hidden_states)
        if any(p is not None and p.requires_grad for p in own_parameters(self.module).values()):
            return self.own(hidden_states)
        ids = [id(tensor) for tensor in own_parameters(self.module).values()]
        if self._made[0] != ids:
            self._made = ids, Norm.of(self.module)
        norm = self._made[1]
        if norm is None:
            return self.own(hidden_states)
        rows = hidden_states.flatten(0, -2)
        return _Normed.apply(rows, norm).view(hidden_states.shape)


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
        if hidden.dim() != 3 or not _on_processor(hidden):
            return None
        for name, value in named.items():
            if value is not None and value is not False and name not in _KNOWN:
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
        if self._halves is None or self._watched():
            return None
        return self._halves

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
        if not self.roles.attention.causal and not _compiled_serves(hidden, self.roles):
            return False
        factors = {
            id(factor)
            for layer in self._layers
            if isinstance(layer, LoRALinear | LoRAConv1D)
            for factor in (layer.lora_A, layer.lora_B)
        }
        return all(id(p) in factors for p in self._parameters if p.requires_grad)

    def _made(self) -> tuple[AttentionHalf, MLPHalf] | None:
        attention, mlp = self.roles.attention, self.roles.mlp
        norms = {p: Norm.of(m) for p, m in zip(self.roles.norms, self._norms, strict=True)}
        kind = activation_kind(part(self.block, mlp.activation))
        if kind is None or any(norm is None for norm in norms.values()):
            return None
        layers = [Projection(layer) for layer in self._layers]
        count = len(attention.inputs)
        how = {
            "scaling": self.told.scaling,
            "window": self.told.window,
            "softcap": self.told.softcap,
            "causal": attention.causal,
        }
        first = AttentionHalf(
            _half_norms(attention.norms, norms),
            layers[:count],
            layers[count],
            *attention.heads(self.block),
            attention.head_size,
            attention.split == "grouped",
            norms.get(attention.query_norm or ""),
            norms.get(attention.key_norm or ""),
            how,
        )
        second = MLPHalf(_half_norms(mlp.norms, norms), layers[count + 1 : -1], layers[-1], mlp.gated, kind)
        return first, second

    def _watched(self) -> bool:
        """Whether somebody looks at, or has changed, what goes on inside the block, or dropout is drawn."""
        if are_hooked(self._tables):
            return True
        for table in self._tables:
            if "forward" in table:
                return True
            if table["training"] and _drops(table):
                return True
        return self.block.training and _drops(vars(self.block))

    def _run(
        self, hidden: Tensor, halves: tuple[AttentionHalf, MLPHalf], around: Around, checkpointed: bool
    ) -> Tensor:
        x, picked = hidden.flatten(0, 1), around.picked
        whole = None
        if around.partial is None and unwatched(hidden) and hidden.is_contiguous():
            whole = self._as_whole(x, halves, around)
        if whole is not None:
            if checkpointed:  # it may be running again, when its weights lie elsewhere
                whole = whole.settled()
            y = _Whole.apply(x, whole, around, *self._factors)
        else:
            y = run_attention(x, halves[0], around)
            if self.roles.parallel:
                y = run_mlp(x if picked is None else x.index_select(0, picked), y, halves[1])
            else:
                y = run_mlp(y, None, halves[1])
        y = y if picked is None else y.new_zeros(x.shape).index_copy(0, picked, y)
        return y.view(hidden.shape)

    def _as_whole(
        self, hidden: Tensor, halves: tuple[AttentionHalf, MLPHalf], around: Around
    ) -> Block | None:
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


def _compiled_serves(hidden: Tensor, roles: BlockRoles) -> bool:
    """Whether the compiled kernel takes the attention, which alone lets tokens see both ways."""
    return serves_compiled(hidden) and roles.attention.head_size % 2 == 0


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
        wide = tuple(
            t.expand(layout.length // length, -1, -1).flatten(0, 1).float().contiguous() for t in turns
        )
        made = layout.made_of[id(turns[0])] = (turns[0], *wide)
    return made[1], made[2]
