"""Initialize A and B, and with PiSSA and OLoRA also W.

All random numbers are sampled on the CPU in fp32, in PEFT's order and layout. A seed therefore determines the
same factors on any device, and the same as PEFT for linear and convolution layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from deltaw.errors import UserError, did_you_mean
from deltaw.lora.config import CHANGING_INITS, INITS
from deltaw.lora.stored import describe_quantization

# Conversion of factors to and from PEFT's layout, which is used in files and for sampling random numbers.
#
# Layers have A (in, r) and B (r, out), so that y = x·A·B. PEFT has weights of torch layers, (r, in) and (out, r). For
# stacked experts, layers have A (experts, in, r) and B (experts, r, out), and PEFT has one matrix each: the rows of A
# are ordered by expert, then rank, and the columns of B by rank, then expert. Convolutions have the same layout.


def to_peft(tensor: Tensor, attribute: str, experts: int | None) -> Tensor:
    """Convert the tensor of a layer's ``attribute`` to PEFT's layout."""
    if experts is not None:
        if attribute == "lora_A":
            return tensor.transpose(1, 2).reshape(-1, tensor.shape[1])
        return tensor.permute(2, 1, 0).reshape(tensor.shape[2], -1)
    return tensor.t() if tensor.dim() == 2 else tensor


def from_peft(tensor: Tensor, attribute: str, experts: int | None) -> Tensor:
    """Convert a tensor from PEFT's layout, the inverse of :func:`to_peft`."""
    if experts is not None:
        if attribute == "lora_A":
            return tensor.reshape(experts, -1, tensor.shape[1]).transpose(1, 2)
        return tensor.reshape(tensor.shape[0], -1, experts).permute(2, 1, 0)
    return tensor.t() if tensor.dim() == 2 else tensor


@dataclass
class ChangedInit:
    """The original W and the initial factors of a layer with an initialization that changed W."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor


class FactoredLayer(Protocol):
    """The interface of layers that can be initialized."""

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    scaling: float
    experts: int | None
    is_layer: bool
    changed_init: ChangedInit | None

    def delta_weight(self) -> Tensor:
        """Return ΔW in the layout of ``weight``."""
        ...

    def initialized(self) -> None:
        """Called when all values are set."""
        ...


_SLOPE_GAIN = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))


@torch.no_grad()
def initialize(layer: FactoredLayer, method: str, generator: torch.Generator | None = None) -> None:
    """Initialize the factors of a layer. Only ``pissa`` and ``olora`` change its weight, and retain the original.

    Args:
        layer: An adapted layer.
        method: ``uniform``: A is Kaiming-uniform with a = √5, so |A| ≤ 1/√in, and B = 0. An embedding's A is standard
            normal instead, because its input is one-hot. ``gaussian``: A is normal with deviation 1/r, and B = 0.
            ``orthogonal``: A and B are random with A·B = 0, for an even rank. ``pissa``: A and B are the r largest
            singular directions of W, and W becomes the residual (arXiv 2404.02948, eq. 2 to 4). ``olora``: A and B are
            the first r rows and columns of W = Q·R, and W becomes the residual (arXiv 2406.01775, algorithm 1).
            ``eva``: as ``uniform``, until ``initialize_from_activations`` sets A.
        generator: CPU generator. None uses torch's global generator.

    Raises:
        UserError: if the method is unknown or does not support the layer.
    """
    if method not in INITS:
        raise UserError(f"init cannot be {method!r}", location="init", hint=did_you_mean(method, INITS))
    if reason := init_refusal(layer, method):
        raise UserError(reason, location="init", hint="use init 'uniform', or exclude this layer")
    if layer.weight.is_meta:
        pass  # A model on the meta device has no values.
    elif method in CHANGING_INITS:
        _init_from_weight(layer, method)
    elif isinstance(layer, nn.Embedding):
        _init_embedding(layer, method, generator)
    else:
        _init_linear_or_conv(layer, method, generator)
    layer.initialized()


def init_refusal(layer: FactoredLayer, method: str) -> str | None:
    """Return the reason why ``method`` does not support ``layer``, or None if it does."""
    matrix = layer.weight.dim() == 2
    if method == "orthogonal":
        if not matrix or not layer.is_layer:
            return "init 'orthogonal' is for linear layers and embeddings"
        if layer.rank % 2:
            return f"init 'orthogonal' needs an even rank, not {layer.rank}"
    if method in (*CHANGING_INITS, "eva"):
        if not layer.is_layer:
            return f"init '{method}' is for linear layers, not for parameters"
        if not matrix or isinstance(layer, nn.Embedding):
            return f"init '{method}' is for linear layers, not for embeddings or convolutions"
        quantization = describe_quantization(layer) if isinstance(layer, nn.Module) else None
        if method != "eva" and quantization is not None:
            return f"init '{method}' changes the weight, which is {quantization}"
        if method != "eva" and layer.rank > min(layer.weight.shape):
            return f"init '{method}' needs a rank of at most {min(layer.weight.shape)}, not {layer.rank}"
    return None


def _init_linear_or_conv(layer: FactoredLayer, method: str, generator: torch.Generator | None) -> None:
    """Initialize A, B = 0 with PEFT's sequence of random numbers.

    PEFT creates A and B as torch layers, which sample default values, and then samples A again. The same number of
    values is discarded here, so that the generator's state matches.
    """
    sample = _empty(tuple(to_peft(layer.lora_A, "lora_A", layer.experts).shape), generator)
    bias = getattr(layer, "lora_bias", None)
    num_discarded = layer.lora_A.numel() + layer.lora_B.numel() + (0 if bias is None else bias.numel())
    _empty((num_discarded,), generator).uniform_(generator=generator)
    if method == "orthogonal":
        _init_orthogonal(layer, generator)
        return
    if method == "gaussian":
        nn.init.normal_(sample, std=1 / layer.rank, generator=generator)
    else:
        # Bitwise equal to nn.init.kaiming_uniform_ with a = √5, without its checks.
        bound = math.sqrt(3.0) * _SLOPE_GAIN / math.sqrt(sample[0].numel())
        sample.uniform_(-bound, bound, generator=generator)
    layer.lora_A.copy_(from_peft(sample, "lora_A", layer.experts))
    layer.lora_B.zero_()


def _init_embedding(layer: FactoredLayer, method: str, generator: torch.Generator | None) -> None:
    """Initialize A as normal and B as zero, the opposite of PEFT.

    The same number of random values is sampled as in PEFT, so that the following layers are initialized as PEFT's.
    """
    sample = _normal((layer.rank, layer.lora_A.shape[0]), generator)
    _normal((layer.lora_B.shape[1], layer.rank), generator)
    if method == "orthogonal":
        _init_orthogonal(layer, generator)
    else:
        _normal((layer.lora_B.shape[1], layer.rank), generator)
        layer.lora_A.copy_(sample.t() / (layer.rank if method == "gaussian" else 1))
        layer.lora_B.zero_()
    if (padding_idx := getattr(layer, "padding_idx", None)) is not None:
        layer.lora_A[padding_idx] = 0


def _init_orthogonal(layer: FactoredLayer, generator: torch.Generator | None) -> None:
    """Initialize A from the odd and B from the even rows of one orthogonal matrix, so that A·B = 0."""
    half = layer.rank // 2
    rows, _ = torch.linalg.qr(_normal((layer.rank, layer.rank), generator))
    layer.lora_A.copy_(_normal((layer.lora_A.shape[0], half), generator) @ rows[0::2] / 10)
    layer.lora_B.copy_(rows[1::2].t() @ _normal((half, layer.lora_B.shape[1]), generator) / 10)


def _init_from_weight(layer: FactoredLayer, method: str) -> None:
    """Move the first r directions of W to A and B. W becomes the residual, rounded to its dtype."""
    original = layer.weight.data
    # nn.Linear's weight is (out, in), that of transformers' Conv1D is (in, out).
    wide = (original.t() if isinstance(layer, nn.Linear) else original).to(layer.lora_A.dtype)
    if not torch.isfinite(wide).all():
        raise UserError(f"init '{method}' needs finite weights", location="init", hint="use init 'uniform'")
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
    return torch.empty(shape, dtype=torch.float32, device="cpu" if generator is None else generator.device)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return _empty(shape, generator).normal_(generator=generator)
