"""Description of a transformer block: the roles of its children.

A description contains paths instead of modules, so it remains valid if modules are replaced by adapted layers or
trained copies. It applies to all blocks of a kind, independent of their sizes.

sequential   x₁ = x + attention(norm(x)),       y = x₁ + mlp(norm(x₁))
parallel     y  = x + attention(norm(x)) + mlp(norm(x))

Attention and MLP are the halves of a block. Each half has up to three norms:

before       before the first projection
after        after the last projection, inside the residual branch (Gemma 2, arXiv 2408.00118)
post         after the sum with the residual stream (BERT, arXiv 1810.04805)

An attention module without a residual stream is described as a block without MLP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.kernels.torch_modules import direct_modules, direct_parameters, with_tensors
from deltaw.kernels.torch_private import without_dispatch
from deltaw.lora.kinds import is_conv1d
from deltaw.lora.layers import LoRAConv1D
from deltaw.lora.stored import stored_form, weight_shape

# Kernel names of activation functions, by their class names in transformers and torch.
ACTIVATIONS = {
    **dict.fromkeys(("SiLU", "SiLUActivation"), "silu"),
    **dict.fromkeys(("PytorchGELUTanh", "GELUTanh", "NewGELUActivation", "FastGELUActivation"), "gelu_tanh"),
    **dict.fromkeys(("GELUActivation", "GELU"), "gelu"),
    "ReLU": "relu",
}
# Layout of queries, keys and values, with d numbers per head: separate layers ("apart"), or the outputs of one layer.
# "stacked": all queries, then all keys, then all values (Phi-3, GPT-2). "grouped": for each key head its queries, its
# key and its value (GPT-NeoX, Falcon).
Split = Literal["apart", "stacked", "grouped"]
# Layout of rotary positions (arXiv 2104.09864) over n numbers of a head, and of the cosines of a position:
# "halves": rotates i and i + n/2. The n cosines are the n/2 angles twice.
# "single halves": as "halves", but with n/2 cosines (gpt-oss).
# "pairs": rotates 2i and 2i + 1. The n cosines are those of "halves".
# "repeated pairs": as "pairs", but each cosine is repeated side by side.
Rotary = Literal["halves", "single halves", "pairs", "repeated pairs"]


@dataclass(frozen=True)
class Norms:
    """Paths of the norms of a half block over the hidden size, or None for norms that it lacks."""

    before: str | None = None
    after: str | None = None
    post: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path in (self.before, self.after, self.post) if path is not None)


# Tensors to which a block applies dropout: the attention weights, and the results of the output projections of the
# first and second half.
DropoutSite = Literal["attention", "first", "second"]


@dataclass(frozen=True)
class DropoutRole:
    """A rate of dropout in a block.

    Args:
        path: Path of the module that has the rate.
        attribute: Name of the attribute.
        sites: Tensors to which the rate applies. Empty if it has no effect.
    """

    path: str
    attribute: str
    sites: tuple[DropoutSite, ...]


def dropout_rates(table: dict[str, Any]) -> dict[str, float]:
    """Return the rates of dropout among a module's attributes: ``p`` of ``nn.Dropout``, and names with "dropout".

    Args:
        table: Attributes of the module.
    """
    names = [name for name in table if "dropout" in name]
    if "inplace" in table:
        names.append("p")
    values = {name: table.get(name) for name in names}
    return {name: v for name, v in values.items() if isinstance(v, float | int) and not isinstance(v, bool)}


def has_dropout(table: dict[str, Any]) -> bool:
    """True if a module in training applies dropout."""
    return any(rate > 0.0 for rate in dropout_rates(table).values())


@dataclass(frozen=True)
class AttentionRoles:
    """Attention of a block.

    Args:
        inputs: Paths of the projections of queries, keys and values, or the path of a combined projection.
        output: Path of the output projection.
        norms: Norms of the attention half.
        split: Layout of queries, keys and values in the outputs of the projections.
        head_size: Size d of a head. The numbers of heads follow from the sizes of the layers.
        query_norm: Path of a norm over each query head, or over all of them.
        key_norm: Path of a norm over each key head, or over all of them.
        value_norm: Path of a norm without weight over each value head.
        rotary: Rotary positions, or None.
        causal: True for causal attention.
        whole_norms: True if the norms of queries and keys are over all heads (OLMo 2, arXiv 2501.00656).
        norms_after_rotary: True if queries and keys are normalized after the rotary positions are applied.
        joint_gate: True if the query projection also computes a gate of each head's output.
        gate: Path of a projection that computes a gate for each head or for each number of the output.
        sinks: Path of a parameter with an additional attention logit per head. It has no key and no value.
    """

    inputs: tuple[str, ...]
    output: str
    norms: Norms
    split: Split
    head_size: int
    query_norm: str | None = None
    key_norm: str | None = None
    value_norm: str | None = None
    rotary: Rotary | None = "halves"
    causal: bool = True
    whole_norms: bool = False
    norms_after_rotary: bool = False
    joint_gate: bool = False
    gate: str | None = None
    sinks: str | None = None

    def inside(self, path: str) -> AttentionRoles:
        """Return the description in a block that has this attention at ``path``."""

        def joined(name: str | None) -> str | None:
            return None if name is None else f"{path}.{name}"

        names = ("output", "query_norm", "key_norm", "value_norm", "gate", "sinks")
        paths: dict[str, Any] = {name: joined(getattr(self, name)) for name in names}
        return replace(self, inputs=tuple(f"{path}.{name}" for name in self.inputs), **paths)

    def heads(self, block: nn.Module) -> tuple[int, int]:
        """Return the numbers of query heads and key heads, from the sizes of the block's layers."""
        heads = sizes(module_at(block, self.output))[0] // self.head_size
        if self.split == "apart":
            return heads, sizes(module_at(block, self.inputs[1]))[1] // self.head_size
        return heads, (sizes(module_at(block, self.inputs[0]))[1] // self.head_size - heads) // 2


@dataclass(frozen=True)
class MLPRoles:
    """MLP of a block: output(f(gate)·up), or output(f(inner)) if it is not gated.

    Args:
        inputs: Paths of gate and up, or of one layer that computes gate and up, or of the inner layer of an MLP without
            gate.
        output: Path of the output layer.
        norms: Norms of the MLP half.
        gated: True for f(gate)·up.
        kind: Kernel name of f, see :data:`deltaw.kernels.rows.ACTIVATIONS`.
    """

    inputs: tuple[str, ...]
    output: str
    norms: Norms
    gated: bool
    kind: str


@dataclass(frozen=True)
class BlockRoles:
    """A transformer block.

    Args:
        mlp: MLP of the block, or None for an attention module without residual stream.
        parallel: True if both halves read the block's input, False if the MLP reads the sum of the attention half.
        extra_outputs: Number of values (all None) after the hidden states in the returned tuple, or None if the block
            returns a tensor.
        multiplier: Factor of the results of both halves before they are added to the residual stream.
        dropout: Rates of dropout with known sites.
    """

    attention: AttentionRoles
    mlp: MLPRoles | None
    parallel: bool = False
    extra_outputs: int | None = None
    multiplier: float = 1.0
    dropout: tuple[DropoutRole, ...] = ()

    @property
    def is_basic(self) -> bool:
        """True if the kernels of complete blocks and the compiled decoder support all parts of the block."""
        attention = self.attention
        flags = attention.whole_norms or attention.norms_after_rotary or attention.joint_gate
        paths = attention.value_norm, attention.gate, attention.sinks
        is_known_form = attention.rotary in (None, "halves") and not flags and not any(paths)
        return is_known_form and self.mlp is not None and self.multiplier == 1.0

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the linear layers: inputs, gate and output of attention, inputs and output of the MLP."""
        attention = self.attention
        gate = () if attention.gate is None else (attention.gate,)
        mlp = () if self.mlp is None else (*self.mlp.inputs, self.mlp.output)
        return (*attention.inputs, *gate, attention.output, *mlp)

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms without duplicates."""
        attention = self.attention
        heads = filter(None, (attention.query_norm, attention.key_norm, attention.value_norm))
        mlp = () if self.mlp is None else self.mlp.norms.paths
        return tuple(dict.fromkeys((*attention.norms.paths, *heads, *mlp)))


@dataclass(frozen=True)
class NormForm:
    """Formula of a norm: (x - mean)·rstd·(weight + offset) + bias, with mean = 0 for RMSNorm.

    Args:
        eps: Added to the variance.
        offset: 1 if the weight is stored as its difference from one (Gemma), else 0.
        centered: True for LayerNorm (arXiv 1607.06450). False for RMSNorm (arXiv 1910.07467), which keeps the mean.
    """

    eps: float
    offset: float
    centered: bool


def module_at(block: nn.Module, path: str) -> nn.Module:
    """Return the current module at ``path`` in a block. An empty path is the block.

    Raises:
        KeyError: if the path does not exist.
    """
    module: nn.Module | None = block
    for name in filter(None, path.split(".")):
        module = None if module is None else direct_modules(module)[name]
    if module is None:
        raise KeyError(path)
    return module


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Return input and output size of a linear layer."""
    rows, columns = weight_shape(layer)
    return (columns, rows) if by_column(layer) else (rows, columns)


def by_column(layer: nn.Module) -> bool:
    """True for a weight (out, in), as in ``nn.Linear`` and quantized layers. False for (in, out), as in ``Conv1D``."""
    return stored_form(layer) is not None or not stores_in_out(layer)


def stores_in_out(layer: nn.Module) -> bool:
    return isinstance(layer, LoRAConv1D) or is_conv1d(layer)


def activation_kind(module: nn.Module) -> str | None:
    """Return the kernel name of an activation function, or None if the kernels do not support it."""
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS.get(type(module).__name__)


def norm_form(module: nn.Module, *, weightless: bool = False) -> NormForm | None:
    """Return the formula of a norm over the last dimension, or None if the module is not a supported norm.

    Classes that are not from torch run on fp32 sample values, which are compared with the formula.

    Args:
        weightless: True to also accept norms without parameters. Their size is unknown.
    """
    weight = direct_parameters(module).get("weight")
    if direct_modules(module) or (not weightless if weight is None else weight.dim() != 1):
        return None
    eps = next((vars(module)[name] for name in ("variance_epsilon", "eps") if name in vars(module)), None)
    if not isinstance(eps, float):
        return None
    if type(module) is nn.LayerNorm:
        covers_last = weight is not None and weight.shape == tuple(module.normalized_shape)
        return NormForm(eps, 0.0, True) if covers_last else None
    bias = direct_parameters(module).get("bias")
    size = 16 if weight is None else weight.numel()
    with torch.no_grad(), without_dispatch():
        x = torch.linspace(-1.5, 2.0, size, dtype=torch.float32)[None]
        values = {"weight": torch.linspace(0.3, 0.7, size), "bias": torch.linspace(-0.2, 0.1, size)}
        used = [name for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None]
        copy = with_tensors(module, {name: nn.Parameter(values[name], False) for name in used})
        try:
            expected = type(module).forward(copy, x)
        except Exception:  # a norm with more inputs, for example a gate
            return None
        added = values["bias"] if bias is not None else torch.zeros(size)
        for centered in (False, True):
            middle = x - x.mean() if centered else x
            normalized = middle * torch.rsqrt(middle.square().mean() + eps)
            for offset in (0.0, 1.0):
                computed = (normalized if weight is None else normalized * (values["weight"] + offset)) + added
                if isinstance(expected, Tensor) and torch.allclose(expected, computed, rtol=1e-4, atol=1e-5):
                    return NormForm(eps, offset, centered)
    return None


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which ``module`` uses another forward function. Its hooks still run."""
    table = vars(module)
    previous = table.get("forward")
    table["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del table["forward"]
        else:
            table["forward"] = previous
