"""Loss and gradient of a language model's head, computed from approximate logits.

The gradient of a row's logits is its probabilities minus one at the target. Most of its mass is in a small number of
likely classes. Their logits are recomputed from the exact weight. The probabilities of unlikely classes are similar in
nearby rows, so they are summed over ``ROWS_PER_GROUP`` rows, and the product with the weight uses the sums. Cut
Cross-Entropy (arXiv 2411.09009) also exploits that unlikely classes barely contribute, but skips them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import loader
from deltaw.kernels.operators import accumulation_dtype, check_shape, check_targets, define
from deltaw.kernels.quantize import INT8_BLOCK, round_rows

# Minimum number of rows for which int8 products save more time than quantizing the weight takes.
MIN_ROWS_FOR_INT8 = 64


def class_gradient_(grad: Tensor, targets: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the input gradient grad·W (M, d) of a classifier, computed in int8 except for the target classes.

    Except at its target, a row of a cross-entropy gradient has one sign, and most numbers are far below the largest. So
    it is quantized to uint8 with a scale per ``INT8_BLOCK`` classes.

    Args:
        grad: (M, classes) gradient of the logits, overwritten.
        targets: (M) class indices.
        weight: (classes, d), quantized to int8 as it is read.
        scale: (classes) scales of the weight; see :func:`row_scales`.

    Raises:
        IndexError: if a target is out of bounds.
        ValueError: if shapes do not match.
    """
    rows, classes = grad.shape
    check_shape("the targets", targets, rows)
    check_shape("the weight", weight, classes, weight.shape[-1])
    check_shape("the weight's scales", scale, classes)
    return _class_gradient(grad, targets, weight, scale)


def class_gradient_reference(grad: Tensor, targets: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Reference implementation of :func:`class_gradient_`. Does not modify ``grad``."""
    rows = torch.arange(len(targets))
    target_grads = grad[rows, targets].to(scale.dtype)
    scaled = grad.to(scale.dtype) * scale
    scaled[rows, targets] = 0
    blocks = F.pad(scaled, (0, -scaled.shape[1] % INT8_BLOCK)).unflatten(1, (-1, INT8_BLOCK))
    maxima = blocks.amax(-1)
    minima = blocks.amin(-1)
    block_scales = torch.where(maxima >= -minima, maxima, minima)[..., None] / 255
    scaled_blocks = torch.where(block_scales != 0, blocks / block_scales, torch.zeros_like(blocks))
    rounded = (torch.round(scaled_blocks).clamp_(0, 255) * block_scales).flatten(1)[:, : scaled.shape[1]]
    sums = rounded @ round_rows(weight, scale).to(scale.dtype)
    return (sums + target_grads[:, None] * weight[targets].to(scale.dtype)).to(grad.dtype)


def can_use_int8_classes(grad: Tensor, weight: Tensor) -> bool:
    """True if the compiled kernel supports :func:`class_gradient_` and the number of rows makes it faster."""
    return _supports_class_gradient(grad, weight) and grad.shape[0] >= MIN_ROWS_FOR_INT8


def _supports_class_gradient(grad: Tensor, weight: Tensor) -> bool:
    if not loader.supports(grad, weight) or grad.dtype != torch.bfloat16 or grad.shape[1] < 2:
        return False
    return grad.is_contiguous() and weight.is_contiguous()


@define(
    "class_gradient_(Tensor(a!) grad, Tensor targets, Tensor weight, Tensor scale) -> Tensor",
    lambda grad, targets, weight, scale: grad.new_empty(grad.shape[0], weight.shape[1]),
    lambda grad, targets, weight, scale: 2 * grad.shape[0] * weight.numel(),
)
def _class_gradient(grad: Tensor, targets: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check_targets(targets, grad.shape[1])
    if not _supports_class_gradient(grad, weight) or scale.dtype != torch.float32:
        return class_gradient_reference(grad, targets, weight, scale)
    rows, classes = grad.shape
    width = weight.shape[1]
    targets = targets.contiguous()
    out = torch.empty(rows, width, dtype=grad.dtype)
    block_scales = torch.empty(rows, -(-classes // INT8_BLOCK))
    loader.kernels().dw_class_gradient(
        rows, classes, width, grad.data_ptr(), targets.data_ptr(), weight.data_ptr(), scale.data_ptr(),
        block_scales.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


# Rows over which unlikely classes are summed. A larger group is faster and less accurate.
ROWS_PER_GROUP = 16
# A class is likely if it has at least this share of the probability outside the target. The kernels process at most the
# first 4,096 likely classes of a row. csrc/head_gradient.cpp defines the same constants.
LIKELY_SHARE = 1 / 8192
# Minimum number of classes for which the approximation is faster than the full product.
MIN_CLASSES = 8192


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
    """Return the fp32 losses (M) of rows, and write ∂loss/∂hidden in two parts.

    The gradient of row i is ``slopes[i] + shares[i]·(unlikely @ weight)[i // ROWS_PER_GROUP]``. Its sum over a group is
    exact up to rounding. The error of a single row is about one percent of its norm.

    Args:
        logits: (M, V) approximation of hidden·weightᵀ + bias, overwritten.
        targets: (M) class indices.
        hidden: (M, d) inputs of the head.
        weight: (V, d).
        bias: (V) or None.
        scale: Factor of the logits: z = scale·logits.
        softcap: If positive, z becomes softcap·tanh(z / softcap).
        slopes: (M, d), overwritten with the gradient of likely classes.
        shares: (M), overwritten with each row's share of the unlikely classes' probability in its group.
        unlikely: (⌈M / ROWS_PER_GROUP⌉, V), overwritten with sums of the logit gradients of unlikely classes.

    Raises:
        IndexError: if a target is out of bounds.
        ValueError: if shapes do not match.
    """
    rows, classes = logits.shape
    check_shape("the targets", targets, rows)
    check_shape("the hidden vectors", hidden, rows, weight.shape[-1])
    check_shape("the weight", weight, classes, hidden.shape[-1])
    check_shape("the bias", bias, classes)
    check_shape("the slopes", slopes, *hidden.shape)
    check_shape("the shares", shares, rows)
    check_shape("the sums of the unlikely classes", unlikely, num_groups(rows), classes)
    return _head_gradient(logits, targets, hidden, weight, bias, scale, softcap, slopes, shares, unlikely)


def num_groups(rows: int) -> int:
    """Return the number of groups of ``ROWS_PER_GROUP`` rows."""
    return -(-rows // ROWS_PER_GROUP)


def can_sum_classes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """True if :func:`head_gradient_` is enabled in this process, supported by the compiled kernel, and faster."""
    is_enabled = loader.arithmetic().summed_classes
    return is_enabled and weight.shape[0] >= MIN_CLASSES and _supports_head_gradient(hidden, weight, bias)


def _supports_head_gradient(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not loader.supports(hidden, weight, bias):
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
    """Reference implementation of :func:`head_gradient_`. Does not modify ``logits``."""
    dtype = accumulation_dtype(logits)
    rows = torch.arange(len(targets), device=logits.device)

    def transform(raw: Tensor) -> tuple[Tensor, Tensor]:
        z = scale * raw
        if not softcap > 0:
            return z, torch.full_like(z, scale)
        t = torch.tanh(z / softcap)
        return softcap * t, scale * (1 - t * t)

    accurate = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        accurate += bias.to(dtype)
    probabilities = transform(logits.to(dtype))[0].softmax(-1)
    non_target = (1 - probabilities[rows, targets]).clamp_min(1e-6)
    likely = probabilities > LIKELY_SHARE * non_target[:, None]
    likely[rows, targets] = True
    z, slope = transform(torch.where(likely, accurate, logits.to(dtype)))
    gradient = z.softmax(-1)
    unlikely_mass = (gradient * ~likely).sum(-1)
    gradient[rows, targets] -= 1
    gradient *= slope
    slopes.copy_((gradient * likely) @ weight.to(dtype))
    for group_index in range(num_groups(len(rows))):
        group = slice(group_index * ROWS_PER_GROUP, (group_index + 1) * ROWS_PER_GROUP)
        unlikely[group_index] = (gradient * ~likely)[group].sum(0)
        shares[group] = unlikely_mass[group] / unlikely_mass[group].sum().clamp_min(torch.finfo(dtype).tiny)
    return z.logsumexp(-1) - z[rows, targets]


@define(
    "head_gradient_(Tensor(a!) logits, Tensor targets, Tensor hidden, Tensor weight, Tensor? bias, "
    "float scale, float softcap, Tensor(b!) slopes, Tensor(c!) shares, Tensor(d!) unlikely) -> Tensor",
    lambda logits, *_: logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits)),
)
def _head_gradient(  # type: ignore[no-untyped-def]
    logits, targets, hidden, weight, bias, scale, softcap, slopes, shares, unlikely
):
    check_targets(targets, logits.shape[1])
    outputs = (logits, slopes, shares, unlikely)
    if (
        not _supports_head_gradient(hidden, weight, bias)
        or not logits.dtype == slopes.dtype == unlikely.dtype == torch.bfloat16
        or shares.dtype != torch.float32
        or not all(t.is_contiguous() for t in outputs)
    ):
        return head_gradient_reference_(
            logits, targets, hidden, weight, bias, scale=scale, softcap=softcap,
            slopes=slopes, shares=shares, unlikely=unlikely,
        )  # fmt: skip
    targets = targets.contiguous()
    hidden = hidden.contiguous()
    losses = torch.empty(len(targets))
    loader.kernels().dw_head_gradient(
        *logits.shape, hidden.shape[1], logits.data_ptr(), targets.data_ptr(), hidden.data_ptr(),
        weight.data_ptr(), loader.address(bias), scale, softcap, ROWS_PER_GROUP, losses.data_ptr(),
        slopes.data_ptr(), shares.data_ptr(), unlikely.data_ptr(),
    )  # fmt: skip
    return losses
