"""Loss and gradient of a language model's head from logits that need not be accurate.

The gradient of a row's logits is its probabilities, less one at the target. Most of their sum is in few
classes. The logits of those are computed once more, from the weight's own numbers; the probabilities of all
others, which are alike in rows near each other, are summed over ``TOGETHER`` rows, and the product with the
weight is taken of the sums. The idea that unlikely classes hardly count is that of Cut Cross-Entropy
(arXiv 2411.09009), which leaves them out.

Knows tensors; not which head or vocabulary they belong to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import loader
from deltaw.kernels.bounds import check_shape, check_targets
from deltaw.kernels.operators import define, sums_dtype
from deltaw.kernels.quantize import INT8_BLOCK, rows_as_int8

# The gradient of a classifier's input from that of its logits, as an int8 product.
#
# Knows tensors; not which head or vocabulary they belong to.


# From so many rows on, int8 products save more time than rounding the weight takes.
ROWS_FOR_INT8 = 64


def class_gradient_(grad: Tensor, targets: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """grad·W (M, d) of the gradient of a cross-entropy (M, classes), in int8 but for the targets' own part.

    Beside its target a row of such a gradient is of one sign, and most of it is far below its largest number:
    it is rounded with a scale for each ``INT8_BLOCK`` classes, to unsigned int8.

    Args:
        grad: (M, classes), overwritten. targets: (M), class indices.
        weight: (classes, d), rounded to int8 as it is read. scale: (classes), see :func:`scales_of_rows`.

    Raises:
        IndexError: a target lies outside of the classes. ValueError: the shapes do not fit each other.
    """
    rows, classes = grad.shape
    check_shape("the targets", targets, rows)
    check_shape("the weight", weight, classes, weight.shape[-1])
    check_shape("the weight's scales", scale, classes)
    return _class_gradient(grad, targets, weight, scale)


def class_gradient_reference(grad: Tensor, targets: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The reference implementation of :func:`class_gradient_`; leaves ``grad`` as it is."""
    rows = torch.arange(len(targets))
    own = grad[rows, targets].to(scale.dtype)
    rest = grad.to(scale.dtype) * scale
    rest[rows, targets] = 0
    blocks = F.pad(rest, (0, -rest.shape[1] % INT8_BLOCK)).unflatten(1, (-1, INT8_BLOCK))
    high, low = blocks.amax(-1), blocks.amin(-1)
    by = torch.where(high >= -low, high, low)[..., None] / 255
    unsigned = torch.where(by != 0, blocks / by, torch.zeros_like(blocks))
    rounded = (torch.round(unsigned).clamp_(0, 255) * by).flatten(1)[:, : rest.shape[1]]
    sums = rounded @ rows_as_int8(weight, scale).to(scale.dtype)
    return (sums + own[:, None] * weight[targets].to(scale.dtype)).to(grad.dtype)


def can_round_classes(grad: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernel serves :func:`class_gradient_`, and is worth its while."""
    return _rounds_classes(grad, weight) and grad.shape[0] >= ROWS_FOR_INT8


def _rounds_classes(grad: Tensor, weight: Tensor) -> bool:
    if not loader.serves(grad, weight) or grad.dtype != torch.bfloat16 or grad.shape[1] < 2:
        return False
    return grad.is_contiguous() and weight.is_contiguous()


def _compute_class_gradient(grad: Tensor, targets: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check_targets(targets, grad.shape[1])
    if not _rounds_classes(grad, weight) or scale.dtype != torch.float32:
        return class_gradient_reference(grad, targets, weight, scale)
    (rows, classes), width, targets = grad.shape, weight.shape[1], targets.contiguous()
    out = torch.empty(rows, width, dtype=grad.dtype)
    block_scales = torch.empty(rows, -(-classes // INT8_BLOCK))
    loader.kernels().dw_class_gradient(
        rows, classes, width, grad.data_ptr(), targets.data_ptr(), weight.data_ptr(), scale.data_ptr(),
        block_scales.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


_class_gradient = define(
    "class_gradient_(Tensor(a!) grad, Tensor targets, Tensor weight, Tensor scale) -> Tensor",
    _compute_class_gradient,
    lambda grad, targets, weight, scale: grad.new_empty(grad.shape[0], weight.shape[1]),
    lambda grad, targets, weight, scale: 2 * grad.shape[0] * weight.numel(),
)


# Rows whose unlikely classes are summed. With more of them the product takes less time, and the error grows.
TOGETHER = 16
# A class is likely if it has this part of the probability beside the target's, and, in the kernels, is among
# the first 4,096 such classes of its row; csrc/head_gradient.cpp says the same.
LIKELY = 1 / 8192
# With fewer classes a product with all of them takes no longer.
CLASSES = 8192


def head_gradient_(
    logits: Tensor,
    targets: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float,
    slopes: Tensor,
    shares: Tensor,
    unlikely: Tensor,
) -> Tensor:
    """Losses (M) in fp32 of rows whose targets are given, and ∂loss/∂hidden in two parts.

    The gradient of row i is ``slopes[i] + shares[i]·(unlikely @ weight)[i // TOGETHER]``. Its sum over the
    rows that are together is exact but for rounding; a single row's error is a per cent of its length or so.

    Args:
        logits: (M, V), about hidden·weightᵀ + bias; overwritten. targets: (M).
        hidden: (M, d). weight: (V, d). bias: (V) or None.
        scale, softcap: z = scale·logits, then softcap·tanh(z / softcap) where that is above 0.
        slopes: (M, d), shares: (M) and unlikely: (M / TOGETHER rounded up, V), all overwritten.

    Raises:
        IndexError: a target lies outside of the classes. ValueError: the shapes do not fit each other.
    """
    rows, classes = logits.shape
    check_shape("the targets", targets, rows)
    check_shape("the hidden vectors", hidden, rows, weight.shape[-1])
    check_shape("the weight", weight, classes, hidden.shape[-1])
    check_shape("the bias", bias, classes)
    check_shape("the slopes", slopes, *hidden.shape)
    check_shape("the shares", shares, rows)
    check_shape("the sums of the unlikely classes", unlikely, groups(rows), classes)
    return _head_gradient(logits, targets, hidden, weight, bias, scale, softcap, slopes, shares, unlikely)


def groups(rows: int) -> int:
    """Sums over ``TOGETHER`` of so many rows."""
    return -(-rows // TOGETHER)


def can_split_classes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`head_gradient_` is to be used: the process computes so, the compiled kernel serves it,
    and it is worth its while."""
    summed = loader.arithmetic().summed_classes
    return summed and weight.shape[0] >= CLASSES and _splits_classes(hidden, weight, bias)


def _splits_classes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not loader.serves(hidden, weight, bias):
        return False
    if not hidden.dtype == weight.dtype == torch.bfloat16 or hidden.shape[1] % 2:
        return False
    return all(t is None or t.is_contiguous() for t in (weight, bias))


def head_gradient_reference_(
    logits: Tensor,
    targets: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float,
    slopes: Tensor,
    shares: Tensor,
    unlikely: Tensor,
) -> Tensor:
    """The reference implementation of :func:`head_gradient_`; leaves ``logits`` as they are."""
    wide = sums_dtype(logits)
    rows = torch.arange(len(targets), device=logits.device)

    def changed(raw: Tensor) -> tuple[Tensor, Tensor]:
        z = scale * raw
        if not softcap > 0:
            return z, torch.full_like(z, scale)
        t = torch.tanh(z / softcap)
        return softcap * t, scale * (1 - t * t)

    accurate = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        accurate += bias.to(wide)
    given = changed(logits.to(wide))[0].softmax(-1)
    beside = (1 - given[rows, targets]).clamp_min(1e-6)
    likely = given > LIKELY * beside[:, None]
    likely[rows, targets] = True
    z, slope = changed(torch.where(likely, accurate, logits.to(wide)))
    gradient = z.softmax(-1)
    rest = (gradient * ~likely).sum(-1)
    gradient[rows, targets] -= 1
    gradient *= slope
    slopes.copy_((gradient * likely) @ weight.to(wide))
    for number in range(groups(len(rows))):
        part = slice(number * TOGETHER, (number + 1) * TOGETHER)
        unlikely[number] = (gradient * ~likely)[part].sum(0)
        shares[part] = rest[part] / rest[part].sum().clamp_min(torch.finfo(wide).tiny)
    return z.logsumexp(-1) - z[rows, targets]


def _compute_head_gradient(  # type: ignore[no-untyped-def]
    logits, targets, hidden, weight, bias, scale, softcap, slopes, shares, unlikely
):
    check_targets(targets, logits.shape[1])
    written = (logits, slopes, shares, unlikely)
    if (
        not _splits_classes(hidden, weight, bias)
        or not logits.dtype == slopes.dtype == unlikely.dtype == torch.bfloat16
        or shares.dtype != torch.float32
        or not all(t.is_contiguous() for t in written)
    ):
        return head_gradient_reference_(
            logits, targets, hidden, weight, bias, scale=scale, softcap=softcap,
            slopes=slopes, shares=shares, unlikely=unlikely,
        )  # fmt: skip
    targets, hidden = targets.contiguous(), hidden.contiguous()
    losses = torch.empty(len(targets))
    loader.kernels().dw_head_gradient(
        *logits.shape, hidden.shape[1], logits.data_ptr(), targets.data_ptr(), hidden.data_ptr(),
        weight.data_ptr(), loader.address(bias), scale, softcap, TOGETHER, losses.data_ptr(),
        slopes.data_ptr(), shares.data_ptr(), unlikely.data_ptr(),
    )  # fmt: skip
    return losses


_head_gradient = define(
    "head_gradient_(Tensor(a!) logits, Tensor targets, Tensor hidden, Tensor weight, Tensor? bias, "
    "float scale, float softcap, Tensor(b!) slopes, Tensor(c!) shares, Tensor(d!) unlikely) -> Tensor",
    _compute_head_gradient,
    lambda logits, *_: logits.new_empty(logits.shape[0], dtype=sums_dtype(logits)),
)
