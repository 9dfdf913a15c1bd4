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

from deltaw.kernels import loader
from deltaw.kernels.bounds import check_shape, check_targets
from deltaw.kernels.operators import define

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
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
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
    lambda logits, *_: logits.new_empty(
        logits.shape[0], dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32
    ),
)
