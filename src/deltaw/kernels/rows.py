"""What is done to each row of tokens between products: norms, activations, rotary positions, cross-entropy.

Sums are in fp32 (fp64 for fp64 inputs) and results are rounded once. Each function has a reference
implementation. Knows tensors; not modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import loader, structs
from deltaw.kernels.bounds import check_shape, check_targets
from deltaw.kernels.operators import define, sums_dtype

# Activation functions of gated and plain MLPs, by the kernels' own numbers.
_GELU_TANH = partial(F.gelu, approximate="tanh")
_FUNCTIONS: dict[str, Any] = {"silu": F.silu, "gelu_tanh": _GELU_TANH, "gelu": F.gelu, "relu": F.relu}
ACTIVATIONS = tuple(_FUNCTIONS)


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the last dimension: (x - mean)·rstd·(weight + offset) + bias, see :func:`norm`; it is frozen."""

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-5
    offset: float = 0.0
    centered: bool = False

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of rows x (M, D), and (M, 2) numbers that :meth:`backward` wants."""
        return norm(x, self.weight, self.bias, offset=self.offset, eps=self.eps, centered=self.centered)

    def backward(self, grad: Tensor, x: Tensor, stats: Tensor, added: Tensor | None = None) -> Tensor:
        """∂L/∂x (M, D), plus ``added``."""
        return norm_backward(grad, x, self.weight, stats, offset=self.offset, centered=self.centered, added=added)

    def over_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of each head of x (M, heads, d)."""
        y, stats = self(x.reshape(-1, x.shape[-1]))
        return y.view(x.shape), stats

    def over_heads_backward(self, grad: Tensor, x: Tensor, stats: Tensor) -> Tensor:
        """∂L/∂x of :meth:`over_heads`."""
        size = x.shape[-1]
        return self.backward(grad.reshape(-1, size), x.reshape(-1, size), stats).view(x.shape)

    def reference(self, x: Tensor) -> Tensor:
        """The norm of rows by the reference implementation."""
        return norm_reference(x, self.weight, self.bias, offset=self.offset, eps=self.eps, centered=self.centered)[0]


@dataclass(frozen=True, eq=False)
class HalfNorms:
    """The norms of half a block: before its first layers, after its last one, and over the sum with the stream."""

    before: Norm | None = None
    after: Norm | None = None
    post: Norm | None = None

    def described(self) -> structs.HalfNorms:
        """The kernels' struct of them."""
        return structs.HalfNorms(*map(described, (self.before, self.after, self.post)))


def described(of: Norm | None) -> structs.RowNorm:
    """The kernels' struct of a norm, or of none."""
    if of is None:
        return structs.RowNorm()
    return structs.RowNorm(*map(loader.address, (of.weight, of.bias)), of.eps, of.offset, of.centered, True)


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, offset: float, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """y = (x - mean)·rstd·(weight + offset) + bias over the last dimension, and (M, 2) mean and rstd.

    Args:
        x: (M, D). weight, bias: (D) or None.
        centered: LayerNorm (arXiv 1607.06450); without it the mean is 0: RMSNorm (arXiv 1910.07467).
        offset: 1 where the weight is kept as its difference from one (Gemma), else 0.
    """
    check_shape("the norm's weight", weight, x.shape[-1])
    check_shape("the norm's bias", bias, x.shape[-1])
    return _norm(x, weight, bias, offset, eps, centered)


def norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, offset: float, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`norm`."""
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True) if centered else wide.new_zeros(*wide.shape[:-1], 1)
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    y = (wide - mean) * rstd
    if weight is not None:
        y = y * (_wide(weight) + offset)
    if bias is not None:
        y = y + _wide(bias)
    return y.to(x.dtype), torch.cat([mean, rstd], -1)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, offset: float, centered: bool, added: Tensor | None
) -> Tensor:
    """∂L/∂x of :func:`norm` with a frozen weight, plus ``added``; (M, D)."""
    check_shape("the gradient", grad, *x.shape)
    check_shape("the norm's weight", weight, x.shape[-1])
    check_shape("the norm's statistics", stats, x.shape[0], 2)
    check_shape("what is added", added, *x.shape)
    return _norm_backward(grad, x, weight, stats, offset, centered, added)


def norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, offset: float, centered: bool, added: Tensor | None
) -> Tensor:
    """The reference implementation of :func:`norm_backward`."""
    mean, rstd = stats.split(1, -1)
    hat = (_wide(x) - mean) * rstd
    g = _wide(grad) if weight is None else _wide(grad) * (_wide(weight) + offset)
    dx = g - hat * (g * hat).mean(-1, keepdim=True)
    if centered:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd
    return (dx if added is None else dx + _wide(added)).to(x.dtype)


def activation(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """f(gate)·up, or f(gate) without ``up``; ``kind`` is one of :data:`ACTIVATIONS`."""
    check_shape("up", up, *gate.shape)
    return _activation(gate, up, ACTIVATIONS.index(kind))


def activation_reference(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """The reference implementation of :func:`activation`."""
    f = _FUNCTIONS[kind](_wide(gate))
    return (f if up is None else f * _wide(up)).to(gate.dtype)


def activation_backward(grad: Tensor, gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂gate, ∂L/∂up (empty without ``up``), and the activation's own output, computed again."""
    check_shape("the gradient", grad, *gate.shape)
    check_shape("up", up, *gate.shape)
    return _activation_backward(grad, gate, up, ACTIVATIONS.index(kind))


def activation_backward_reference(
    grad: Tensor, gate: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference implementation of :func:`activation_backward`."""
    with torch.enable_grad():
        wide = _wide(gate).detach().requires_grad_()
        f = activation_reference(wide, None, kind)
        (slope,) = torch.autograd.grad(f.sum(), wide)
    f = f.detach()
    g = _wide(grad)
    if up is None:
        return (g * slope).to(gate.dtype), gate.new_empty(0), f.to(gate.dtype)
    u = _wide(up)
    return (g * u * slope).to(gate.dtype), (g * f).to(gate.dtype), (f * u).to(gate.dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, backward: bool = False) -> Tensor:
    """Rotary positions (arXiv 2104.09864): the halves of each head's first numbers turned against each other.

    Args:
        x: (M, heads, d). cosine, sine: (M, n) in fp32, n ≤ d; the other d - n numbers stay.
        backward: apply the transposed turn, as a gradient needs it.

    Raises:
        ValueError: the tables do not fit x or each other, or n is odd.
    """
    turned = cosine.shape[-1]
    if turned % 2 or turned > x.shape[-1]:
        raise ValueError(f"{turned} numbers of a head of {x.shape[-1]} cannot be turned in two halves")
    check_shape("the cosines", cosine, x.shape[0], turned)
    check_shape("the sines", sine, x.shape[0], turned)
    return _rotate(x, cosine, sine, backward)


def rotate_reference(x: Tensor, cosine: Tensor, sine: Tensor, *, backward: bool = False) -> Tensor:
    """The reference implementation of :func:`rotate`."""
    turned, rest = _wide(x).split([cosine.shape[-1], x.shape[-1] - cosine.shape[-1]], -1)
    c, s = _wide(cosine)[:, None], _wide(sine)[:, None]
    if backward:
        first, second = (turned * s).chunk(2, -1)
        out = turned * c + torch.cat([second, -first], -1)
    else:
        first, second = turned.chunk(2, -1)
        out = turned * c + torch.cat([-second, first], -1) * s
    return torch.cat([out, rest], -1).to(x.dtype)


def cross_entropy_(
    logits: Tensor, targets: Tensor, weights: Tensor, *, scale: float, softcap: float, grad: bool
) -> Tensor:
    """Cross-entropy of each row (M), in fp32; with ``grad`` the logits become weightᵢ·∂lossᵢ/∂logits.

    Args:
        logits: (M, V), overwritten. targets: (M). weights: (M) in fp32.
        scale, softcap: z = scale·logits, then softcap·tanh(z / softcap) where that is above 0.

    Raises:
        IndexError: a target lies outside of the classes. ValueError: the shapes do not fit each other.
    """
    check_shape("the targets", targets, logits.shape[0])
    check_shape("the weights", weights, logits.shape[0])
    return _cross_entropy(logits, targets, weights, scale, softcap, grad)


def cross_entropy_reference_(
    logits: Tensor, targets: Tensor, weights: Tensor, *, scale: float, softcap: float, grad: bool
) -> Tensor:
    """The reference implementation of :func:`cross_entropy_`."""
    with torch.enable_grad():
        leaf = _wide(logits).detach().requires_grad_()
        z = leaf * scale
        if softcap > 0:
            z = softcap * torch.tanh(z / softcap)
        losses = F.cross_entropy(z, targets, reduction="none")
        if grad:
            (slope,) = torch.autograd.grad((losses * weights).sum(), leaf)
            logits.copy_(slope)
    return losses.detach()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _compute_norm(x, weight, bias, offset, eps, centered):  # type: ignore[no-untyped-def]
    if not loader.serves(x, weight, bias):
        return norm_reference(x, weight, bias, offset=offset, eps=eps, centered=centered)
    x = x.contiguous()
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    y, stats = torch.empty_like(x), torch.empty(x.shape[0], 2)
    loader.kernels().dw_norm(
        loader.number(x.dtype), *x.shape, x.data_ptr(), x.stride(0), loader.address(weight),
        loader.address(bias), offset, eps, centered, y.data_ptr(), stats.data_ptr(),
    )  # fmt: skip
    return y, stats


def _compute_norm_backward(grad, x, weight, stats, offset, centered, added):  # type: ignore[no-untyped-def]
    if not loader.serves(grad, x, weight, added):
        return norm_backward_reference(grad, x, weight, stats, offset=offset, centered=centered, added=added)
    x, grad = x.contiguous(), grad.contiguous()
    weight, added = (None if t is None else t.contiguous() for t in (weight, added))
    stats = stats.float().contiguous()
    dx = torch.empty_like(x)
    loader.kernels().dw_norm_backward(
        loader.number(x.dtype), *x.shape, grad.data_ptr(), x.data_ptr(), x.stride(0), loader.address(weight),
        offset, centered, stats.data_ptr(), loader.address(added), dx.data_ptr(),
    )  # fmt: skip
    return dx


def _compute_activation(gate, up, kind):  # type: ignore[no-untyped-def]
    if not loader.serves(gate, up):
        return activation_reference(gate, up, ACTIVATIONS[kind])
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    y = torch.empty_like(gate)
    loader.kernels().dw_activation(
        loader.number(gate.dtype), kind, *gate.shape, gate.data_ptr(), loader.address(up), y.data_ptr()
    )
    return y


def _compute_activation_backward(grad, gate, up, kind):  # type: ignore[no-untyped-def]
    if not loader.serves(grad, gate, up):
        return activation_backward_reference(grad, gate, up, ACTIVATIONS[kind])
    grad, gate, up = grad.contiguous(), gate.contiguous(), None if up is None else up.contiguous()
    d_gate, y = torch.empty_like(gate), torch.empty_like(gate)
    d_up = gate.new_empty(0) if up is None else torch.empty_like(gate)
    loader.kernels().dw_activation_backward(
        loader.number(gate.dtype), kind, *gate.shape, grad.data_ptr(), gate.data_ptr(), loader.address(up),
        d_gate.data_ptr(), None if up is None else d_up.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return d_gate, d_up, y


def _compute_rotate(x, cosine, sine, backward):  # type: ignore[no-untyped-def]
    if not loader.serves(x) or not cosine.dtype == sine.dtype == torch.float32:
        return rotate_reference(x, cosine, sine, backward=backward)
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    out = torch.empty_like(x)
    loader.kernels().dw_rotate(
        loader.number(x.dtype), *x.shape, cosine.shape[-1], x.data_ptr(), x.stride(0), cosine.data_ptr(),
        sine.data_ptr(), backward, out.data_ptr(), out.stride(0),
    )  # fmt: skip
    return out


def _compute_cross_entropy(logits, targets, weights, scale, softcap, grad):  # type: ignore[no-untyped-def]
    check_targets(targets, logits.shape[1])
    if not loader.serves(logits) or not logits.is_contiguous():
        return cross_entropy_reference_(logits, targets, weights, scale=scale, softcap=softcap, grad=grad)
    targets, weights = targets.contiguous(), weights.float().contiguous()
    losses = torch.empty(logits.shape[0])
    loader.kernels().dw_cross_entropy(
        loader.number(logits.dtype), *logits.shape, logits.data_ptr(), targets.data_ptr(), weights.data_ptr(),
        scale, softcap, grad, losses.data_ptr(),
    )  # fmt: skip
    return losses


_norm = define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, float offset, float eps, bool centered) -> (Tensor, Tensor)",
    _compute_norm,
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape[0], 2, dtype=sums_dtype(x))),
)
_norm_backward = define(
    "norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor stats, float offset, bool centered, "
    "Tensor? added) -> Tensor",
    _compute_norm_backward,
    lambda grad, x, *_: x.new_empty(x.shape),
)
_activation = define(
    "activation(Tensor gate, Tensor? up, int kind) -> Tensor",
    _compute_activation,
    lambda gate, *_: gate.new_empty(gate.shape),
)
_activation_backward = define(
    "activation_backward(Tensor grad, Tensor gate, Tensor? up, int kind) -> (Tensor, Tensor, Tensor)",
    _compute_activation_backward,
    lambda grad, gate, up, kind: (
        gate.new_empty(gate.shape),
        gate.new_empty(0 if up is None else gate.shape),
        gate.new_empty(gate.shape),
    ),
)
_rotate = define(
    "rotate(Tensor x, Tensor cosine, Tensor sine, bool backward) -> Tensor",
    _compute_rotate,
    lambda x, *_: x.new_empty(x.shape),
)
_cross_entropy = define(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor weights, float scale, float softcap, "
    "bool grad) -> Tensor",
    _compute_cross_entropy,
    lambda logits, *_: logits.new_empty(logits.shape[0], dtype=sums_dtype(logits)),
)
