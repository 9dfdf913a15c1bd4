"""The language-model objective: a loss of the label tokens' log-probabilities, cross-entropy by default.

The output head is applied only to the outputs that predict a label, a chunk of them at a time
(:mod:`deltaw.training.tasks.causal_objective`).

Knows a model's backbone and head; not data files, optimizers or schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.data.example import Item
from deltaw.data.packing import Batch
from deltaw.hub.loading import has_values as model_has_values
from deltaw.kernels import linear as products
from deltaw.kernels import loader, quantize
from deltaw.kernels.block_linear import BlockWeight
from deltaw.kernels.head_gradient import (
    CLASSES,
    TOGETHER,
    can_round_classes,
    can_split_classes,
    class_gradient_,
    groups,
    head_gradient_,
)
from deltaw.kernels.rows import cross_entropy_
from deltaw.lora.fingerprint import has_values
from deltaw.lora.layers_quantized import BlockLinear
from deltaw.lora.stored import Scales, Stored, block_weight, product, weight_scales
from deltaw.runtime.packed import backbone_of, one_row, outputs_at
from deltaw.training.losses import CrossEntropy, Loss, RowLogProbs, Watched
from deltaw.training.microbatches import entered

# Logits of a frozen head from int8 products, for where those that count are computed once more.
#
# A head's inputs have a few columns with numbers far larger than all others, and one scale for each row would
# have to span them. So the largest columns are taken out before a row is rounded, and come back as a low-rank
# update that is not rounded, as in LLM.int8() (arXiv 2208.07339).

# Columns that are not rounded. Twice as many halve the error, and cost as much again.
APART = 8
# With fewer rows, reading these columns of the weight takes longer than they are worth.
ROWS_FOR_APART = 128
# Rows of the weight, at most, that tell how long its rows are.
SAMPLED = 1024
# The error that rough logits may have: sums of probabilities of classes that are not computed once more are
# too large by this share, about.
LARGEST_ERROR = 0.01


@dataclass(frozen=True)
class RoughHead:
    """What a head's weight W (classes, d) takes to be multiplied in int8.

    Attributes:
        scales: (classes) fp32, what each row is divided by to be rounded.
        row_square, scale_square: means over the classes, or many of them, of ‖row‖² and of scale².
        least_rows: with fewer rows at once no column is left unrounded, and a bf16 head is multiplied as it
            is.
    """

    scales: Tensor
    row_square: float
    scale_square: float
    least_rows: int = ROWS_FOR_APART

    @classmethod
    def of(cls, weight: Tensor) -> RoughHead:
        """That of a weight; in a dry run its numbers are not read."""
        scales = quantize.scales_of_rows(weight.detach())
        if not has_values(weight):
            return cls(scales, 0.0, 0.0)
        some = weight.detach()[:: -(-len(weight) // SAMPLED)].float()
        return cls(scales, float(some.square().sum(1).mean()), float(scales.square().mean()))


class RoughLogits:
    """The logits of rows (M, d), to be asked for in parts.

    Args:
        hidden: (M, d). weight: (classes, d) in bf16, rounded to int8 as it is read. bias: (classes) or None.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: RoughHead) -> None:
        self.hidden, self.weight, self.bias, self.head = hidden, weight, bias, head
        self.rounded: Tensor = hidden
        self.lora_A: Tensor | None = None
        self.lora_B: Tensor | None = None
        if len(hidden) < head.least_rows or hidden.shape[1] <= APART:
            return
        apart = hidden.abs().amax(0).topk(APART).indices
        self.rounded = hidden.index_fill(1, apart, 0)
        self.lora_A = torch.zeros(hidden.shape[1], APART).index_put_((apart, torch.arange(APART)), torch.ones(APART))
        # Column by column, which is several times as fast as all at once.
        columns = [weight.index_select(1, apart[n : n + 1])[:, 0] for n in range(APART)]
        self.lora_B = torch.stack([column.float() for column in columns])

    def of(self, part: slice) -> Tensor:
        """Logits (m, classes) of some of the rows, without what a model makes of them afterwards."""
        int8, scales = quantize.quantized(self.rounded[part], None)
        update = (self.bias, self.lora_A, self.lora_B)
        head = products.Product(self.weight, True, self.head.scales, None, *update)
        return products.linear(self.hidden[part], head, None, int8, scales)[0]

    def variance(self) -> float:
        """The mean square of the logits' error, about, over all rows.

        A number rounded to steps of s is off by s²/12 in the mean square; so a logit is off by
        (s²·‖w‖² + ‖x‖²·t²)/12, with the steps s of a row x and t of a class w.
        """
        lengths = torch.linalg.vector_norm(self.rounded, dim=1, dtype=torch.float32)
        steps = self.rounded.abs().amax(1).float() / 127
        of_inputs = float(steps.square().mean()) * self.head.row_square
        return (of_inputs + float(lengths.square().mean()) * self.head.scale_square) / 12

    def accurate(self, scale: float) -> bool:
        """Whether they may stand for the head's own, times ``scale``; in a dry run they may.

        The mean of exp(e) of an error e with the variance v is exp(v/2).
        """
        if not has_values(self.hidden):
            return True
        return math.expm1(scale * scale * self.variance() / 2) <= LARGEST_ERROR


# A language model's output head on hidden vectors, in chunks: all logits never exist at once.
#
# Three functions for three cases: a frozen linear head, whose chunks' logits become their own gradient; any
# head, with log-probabilities whose logits the backward recomputes; and the weighted sum over any
# head, whose gradient is taken in the forward.

# Bytes that the fp32 logits of one chunk may take; the soft-max and its gradient take about twice that again.
CHUNK_BYTES = 32 * 2**20
# The same on devices that need larger products to be busy, by kind of device.
DEVICE_CHUNK_BYTES = {"cuda": 256 * 2**20}
# Bytes of a frozen head's logits at a time, and rows at least: the head's weight is read and laid out anew
# for each chunk, which takes as long as some thirty rows.
FROZEN_CHUNK_BYTES, FROZEN_CHUNK_ROWS = 24 * 2**20, 256
# Rows of a chunk are filled up to a multiple of this, where they go through a matrix library.
EVEN_ROWS = 16
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
    return _FrozenHeadLogProbs.apply(hidden, targets, _FrozenHead(head, bias, scale, softcap, stored, rough))


@dataclass(frozen=True)
class _FrozenHead:
    """A linear head that is not trained, as :func:`frozen_head_log_probs` describes it."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float
    stored: Stored | None
    rough: RoughHead | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(P, classes) of the head alone; in the wider type of the two."""
        if self._is_narrower(hidden):
            logits = torch.cat([hidden @ rows.to(hidden.dtype).t() for rows in self.weight.split(WIDENED_ROWS)], 1)
            return logits if self.bias is None else logits.add_(self.bias)
        return products.linear(hidden, product(self.weight, self.stored, bias=self.bias))[0]

    def logits_by_parts(self, hidden: Tensor) -> Callable[[slice], Tensor]:
        """Logits of a part of the rows: in int8 with int8-quantized weights, else where that is accurate enough
        and there are rows enough to be worth it."""
        rough = self.rough
        if rough is not None and (self.stored is not None or len(hidden) >= rough.least_rows):
            logits = RoughLogits(hidden.detach(), self.weight, self.bias, rough)
            if self.stored is not None or logits.accurate(self.scale):
                return logits.of
        return lambda part: self.logits(hidden[part])

    def times(self, gradient: Tensor, targets: Tensor) -> Tensor:
        """gradient (P, classes) · head; overwrites it. In int8 the targets' own part is not rounded."""
        head, stored = self.weight, self.stored
        if isinstance(stored, Scales) and can_round_classes(gradient, head):
            return class_gradient_(gradient, targets, head, stored[0])
        if self._is_narrower(gradient):
            sums = gradient.new_zeros(len(gradient), head.shape[1])
            for part, rows in zip(gradient.split(WIDENED_ROWS, 1), head.split(WIDENED_ROWS), strict=True):
                sums.addmm_(part, rows.to(gradient.dtype))
            return sums
        # Not rounded, the gradient is taken with the head's own numbers, whatever layers do with theirs.
        blocks = stored if isinstance(stored, BlockWeight) else None
        return products.linear_backward(gradient, product(head, blocks))[0]

    def _is_narrower(self, left: Tensor) -> bool:
        return self.stored is None and left.dtype != self.weight.dtype


class _FrozenHeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head):  # type: ignore[override]
        chunk = max(FROZEN_CHUNK_ROWS, FROZEN_CHUNK_BYTES // (hidden.element_size() * head.weight.shape[0]))
        # The same with and without a gradient, so that log-probabilities of both kinds can be compared.
        split = not isinstance(head.stored, BlockWeight) and can_split_classes(hidden, head.weight, head.bias)
        losses, slopes = (_by_likely_classes if split else _by_all_classes)(hidden, targets, head, chunk)
        ctx.save_for_backward(slopes)
        return losses.to(loss_dtype(hidden)).neg_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        (slopes,) = ctx.saved_tensors  # of the losses, which are minus the log-probabilities
        return (slopes * grad.neg()[:, None]).to(slopes.dtype), None, None


def _by_all_classes(hidden: Tensor, targets: Tensor, head: _FrozenHead, most: int) -> tuple[Tensor, Tensor | None]:
    """Losses (P), and their gradient (P, d) where it is wanted, from chunks of up to ``most`` rows."""
    wanted = hidden.requires_grad
    slopes = torch.empty_like(hidden) if wanted else None
    ones = hidden.new_ones(len(targets), dtype=loss_dtype(hidden))
    losses = []
    chunk = _even_chunk(len(hidden), most)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits, how = head.logits(hidden[part]), {"scale": head.scale, "softcap": head.softcap}
        losses.append(cross_entropy_(logits, targets[part], ones[part], **how, grad=wanted))
        if slopes is not None:
            slopes[part] = head.times(logits, targets[part])
    return torch.cat(losses), slopes


def _by_likely_classes(hidden: Tensor, targets: Tensor, head: _FrozenHead, most: int) -> tuple[Tensor, Tensor | None]:
    """The same, with accurate losses and a gradient that is nearly that: see :func:`head_gradient_`."""
    (rows, width), logits_of = hidden.shape, head.logits_by_parts(hidden)
    chunk = groups(_even_chunk(rows, most)) * TOGETHER
    losses = torch.empty(rows)
    # Whole groups of rows; the sums of at most a chunk of groups wait for their product with the head.
    slopes, shares = hidden.new_zeros(groups(rows) * TOGETHER, width), torch.zeros(groups(rows) * TOGETHER)
    unlikely = hidden.new_empty(min(groups(rows), chunk), len(head.weight))
    for first in range(0, rows, chunk * TOGETHER):
        last = min(first + chunk * TOGETHER, rows)
        for start in range(first, last, chunk):
            part = slice(start, min(start + chunk, last))
            sums = slice((start - first) // TOGETHER, groups(part.stop - first))
            logits = logits_of(part)
            losses[part] = head_gradient_(
                logits, targets[part], hidden[part], head.weight, head.bias, scale=head.scale, softcap=head.softcap,
                slopes=slopes[part], shares=shares[part], unlikely=unlikely[sums],
            )  # fmt: skip
            del logits
        if not hidden.requires_grad:
            continue
        count = groups(last - first)
        # There are no targets in the sums; class 0 serves as well as any.
        rest = head.times(unlikely[:count], targets.new_zeros(count))
        theirs = slice(first, first + count * TOGETHER)
        of_rows = shares[theirs].to(slopes.dtype).view(count, TOGETHER, 1)
        slopes[theirs].view(count, TOGETHER, width).addcmul_(of_rows, rest[:, None])
    return losses, slopes[:rows] if hidden.requires_grad else None


def _even_chunk(rows: int, most: int) -> int:
    """Rows of each chunk, as even as can be and no more than ``most``."""
    return max(1, -(-rows // max(1, -(-rows // most))))


# A head: maps (p, d) to logits (p, classes).
Head: TypeAlias = Callable[[Tensor], Tensor]


def head_log_probs(hidden: Tensor, targets: Tensor, head: Head, parameters: Sequence[Tensor], *, chunk: int) -> Tensor:
    """log softmax(head(hiddenᵢ)) at targetᵢ of any head; the backward recomputes each chunk's logits.

    Args:
        hidden: (P, d). targets: (P,) class indices.
        parameters: what ``head`` uses and may be trained. chunk: rows of ``hidden`` at a time.

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
        values_of = _log_probs_of(targets, ctx.head)
        _, grad_hidden, sums = _over_chunks(hidden, values_of, grad, ctx.trained, ctx.chunk)
        return grad_hidden, None, None, None, *sums


# What a chunk of hidden vectors (p, d) comes to: a value for each (p,), given where in all rows the chunk is.
Values: TypeAlias = Callable[[Tensor, slice], Tensor]


def _log_probs_of(targets: Tensor, head: Head) -> Values:
    return lambda part, rows: log_probs(head(part), targets[rows])


def _over_chunks(
    hidden: Tensor, values_of: Values, slopes: Tensor, trained: Sequence[Tensor], chunk: int
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Values, chunk by chunk, and the gradient of Σ slopeᵢ · valueᵢ, taken while a chunk's logits are there: for
    ``hidden`` if it requires one, and for what is trained of the head."""
    needed = hidden.requires_grad
    grad_hidden = torch.empty_like(hidden) if needed else None
    sums, found = [torch.zeros_like(t) for t in trained], []
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        part = hidden[rows].detach().requires_grad_(needed)
        leaves = [*([part] if needed else []), *trained]
        with torch.set_grad_enabled(bool(leaves)):
            values = values_of(part, rows)
        found.append(values.detach())
        if not leaves:
            continue
        grads = list(torch.autograd.grad(values, leaves, slopes[rows]))
        if grad_hidden is not None:
            grad_hidden[rows] = grads.pop(0)
        for kept, new in zip(sums, grads, strict=True):
            kept += new
    return found, grad_hidden, sums


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, weights: Tensor, head: Head, parameters: Sequence[Tensor], *, chunk: int
) -> Tensor:
    """Σ weightᵢ · cross-entropy(head(hiddenᵢ), targetᵢ) of any head, each chunk's logits computed once.

    Args:
        hidden: (P, d). targets: (P,) class indices. weights: (P,).
        parameters: what ``head`` uses and may be trained. chunk: rows of ``hidden`` at a time.

    Returns:
        a scalar in fp32, or fp64 for fp64 inputs.
    """
    return -chunked_sum(hidden, weights, _log_probs_of(targets, head), parameters, chunk=chunk)


def chunked_sum(
    hidden: Tensor, weights: Tensor, values_of: Values, parameters: Sequence[Tensor], *, chunk: int
) -> Tensor:
    """Σ weightᵢ · valueᵢ, a scalar in fp32, or fp64 for fp64 inputs; the arguments are as those of
    :func:`chunked_cross_entropy`."""
    trained = [p for p in parameters if p.requires_grad]
    return _ChunkedSum.apply(hidden, weights, values_of, chunk, *trained)


class _ChunkedSum(torch.autograd.Function):
    """The gradient is taken in the forward, while a chunk's logits are there, and scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, weights, values_of, chunk, *trained):  # type: ignore[override]
        weights = weights.to(loss_dtype(hidden))
        values, grad_hidden, sums = _over_chunks(hidden, values_of, weights, trained, chunk)
        total = hidden.new_zeros((), dtype=loss_dtype(hidden))
        for part, own in zip(values, weights.split(chunk), strict=True):
            total += (part * own).sum()
        ctx.save_for_backward(grad_hidden, *sums)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        grad_hidden, *sums = ctx.saved_tensors
        scaled = None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype)
        return scaled, None, None, None, *[(s * grad).to(s.dtype) for s in sums]


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


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """What losses of these values are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class CausalObjective:
    """A loss over a batch's labels, with gradients for whatever is trained.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        loss: of the labels' log-probabilities; cross-entropy by default.

    Attributes:
        chunked: whether the head is applied in chunks; False where the model does something between its
            backbone and its logits that is not known here, and its own logits are taken instead.
        rough_rows: with fewer labels at once, a bf16 head's logits never come from int8 products.
    """

    def __init__(self, model: PreTrainedModel, loss: Loss | None = None) -> None:
        self.model = model
        self.loss = loss or CrossEntropy()
        self.backbone = backbone_of(model)
        head = model.get_output_embeddings()
        self.chunked = head is not None and self.backbone is not model and _head_is_known(model, head)
        self.head = head
        self.rough_rows = ROWS_FOR_APART
        # Whether the blocks' weights are int8, and the head may be multiplied so too in training. Its weight
        # stays as it is, for evaluation.
        is_int8 = any(weight_scales(module) is not None for module in self.backbone.modules())
        self._int8 = self.chunked and _may_round(head) and is_int8

    def __call__(self, batch: Batch) -> Tensor:
        """The sum of the batch's losses, a scalar in fp32."""
        if isinstance(self.loss, CrossEntropy):
            return self._cross_entropy(batch)
        return self.loss(RowLogProbs.of(batch, self.token_log_probs(batch)))

    @property
    def watched(self) -> Watched | None:
        """What the loss counts beside its sum; None for most."""
        return getattr(self.loss, "watched", None)

    def units(self, rows: Sequence[Item]) -> int:
        """What a step's sum of losses is divided by: label tokens of a cross-entropy."""
        return self.loss.units(rows)

    def token_log_probs(self, batch: Batch) -> Tensor:
        """(P,) log p of each of the batch's ``targets``, differentiable, in fp32."""
        return self._log_probs(self.label_outputs(batch), batch.targets)

    def _log_probs(self, picked: Tensor, targets: Tensor) -> Tensor:
        if not self.chunked:
            return log_probs(picked, targets)
        if self._head_is_frozen():
            return self._frozen(picked, targets)
        return head_log_probs(picked, targets, self._logits, list(self.head.parameters()), chunk=self.chunk)

    def _cross_entropy(self, batch: Batch) -> Tensor:
        """Σ weight · cross-entropy: as the loss of :meth:`token_log_probs`, without logits computed twice."""
        picked = self.label_outputs(batch)
        if self.chunked and not self._head_is_frozen():
            given, parameters = (batch.targets, batch.weights), list(self.head.parameters())
            return chunked_cross_entropy(picked, *given, self._logits, parameters, chunk=self.chunk)
        values = self._log_probs(picked, batch.targets)
        return -(values * batch.weights.to(values.dtype)).sum()

    @property
    def approximable(self) -> tuple[str, ...]:
        """What of the head can be approximate: those of ``APPROXIMATIONS`` that would change something."""
        if not (self.chunked and _is_plain_bf16(self.head) and self._head_is_frozen()):
            return ()
        rounded = ("int8_logits",) if _may_round(self.head) else ()
        if self.head.weight.shape[0] < CLASSES:
            return rounded if self._int8 else ()
        return *rounded, "summed_classes"

    @cached_property
    def _rough_head(self) -> RoughHead:
        return RoughHead.of(self.head.weight)

    def _frozen(self, picked: Tensor, targets: Tensor) -> Tensor:
        change = logits_change(self.model.config.get_text_config())
        rough = None
        if loader.arithmetic().int8_logits and _may_round(self.head) and picked.dtype == torch.bfloat16:
            rough = replace(self._rough_head, least_rows=self.rough_rows)
        scales = rough.scales if rough is not None and self._int8 else None
        blocks = block_weight(self.head)
        return frozen_head_log_probs(
            picked, targets, self.head.weight, self.head.bias, *change, scales=scales, blocks=blocks, rough=rough
        )

    @torch.no_grad()
    def evaluate_rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each label its cross-entropy (P,), and the likeliest token in its place, int64 (P,)."""
        losses, likeliest = [], []
        outputs, chunk = self.label_outputs(batch), self.chunk
        for rows, targets in zip(outputs.split(chunk), batch.targets.split(chunk), strict=True):
            logits = self.logits_of(rows).float()
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
            likeliest.append(logits.argmax(-1))
        return torch.cat(losses), torch.cat(likeliest)

    def logits_of(self, outputs: Tensor) -> Tensor:
        """(P, vocabulary) logits of :meth:`label_outputs`."""
        if not self.chunked:
            return outputs
        # Matrix libraries build and keep a kernel for each number of rows that they meet.
        missing = -len(outputs) % min(EVEN_ROWS, self.chunk) if outputs.device.type == "cpu" else 0
        if not missing:
            return self._logits(outputs)
        return self._logits(nn.functional.pad(outputs, (0, 0, 0, missing)))[: len(outputs)]

    def label_outputs(self, batch: Batch) -> Tensor:
        """(P, d) outputs of the backbone for each distinct label position of the batch in ascending order;
        (P, vocabulary) logits if not chunked."""
        with entered(batch) as run:
            if self.chunked:
                with outputs_at(self.model, run.asked):
                    outputs = self.backbone(**run.inputs, use_cache=False).last_hidden_state
            else:
                outputs = self.model(**run.inputs, use_cache=False).logits
            return outputs.flatten(0, 1).index_select(0, run.predictors)

    def _head_is_frozen(self) -> bool:
        """Whether the head is a plain matrix that nobody trains, on a processor."""
        if type(self.head) not in (nn.Linear, BlockLinear) or self.head.weight.device.type != "cpu":
            return False
        return not any(p.requires_grad for p in self.head.parameters()) and not torch.is_autocast_enabled("cpu")

    def _logits(self, rows: Tensor) -> Tensor:
        return final_logits(self.model, self.head(rows))

    @property
    def chunk(self) -> int:
        """Labels whose logits are there at a time."""
        return _chunk(self.model)


@torch.no_grad()
def loss_of_outputs(model: PreTrainedModel, outputs: Tensor, targets: Tensor, *, int8: bool) -> float:
    """Mean cross-entropy of targets (P,) from the backbone's outputs (P, d), the head as training computes it
    with int8-quantized weights or without."""
    head = model.get_output_embeddings()
    if _is_plain_bf16(head):
        change = logits_change(model.config.get_text_config())
        rough = RoughHead.of(head.weight) if int8 and _may_round(head) else None
        scales = None if rough is None else rough.scales
        values = frozen_head_log_probs(outputs, targets, head.weight, head.bias, *change, scales=scales, rough=rough)
    else:
        logits = lambda rows: final_logits(model, head(rows))  # noqa: E731
        values = head_log_probs(outputs, targets, logits, [], chunk=_chunk(model))
    return -float(values.mean())


def _chunk(model: PreTrainedModel) -> int:
    """Labels whose fp32 logits fit in what a chunk may take on the model's device."""
    room = DEVICE_CHUNK_BYTES.get(model.device.type, CHUNK_BYTES)
    return max(1, room // (4 * model.config.get_text_config().vocab_size))


def _may_round(head: nn.Module) -> bool:
    """Return True if the compiled kernel can compute a head's logits in int8. It takes groups of four numbers.

    Without the kernel, an int8 product would need two copies of the head in fp32.
    """
    weight = head.weight
    return _is_plain_bf16(head) and isinstance(weight, Tensor) and not any(size % 4 for size in weight.shape)


def _is_plain_bf16(head: nn.Module) -> bool:
    """Return True for a plain bf16 matrix on a CPU."""
    return type(head) is nn.Linear and head.weight.dtype == torch.bfloat16 and head.weight.device.type == "cpu"


def _head_is_known(model: PreTrainedModel, head: nn.Module) -> bool:
    """Try a few tokens: the head on the backbone's outputs must give the model's own logits.

    On fake tensors there are no logits to compare: sizes that fit are all that can be seen.
    """
    text, real = model.config.get_text_config(), model_has_values(model)
    width = getattr(head, "in_features", None)
    if not real and (width, getattr(head, "out_features", None)) == (text.hidden_size, text.vocab_size):
        return True
    tokens = torch.arange(8, device=model.device)[None] % text.vocab_size
    outputs: list[Tensor] = []
    backbone = model.base_model
    hook = backbone.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        try:
            own = model(**one_row(model, tokens), use_cache=False).logits[0].float()
        finally:
            hook.remove()
        if len(outputs) != 1:
            return False
        hidden = outputs[0][0]
        if width not in (None, hidden.shape[-1]):
            return False
        ours = final_logits(model, head(hidden)).float()
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2
    return own.shape == ours.shape and (not real or bool((own - ours).norm() <= tolerance * own.norm()))
