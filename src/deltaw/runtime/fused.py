"""Fused, memory-efficient forward and backward of transformer blocks.

A :class:`FusedBlock` replaces the forward method of a block, based on a description of its parts (``BlockRoles``). If
the compiled kernels support the entire block and torch calls are not observed, forward and backward are one kernel call
each (``kernels.block``).

Parts are looked up on every call, and derived objects are cached until a part or its tensors change. The block runs the
model's code if parameters other than low-rank factors are trained, dropout is active at an unknown site, hooks are
registered inside, or the call has unsupported arguments.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.kernels.block import Block
from deltaw.kernels.block import supports as serves_block
from deltaw.kernels.layout import Layout
from deltaw.kernels.loader import supports as serves_compiled
from deltaw.kernels.operators import PLAIN_TYPES, can_call_directly
from deltaw.kernels.rows import HalfNorms, Norm, split_pairs
from deltaw.kernels.torch_modules import are_hooked, direct_buffers, direct_modules, direct_parameters
from deltaw.lora.layers import LoRAConv1D, LoRALinear
from deltaw.runtime.block_roles import BlockRoles, DropoutSite, Norms, Rotary, dropout_rates, module_at
from deltaw.runtime.halves import (
    AttentionContext,
    AttentionHalf,
    Halves,
    MLPHalf,
    convert_factors,
    run_attention,
    run_mlp,
)
from deltaw.runtime.partial import PartialLayout, layer_index_of
from deltaw.runtime.projections import Projection, can_project, factors_of, make_norm, select_rows
from deltaw.runtime.recognition import AttentionConfig
from deltaw.runtime.signatures import signature

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

    def __call__(self, hidden_states: Tensor, *others: Tensor | None) -> Tensor:
        if any(value is not None for value in others):  # for example a gate
            return self.original_forward(hidden_states, *others)
        weight = direct_parameters(self.module).get("weight")
        trained = any(p is not None and p.requires_grad for p in direct_parameters(self.module).values())
        if (
            trained
            or weight is None
            or weight.dtype != hidden_states.dtype
            or not is_on_supported_device(hidden_states)
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
        ctx.compiled = compiled
        ctx.arguments = arguments
        ctx.save_for_backward(x, saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, saved = ctx.saved_tensors
        need_x, *_, need_factors = ctx.needs_input_grad
        compiled: Block = ctx.compiled.refreshed()
        segments, cosine, sine, output_indices = ctx.arguments
        grad = grads[0].contiguous()
        needed = (need_x, need_factors)
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
        self.block = block
        self.roles = roles
        self.config = config
        self.layouts = layouts
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
        self._dropout: list[tuple[dict[str, Any], str]] = []
        self._dropout_parents: list[dict[str, Any]] = []
        self._known_rates: set[tuple[int, str]] = set()
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
        cosine, sine = _rotary_tables(embeddings, layout, rotary) if rotary and embeddings is not None else (None, None)
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
        supported = _SUPPORTED if _uses_shared_keys(self.block) else {*_SUPPORTED, "shared_kv_states"}
        unsupported = (v is not None and v is not False and name not in supported for name, v in arguments.items())
        if hidden.dim() != 3 or not is_on_supported_device(hidden) or any(unsupported):
            return None
        return self.layouts(hidden, arguments, self.roles.attention.causal)

    def _current_halves(self, hidden: Tensor) -> Halves | None:
        """Return the halves for the block's current parts, or None to run the model's code."""
        if not self._has_same_modules():
            self._look_up()
        state: list[Any] = [self.config, hidden.dtype, *self._current_rates()]
        for layer in self._layers:
            _append_settings(layer, state)
        _append_tensors([*self._norms, *self._layers], state)
        state += map(_REQUIRES_GRAD, self._parameters)
        if state != self._state:
            self._state = state
            self._compiled = None
            self._factors = []
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
            tables = [vars(module_at(self.block, role.path)) for role in self.roles.dropout]
            self._dropout = [(table, role.attribute) for table, role in zip(tables, self.roles.dropout, strict=True)]
            parents = [role.path.rpartition(".")[0] for role in self.roles.dropout]
            self._dropout_parents = [vars(module_at(self.block, path)) for path in parents]
            self._known_rates = {(id(table), attribute) for table, attribute in self._dropout}
            self._known_rates |= {(id(vars(layer)), "dropout") for layer in self._layers}

    def _current_rates(self) -> list[float]:
        """Return the rates of dropout of the block's roles, 0 for modules that are not in training mode."""
        return [table[attribute] if table["training"] else 0.0 for table, attribute in self._dropout]

    def _can_run(self, hidden: Tensor) -> bool:
        """True if all layers are supported, only their factors are trained, and norms have the type of the input."""
        if not self._layers or not all(can_project(layer) for layer in self._layers):
            return False
        weights = [direct_parameters(norm).get("weight") for norm in self._norms]
        if any(weight is not None and weight.dtype != hidden.dtype for weight in weights):
            return False
        # Only the compiled kernel supports bidirectional attention.
        attention = self.roles.attention
        if not attention.causal and not (serves_compiled(hidden) and attention.head_size % 2 == 0):
            return False
        adapted = [layer for layer in self._layers if isinstance(layer, LoRALinear | LoRAConv1D)]
        factors = {id(factor) for layer in adapted for factor in (layer.lora_A, layer.lora_B)}
        return all(id(p) in factors for p in self._parameters if p.requires_grad)

    def _rate_at(self, site: DropoutSite) -> float:
        """Return the probability that a number at a site is set to 0, by all rates together."""
        rates = zip(self.roles.dropout, self._current_rates(), strict=True)
        return 1.0 - math.prod(1.0 - rate for role, rate in rates if site in role.sites)

    def _build_halves(self) -> Halves | None:
        norms = {p: make_norm(m) for p, m in zip(self.roles.norms, self._norms, strict=True)}
        if any(norm is None for norm in norms.values()):
            return None
        layers = dict(zip(self.roles.layers, map(Projection, self._layers), strict=True))
        attention = self.roles.attention
        heads, key_heads = attention.heads(self.block)
        options: dict[str, Any] = {**vars(self.config), "causal": attention.causal}
        module = _module_or_block(self.block, attention.inputs[0].rpartition(".")[0])
        options["scaling"] *= vars(module).get("key_multiplier", 1.0)  # Falcon-H1
        if attention.sinks is not None:
            options["sinks"] = direct_parameters(module)["sinks"]
        first = AttentionHalf(
            norms=_half_norms(attention.norms, norms),
            inputs=[layers[path] for path in attention.inputs],
            output=layers[attention.output],
            heads=heads,
            key_heads=key_heads,
            head_size=attention.head_size,
            grouped=attention.split == "grouped",
            query_norm=norms.get(attention.query_norm or ""),
            key_norm=norms.get(attention.key_norm or ""),
            value_norm=norms.get(attention.value_norm or ""),
            options=options,
            pairs=attention.rotary in ("pairs", "repeated pairs"),
            norms_after_rotary=attention.norms_after_rotary,
            joint_gate=attention.joint_gate,
            gate=layers.get(attention.gate or ""),
            residual=self.roles.mlp is not None,
            multiplier=self.roles.multiplier,
            dropout=self._rate_at("first"),
            attention_dropout=self._rate_at("attention"),
        )
        mlp = self.roles.mlp
        if mlp is None:
            return first, None
        second = MLPHalf(
            norms=_half_norms(mlp.norms, norms),
            inputs=[layers[path] for path in mlp.inputs],
            output=layers[mlp.output],
            gated=mlp.gated,
            kind=mlp.kind,
            multiplier=self.roles.multiplier,
            dropout=self._rate_at("second"),
        )
        return first, second

    def _is_observed(self) -> bool:
        """True if modules inside the block have hooks, a replaced forward or dropout whose effect is unknown."""
        if are_hooked(self._tables) or any("forward" in table for table in self._tables):
            return True
        # Some code applies the rate of a module depending on the mode of its parent (BERT's attention).
        for (table, attribute), parent in zip(self._dropout, self._dropout_parents, strict=True):
            if table[attribute] > 0.0 and table["training"] != parent["training"]:
                return True
        for table in [*self._tables, vars(self.block)]:
            if table["training"] and self._has_unknown_dropout(table):
                return True
        return False

    def _has_unknown_dropout(self, table: dict[str, Any]) -> bool:
        rates = dropout_rates(table).items()
        return any(rate > 0.0 and (id(table), name) not in self._known_rates for name, rate in rates)

    def _run(self, hidden: Tensor, halves: Halves, context: AttentionContext, checkpointed: bool) -> Tensor:
        x = hidden.flatten(0, 1)
        indices = context.output_indices
        drops = any(half is not None and half.has_dropout for half in halves)
        use_compiled = not drops and context.partial is None and can_call_directly(hidden) and hidden.is_contiguous()
        compiled = self._compiled_block(x, halves, context) if use_compiled else None
        if compiled is not None:
            if checkpointed:  # recomputation may run after the weights have moved
                compiled = compiled.refreshed()
            y = _FullBlock.apply(x, compiled, context, *self._factors)
        else:
            if x.device.type != "cpu":
                halves = convert_factors(halves, x.dtype)
            attention, mlp = halves
            y = run_attention(x, attention, context)
            if mlp is not None:
                y = run_mlp(select_rows(x, indices), y, mlp) if self.roles.parallel else run_mlp(y, None, mlp)
        y = y if indices is None else y.new_zeros(x.shape).index_copy(0, indices, y)
        return y.view(hidden.shape)

    def _compiled_block(self, hidden: Tensor, halves: Halves, context: AttentionContext) -> Block | None:
        """Return the block as a single kernel call, if supported."""
        if self._compiled is not None:
            return self._compiled
        attention, mlp = halves
        parallel = self.roles.parallel
        if mlp is None or not self.roles.is_basic or not serves_block(hidden, attention, mlp, parallel):
            return None
        layers = [*attention.projections, *mlp.projections]
        if len({layer.lora_A.requires_grad for layer in layers if layer.lora_A is not None}) > 1:
            return None
        self._factors = factors_of(layers)
        rotary_dims = 0 if context.cosine is None else context.cosine.shape[-1]
        self._compiled = Block(attention, mlp, dtype=hidden.dtype, parallel=parallel, rotary_dims=rotary_dims)
        return self._compiled


def _module_or_block(block: nn.Module, path: str) -> nn.Module:
    return module_at(block, path) if path else block


def _half_norms(paths: Norms, norms: dict[str, Norm | None]) -> HalfNorms:
    return HalfNorms(*(norms.get(path or "") for path in (paths.before, paths.after, paths.post)))


def _uses_shared_keys(attention: nn.Module) -> bool:
    """True if an attention module uses keys of another layer, or stores its keys for another layer (Gemma 4)."""
    table = vars(attention)
    if table.get("is_kv_shared_layer", True):
        return True
    return bool(table.get("store_full_length_kv", True)) and getattr(table["config"], "num_kv_shared_layers", 1) != 0


def is_on_supported_device(hidden: Tensor) -> bool:
    return hidden.device.type in ("cpu", "cuda") and not torch.is_autocast_enabled(hidden.device.type)


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


def _rotary_tables(
    embeddings: tuple[Tensor, Tensor], layout: Layout | PartialLayout, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """Return fp32 cosines and sines (T, n) of all rows, concatenated, with angles listed as two halves.

    Computed once per forward pass for all blocks.
    """
    key = id(embeddings[0]), rotary
    cached = layout.cached_tensors.get(key)
    if cached is None or cached[0] is not embeddings[0]:
        if len(layout.cached_tensors) >= 8:  # bound the memory of reused layouts
            layout.cached_tensors.clear()
        length = embeddings[0].shape[1]
        tables = [t.expand(layout.length // length, -1, -1).flatten(0, 1).float().contiguous() for t in embeddings]
        if rotary == "repeated pairs":
            tables = [split_pairs(t, t.shape[-1]) for t in tables]
        elif rotary == "single halves":
            tables = [torch.cat([t, t], -1) for t in tables]
        cached = layout.cached_tensors[key] = (embeddings[0], *tables)
    return cached[1], cached[2]
