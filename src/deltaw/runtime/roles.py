"""A transformer block described by roles: which child does what, and how the parts are put together.

A description holds paths, not modules. The parts are looked up in a block whenever they are needed, so a
module that was replaced meanwhile (by an adapted layer, by a trained copy) is the one that is found. One
description fits every block of its kind, whatever the sizes.

    sequential   x₁ = x + attention(norm(x)),       y = x₁ + mlp(norm(x₁))
    parallel     y  = x + attention(norm(x)) + mlp(norm(x))

Each half has up to three norms: ``before`` its first projection, ``after`` its last one, inside the residual
branch (Gemma 2, arXiv 2408.00118), and ``post``, over the sum with the residual stream (BERT,
arXiv 1810.04805).

Knows modules and names; not autograd, kernels or how a block is run. Which description is the right one for a
block is found in ``recognition``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deltaw.kernels.torch_private import own_modules, own_parameters, with_tensors, without_dispatch
from deltaw.lora.kinds import is_conv1d
from deltaw.lora.layers import LoRAConv1D
from deltaw.lora.stored import stored_form, weight_shape

# Activation functions by the class names that transformers and torch give them, and the kernels' own names.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "ReLU": "relu",
}
# How one layer's outputs hold queries, keys and values, d numbers a head: all queries, then all keys, then
# all values (Phi-3, GPT-2); or for each key head its queries, its key and its value (GPT-NeoX, Falcon).
Split = Literal["apart", "stacked", "grouped"]


@dataclass(frozen=True)
class Norms:
    """Paths of a half's norms over the hidden size; None where there is none."""

    before: str | None = None
    after: str | None = None
    post: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path in (self.before, self.after, self.post) if path is not None)


@dataclass(frozen=True)
class AttentionRoles:
    """The attention of a block.

    Args:
        inputs: paths of the projections of queries, keys and values; one path where one layer gives all.
        output: path of the output projection.
        split: how queries, keys and values lie in the projections' outputs.
        head_size: numbers of one head (d). The numbers of heads follow from the layers' sizes.
        query_norm, key_norm: paths of norms over each head.
        rotary: whether rotary positions (arXiv 2104.09864) turn queries and keys.
        causal: whether a token sees no later ones.
    """

    inputs: tuple[str, ...]
    output: str
    norms: Norms
    split: Split
    head_size: int
    query_norm: str | None = None
    key_norm: str | None = None
    rotary: bool = True
    causal: bool = True

    def heads(self, block: nn.Module) -> tuple[int, int]:
        """Query heads and key heads, from the sizes of the block's layers."""
        heads = sizes(part(block, self.output))[0] // self.head_size
        if self.split == "apart":
            return heads, sizes(part(block, self.inputs[1]))[1] // self.head_size
        return heads, (sizes(part(block, self.inputs[0]))[1] // self.head_size - heads) // 2


@dataclass(frozen=True)
class MLPRoles:
    """The feed-forward half of a block: output(f(gate)·up), or output(f(inner)) where it is not gated.

    Args:
        inputs: paths of gate and up, or of one layer that gives the gate and then up, or of the one inner
            layer of an MLP without a gate.
        activation: path of f; see :func:`activation_kind`.
    """

    inputs: tuple[str, ...]
    output: str
    norms: Norms
    gated: bool
    activation: str


@dataclass(frozen=True)
class BlockRoles:
    """A whole block.

    Args:
        parallel: whether both halves read the block's input; else the MLP reads attention's sum.
        extra_outputs: how many values (all None) the block returns behind its hidden states, in a tuple; None
            where it returns them bare.
    """

    attention: AttentionRoles
    mlp: MLPRoles
    parallel: bool = False
    extra_outputs: int | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the linear layers: attention's inputs and output, the MLP's inputs and output."""
        return (*self.attention.inputs, self.attention.output, *self.mlp.inputs, self.mlp.output)

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms, each once."""
        attention = self.attention
        heads = tuple(path for path in (attention.query_norm, attention.key_norm) if path is not None)
        return tuple(dict.fromkeys((*attention.norms.paths, *heads, *self.mlp.norms.paths)))


@dataclass(frozen=True)
class NormForm:
    """(x - mean)·rstd·(weight + offset) + bias.

    Args:
        eps: added to the variance.
        offset: 1 where the weight is kept as its difference from one (Gemma), else 0.
        centered: LayerNorm (arXiv 1607.06450); without it the mean is 0: RMSNorm (arXiv 1910.07467).
    """

    eps: float
    offset: float
    centered: bool


def part(block: nn.Module, path: str) -> nn.Module:
    """The module that stands at ``path`` in a block now.

    Raises:
        KeyError: there is none.
    """
    found: nn.Module | None = block
    for name in path.split("."):
        found = None if found is None else own_modules(found)[name]
    if found is None:
        raise KeyError(path)
    return found


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, by its weight."""
    rows, columns = weight_shape(layer)
    return (columns, rows) if by_column(layer) else (rows, columns)


def by_column(layer: nn.Module) -> bool:
    """Whether the weight is (out, in), as of ``nn.Linear`` and quantized; else (in, out), as ``Conv1D``."""
    return stored_form(layer) is not None or not (isinstance(layer, LoRAConv1D) or is_conv1d(layer))


def activation_kind(module: nn.Module) -> str | None:
    """The kernels' name of an activation function; None where it is none of theirs."""
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS.get(type(module).__name__)


def norm_form(module: nn.Module) -> NormForm | None:
    """What a norm over the last dimension computes; None where it is no norm that is known here.

    A class that is not torch's own is run on a few fp32 numbers and compared with the formula.
    """
    weight = own_parameters(module).get("weight")
    if weight is None or weight.dim() != 1 or own_modules(module):
        return None
    eps = next((vars(module)[name] for name in ("variance_epsilon", "eps") if name in vars(module)), None)
    if not isinstance(eps, float):
        return None
    if type(module) is nn.LayerNorm:
        return NormForm(eps, 0.0, True) if weight.shape == tuple(module.normalized_shape) else None
    bias = own_parameters(module).get("bias")
    size = weight.numel()
    with torch.no_grad(), real_tensors():
        x = torch.linspace(-1.5, 2.0, size, dtype=torch.float32)[None]
        values = {"weight": torch.linspace(0.3, 0.7, size), "bias": torch.linspace(-0.2, 0.1, size)}
        used = [name for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None]
        copy = with_tensors(module, {name: nn.Parameter(values[name], False) for name in used})
        own = type(module).forward(copy, x)
        added = values["bias"] if bias is not None else torch.zeros(size)
        for centered in (False, True):
            middle = x - x.mean() if centered else x
            hat = middle * torch.rsqrt(middle.square().mean() + eps)
            for offset in (0.0, 1.0):
                given = hat * (values["weight"] + offset) + added
                if isinstance(own, Tensor) and torch.allclose(own, given, rtol=1e-4, atol=1e-5):
                    return NormForm(eps, offset, centered)
    return None


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """While open, new tensors have values, in a dry run on fake tensors too."""
    with without_dispatch():
        yield
