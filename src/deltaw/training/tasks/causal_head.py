"""A language model's output head on hidden vectors, in chunks: all logits never exist at once.

Three functions for three cases: a frozen linear head, whose chunks' logits become their own gradient; any
head, with log-probabilities whose logits the backward recomputes; and the weighted sum over any
head, whose gradient is taken in the forward.

Knows tensors and heads; not models' backbones, batches or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.kernels.block_formats import BlockWeight
from deltaw.kernels.block_linear import block_linear_backward
from deltaw.kernels.class_gradient import can_round_classes, class_gradient_
from deltaw.kernels.head_gradient import TOGETHER, can_split_classes, groups, head_gradient_
from deltaw.kernels.linear import linear_backward
from deltaw.kernels.rows import cross_entropy_
from deltaw.lora.stored import Scales, Stored, multiply
from deltaw.training.tasks.rough_logits import RoughHead, RoughLogits

# Bytes that the fp32 logits of one chunk may take; the soft-max and its gradient take about twice that again.
CHUNK_BYTES = 32 * 2**20
# The same on devices that need larger products to be busy, by kind of device.
DEVICE_CHUNK_BYTES = {"cuda": 256 * 2**20}
# Bytes of a frozen head's logits at a time, and rows at least: the head's weight is read and laid out anew
# for each chunk, which takes as long as some thirty rows.
FROZEN_CHUNK_BYTES, FROZEN_CHUNK_ROWS = 24 * 2**20, 256
# Rows of a head that are there in a wider type at a time.
WIDENED_ROWS = 4096


def frozen_head_log_probs(
    hidden: Tensor,
    targets: Tensor,
    head: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    *,
    scales: Tensor | None = None,
    blocks: BlockWeight | None = None,
    rough: RoughHead | None = None,
) -> Tensor:
    """log softmax(head(hiddenᵢ)) at targetᵢ of a linear head that is not trained.

    Token i's log-probability depends on row i of ``hidden`` alone. So the forward takes its gradient while
    the chunk's logits are there, and the backward scales the rows.

    Args:
        hidden: (P, d). targets: (P,) class indices. head: (classes, d). bias: (classes,) or None. Where the
            hidden vectors are of a wider type than the head, all is computed in theirs.
        scale, softcap: what becomes of the logits, as in :func:`deltaw.kernels.rows.cross_entropy_`.
        scales: (classes,): the logits are computed in int8, the head's rows divided by these, and so is their
            gradient where there are rows enough to be worth it.
        blocks: the head where it is stored in blocks, whose bytes ``head`` is then.
        rough: with it, logits may come from int8 products where those that count are computed once more.

    Returns:
        (P,) in fp32, or fp64 for fp64 inputs.
    """
    stored = blocks or (None if scales is None else Scales(scales, None))
    return _FrozenHeadLogProbs.apply(hidden, targets, head, bias, scale, softcap, stored, rough)


class _FrozenHeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head, bias, scale, softcap, stored, rough):  # type: ignore[override]
        chunk = max(FROZEN_CHUNK_ROWS, FROZEN_CHUNK_BYTES // (hidden.element_size() * head.shape[0]))
        # The same with and without a gradient, so that log-probabilities of both kinds can be compared.
        split = not isinstance(stored, BlockWeight) and can_split_classes(hidden, head, bias)
        if split:
            logits = _logits_by_parts(hidden, head, bias, scale, stored, rough)
            losses, slopes = _by_likely_classes(
                hidden, targets, head, bias, scale, softcap, stored, chunk, logits
            )
        else:
            losses, slopes = _by_all_classes(hidden, targets, head, bias, scale, softcap, stored, chunk)
        ctx.save_for_backward(slopes)
        return losses.to(loss_dtype(hidden)).neg_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        (slopes,) = ctx.saved_tensors  # of the losses, which are minus the log-probabilities
        return (slopes * grad.neg()[:, None]).to(slopes.dtype), None, None, None, None, None, None, None


def _by_all_classes(
    hidden: Tensor,
    targets: Tensor,
    head: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    stored: Stored | None,
    most: int,
) -> tuple[Tensor, Tensor | None]:
    """Losses (P), and their gradient (P, d) where it is wanted, from chunks of up to ``most`` rows."""
    wanted = hidden.requires_grad
    slopes = torch.empty_like(hidden) if wanted else None
    ones = hidden.new_ones(len(targets), dtype=loss_dtype(hidden))
    losses = []
    chunk = _even_chunk(len(hidden), most)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = _logits(hidden[part], head, bias, stored)
        losses.append(
            cross_entropy_(logits, targets[part], ones[part], scale=scale, softcap=softcap, grad=wanted)
        )
        if slopes is not None:
            slopes[part] = _times_head(logits, targets[part], head, stored)
    return torch.cat(losses), slopes


def _logits_by_parts(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    scale: float,
    stored: Stored | None,
    rough: RoughHead | None,
) -> Callable[[slice], Tensor]:
    """Logits of a part of the rows: in int8 with int8-quantized weights, else where that is accurate enough
    and there are rows enough to be worth it."""
    if rough is not None and (stored is not None or len(hidden) >= rough.least_rows):
        logits = RoughLogits(hidden.detach(), head, bias, rough)
        if stored is not None or logits.accurate(scale):
            return logits.of
    return lambda part: _logits(hidden[part], head, bias, stored)


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, stored: Stored | None) -> Tensor:
    if _is_wider(hidden, head, stored):
        logits = torch.cat([hidden @ rows.to(hidden.dtype).t() for rows in head.split(WIDENED_ROWS)], 1)
        return logits if bias is None else logits.add_(bias)
    return multiply(hidden, head, stored, bias=bias)[0]


def _is_wider(left: Tensor, head: Tensor, stored: Stored | None) -> bool:
    return stored is None and left.dtype != head.dtype


def _by_likely_classes(
    hidden: Tensor,
    targets: Tensor,
    head: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    stored: Stored | None,
    most: int,
    logits_of: Callable[[slice], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The same, with accurate losses and a gradient that is nearly that: see :func:`head_gradient_`."""
    rows, width = hidden.shape
    chunk = groups(_even_chunk(rows, most)) * TOGETHER
    losses = torch.empty(rows)
    # Whole groups of rows; the sums of at most a chunk of groups wait for their product with the head.
    slopes, shares = hidden.new_zeros(groups(rows) * TOGETHER, width), torch.zeros(groups(rows) * TOGETHER)
    unlikely = hidden.new_empty(min(groups(rows), chunk), head.shape[0])
    for first in range(0, rows, chunk * TOGETHER):
        last = min(first + chunk * TOGETHER, rows)
        for start in range(first, last, chunk):
            part = slice(start, min(start + chunk, last))
            sums = slice((start - first) // TOGETHER, groups(part.stop - first))
            logits = logits_of(part)
            losses[part] = head_gradient_(
                logits, targets[part], hidden[part], head, bias, scale=scale, softcap=softcap,
                slopes=slopes[part], shares=shares[part], unlikely=unlikely[sums],
            )  # fmt: skip
            del logits
        if not hidden.requires_grad:
            continue
        count = groups(last - first)
        # There are no targets in the sums; class 0 serves as well as any.
        rest = _times_head(unlikely[:count], targets.new_zeros(count), head, stored)
        theirs = slice(first, first + count * TOGETHER)
        of_rows = shares[theirs].to(slopes.dtype).view(count, TOGETHER, 1)
        slopes[theirs].view(count, TOGETHER, width).addcmul_(of_rows, rest[:, None])
    return losses, slopes[:rows] if hidden.requires_grad else None


def _times_head(gradient: Tensor, targets: Tensor, head: Tensor, stored: Stored | None) -> Tensor:
    """gradient (P, classes) · head; overwrites it. In int8 the targets' own part is not rounded."""
    if isinstance(stored, Scales) and can_round_classes(gradient, head):
        return class_gradient_(gradient, targets, head, stored[0])
    if isinstance(stored, BlockWeight):
        return block_linear_backward(gradient, stored)[0]
    if _is_wider(gradient, head, stored):
        parts = zip(gradient.split(WIDENED_ROWS, 1), head.split(WIDENED_ROWS), strict=True)
        sums = gradient.new_zeros(len(gradient), head.shape[1])
        for part, rows in parts:
            sums.addmm_(part, rows.to(gradient.dtype))
        return sums
    # Not rounded, the gradient is taken with the head's own numbers, whatever layers do with theirs.
    return linear_backward(gradient, head)[0]


def _even_chunk(rows: int, most: int) -> int:
    """Rows of each chunk, as even as can be and no more than ``most``."""
    return max(1, -(-rows // max(1, -(-rows // most))))


def head_log_probs(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    *,
    chunk: int,
) -> Tensor:
    """log softmax(head(hiddenᵢ)) at targetᵢ of any head; the backward recomputes each chunk's logits.

    Args:
        hidden: (P, d). targets: (P,) class indices.
        head: maps (p, d) to logits (p, classes). parameters: what ``head`` uses and may be trained.
        chunk: rows of ``hidden`` at a time.

    Returns:
        (P,) in fp32, or fp64 for fp64 inputs.
    """
    trained = [p for p in parameters if p.requires_grad]
    return _HeadLogProbs.apply(hidden, targets, head, chunk, *trained)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head, chunk, *trained):  # type: ignore[override]
        # The trained ones are saved only so that a change before the backward is noticed.
        ctx.save_for_backward(hidden, targets, *trained)
        ctx.head, ctx.chunk, ctx.trained = head, chunk, trained
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([log_probs(head(rows), wanted) for rows, wanted in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        hidden, targets, *_ = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden) if needed else None
        sums = [torch.zeros_like(t) for t in ctx.trained]
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            part = hidden[rows].detach().requires_grad_(needed)
            with torch.enable_grad():
                values = log_probs(ctx.head(part), targets[rows])
            grads = list(torch.autograd.grad(values, [*([part] if needed else []), *ctx.trained], grad[rows]))
            if grad_hidden is not None:
                grad_hidden[rows] = grads.pop(0)
            for kept, new in zip(sums, grads, strict=True):
                kept += new
        return grad_hidden, None, None, None, *sums


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    *,
    chunk: int,
) -> Tensor:
    """Σ weightᵢ · cross-entropy(head(hiddenᵢ), targetᵢ) of any head, each chunk's logits computed once.

    Args:
        hidden: (P, d). targets: (P,) class indices. weights: (P,).
        head: maps (p, d) to logits (p, classes). parameters: what ``head`` uses and may be trained.
        chunk: rows of ``hidden`` at a time.

    Returns:
        a scalar in fp32, or fp64 for fp64 inputs.
    """
    trained = [p for p in parameters if p.requires_grad]
    return _ChunkedCrossEntropy.apply(hidden, targets, weights, head, chunk, *trained)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is taken in the forward, while a chunk's logits are there, and scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, targets, weights, head, chunk, *trained):  # type: ignore[override]
        wanted = [t for t in (hidden, *trained) if t.requires_grad]
        total = hidden.new_zeros((), dtype=loss_dtype(hidden))
        sums = [torch.zeros_like(t) for t in trained]
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach().requires_grad_(hidden.requires_grad)
            with torch.set_grad_enabled(bool(wanted)):
                loss = cross_entropy_sum(head(part), targets[rows], weights[rows])
            total += loss.detach()
            if wanted:
                leaves = [t for t in (part, *trained) if t.requires_grad]
                grads = list(torch.autograd.grad(loss, leaves))
                if grad_hidden is not None:
                    grad_hidden[rows] = grads.pop(0)
                for kept, new in zip(sums, grads, strict=True):
                    kept += new
        ctx.save_for_backward(grad_hidden, *sums)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        grad_hidden, *sums = ctx.saved_tensors
        scaled = None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype)
        return scaled, None, None, None, None, *[(s * grad).to(s.dtype) for s in sums]


def logits_change(config: PretrainedConfig) -> tuple[float, float]:
    """What a model does to its head's outputs: a scale (Cohere, Granite), and a soft cap (Gemma) or 0."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    return scale / (1.0 if divisor is None else float(divisor)), 0.0 if cap is None else float(cap)


def final_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """The model's logits from its head's outputs."""
    scale, cap = logits_change(model.config.get_text_config())
    if scale != 1.0:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """(P,) the log-probability of each target: log softmax of logits (P, classes) at targets (P,)."""
    return -nn.functional.cross_entropy(logits.to(loss_dtype(logits)), targets, reduction="none")


def cross_entropy_sum(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ weightᵢ · cross-entropy of logits (P, classes), a scalar."""
    values = log_probs(logits, targets)
    return -(values * weights.to(values.dtype)).sum()


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """What losses of these values are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
