"""The gradient of a classifier's input from that of its logits, as an int8 product.

Knows tensors; not which head or vocabulary they belong to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import loader
from deltaw.kernels.bounds import check_shape, check_targets
from deltaw.kernels.operators import define
from deltaw.kernels.quantize import INT8_BLOCK, rows_as_int8

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
