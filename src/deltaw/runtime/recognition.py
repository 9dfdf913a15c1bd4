"""Recognition of transformer blocks: find a description of a block and verify it against the model's code.

Candidates follow from the names and sizes of a block's parts. The names do not determine everything: the order of
halves, the positions of norms, the layout of combined projections, and rotary positions. A candidate is therefore
accepted only if the block computed by it equals the model's code in fp32, forward and backward, on a small copy of
the model.

Every parameter of a block must have a role. A description is valid for all blocks with the same signature, which
consists of classes and flags of all modules inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.kernels.torch_modules import direct_parameters
from deltaw.runtime.block_roles import (
    AttentionRoles,
    BlockRoles,
    MLPRoles,
    Norms,
    Split,
    activation_kind,
    module_at,
    norm_form,
    sizes,
    stores_in_out,
)


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the name and the list of the model's blocks, or None if it has no such list.

    This is the list of modules with the largest number of parameters. Lists inside blocks (experts) have fewer. Lists
    inside an embedding belong to a vision tower.
    """
    embeddings = {id(inner) for m in model.modules() if isinstance(m, nn.Embedding) for inner in m.modules()}
    named = [pair for pair in model.named_modules() if id(pair[1]) not in embeddings]
    lists = [pair for pair in named if isinstance(pair[1], nn.ModuleList)]
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in lists]
    return lists[sizes.index(max(sizes))] if any(sizes) else None  # type: ignore[return-value]


# Maximum relative difference of outputs and gradients that is attributed to fp32 rounding.
TOLERANCE = 1e-4
_SEPARATE_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_COMBINED_NAMES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_HEAD_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")
GATED_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate", "up", "down"))
# Attributes that differ between blocks of a kind, or depend on sizes.
_PER_LAYER_FLAGS = ("layer_idx", "layer_number", "scaling", "training", "gradient_checkpointing", "enabled", "merged")
Signature = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class AttentionConfig:
    """Attention parameters of a block.

    Args:
        scaling: Factor applied to the scores.
        window: Number of positions that a token attends to, including itself, or None.
        softcap: Soft cap of the scores, see :func:`deltaw.kernels.attention.packed_attention`.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None

    @property
    def kind(self) -> tuple[bool, bool]:
        """The part of the parameters that distinguishes kinds of blocks."""
        return self.window is not None, self.softcap is not None


def signature(block: nn.Module) -> Signature:
    """Return the properties that a block's code depends on, without sizes and weights: class and flags of each part.

    Adapted and int8-quantized layers count as the layers that they replace.
    """
    return tuple((path, *_kind_of(module), *_flags_of(module)) for path, module in block.named_modules())


def _kind_of(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.Linear):
        return ("linear", str(direct_parameters(module).get("bias") is not None))
    if stores_in_out(module):
        return ("conv1d",)
    kind = type(module)
    parameters = sorted(name for name, parameter in direct_parameters(module).items() if parameter is not None)
    return (f"{kind.__module__}.{kind.__qualname__}", *parameters)


def _flags_of(module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.Linear) or stores_in_out(module):
        return
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in _PER_LAYER_FLAGS:
            continue
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, bool | float | str) or (is_integer and name.startswith("use")):
            yield f"{name}={value}"


def candidates(block: nn.Module) -> list[BlockRoles] | str:
    """Return descriptions that the names and sizes of a block's parts allow, most likely first.

    Without candidates, return a text that states the missing part.
    """
    modules = dict(block.named_modules())
    linear = {path: m for path, m in modules.items() if isinstance(m, nn.Linear) or stores_in_out(m)}
    attention_inputs = _attention_inputs(linear)
    if attention_inputs is None:
        return "no query, key and value projections found"
    inputs, parent = attention_inputs
    head_size = _head_size(module_at(block, parent) if parent else block)
    if head_size is None:
        return "unknown head size"
    top = parent.partition(".")[0]
    other_paths = [path for path in linear if path not in inputs]
    outputs = [path for path in other_paths if path.startswith(f"{top}.")]
    inner = [path for path in other_paths if path not in outputs]
    if len(outputs) != 1:
        return "no single output projection"
    activations = [p for p, m in modules.items() if activation_kind(m) is not None and not p.startswith(f"{top}.")]
    if len(activations) != 1:
        return "no known activation"
    shapes = _mlp_shapes(inner, linear)
    if shapes is None:
        return "no MLP of two or three layers"
    norms = [path for path, m in modules.items() if path and path not in linear and norm_form(m) is not None]
    pair = next((p for p in _HEAD_NORMS if all(f"{parent}.{name}" in norms for name in p)), None)
    heads = [f"{parent}.{name}" for name in pair] if pair is not None else []
    if any(direct_parameters(module_at(block, path))["weight"].numel() != head_size for path in heads):  # type: ignore[union-attr]
        return "query norms do not match the head size"
    block_norms = [path for path in norms if path not in heads]
    covered_ids = {id(p) for path in (*linear, *norms) for p in modules[path].parameters()}
    if any(id(p) not in covered_ids for p in block.parameters()):
        return "it has parameters outside of norms and projections"
    causal = vars(module_at(block, parent)).get("is_causal", True) is not False
    splits: tuple[Split, ...] = ("apart",) if len(inputs) == 3 else ("stacked", "grouped")
    query_norm, key_norm = heads or (None, None)
    roles = []
    combinations = itertools.product((True, False), list(_norm_places(block_norms)), splits, shapes)
    for rotary, (first, second, parallel), split, (into, out, gated) in combinations:
        attention = AttentionRoles(inputs, outputs[0], first, split, head_size, query_norm, key_norm, rotary, causal)
        roles.append(BlockRoles(attention, MLPRoles(into, out, second, gated, activations[0]), parallel))
    return roles


def _norm_places(paths: list[str]) -> Iterator[tuple[Norms, Norms, bool]]:
    """Yield possible roles of the norms: norms of attention, norms of the MLP, and True if the halves are parallel."""
    if len(paths) == 1:
        yield Norms(before=paths[0]), Norms(before=paths[0]), True
    if len(paths) == 2:
        for first, second in (paths, paths[::-1]):
            yield Norms(before=first), Norms(before=second), False
            yield Norms(before=first), Norms(before=second), True
            yield Norms(post=first), Norms(post=second), False
            yield Norms(after=first), Norms(after=second), False
    if len(paths) == 4:
        yield Norms(paths[0], paths[1]), Norms(paths[2], paths[3]), False
        yield Norms(paths[0], paths[2]), Norms(paths[1], paths[3]), False


def _attention_inputs(linear: dict[str, nn.Module]) -> tuple[tuple[str, ...], str] | None:
    """Return the paths of the query, key and value projections, and of their parent module."""
    for path in linear:
        parent, _, name = path.rpartition(".")
        for names in _SEPARATE_NAMES:
            paths = tuple(f"{parent}.{n}" if parent else n for n in names)
            if name == names[0] and all(p in linear for p in paths):
                return paths, parent
        if name in _COMBINED_NAMES and parent:
            return (path,), parent
    return None


def _head_size(attention: nn.Module) -> int | None:
    for name in _HEAD_SIZES:
        value = vars(attention).get(name)
        if isinstance(value, int) and value > 0:
            return value
    heads = vars(attention).get("n_heads")
    dim = vars(attention).get("dim")
    return dim // heads if isinstance(heads, int) and isinstance(dim, int) else None


def _mlp_shapes(inner: list[str], linear: dict[str, nn.Module]) -> list[tuple[tuple[str, ...], str, bool]] | None:
    """Return possible (inputs, output, gated) of the MLP's layers."""
    by_name = {path.rpartition(".")[2]: path for path in inner}
    for gate, up, down in GATED_NAMES:
        if len(inner) == 3 and {gate, up, down} == set(by_name):
            return [((by_name[gate], by_name[up]), by_name[down], True)]
    if len(inner) != 2:
        return None
    (_, inner_size), (outer_size, _) = (sizes(linear[path]) for path in inner)
    return [((inner[0],), inner[1], inner_size != outer_size)] if inner_size in (outer_size, 2 * outer_size) else None


@dataclass(frozen=True)
class BlockCall:
    """A recorded call of a block in fp32.

    Attributes:
        block: The block.
        hidden: Input hidden states.
        args: Further positional arguments.
        kwargs: Keyword arguments.
        output: Output of the block.
        config: Attention parameters, or None if attention was not recorded.
        token_mask: (rows, length) True for tokens, False for padding with undefined outputs. None without padding.
    """

    block: nn.Module
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    config: AttentionConfig | None = None
    token_mask: Tensor | None = None


def find_roles(
    call: BlockCall, run: Callable[[nn.Module, BlockRoles, AttentionConfig], Callable[..., Any]]
) -> tuple[BlockRoles | None, str]:
    """Return the first candidate that equals the model's code, or None, and the reason.

    Args:
        run: Creates the replacement of a block from its description and attention parameters.
    """
    proposed = candidates(call.block)
    if isinstance(proposed, str):
        return None, proposed
    extra = len(call.output) - 1 if isinstance(call.output, tuple) else None
    if isinstance(call.output, tuple) and any(value is not None for value in call.output[1:]):
        return None, "it returns values in addition to the hidden states"
    expected = _with_gradient(call.block.forward, call)
    best = float("inf")
    why = "no description matches"
    for roles in proposed:
        roles = BlockRoles(roles.attention, roles.mlp, roles.parallel, extra)
        config = call.config or AttentionConfig(roles.attention.head_size**-0.5)
        try:
            computed = _with_gradient(run(call.block, roles, config), call)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            why = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        hidden = call.hidden if call.token_mask is None else call.hidden * call.token_mask[..., None]
        difference = max(_difference(computed[0], expected[0], hidden), _difference(computed[1], expected[1]))
        if difference < TOLERANCE:
            return roles, f"equal to the model's code in fp32 (relative difference {difference:.1e})"
        if difference < best:
            best = difference
            why = f"outputs differ from the model's code by {difference:.1e}"
    return None, why


def relative_difference(call: BlockCall, replacement: Callable[..., Any]) -> float:
    """Return the relative difference of outputs and input gradients between a block and its replacement."""
    return max(map(_difference, _with_gradient(replacement, call), _with_gradient(call.block.forward, call)))


def _with_gradient(function: Callable[..., Any], call: BlockCall) -> tuple[Tensor, Tensor]:
    """Return a block's output, with zeros at padding, and the input gradient of a weighted sum of the output."""
    leaf = call.hidden.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = function(leaf, *call.args, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        if call.token_mask is not None:
            output = output * call.token_mask[..., None]
        slopes = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
        (grad,) = torch.autograd.grad((output * slopes).sum(), leaf)
    return output.detach(), grad


def _difference(computed: Tensor, expected: Tensor, hidden: Tensor | None = None) -> float:
    """Return the relative difference. For outputs, it is relative to the block's residual update if that is smaller."""
    if computed.shape != expected.shape:
        return float("inf")
    size = float(expected.norm())
    if hidden is not None and hidden.shape == expected.shape:
        size = min(size, float((expected - hidden).norm()))
    difference = float((computed - expected).norm()) / max(size, 1e-30)
    return difference if math.isfinite(difference) else float("inf")
