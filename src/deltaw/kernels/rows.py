"""Row-wise operators between matrix products: norms, activations, rotary positions and cross-entropy.

Sums are accumulated in fp32 (fp64 for fp64 inputs), and results are rounded once. Each function has a reference
implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import loader
from deltaw.kernels.compiled import CompiledFunction
from deltaw.kernels.operators import accumulation_dtype, check_shape, check_targets, define

# Activation functions of gated and plain MLPs, in the order of the kernels' codes.
_GELU_TANH = partial(F.gelu, approximate="tanh")
_FUNCTIONS: dict[str, Any] = {"silu": F.silu, "gelu_tanh": _GELU_TANH, "gelu": F.gelu, "relu": F.relu}
ACTIVATIONS = tuple(_FUNCTIONS)


@dataclass(frozen=True, eq=False)
class Norm:
    """A frozen norm over the last dimension: (x - mean)·rstd·(weight + offset) + bias. See :func:`norm`."""

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-5
    offset: float = 0.0
    centered: bool = False

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of rows x (M, D) and its statistics (M, 2) for :meth:`backward`."""
        return norm(x, self.weight, self.bias, offset=self.offset, eps=self.eps, centered=self.centered)

    def backward(self, grad: Tensor, x: Tensor, stats: Tensor, addend: Tensor | None = None) -> Tensor:
        """Return ∂L/∂x (M, D) plus ``addend``."""
        return norm_backward(grad, x, self.weight, stats, offset=self.offset, centered=self.centered, addend=addend)

    def over_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of each head of x (M, heads, d), or of all heads of a row, and its statistics."""
        y, stats = self(x.reshape(-1, self._size(x)))
        return y.view(x.shape), stats

    def over_heads_backward(self, grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
        """Return ∂L/∂x of :meth:`over_heads`."""
        size = self._size(x)
        return self.backward(grad.reshape(-1, size), x.reshape(-1, size), stats).view(x.shape)

    def _size(self, x: Tensor) -> int:
        return x.shape[-1] if self.weight is None else self.weight.numel()

    def reference(self, x: Tensor) -> Tensor:
        """Return the norm of rows from the reference implementation."""
        return norm_reference(x, self.weight, self.bias, offset=self.offset, eps=self.eps, centered=self.centered)[0]


@dataclass(frozen=True, eq=False)
class HalfNorms:
    """Optional norms of half a block.

    Attributes:
        before: Norm of the input of the first layers.
        after: Norm of the last layer's output.
        post: Norm of the sum with the residual stream.
    """

    before: Norm | None = None
    after: Norm | None = None
    post: Norm | None = None

    def as_struct(self) -> loader.HalfNormsStruct:
        """Return the kernels' struct of the norms."""
        return loader.HalfNormsStruct(*map(norm_struct, (self.before, self.after, self.post)))


def norm_struct(norm: Norm | None) -> loader.RowNorm:
    """Return the kernels' struct of a norm. None gives an unused struct."""
    if norm is None:
        return loader.RowNorm()
    return loader.RowNorm(*map(loader.address, (norm.weight, norm.bias)), norm.eps, norm.offset, norm.centered, True)


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, offset: float, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """Return (x - mean)·rstd·(weight + offset) + bias over the last dimension, and the statistics (M, 2): mean and
    rstd.

    Args:
        x: (M, D).
        weight: (D) or None.
        bias: (D) or None.
        offset: 1 if the weight is stored as the difference from 1 (Gemma), else 0.
        eps: Added to the variance.
        centered: True for LayerNorm (arXiv 1607.06450). False sets the mean to 0: RMSNorm (arXiv 1910.07467).
    """
    check_shape("the norm's weight", weight, x.shape[-1])
    check_shape("the norm's bias", bias, x.shape[-1])
    return _norm(x, weight, bias, offset, eps, centered)


def norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, offset: float, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """Reference implementation of :func:`norm`."""
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True) if centered else None
    middle = wide if mean is None else wide - mean
    rstd = torch.rsqrt(middle.square().mean(-1, keepdim=True) + eps)
    y = middle * rstd
    if weight is not None:
        y = y * (_wide(weight) + offset)
    if bias is not None:
        y = y + _wide(bias)
    # The zeros depend on rstd, because constants would be a separate kernel.
    return y.to(x.dtype), torch.cat([rstd.clamp(max=0) if mean is None else mean, rstd], -1)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, offset: float, centered: bool, addend: Tensor | None
) -> Tensor:
    """Return ∂L/∂x (M, D) of :func:`norm` with a frozen weight, plus ``addend``."""
    check_shape("the gradient", grad, *x.shape)
    check_shape("the norm's weight", weight, x.shape[-1])
    check_shape("the norm's statistics", stats, x.shape[0], 2)
    check_shape("the addend", addend, *x.shape)
    return _norm_backward(grad, x, weight, stats, offset, centered, addend)


def norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, offset: float, centered: bool, addend: Tensor | None
) -> Tensor:
    """Reference implementation of :func:`norm_backward`."""
    mean, rstd = stats.split(1, -1)
    normalized = (_wide(x) - mean) * rstd
    g = _wide(grad) if weight is None else _wide(grad) * (_wide(weight) + offset)
    dx = g - normalized * (g * normalized).mean(-1, keepdim=True)
    if centered:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd
    return (dx if addend is None else dx + _wide(addend)).to(x.dtype)


def activation(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """Return f(gate)·up, or f(gate) without ``up``. ``kind`` is a name from :data:`ACTIVATIONS`."""
    check_shape("up", up, *gate.shape)
    return _activation(gate, up, ACTIVATIONS.index(kind))


def activation_reference(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """Reference implementation of :func:`activation`."""
    f = _FUNCTIONS[kind](_wide(gate))
    return (f if up is None else f * _wide(up)).to(gate.dtype)


def activation_backward(grad: Tensor, gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∂L/∂gate, ∂L/∂up (empty without ``up``), and the recomputed output of the activation."""
    check_shape("the gradient", grad, *gate.shape)
    check_shape("up", up, *gate.shape)
    return _activation_backward(grad, gate, up, ACTIVATIONS.index(kind))


def activation_backward_reference(
    grad: Tensor, gate: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference implementation of :func:`activation_backward`."""
    f, gradient_of = torch.func.vjp(_FUNCTIONS[kind], _wide(gate))  # type: ignore[misc]
    g = _wide(grad)
    if up is None:
        return gradient_of(g)[0].to(gate.dtype), gate.new_empty(0), f.to(gate.dtype)
    u = _wide(up)
    return gradient_of(g * u)[0].to(gate.dtype), (g * f).to(gate.dtype), (f * u).to(gate.dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, backward: bool = False) -> Tensor:
    """Apply rotary positions (arXiv 2104.09864) to the first n numbers of each head, in two halves.

    Args:
        x: (M, heads, d).
        cosine: (M, n) in fp32, n ≤ d. The other d - n numbers are unchanged.
        sine: (M, n) in fp32.
        backward: Apply the transposed rotation, for gradients.

    Raises:
        ValueError: if the tables do not match x or each other, or n is odd.
    """
    rotary_dims = cosine.shape[-1]
    if rotary_dims % 2 or rotary_dims > x.shape[-1]:
        raise ValueError(f"rotary dimensions must be even and at most {x.shape[-1]}, not {rotary_dims}")
    check_shape("the cosines", cosine, x.shape[0], rotary_dims)
    check_shape("the sines", sine, x.shape[0], rotary_dims)
    return _rotate(x, cosine, sine, backward)


def rotate_reference(x: Tensor, cosine: Tensor, sine: Tensor, *, backward: bool = False) -> Tensor:
    """Reference implementation of :func:`rotate`."""
    rotated, unrotated = _wide(x).split([cosine.shape[-1], x.shape[-1] - cosine.shape[-1]], -1)
    c = _wide(cosine)[:, None]
    s = _wide(sine)[:, None]
    if backward:
        first, second = (rotated * s).chunk(2, -1)
        out = rotated * c + torch.cat([second, -first], -1)
    else:
        first, second = rotated.chunk(2, -1)
        out = rotated * c + torch.cat([-second, first], -1) * s
    return torch.cat([out, unrotated], -1).to(x.dtype)


def split_pairs(x: Tensor, size: int) -> Tensor:
    """Move adjacent numbers among the first ``size`` of the last dimension to two halves, for :func:`rotate`."""
    paired, rest = x.split([size, x.shape[-1] - size], -1)
    return torch.cat([paired[..., ::2], paired[..., 1::2], rest], -1)


def join_pairs(x: Tensor, size: int) -> Tensor:
    """Invert :func:`split_pairs`."""
    halves, rest = x.split([size, x.shape[-1] - size], -1)
    return torch.cat([halves.unflatten(-1, (2, size // 2)).transpose(-1, -2).flatten(-2), rest], -1)


def cross_entropy_(
    logits: Tensor, targets: Tensor, weights: Tensor, *, scale: float, softcap: float, grad: bool
) -> Tensor:
    """Return the cross-entropy (M) of each row in fp32. With ``grad``, overwrite the logits by weightᵢ·∂lossᵢ/∂logits.

    Args:
        logits: (M, V), overwritten if ``grad``.
        targets: (M) class indices.
        weights: (M) in fp32.
        scale: Factor of the logits: z = scale·logits.
        softcap: If positive, z becomes softcap·tanh(z / softcap).
        grad: Compute the gradient.

    Raises:
        IndexError: if a target is out of bounds.
        ValueError: if shapes do not match.
    """
    check_shape("the targets", targets, logits.shape[0])
    check_shape("the weights", weights, logits.shape[0])
    return _cross_entropy(logits, targets, weights, scale, softcap, grad)


def cross_entropy_reference_(
    logits: Tensor, targets: Tensor, weights: Tensor, *, scale: float, softcap: float, grad: bool
) -> Tensor:
    """Reference implementation of :func:`cross_entropy_`."""
    z = _wide(logits) if scale == 1.0 else _wide(logits) * scale
    slope = weights[:, None] * scale
    if softcap > 0:
        capped = torch.tanh(z / softcap)
        z = softcap * capped
        slope = slope * (1 - capped.square())
    log_sum = z.logsumexp(-1, keepdim=True)
    target = targets[:, None]
    losses = (log_sum - z.gather(1, target))[:, 0]
    if grad:  # z is overwritten: chunks of logits are large
        is_target = target == torch.arange(z.shape[1], device=z.device)
        logits.copy_(z.sub_(log_sum).exp_().sub_(is_target.to(z.dtype)).mul_(slope))
    return losses


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


_compiled_norm = CompiledFunction(norm_reference)
_compiled_norm_backward = CompiledFunction(norm_backward_reference)
_compiled_activation = CompiledFunction(activation_reference)
_compiled_activation_backward = CompiledFunction(activation_backward_reference)
_compiled_rotate = CompiledFunction(rotate_reference)
_compiled_cross_entropy = CompiledFunction(cross_entropy_reference_)


@define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, float offset, float eps, bool centered) -> (Tensor, Tensor)",
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape[0], 2, dtype=accumulation_dtype(x))),
)
def _norm(x, weight, bias, offset, eps, centered):  # type: ignore[no-untyped-def]
    if not loader.supports(x, weight, bias):
        return _compiled_norm(x=x, weight=weight, bias=bias, offset=offset, eps=eps, centered=centered)
    x = x.contiguous()
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    y = torch.empty_like(x)
    stats = torch.empty(x.shape[0], 2)
    loader.kernels().dw_norm(
        loader.dtype_code(x.dtype), *x.shape, x.data_ptr(), x.stride(0), loader.address(weight),
        loader.address(bias), offset, eps, centered, y.data_ptr(), stats.data_ptr(),
    )  # fmt: skip
    return y, stats


@define(
    "norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor stats, float offset, bool centered, "
    "Tensor? addend) -> Tensor",
    lambda grad, x, *_: x.new_empty(x.shape),
)
def _norm_backward(grad, x, weight, stats, offset, centered, addend):  # type: ignore[no-untyped-def]
    if not loader.supports(grad, x, weight, addend):
        arguments = {"weight": weight, "stats": stats, "offset": offset, "centered": centered, "addend": addend}
        return _compiled_norm_backward(grad=grad, x=x, **arguments)
    x = x.contiguous()
    grad = grad.contiguous()
    weight, addend = (None if t is None else t.contiguous() for t in (weight, addend))
    stats = stats.float().contiguous()
    dx = torch.empty_like(x)
    loader.kernels().dw_norm_backward(
        loader.dtype_code(x.dtype), *x.shape, grad.data_ptr(), x.data_ptr(), x.stride(0), loader.address(weight),
        offset, centered, stats.data_ptr(), loader.address(addend), dx.data_ptr(),
    )  # fmt: skip
    return dx


@define("activation(Tensor gate, Tensor? up, int kind) -> Tensor", lambda gate, *_: gate.new_empty(gate.shape))
def _activation(gate, up, kind):  # type: ignore[no-untyped-def]
    if not loader.supports(gate, up):
        return _compiled_activation(gate=gate, up=up, kind=ACTIVATIONS[kind])
    gate = gate.contiguous()
    up = None if up is None else up.contiguous()
    y = torch.empty_like(gate)
    loader.kernels().dw_activation(
        loader.dtype_code(gate.dtype), kind, *gate.shape, gate.data_ptr(), loader.address(up), y.data_ptr()
    )
    return y


@define(
    "activation_backward(Tensor grad, Tensor gate, Tensor? up, int kind) -> (Tensor, Tensor, Tensor)",
    lambda grad, gate, up, kind: (
        gate.new_empty(gate.shape),
        gate.new_empty(0 if up is None else gate.shape),
        gate.new_empty(gate.shape),
    ),
)
def _activation_backward(grad, gate, up, kind):  # type: ignore[no-untyped-def]
    if not loader.supports(grad, gate, up):
        return _compiled_activation_backward(grad=grad, gate=gate, up=up, kind=ACTIVATIONS[kind])
    grad = grad.contiguous()
    gate = gate.contiguous()
    up = None if up is None else up.contiguous()
    d_gate = torch.empty_like(gate)
    y = torch.empty_like(gate)
    d_up = gate.new_empty(0) if up is None else torch.empty_like(gate)
    loader.kernels().dw_activation_backward(
        loader.dtype_code(gate.dtype), kind, *gate.shape, grad.data_ptr(), gate.data_ptr(), loader.address(up),
        d_gate.data_ptr(), None if up is None else d_up.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return d_gate, d_up, y


@define("rotate(Tensor x, Tensor cosine, Tensor sine, bool backward) -> Tensor", lambda x, *_: x.new_empty(x.shape))
def _rotate(x, cosine, sine, backward):  # type: ignore[no-untyped-def]
    if not loader.supports(x) or not cosine.dtype == sine.dtype == torch.float32:
        return _compiled_rotate(x=x, cosine=cosine, sine=sine, backward=backward)
    x = x.contiguous()
    cosine = cosine.contiguous()
    sine = sine.contiguous()
    out = torch.empty_like(x)
    loader.kernels().dw_rotate(
        loader.dtype_code(x.dtype), *x.shape, cosine.shape[-1], x.data_ptr(), x.stride(0), cosine.data_ptr(),
        sine.data_ptr(), backward, out.data_ptr(), out.stride(0),
    )  # fmt: skip
    return out


@define(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor weights, float scale, float softcap, "
    "bool grad) -> Tensor",
    lambda logits, *_: logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits)),
)
def _cross_entropy(logits, targets, weights, scale, softcap, grad):  # type: ignore[no-untyped-def]
    if logits.device.type == "cpu":  # on a device the check would synchronize, and torch checks indices there anyway
        check_targets(targets, logits.shape[1])
    if not loader.supports(logits) or not logits.is_contiguous():
        arguments = {"targets": targets, "weights": weights, "scale": scale, "softcap": softcap, "grad": grad}
        return _compiled_cross_entropy(logits=logits, **arguments)
    targets = targets.contiguous()
    weights = weights.float().contiguous()
    losses = torch.empty(logits.shape[0])
    loader.kernels().dw_cross_entropy(
        loader.dtype_code(logits.dtype), *logits.shape, logits.data_ptr(), targets.data_ptr(), weights.data_ptr(),
        scale, softcap, grad, losses.data_ptr(),
    )  # fmt: skip
    return losses
