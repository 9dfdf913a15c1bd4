"""The initialization of A and B, and with PiSSA and OLoRA also of W.

All random numbers are drawn on the CPU in fp32, in PEFT's order and in PEFT's layout, so that one seed
gives the same factors on any device, and for linear and convolution layers the same as PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from deltaw.errors import UserError, did_you_mean
from deltaw.lora.config import CHANGING_INITS, INITS
from deltaw.lora.stored import quantized_as

# Factors as PEFT lays them out, in files and when it draws random numbers, and back.
#
# Ours are A (in, r) and B (r, out), so that y = x·A·B. PEFT has weights of torch layers, (r, in) and (out, r).
# For stacked experts, A (experts, in, r) and B (experts, r, out) here, PEFT has one matrix each: the rows of A
# are ordered by expert, then rank; the columns of B by rank, then expert. Convolutions are the same in both.


def to_peft(tensor: Tensor, attribute: str, experts: int | None) -> Tensor:
    """``tensor``, which a layer has as ``attribute``, in PEFT's layout."""
    if experts is not None:
        if attribute == "lora_A":
            return tensor.transpose(1, 2).reshape(-1, tensor.shape[1])
        return tensor.permute(2, 1, 0).reshape(tensor.shape[2], -1)
    return tensor.t() if tensor.dim() == 2 else tensor


def from_peft(tensor: Tensor, attribute: str, experts: int | None) -> Tensor:
    """The inverse of :func:`to_peft`."""
    if experts is not None:
        if attribute == "lora_A":
            return tensor.reshape(experts, -1, tensor.shape[1]).transpose(1, 2)
        return tensor.reshape(tensor.shape[0], -1, experts).permute(2, 1, 0)
    return tensor.t() if tensor.dim() == 2 else tensor


@dataclass
class ChangedInit:
    """What a layer began with whose initialization changed W: W before, and the factors taken out of it."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor


class Factored(Protocol):
    """What is asked of a layer here."""

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    scaling: float
    experts: int | None
    is_layer: bool
    changed_init: ChangedInit | None

    def delta_weight(self) -> Tensor:
        """ΔW in the layout of ``weight``."""
        ...

    def initialized(self) -> None:
        """Called when all values are there."""
        ...


_SLOPE_GAIN = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))


@torch.no_grad()
def initialize(layer: Factored, method: str, generator: torch.Generator | None = None) -> None:
    """Fill ``layer``'s factors; only ``pissa`` and ``olora`` change its weight, and keep what it was.

    Args:
        layer: an adapted layer.
        method: ``uniform``: A Kaiming-uniform with a = √5, so |A| ≤ 1/√in (an embedding's A is standard
            normal instead, its input is one-hot); ``gaussian``: A normal with deviation 1/r; B = 0 for
            both. ``orthogonal``: A and B random with A·B = 0, even rank. ``pissa``: A and B the r largest
            singular directions of W, and W what is left (arXiv 2404.02948, eq. 2 to 4). ``olora``: A and B
            the first r rows and columns of W = Q·R, and W what is left (arXiv 2406.01775, algorithm 1).
            ``eva``: as ``uniform``, until ``initialize_from_activations`` fills A.
        generator: of the CPU; None takes torch's own.

    Raises:
        UserError: the method is unknown or does not suit the layer.
    """
    if method not in INITS:
        raise UserError(f"init cannot be {method!r}", where="init", hint=did_you_mean(method, INITS))
    if refused := init_refusal(layer, method):
        raise UserError(refused, where="init", hint="use init 'uniform', or leave this layer out")
    if layer.weight.is_meta:
        pass  # A model on the meta device has no values.
    elif method in CHANGING_INITS:
        _change(layer, method)
    elif isinstance(layer, nn.Embedding):
        _embedding(layer, method, generator)
    else:
        _linear_or_conv(layer, method, generator)
    layer.initialized()


def init_refusal(layer: Factored, method: str) -> str | None:
    """Why ``method`` does not suit ``layer``, or None where it does."""
    matrix = layer.weight.dim() == 2
    if method == "orthogonal":
        if not matrix or not layer.is_layer:
            return "init 'orthogonal' is for linear layers and embeddings"
        if layer.rank % 2:
            return f"init 'orthogonal' needs an even rank, not {layer.rank}"
    if method in (*CHANGING_INITS, "eva"):
        if not layer.is_layer:
            return f"init '{method}' is for linear layers, not for parameters that a module computes with"
        if not matrix or isinstance(layer, nn.Embedding):
            return f"init '{method}' is for linear layers, not for embeddings or convolutions"
        kept = quantized_as(layer) if isinstance(layer, nn.Module) else None
        if method != "eva" and kept is not None:
            return f"init '{method}' changes the weight, which is {kept} here"
        if method != "eva" and layer.rank > min(layer.weight.shape):
            return f"init '{method}' needs a rank of at most {min(layer.weight.shape)}, not {layer.rank}"
    return None


def _linear_or_conv(layer: Factored, method: str, generator: torch.Generator | None) -> None:
    """PEFT makes A and B as torch layers, which draw their own default values, and then draws A again.
    As many numbers are thrown away here as there: the seed then stands where PEFT's does."""
    drawn = _empty(tuple(to_peft(layer.lora_A, "lora_A", layer.experts).shape), generator)
    bias = getattr(layer, "lora_bias", None)
    thrown = layer.lora_A.numel() + layer.lora_B.numel() + (0 if bias is None else bias.numel())
    _empty((thrown,), generator).uniform_(generator=generator)
    if method == "orthogonal":
        _orthogonal(layer, generator)
        return
    if method == "gaussian":
        nn.init.normal_(drawn, std=1 / layer.rank, generator=generator)
    else:
        # nn.init.kaiming_uniform_ with a = √5, to the bit, without its checks of every call.
        bound = math.sqrt(3.0) * _SLOPE_GAIN / math.sqrt(drawn[0].numel())
        drawn.uniform_(-bound, bound, generator=generator)
    layer.lora_A.copy_(from_peft(drawn, "lora_A", layer.experts))
    layer.lora_B.zero_()


def _embedding(layer: Factored, method: str, generator: torch.Generator | None) -> None:
    """A normal and B zero, where PEFT has it the other way round; as many numbers are drawn as there, so
    that the layers after an embedding are initialized as PEFT's are."""
    drawn = _normal((layer.rank, layer.lora_A.shape[0]), generator)
    _normal((layer.lora_B.shape[1], layer.rank), generator)
    if method == "orthogonal":
        _orthogonal(layer, generator)
    else:
        _normal((layer.lora_B.shape[1], layer.rank), generator)
        layer.lora_A.copy_(drawn.t() / (layer.rank if method == "gaussian" else 1))
        layer.lora_B.zero_()
    if (padding_idx := getattr(layer, "padding_idx", None)) is not None:
        layer.lora_A[padding_idx] = 0


def _orthogonal(layer: Factored, generator: torch.Generator | None) -> None:
    """A from the odd and B from the even rows of one orthogonal matrix, so that A·B = 0."""
    half = layer.rank // 2
    rows, _ = torch.linalg.qr(_normal((layer.rank, layer.rank), generator))
    wide_A = _normal((layer.lora_A.shape[0], half), generator)
    wide_B = _normal((half, layer.lora_B.shape[1]), generator)
    layer.lora_A.copy_(wide_A @ rows[0::2] / 10)
    layer.lora_B.copy_(rows[1::2].t() @ wide_B / 10)


def _change(layer: Factored, method: str) -> None:
    """Take the first r directions of W into A and B; W keeps the rest, rounded to its type."""
    original = layer.weight.data
    # nn.Linear's weight is (out, in); transformers' Conv1D already has (in, out).
    wide = (original.t() if isinstance(layer, nn.Linear) else original).to(layer.lora_A.dtype)
    if not torch.isfinite(wide).all():
        raise UserError(f"init '{method}' needs finite weights", where="init", hint="use init 'uniform'")
    if method == "pissa":
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        root = (values[: layer.rank] / layer.scaling).sqrt()
        layer.lora_A.copy_(left[:, : layer.rank] * root)
        layer.lora_B.copy_(root[:, None] * right[: layer.rank])
    else:
        columns, rows = torch.linalg.qr(wide.t())
        layer.lora_A.copy_(rows[: layer.rank].t())
        layer.lora_B.copy_(columns[:, : layer.rank].t())
    residual = original.to(wide.dtype) - layer.delta_weight()
    layer.changed_init = ChangedInit(original, layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
    layer.weight.data = residual.to(original.dtype)


def _empty(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else "cpu"
    return torch.empty(shape, dtype=torch.float32, device=device)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return _empty(shape, generator).normal_(generator=generator)
