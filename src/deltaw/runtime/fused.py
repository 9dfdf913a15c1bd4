"""Fused blocks: a decoder's block under its own name, which keeps for the backward what it must and no more.

What its halves compute and keep is said in ``fused_halves``. Where the compiled kernels serve all of a block
and nobody looks on, both are one call each way (``kernels.block``).

A block with anything trained in it but low-rank factors, with dropout that is drawn, with hooks inside, or
called without a layout, runs the model's own code.

Knows LoRA layers and kernels; not what a model's parts are called (``fused_blocks``), data or training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.kernels.block import Block
from deltaw.kernels.block import serves as serves_block
from deltaw.kernels.layout import Layout
from deltaw.kernels.operators import ORDINARY, unwatched
from deltaw.lora.layers import LoRALinear
from deltaw.lora.layers_int8 import weight_scales
from deltaw.runtime.fused_halves import (
    AttentionHalf,
    GatedHalf,
    Half,
    Norm,
    Projection,
    factors_of,
    run_attention,
    run_gated,
)

# Outputs of a block are computed at the places that are asked for where these are at most this share of all.
FEW = 0.9


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
        return ctx.norm.backward(grads[0], x, stats), None


class FusedNorm:
    """A norm module's own forward with the kernels' inside, where its weight is frozen."""

    def __init__(self, norm: Norm) -> None:
        self.norm, self.module = norm, norm.module
        self.own = norm.module.forward

    def __call__(self, hidden_states: Tensor) -> Tensor:
        frozen = not any(p.requires_grad for p in self.module.parameters())
        weight = self.norm.weight
        if not frozen or weight is None or weight.dtype != hidden_states.dtype:
            return self.own(hidden_states)
        if hidden_states.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return self.own(hidden_states)
        rows = hidden_states.flatten(0, -2)
        return _Normed.apply(rows, self.norm).view(hidden_states.shape)


class _Whole(torch.autograd.Function):
    """A block in one call each way, to the bit what its two halves give."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, whole: Block, layout: Layout, cosine: Tensor, sine: Tensor, *factors: Tensor
    ) -> Tensor:
        y, kept = whole.forward(x, layout.forest(), cosine, sine)
        ctx.whole, ctx.around = whole, (layout.forest(), cosine, sine)
        ctx.save_for_backward(x, kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, kept = ctx.saved_tensors
        need_x, *_, need_factors = ctx.needs_input_grad
        whole: Block = ctx.whole
        forest, cosine, sine = ctx.around
        grad = grads[0].contiguous()
        d_x, of_factors = whole.backward(grad, x, kept, forest, cosine, sine, need_x, need_factors)
        return d_x, None, None, None, None, *of_factors


class FusedBlock:
    """A block's own forward with another inside; called as the block is.

    Attributes:
        picked: the outputs (P, ascending) that are asked for of it, or None for all. Where they are few, the
            others become 0.
    """

    def __init__(self, block: nn.Module, attention: AttentionHalf, gated: GatedHalf) -> None:
        self.block = block
        self.attention, self.gated = attention, gated
        self.own = block.forward
        self.picked: Tensor | None = None
        self._layers: list[nn.Linear] = []
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._complete = False
        self._inside: list[dict[str, Any]] = []
        self._state: list[Any] = []
        self._fused = False
        self._whole: Block | None = None
        self._factors: list[Tensor] = []

    @property
    def layers(self) -> list[nn.Linear]:
        return [*self.attention.layers, *self.gated.layers]

    @property
    def recompute(self) -> bool:
        """Whether the block is told to keep its input alone, as transformers tells it."""
        return bool(getattr(self.block, "gradient_checkpointing", False)) and self.block.training

    def serves(self, hidden: Tensor, layout: Layout | None) -> bool:
        """Whether this call can go the fused way."""
        if layout is None or hidden.shape[0] != 1 or layout.length != hidden.shape[1]:
            return False
        if hidden.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        if self.attention.norm.weight is None or self.attention.norm.weight.dtype != hidden.dtype:
            return False
        self._look()
        return self._fused and not self._watched()

    def _look(self) -> None:
        """Look the block's layers over again; what is known of them is forgotten if one has changed."""
        layers = self.layers
        modules = list(self.block.modules())
        if layers != self._layers or modules != self._modules:
            self._layers, self._modules = layers, modules
            self._inside = [vars(m) for m in modules if m is not self.block]
            # A part that was found at first and has been replaced since, by a trained copy for example.
            self._complete = {id(part) for part in self._parts()} <= {id(m) for m in modules}
            self._parameters = list(self.block.parameters())
        attention = self.attention
        state: list[Any] = [attention.scaling, attention.window, attention.softcap]
        for norm in (attention.norm, self.gated.norm):
            _note_tensors(norm.module, state)
        for layer in layers:
            _note(layer, state)
        state += [p.requires_grad for p in self._parameters]
        if state != self._state:
            self._state, self._whole = state, None
            self._fused = self._complete and self._trains_factors_alone()

    def _parts(self) -> list[nn.Module]:
        """The modules that this block's way computes with, as they were found."""
        attention, gated = self.attention, self.gated
        norms = (attention.norm, attention.query_norm, attention.key_norm, attention.after, gated.norm)
        named = [norm.module for norm in (*norms, gated.after) if norm is not None]
        return [attention.holder, gated.holder, *named]

    def _trains_factors_alone(self) -> bool:
        """Whether every trained parameter in the block is a factor that this way has a gradient for."""
        if not all(layer_can_fuse(layer) for layer in self._layers):
            return False
        factors = {
            id(factor)
            for layer in self._layers
            if isinstance(layer, LoRALinear)
            for factor in (layer.lora_A, layer.lora_B)
        }
        return all(id(p) in factors for p in self.block.parameters() if p.requires_grad)

    def forget(self) -> None:
        """Let go of the tensors that were noted."""
        self._layers, self._inside, self._state, self._factors = [], [], [], []
        self._modules, self._parameters = [], []
        self._whole = None

    def _watched(self) -> bool:
        """Whether somebody looks at, or has changed, what goes on inside the block."""
        return any(
            m["_forward_hooks"] or m["_forward_pre_hooks"] or m["_backward_hooks"] or "forward" in m
            for m in self._inside
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layout = kwargs.get("packed_layout")
        turns = kwargs.get("position_embeddings")
        if layout is None or turns is None or not self.serves(hidden_states, layout):
            return self.own(hidden_states, *args, **kwargs)
        cosine, sine = _wide_turns(turns, layout)
        few = self.picked is not None and 0 < len(self.picked) <= FEW * hidden_states.shape[1]
        picked = self.picked if few else None
        how = (hidden_states, cosine, sine, layout, picked)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, *how, use_reentrant=False)
        return self._run(*how)

    def _run(
        self, hidden: Tensor, cosine: Tensor, sine: Tensor, layout: Layout, picked: Tensor | None
    ) -> Tensor:
        if picked is None and unwatched(hidden) and hidden.is_contiguous():
            whole = self._as_whole(hidden, cosine)
            if whole is not None:
                return _Whole.apply(hidden, whole, layout, cosine, sine, *self._factors)
        x = hidden.squeeze(0)
        attention, gated = self._projections()
        first = Half(self.attention, attention, cosine, sine, layout, picked)
        second = Half(self.gated, gated)
        y = run_gated(run_attention(x, first), second)
        return (y if picked is None else y.new_zeros(x.shape).index_copy(0, picked, y))[None]

    def _projections(self) -> tuple[list[Projection], list[Projection]]:
        made = [Projection(layer) for layer in self._layers]
        return made[:4], made[4:]

    def _as_whole(self, hidden: Tensor, cosine: Tensor) -> Block | None:
        """The block for one call, where it can be had so."""
        if self._whole is not None:
            return self._whole
        attention, gated = self.attention, self.gated
        if any(part is not None for part in (attention.query_norm, attention.key_norm, attention.after)):
            return None
        layers = [projection for half in self._projections() for projection in half]
        norms = (attention.norm, gated.norm)
        if gated.after is not None or not serves_block(hidden, layers, norms, attention.head_size):
            return None
        trained = {layer.lora_A.requires_grad for layer in layers if layer.lora_A is not None}
        if len(trained) > 1:
            return None
        self._factors = factors_of(layers)
        self._whole = Block(
            layers,
            norms,
            dtype=hidden.dtype,
            head_size=attention.head_size,
            activation=gated.kind,
            turned=cosine.shape[-1],
            **attention.how,
        )
        return self._whole


def _note(layer: nn.Linear, state: list[Any]) -> None:
    """Note what a layer's part in a block depends on: who it is, how it is set, and where its tensors lie."""
    of = vars(layer).get
    state += (id(layer), of("training"), of("enabled"), of("merged"), of("scaling"), of("dropout"))
    _note_tensors(layer, state)


def _note_tensors(module: nn.Module, state: list[Any]) -> None:
    """Note where a module's tensors lie, or which they are if on fake tensors, and if they are trained."""
    for table in (module._parameters, module._buffers):
        for tensor in table.values():
            if tensor is not None:
                place = tensor.data_ptr() if type(tensor) in ORDINARY else id(tensor)
                state += (place, tensor.requires_grad)


def _wide_turns(turns: tuple[Tensor, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, n) in fp32, made once for all blocks of a pass."""
    made = layout.made_of.get(id(turns[0]))
    if made is None or made[0] is not turns[0]:
        wide = tuple(t.squeeze(0).float().contiguous() for t in turns)
        made = layout.made_of[id(turns[0])] = (turns[0], *wide)
    return made[1], made[2]


def layer_can_fuse(layer: nn.Module) -> bool:
    """A linear layer whose own weights are frozen, plain or with low-rank factors without dropout."""
    if type(layer) is LoRALinear:
        if layer.training and layer.dropout > 0.0:
            return False
    elif type(layer) is not nn.Linear and weight_scales(layer) is None:
        return False
    bias = getattr(layer, "bias", None)
    return not layer.weight.requires_grad and not (bias is not None and bias.requires_grad)
