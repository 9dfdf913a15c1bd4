"""Which description fits a block: candidates by names and sizes, verified against the model's own code.

Names propose: which layer gives queries, which stands last in the MLP. What names do not say (whether halves
run one after the other or side by side, where norms stand, how one layer's outputs hold queries and keys,
whether positions are rotary) is verified: a candidate is taken only if the block computed by it equals the
block's own code in fp32, forward and backward, on a small copy of the model (see ``small_copy``).

Every parameter of a block must have a role. What is found holds for all blocks of the same signature, the
classes and flags of everything inside.

Knows roles and modules; how a described block is run is handed in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.kinds import is_conv1d
from deltaw.lora.layers import LoRAConv1D
from deltaw.runtime.roles import (
    AttentionRoles,
    BlockRoles,
    MLPRoles,
    Norms,
    Split,
    activation_kind,
    norm_form,
    part,
    sizes,
)

# Relative difference of outputs and of gradients, in fp32, that is rounding and no more.
TOLERANCE = 1e-4
_APART = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_TOGETHER = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_HEAD_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate", "up", "down"))
# What differs from one block to the next of the same kind, or hangs on sizes.
_OF_A_LAYER = (
    "layer_idx",
    "layer_number",
    "scaling",
    "training",
    "gradient_checkpointing",
    "enabled",
    "merged",
)
Signature = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Told:
    """What a block's attention is told besides the tokens.

    Args:
        scaling: of scores. window: positions that a token sees, itself among them. softcap: of scores; see
            :func:`deltaw.kernels.attention.packed_attention`.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None

    @property
    def kind(self) -> tuple[bool, bool]:
        """What of it makes another kind of block."""
        return self.window is not None, self.softcap is not None


def signature(block: nn.Module) -> Signature:
    """What a block's code depends on, sizes and weights left out: the class of each part and its flags.

    Adapted and int8-quantized layers count as the layers that they stand for.
    """
    return tuple((path, *_kind_of(module), *_flags_of(module)) for path, module in block.named_modules())


def _kind_of(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.Linear):
        return ("linear", str(own_parameters(module).get("bias") is not None))
    if isinstance(module, LoRAConv1D) or is_conv1d(module):
        return ("conv1d",)
    kind = type(module)
    return (
        f"{kind.__module__}.{kind.__qualname__}",
        *sorted(n for n, p in own_parameters(module).items() if p is not None),
    )


def _flags_of(module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.Linear) or is_conv1d(module) or isinstance(module, LoRAConv1D):
        return
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in _OF_A_LAYER:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, bool | float | str) or (whole and name.startswith("use")):
            yield f"{name}={value}"


def candidates(block: nn.Module) -> Iterator[BlockRoles] | str:
    """Descriptions that the names and sizes of a block's parts allow, likeliest first; or what it lacks."""
    modules = dict(block.named_modules())
    linear = {path: m for path, m in modules.items() if _is_linear(m)}
    found = _attention_inputs(linear)
    if found is None:
        return "no attention with projections of queries, keys and values"
    inputs, holder = found
    head_size = _head_size(part(block, holder) if holder else block)
    if head_size is None:
        return "the size of its heads"
    top = holder.partition(".")[0]
    rest = [path for path in linear if path not in inputs]
    outputs = [path for path in rest if path.startswith(f"{top}.")]
    inner = [path for path in rest if path not in outputs]
    if len(outputs) != 1:
        return "no single output projection"
    activations = [
        p for p, m in modules.items() if activation_kind(m) is not None and not p.startswith(f"{top}.")
    ]
    if len(activations) != 1:
        return "no known activation"
    shapes = _mlp_shapes(inner, linear)
    if shapes is None:
        return "no MLP of two or three layers"
    norms = [path for path, m in modules.items() if path and path not in linear and norm_form(m) is not None]
    pair = next((p for p in _HEAD_NORMS if all(f"{holder}.{name}" in norms for name in p)), None)
    heads = [f"{holder}.{name}" for name in pair] if pair is not None else []
    if any(own_parameters(part(block, path))["weight"].numel() != head_size for path in heads):  # type: ignore[union-attr]
        return "norms of queries that are not over each head"
    wide = [path for path in norms if path not in heads]
    known = {id(p) for path in (*linear, *norms) for p in modules[path].parameters()}
    if any(id(p) not in known for p in block.parameters()):
        return "parameters besides its norms and projections"
    causal = vars(part(block, holder)).get("is_causal", True) is not False
    return _combined(inputs, outputs[0], shapes, activations[0], wide, heads, head_size, causal)


def _combined(
    inputs: tuple[str, ...],
    output: str,
    shapes: list[tuple[tuple[str, ...], str, bool]],
    activation: str,
    wide: list[str],
    heads: list[str],
    head_size: int,
    causal: bool,
) -> Iterator[BlockRoles]:
    splits: tuple[Split, ...] = ("apart",) if len(inputs) == 3 else ("stacked", "grouped")
    query_norm, key_norm = heads or (None, None)
    for rotary, (first, second, parallel), split, (into, out, gated) in itertools.product(
        (True, False), list(_norm_places(wide)), splits, shapes
    ):
        yield BlockRoles(
            AttentionRoles(inputs, output, first, split, head_size, query_norm, key_norm, rotary, causal),
            MLPRoles(into, out, second, gated, activation),
            parallel,
        )


def _norm_places(wide: list[str]) -> Iterator[tuple[Norms, Norms, bool]]:
    """Where norms may stand: those of attention, those of the MLP, and whether the two run side by side."""
    if len(wide) == 1:
        yield Norms(before=wide[0]), Norms(before=wide[0]), True
    if len(wide) == 2:
        for first, second in (wide, wide[::-1]):
            yield Norms(before=first), Norms(before=second), False
            yield Norms(before=first), Norms(before=second), True
            yield Norms(post=first), Norms(post=second), False
            yield Norms(after=first), Norms(after=second), False
    if len(wide) == 4:
        yield Norms(wide[0], wide[1]), Norms(wide[2], wide[3]), False
        yield Norms(wide[0], wide[2]), Norms(wide[1], wide[3]), False


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, LoRAConv1D) or is_conv1d(module):
        return True
    return isinstance(module, nn.Linear)


def _attention_inputs(linear: dict[str, nn.Module]) -> tuple[tuple[str, ...], str] | None:
    """Paths of the projections of queries, keys and values, and of the module that holds them."""
    for path in linear:
        holder, _, name = path.rpartition(".")
        for names in _APART:
            paths = tuple(f"{holder}.{n}" if holder else n for n in names)
            if name == names[0] and all(p in linear for p in paths):
                return paths, holder
        if name in _TOGETHER and holder:
            return (path,), holder
    return None


def _head_size(holder: nn.Module) -> int | None:
    for name in _HEAD_SIZES:
        value = vars(holder).get(name)
        if isinstance(value, int) and value > 0:
            return value
    heads, dim = vars(holder).get("n_heads"), vars(holder).get("dim")
    return dim // heads if isinstance(heads, int) and isinstance(dim, int) else None


def _mlp_shapes(
    inner: list[str], linear: dict[str, nn.Module]
) -> list[tuple[tuple[str, ...], str, bool]] | None:
    """(inputs, output, gated) that the MLP's layers may have."""
    if len(inner) == 3:
        by_name = {path.rpartition(".")[2]: path for path in inner}
        for gate, up, down in _GATED:
            if {gate, up, down} == set(by_name):
                return [((by_name[gate], by_name[up]), by_name[down], True)]
        return None
    if len(inner) != 2:
        return None
    (_, wide), (narrow, _) = (sizes(linear[path]) for path in inner)
    if wide == narrow:
        return [((inner[0],), inner[1], False)]
    return [((inner[0],), inner[1], True)] if wide == 2 * narrow else None


@dataclass(frozen=True)
class Call:
    """One call of a block by its model, in fp32: what it was given, what it gave, and what its attention was
    told. ``real`` (rows, length) tells tokens from padding, whose outputs may be anything; None for all."""

    block: nn.Module
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    told: Told | None = None
    real: Tensor | None = None


def verified(
    call: Call, run: Callable[[nn.Module, BlockRoles, Told], Callable[..., Any]]
) -> tuple[BlockRoles | None, str]:
    """The first candidate that equals the block's own code, and how well; or None and why.

    Args:
        run: makes of a block, a description and what its attention is told a function that is called as the
            block is.
    """
    proposed = candidates(call.block)
    if isinstance(proposed, str):
        return None, proposed
    extra = len(call.output) - 1 if isinstance(call.output, tuple) else None
    if isinstance(call.output, tuple) and any(value is not None for value in call.output[1:]):
        return None, "it returns more than its hidden states"
    expected = _with_gradient(call.block.forward, call)
    best, why = float("inf"), "no way to compute it fits"
    for roles in proposed:
        roles = BlockRoles(roles.attention, roles.mlp, roles.parallel, extra)
        told = call.told or Told(roles.attention.head_size**-0.5)
        try:
            found = _with_gradient(run(call.block, roles, told), call)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            why = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        hidden = call.hidden if call.real is None else call.hidden * call.real[..., None]
        difference = max(_off(found[0], expected[0], hidden), _off(found[1], expected[1]))
        if difference < TOLERANCE:
            return roles, f"equal to the model's own in fp32 (relative difference {difference:.1e})"
        if difference < best:
            best, why = difference, f"outputs differ from the model's own by {difference:.1e}"
    return None, why


def _with_gradient(way: Callable[..., Any], call: Call) -> tuple[Tensor, Tensor]:
    """A block's output, zero at padding, and the gradient of a weighted sum of it for the block's input."""
    leaf = call.hidden.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = way(leaf, *call.args, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        if call.real is not None:
            output = output * call.real[..., None]
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        (grad,) = torch.autograd.grad((output * weights).sum(), leaf)
    return output.detach(), grad


def _off(ours: Tensor, own: Tensor, hidden: Tensor | None = None) -> float:
    """The relative difference; of outputs, relative to what the block adds to its input if that is less."""
    if ours.shape != own.shape:
        return float("inf")
    size = float(own.norm())
    if hidden is not None and hidden.shape == own.shape:
        size = min(size, float((own - hidden).norm()))
    difference = float((ours - own).norm()) / max(size, 1e-30)
    return difference if math.isfinite(difference) else float("inf")
