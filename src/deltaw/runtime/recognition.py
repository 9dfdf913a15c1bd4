"""Recognition of transformer blocks: find a description of a block and verify it against the model's code.

Candidates follow from the names and sizes of a block's parts. The names do not determine everything: the order of
halves, the positions of norms, the layout of combined projections, and rotary positions. A candidate is therefore
accepted only if the replacement built from it equals the model's code in fp32, forward and backward. The comparison
uses a small copy of the model.

Every parameter of a block must have a role. A description is valid for all blocks with the same signature, which
consists of classes and flags of all modules inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.kernels.torch_modules import direct_modules, direct_parameters
from deltaw.runtime.block_roles import (
    AttentionRoles,
    BlockRoles,
    MLPRoles,
    Norms,
    Rotary,
    Split,
    activation_kind,
    module_at,
    norm_form,
    sizes,
    stores_in_out,
)
from deltaw.runtime.mlp_forms import GATED_NAMES, mlp_form


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the name and the list of the model's blocks, or None if it has no such list.

    The blocks are the ``nn.ModuleList`` with the most parameters, because lists inside blocks (experts) have fewer.
    Lists inside an embedding belong to a vision tower and are ignored.
    """
    embeddings = {id(inner) for m in model.modules() if isinstance(m, nn.Embedding) for inner in m.modules()}
    named = [pair for pair in model.named_modules() if id(pair[1]) not in embeddings]
    lists = [pair for pair in named if isinstance(pair[1], nn.ModuleList)]
    counts = [sum(p.numel() for p in module.parameters()) for _, module in lists]
    return lists[counts.index(max(counts))] if any(counts) else None  # type: ignore[return-value]


# Maximum relative difference of outputs and gradients that is attributed to fp32 rounding.
TOLERANCE = 1e-4
_SEPARATE_NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_COMBINED_NAMES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_HEAD_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")


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


def candidates(block: nn.Module, known: AttentionRoles | None = None) -> list[BlockRoles] | str:
    """Return descriptions that the names and sizes of a block's parts allow, most likely first.

    Returns:
        Candidates, or the reason if there are none.

    Args:
        known: Verified description of the block's attention.
    """
    attention = attention_candidates(block) if known is None else [known]
    if isinstance(attention, str):
        return attention
    top = attention[0].output.partition(".")[0]
    modules = dict(block.named_modules())
    outside = [path for path in modules if path and not path.startswith(f"{top}.")]
    mlps = _mlp_candidates(block, outside)
    if isinstance(mlps, str):
        return mlps
    linear = _linear_layers(block)
    heads = (attention[0].query_norm, attention[0].key_norm)
    norms = [path for path in _norms(block) if path not in heads]
    covered = {id(p) for path in (*linear, *norms, *filter(None, heads)) for p in modules[path].parameters()}
    sinks = () if attention[0].sinks is None else [p for n, p in block.named_parameters() if n == attention[0].sinks]
    covered |= {id(p) for p in sinks}
    if any(id(p) not in covered for p in block.parameters()):
        return "it has parameters outside of norms and projections"
    multiplier = vars(block).get("residual_multiplier", 1.0)
    roles = []
    for form, (first, second, parallel), mlp in itertools.product(attention, list(_norm_roles(norms)), mlps):
        halves = replace(form, norms=first), replace(mlp, norms=second)
        roles.append(BlockRoles(*halves, parallel=parallel, multiplier=multiplier))
    return roles


def attention_candidates(root: nn.Module) -> list[AttentionRoles] | str:
    """Return descriptions of the attention in a block, or of an attention module, or the reason if there are none.

    The norms over the hidden size are left empty.
    """
    linear = _linear_layers(root)
    attention_inputs = _attention_inputs(linear)
    if attention_inputs is None:
        return "no query, key and value projections found"
    inputs, parent = attention_inputs
    module = module_at(root, parent) if parent else root
    head_size = _head_size(module)
    if head_size is None:
        return "unknown head size"
    prefix = f"{parent}." if parent else ""
    top = f"{parent.partition('.')[0]}." if parent else ""
    others = [path for path in linear if path not in inputs and path.startswith(top)]
    if len(others) not in (1, 2):
        return "no single output projection"
    # The output projection, and a projection of a gate if there is another layer.
    pairs: list[tuple[str, str | None]] = [(others[0], None)]
    if len(others) == 2:
        pairs = [(others[0], others[1]), (others[1], others[0])]
    names = {path.rpartition(".")[2]: path for path in _norms(root)}
    pair = next((pair for pair in _HEAD_NORMS if all(f"{prefix}{name}" in names.values() for name in pair)), None)
    query_norm, key_norm = (None, None) if pair is None else (f"{prefix}{name}" for name in pair)
    value_norm = direct_modules(module).get("v_norm")
    has_value_norm = value_norm is not None and norm_form(value_norm, weightless=True) is not None
    sinks = f"{prefix}sinks" if direct_parameters(module).get("sinks") is not None else None
    norm_orders = (False, True) if query_norm is not None else (False,)
    splits: tuple[Split, ...] = ("apart",) if len(inputs) == 3 else ("stacked", "grouped")
    causal = vars(module).get("is_causal", True) is not False
    rotations: tuple[Rotary | None, ...] = ("halves", None, "pairs", "repeated pairs", "single halves")
    descriptions = []
    for rotary, norms_after_rotary, split, (output, gate) in itertools.product(rotations, norm_orders, splits, pairs):
        width = sizes(linear[output])[0]
        if width % head_size or (norms_after_rotary and rotary != "halves"):
            continue
        if gate is not None and sizes(linear[gate])[1] not in (width, width // head_size):
            continue
        norm_width = None if query_norm is None else _norm_width(module_at(root, query_norm))
        if norm_width not in (None, head_size, width):
            return "query norms do not match the head size"
        roles = AttentionRoles(
            inputs=inputs,
            output=output,
            norms=Norms(),
            split=split,
            head_size=head_size,
            query_norm=query_norm,
            key_norm=key_norm,
            rotary=rotary,
            causal=causal,
            value_norm=f"{prefix}v_norm" if has_value_norm else None,
            whole_norms=norm_width not in (None, head_size),
            norms_after_rotary=norms_after_rotary,
            joint_gate=split == "apart" and sizes(linear[inputs[0]])[1] == 2 * width,
            gate=gate,
            sinks=sinks,
        )
        descriptions.append(roles)
    return descriptions or "no output projection of the queries' size"


def module_candidates(module: nn.Module) -> list[BlockRoles] | str:
    """Return descriptions of an attention module without residual stream, most likely first, or a reason."""
    attention = attention_candidates(module)
    if isinstance(attention, str):
        return attention
    first = attention[0]
    parts = [module_at(module, path) for path in BlockRoles(first, None).layers + BlockRoles(first, None).norms]
    covered = {id(p) for part in parts for p in part.parameters()}
    if any(id(p) not in covered for name, p in module.named_parameters() if name != first.sinks):
        return "it has parameters outside of norms and projections"
    return [BlockRoles(roles, None) for roles in attention]


def _linear_layers(root: nn.Module) -> dict[str, nn.Module]:
    modules = dict(root.named_modules())
    return {path: module for path, module in modules.items() if isinstance(module, nn.Linear) or stores_in_out(module)}


def _norms(root: nn.Module) -> list[str]:
    linear = _linear_layers(root)
    return [path for path, m in root.named_modules() if path and path not in linear and norm_form(m) is not None]


def _norm_width(norm: nn.Module) -> int:
    weight = direct_parameters(norm)["weight"]
    assert weight is not None
    return weight.numel()


def _norm_roles(paths: list[str]) -> Iterator[tuple[Norms, Norms, bool]]:
    """Yield possible roles of the norms: of attention, of the MLP, and True if the halves are parallel."""
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


def _mlp_candidates(block: nn.Module, paths: list[str]) -> list[MLPRoles] | str:
    """Return descriptions of the MLP among the modules of a block at ``paths``, without norms."""
    modules = {path: module_at(block, path) for path in paths}
    kinds = [kind for module in modules.values() if (kind := activation_kind(module)) is not None]
    if len(kinds) == 1:
        linear = {path: m for path, m in modules.items() if isinstance(m, nn.Linear) or stores_in_out(m)}
        shapes = _mlp_shapes(list(linear), linear)
        if shapes is None:
            return "no MLP of two or three layers"
        return [MLPRoles(into, out, Norms(), gated, kinds[0]) for into, out, gated in shapes]
    forms = {path: form for path, module in modules.items() if (form := mlp_form(module)) is not None}
    if len(forms) != 1:
        return "no known activation"
    ((path, form),) = forms.items()
    inputs = tuple(f"{path}.{name}" for name in form.inputs)
    return [MLPRoles(inputs, f"{path}.{form.output}", Norms(), form.gated, form.kind)]


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
        config: Attention parameters, or None if attention was not recorded (then those of plain attention apply).
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
    call: BlockCall,
    proposed: list[BlockRoles] | str,
    run: Callable[[nn.Module, BlockRoles, AttentionConfig], Callable[..., Any]],
) -> tuple[BlockRoles | None, str]:
    """Return the first candidate that equals the model's code, or None, and a reason for the result.

    Args:
        proposed: Candidates, or the reason why there are none.
        run: Creates the replacement of a block from its description and attention parameters.
    """
    if isinstance(proposed, str):
        return None, proposed
    extra = len(call.output) - 1 if isinstance(call.output, tuple) else None
    if isinstance(call.output, tuple) and any(value is not None for value in call.output[1:]):
        return None, "it returns values in addition to the hidden states"
    expected = _with_gradient(call.block.forward, call)
    best = float("inf")
    reason = "no description matches"
    for roles in proposed:
        roles = replace(roles, extra_outputs=extra)
        config = call.config or AttentionConfig(roles.attention.head_size**-0.5)
        try:
            computed = _with_gradient(run(call.block, roles, config), call)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        hidden = call.hidden if call.token_mask is None else call.hidden * call.token_mask[..., None]
        difference = max(_difference(computed[0], expected[0], hidden), _difference(computed[1], expected[1]))
        if difference < TOLERANCE:
            return roles, f"equal to the model's code in fp32 (relative difference {difference:.1e})"
        if difference < best:
            best = difference
            reason = f"outputs differ from the model's code by {difference:.1e}"
    return None, reason


def call_difference(call: BlockCall, replacement: Callable[..., Any]) -> float:
    """Return the relative difference between a block and its replacement, or infinity if it does not support the
    call.
    """
    try:
        return relative_difference(call, replacement)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return math.inf


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
