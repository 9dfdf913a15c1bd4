"""Objective of language models: a loss of the label tokens' log-probabilities, cross-entropy by default.

The output head is applied only at positions that predict a label, in chunks, so the full logits never exist in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.data.example import Item
from deltaw.data.packing import MicroBatch
from deltaw.hub.skeletons import has_values as model_has_values
from deltaw.kernels import linear as products
from deltaw.kernels import loader
from deltaw.kernels.block_linear import BlockWeight
from deltaw.kernels.head_gradient import (
    MIN_CLASSES,
    ROWS_PER_GROUP,
    can_sum_classes,
    can_use_int8_classes,
    class_gradient_,
    head_gradient_,
    num_groups,
)
from deltaw.kernels.rows import cross_entropy_
from deltaw.lora.layers_quantized import BlockLinear
from deltaw.lora.stored import Scales, StoredWeight, block_weight, product, weight_scales
from deltaw.runtime.packed import backbone_of, one_row, outputs_at
from deltaw.runtime.rough_head import MIN_OUTLIER_ROWS, RoughHead, RoughLogits
from deltaw.training.feed import enter_batch
from deltaw.training.losses import CrossEntropy, Loss, RowLogProbs
from deltaw.training.objective import Objective

# Chunked output heads:
# - frozen_head_log_probs: frozen linear head. The logits of a chunk are overwritten by their gradient.
# - head_log_probs: any head. The backward pass recomputes the logits of each chunk.
# - chunked_sum: weighted sum over any head. The forward pass computes the gradient.

# Bytes of a chunk's fp32 logits. Softmax and its gradient take about twice as much in addition.
CHUNK_BYTES = 32 * 2**20
# The same for devices that need larger products for full utilization, by device type.
DEVICE_CHUNK_BYTES = {"cuda": 256 * 2**20}
# Bytes and minimum rows of a chunk of a frozen head. Each chunk reads and rearranges the weight, which costs as much
# as about thirty rows.
FROZEN_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 128 * 2**20}
FROZEN_CHUNK_ROWS = 256
# Rows of a chunk are padded to a multiple of this for matrix libraries.
ROW_MULTIPLE = 16
# Scale of gradients in fp16 between the forward pass, which computes them, and the backward pass.
FP16_SCALE = 2.0**10
# Rows of a head that are converted to a wider type at a time.
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
    """Return log softmax(head(hiddenᵢ)) at targetᵢ for a frozen linear head.

    Token i's log-probability depends only on row i of ``hidden``. The forward pass therefore computes its gradient
    while the chunk's logits are in memory, and the backward pass scales the rows.

    Args:
        hidden: (P, d). If its type is wider than the head's, everything is computed in this type.
        targets: (P,) class indices.
        head: (classes, d).
        bias: (classes,) or None.
        scale: Factor applied to the logits, see :func:`deltaw.kernels.rows.cross_entropy_`.
        softcap: Soft cap of the logits, or 0 for no cap.
        scales: (classes,) int8 scales of the head's rows. With them the logits are computed in int8, and their
            gradient too for a sufficient number of rows.
        blocks: Block-quantized form of ``head``.
        rough: Allows int8 logits if the logits of likely classes are recomputed.

    Returns:
        (P,) in fp32, or fp64 for fp64 inputs.
    """
    stored = blocks or (None if scales is None else Scales(scales, None))
    frozen_head = _FrozenHead(head, bias, scale, softcap, stored, rough)
    return cast(Tensor, _FrozenHeadLogProbs.apply(hidden, targets, frozen_head))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _FrozenHead:
    """A frozen linear head, see :func:`frozen_head_log_probs`."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float
    stored: StoredWeight | None
    rough: RoughHead | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the head's outputs (P, classes) in the wider type of head and input."""
        if self._is_narrower(hidden):
            logits = torch.cat([hidden @ rows.to(hidden.dtype).t() for rows in self.weight.split(WIDENED_ROWS)], 1)
            return logits if self.bias is None else logits.add_(self.bias)
        return products.linear(hidden, product(self.weight, self.stored, bias=self.bias))[0]

    def logits_by_parts(self, hidden: Tensor) -> Callable[[slice], Tensor]:
        """Return a function that computes the logits of a slice of rows.

        It uses int8 if the weights are int8-quantized, or if int8 is accurate enough for the rows.
        """
        rough = self.rough
        if rough is not None and (self.stored is not None or len(hidden) >= rough.min_rows):
            logits = RoughLogits(hidden.detach(), self.weight, self.bias, rough)
            if self.stored is not None or logits.accurate(self.scale):
                return logits.of
        return lambda part: self.logits(hidden[part])

    def times(self, gradient: Tensor, targets: Tensor) -> Tensor:
        """Return gradient (P, classes) · head, overwriting ``gradient``.

        In int8 the columns of the targets are not rounded.
        """
        head = self.weight
        stored = self.stored
        if isinstance(stored, Scales) and can_use_int8_classes(gradient, head):
            return class_gradient_(gradient, targets, head, stored[0])
        if self._is_narrower(gradient):
            sums = gradient.new_zeros(len(gradient), head.shape[1])
            for part, rows in zip(gradient.split(WIDENED_ROWS, 1), head.split(WIDENED_ROWS), strict=True):
                sums.addmm_(part, rows.to(gradient.dtype))
            return sums
        # Without int8 rounding the head's stored values are used, even if layers use rounded weights.
        blocks = stored if isinstance(stored, BlockWeight) else None
        return products.linear_backward(gradient, product(head, blocks))[0]

    def _is_narrower(self, left: Tensor) -> bool:
        return self.stored is None and left.dtype != self.weight.dtype


class _FrozenHeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: _FrozenHead) -> Tensor:
        chunk_bytes = FROZEN_CHUNK_BYTES[hidden.device.type]
        chunk = max(FROZEN_CHUNK_ROWS, chunk_bytes // (hidden.element_size() * head.weight.shape[0]))
        # Independent of requires_grad, so that log-probabilities with and without gradient are comparable.
        split = not isinstance(head.stored, BlockWeight) and can_sum_classes(hidden, head.weight, head.bias)
        losses, slopes = (_by_top_classes if split else _by_all_classes)(hidden, targets, head, chunk)
        ctx.save_for_backward(slopes)
        return losses.to(loss_dtype(hidden)).neg_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors  # gradients of the losses, the negative log-probabilities
        return (slopes * grad.neg()[:, None]).to(slopes.dtype), None, None


def _by_all_classes(hidden: Tensor, targets: Tensor, head: _FrozenHead, max_rows: int) -> tuple[Tensor, Tensor | None]:
    """Return losses (P,), and their gradient (P, d) if required, in chunks of up to ``max_rows`` rows."""
    needs_grad = hidden.requires_grad
    slopes = torch.empty_like(hidden) if needs_grad else None
    ones = hidden.new_ones(len(targets), dtype=loss_dtype(hidden))
    losses = []
    chunk = _even_chunk(len(hidden), max_rows)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = head.logits(hidden[part])
        loss = cross_entropy_(
            logits, targets[part], ones[part], scale=head.scale, softcap=head.softcap, grad=needs_grad
        )
        losses.append(loss)
        if slopes is not None:
            slopes[part] = head.times(logits, targets[part])
    return torch.cat(losses), slopes


def _by_top_classes(hidden: Tensor, targets: Tensor, head: _FrozenHead, max_rows: int) -> tuple[Tensor, Tensor | None]:
    """Return accurate losses (P,) and an approximate gradient (P, d), see :func:`head_gradient_`."""
    rows, width = hidden.shape
    logits_of = head.logits_by_parts(hidden)
    chunk = num_groups(_even_chunk(rows, max_rows)) * ROWS_PER_GROUP
    losses = torch.empty(rows)
    # Rows are padded to complete groups. Group sums are multiplied with the head once per chunk of groups.
    padded_rows = num_groups(rows) * ROWS_PER_GROUP
    slopes = hidden.new_zeros(padded_rows, width)
    shares = torch.zeros(padded_rows)
    group_sums = hidden.new_empty(min(num_groups(rows), chunk), len(head.weight))
    for first in range(0, rows, chunk * ROWS_PER_GROUP):
        last = min(first + chunk * ROWS_PER_GROUP, rows)
        for start in range(first, last, chunk):
            part = slice(start, min(start + chunk, last))
            sums = slice((start - first) // ROWS_PER_GROUP, num_groups(part.stop - first))
            logits = logits_of(part)
            losses[part] = head_gradient_(
                logits, targets[part], hidden[part], head.weight, head.bias, scale=head.scale, softcap=head.softcap,
                slopes=slopes[part], shares=shares[part], unlikely=group_sums[sums],
            )  # fmt: skip
            del logits
        if not hidden.requires_grad:
            continue
        count = num_groups(last - first)
        # The sums contain no targets, so any class index is valid.
        rest = head.times(group_sums[:count], targets.new_zeros(count))
        group_rows = slice(first, first + count * ROWS_PER_GROUP)
        row_shares = shares[group_rows].to(slopes.dtype).view(count, ROWS_PER_GROUP, 1)
        slopes[group_rows].view(count, ROWS_PER_GROUP, width).addcmul_(row_shares, rest[:, None])
    return losses, slopes[:rows] if hidden.requires_grad else None


def _even_chunk(rows: int, max_rows: int) -> int:
    """Return the number of rows per chunk: up to ``max_rows``, with chunks of about equal size."""
    return max(1, -(-rows // max(1, -(-rows // max_rows))))


# Maps hidden vectors (p, d) to logits (p, classes).
Head: TypeAlias = Callable[[Tensor], Tensor]


def head_log_probs(hidden: Tensor, targets: Tensor, head: Head, parameters: Sequence[Tensor], *, chunk: int) -> Tensor:
    """Return log softmax(head(hiddenᵢ)) at targetᵢ for any head. The backward pass recomputes each chunk's logits.

    Args:
        hidden: (P, d).
        targets: (P,) class indices.
        parameters: Parameters of ``head``, of which some may be trainable.
        chunk: Rows of ``hidden`` per chunk.

    Returns:
        (P,) in fp32, or fp64 for fp64 inputs.
    """
    trained = [p for p in parameters if p.requires_grad]
    return cast(Tensor, _HeadLogProbs.apply(hidden, targets, head, chunk, *trained))  # type: ignore[no-untyped-call]


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk: int, *trained: Tensor) -> Tensor:
        # Autograd detects in-place changes of saved parameters before the backward pass.
        ctx.save_for_backward(hidden, targets, *trained)
        ctx.head = head
        ctx.chunk = chunk
        ctx.trained = trained
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([log_probs(head(rows), wanted) for rows, wanted in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, *_ = ctx.saved_tensors
        _, grad_hidden, sums = _over_chunks(hidden, _log_probs_of(targets, ctx.head), grad, ctx.trained, ctx.chunk)
        return grad_hidden, None, None, None, *sums


# Maps a chunk of hidden vectors (p, d), and its slice of all rows, to values (p,).
Values: TypeAlias = Callable[[Tensor, slice], Tensor]


def _log_probs_of(targets: Tensor, head: Head) -> Values:
    return lambda part, rows: log_probs(head(part), targets[rows])


def _over_chunks(
    hidden: Tensor, values_of: Values, slopes: Tensor, trained: Sequence[Tensor], chunk: int
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Return values per chunk, and the gradients of Σ slopeᵢ · valueᵢ.

    Gradients are computed while a chunk's logits are in memory: for ``hidden`` if it requires one, and for the
    trainable parameters of the head.
    """
    needed = hidden.requires_grad
    grad_hidden = torch.empty_like(hidden) if needed else None
    sums = [torch.zeros_like(t) for t in trained]
    chunk_values = []
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        part = hidden[rows].detach().requires_grad_(needed)
        leaves = [*([part] if needed else []), *trained]
        with torch.set_grad_enabled(bool(leaves)):
            values = values_of(part, rows)
        chunk_values.append(values.detach())
        if not leaves:
            continue
        grads = list(torch.autograd.grad(values, leaves, slopes[rows]))
        if grad_hidden is not None:
            grad_hidden[rows] = grads.pop(0)
        for total, grad in zip(sums, grads, strict=True):
            total += grad
    return chunk_values, grad_hidden, sums


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, weights: Tensor, head: Head, parameters: Sequence[Tensor], *, chunk: int
) -> Tensor:
    """Return Σ weightᵢ · cross-entropy(head(hiddenᵢ), targetᵢ) for any head, computing each chunk's logits once.

    Args:
        hidden: (P, d).
        targets: (P,) class indices.
        weights: (P,).
        parameters: Parameters of ``head``, of which some may be trainable.
        chunk: Rows of ``hidden`` per chunk.

    Returns:
        Scalar in fp32, or fp64 for fp64 inputs.
    """
    return -chunked_sum(hidden, weights, _log_probs_of(targets, head), parameters, chunk=chunk)


def chunked_sum(hidden: Tensor, weights: Tensor, values: Values, parameters: Sequence[Tensor], *, chunk: int) -> Tensor:
    """Return Σ weightᵢ · valueᵢ as a scalar in fp32, or fp64 for fp64 inputs.

    See :func:`chunked_cross_entropy` for the arguments.
    """
    trained = [p for p in parameters if p.requires_grad]
    return cast(Tensor, _ChunkedSum.apply(hidden, weights, values, chunk, *trained))  # type: ignore[no-untyped-call]


class _ChunkedSum(torch.autograd.Function):
    """Computes the gradient in the forward pass, while a chunk's logits are in memory, and scales it in the backward
    pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, values_of: Values, chunk: int, *trained: Tensor) -> Tensor:
        weights = weights.to(loss_dtype(hidden))
        is_fp16 = hidden.dtype == torch.float16
        slopes = weights * FP16_SCALE if is_fp16 else weights
        values, grad_hidden, sums = _over_chunks(hidden, values_of, slopes, trained, chunk)
        total = hidden.new_zeros((), dtype=loss_dtype(hidden))
        for part, part_weights in zip(values, weights.split(chunk), strict=True):
            total += (part * part_weights).sum()
        ctx.save_for_backward(grad_hidden, *sums)
        ctx.is_fp16 = is_fp16
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *sums = ctx.saved_tensors
        grad = grad / FP16_SCALE if ctx.is_fp16 else grad
        scaled = None if grad_hidden is None else (grad_hidden * grad).to(grad_hidden.dtype)
        return scaled, None, None, None, *[(s * grad).to(s.dtype) for s in sums]


def logit_transform(config: PretrainedConfig) -> tuple[float, float]:
    """Return the scale (Cohere, Granite) and soft cap (Gemma, else 0) that a model applies to its head's outputs."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    return scale / (1.0 if divisor is None else float(divisor)), 0.0 if cap is None else float(cap)


def final_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Return the model's logits for its head's outputs."""
    scale, cap = logit_transform(model.config.get_text_config())
    if scale != 1.0:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability (P,) of each target (P,) for logits (P, classes)."""
    return -nn.functional.cross_entropy(logits.to(loss_dtype(logits)), targets, reduction="none")


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type that losses of these values are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class CausalObjective(Objective):
    """Loss over the labels of a batch, differentiable with respect to all trainable parameters.

    Args:
        model: Causal language model of transformers, with or without an adapter.
        loss: Loss of the labels' log-probabilities, cross-entropy by default.

    Attributes:
        chunked: False if the model applies an unknown operation between its backbone and its logits. Then the model
            computes the logits itself.
    """

    def __init__(self, model: PreTrainedModel, loss: Loss | None = None) -> None:
        self.model = model
        self.loss = loss or CrossEntropy()
        self.accumulator = getattr(self.loss, "accumulator", None)
        self.backbone = backbone_of(model)
        head = model.get_output_embeddings()
        self.chunked = head is not None and self.backbone is not model and _is_supported_head(model, head)
        self.head = head
        self.min_rough_rows = MIN_OUTLIER_ROWS
        # If the blocks' weights are int8, training may also multiply the head in int8. Evaluation uses its stored
        # weight.
        is_int8 = any(weight_scales(module) is not None for module in self.backbone.modules())
        self._int8 = self.chunked and _may_round(head) and is_int8

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Return the sum of the batch's losses as a scalar in fp32."""
        if isinstance(self.loss, CrossEntropy):
            return self._cross_entropy(batch)
        return self.loss(RowLogProbs.of(batch, self.token_log_probs(batch)))

    def units(self, rows: Sequence[Item]) -> int:
        """Return the divisor of a step's summed loss: the number of label tokens for cross-entropy."""
        return self.loss.units(rows)

    def token_log_probs(self, batch: MicroBatch) -> Tensor:
        """Return (P,) differentiable log-probabilities of the batch's ``targets`` in fp32."""
        return self.log_probs_of(self.label_outputs(batch), batch.targets)

    def log_probs_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (P,) log-probabilities of targets (P,) for :meth:`label_outputs`."""
        if not self.chunked:
            return log_probs(outputs, targets)
        if self._head_is_frozen():
            return self._frozen(outputs, targets)
        return head_log_probs(outputs, targets, self._logits, list(self.head.parameters()), chunk=self.chunk)

    def _cross_entropy(self, batch: MicroBatch) -> Tensor:
        """Return Σ weight · cross-entropy without recomputing logits in the backward pass."""
        outputs = self.label_outputs(batch)
        if self.chunked and not self._head_is_frozen():
            labels = (batch.targets, batch.weights)
            parameters = list(self.head.parameters())
            return chunked_cross_entropy(outputs, *labels, self._logits, parameters, chunk=self.chunk)
        values = self.log_probs_of(outputs, batch.targets)
        return -(values * batch.weights.to(values.dtype)).sum()

    @property
    def approximable(self) -> tuple[str, ...]:
        """Names of the applicable ``APPROXIMATIONS`` of the head."""
        if not (self.chunked and _is_plain_bf16(self.head) and self._head_is_frozen()):
            return ()
        rounded = ("int8_logits",) if _may_round(self.head) else ()
        if self.head.weight.shape[0] < MIN_CLASSES:
            return rounded if self._int8 else ()
        return *rounded, "summed_classes"

    @cached_property
    def _rough_head(self) -> RoughHead:
        return RoughHead.of(self.head.weight)

    def _frozen(self, outputs: Tensor, targets: Tensor) -> Tensor:
        transform = logit_transform(self.model.config.get_text_config())
        rough = None
        if loader.arithmetic().int8_logits and _may_round(self.head) and outputs.dtype == torch.bfloat16:
            rough = replace(self._rough_head, min_rows=self.min_rough_rows)
        scales = rough.scales if rough is not None and self._int8 else None
        weight = (self.head.weight, self.head.bias)
        blocks = block_weight(self.head)
        return frozen_head_log_probs(outputs, targets, *weight, *transform, scales=scales, blocks=blocks, rough=rough)

    @torch.no_grad()
    def evaluate_rows(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy (P,) of each label, and the predicted token (P,) as int64."""
        losses = []
        likeliest = []
        outputs = self.label_outputs(batch)
        chunk = self.chunk
        for rows, targets in zip(outputs.split(chunk), batch.targets.split(chunk), strict=True):
            logits = self.logits_of(rows).float()
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
            likeliest.append(logits.argmax(-1))
        return torch.cat(losses), torch.cat(likeliest)

    def logits_of(self, outputs: Tensor) -> Tensor:
        """Return logits (P, vocabulary) for :meth:`label_outputs`."""
        if not self.chunked:
            return outputs
        # Matrix libraries compile and cache a kernel per number of rows.
        missing = -len(outputs) % min(ROW_MULTIPLE, self.chunk) if outputs.device.type == "cpu" else 0
        if not missing:
            return self._logits(outputs)
        return self._logits(nn.functional.pad(outputs, (0, 0, 0, missing)))[: len(outputs)]

    def label_outputs(self, batch: MicroBatch) -> Tensor:
        """Return the backbone's outputs (P, d) at each distinct label position, in ascending order.

        If the head is not chunked, return logits (P, vocabulary) instead.
        """
        with enter_batch(batch) as run:
            if self.chunked:
                with outputs_at(self.model, run.predictor_indices):
                    outputs = self.backbone(**run.inputs, use_cache=False).last_hidden_state
            else:
                outputs = self.model(**run.inputs, use_cache=False).logits
            return cast(Tensor, outputs.flatten(0, 1).index_select(0, run.predictors))

    def _head_is_frozen(self) -> bool:
        """True if the head is a frozen linear layer on a supported device."""
        if type(self.head) not in (nn.Linear, BlockLinear) or self.head.weight.device.type not in FROZEN_CHUNK_BYTES:
            return False
        autocast = torch.is_autocast_enabled(self.head.weight.device.type)
        return not autocast and not any(p.requires_grad for p in self.head.parameters())

    def _logits(self, rows: Tensor) -> Tensor:
        return final_logits(self.model, self.head(rows))

    @property
    def chunk(self) -> int:
        """Number of labels per chunk of logits."""
        return _chunk(self.model)


@torch.no_grad()
def loss_of_outputs(model: PreTrainedModel, outputs: Tensor, targets: Tensor, *, int8: bool) -> float:
    """Return the mean cross-entropy of targets (P,) for the backbone's outputs (P, d).

    The head is computed as in training, with or without int8-quantized weights.
    """
    head = model.get_output_embeddings()
    if _is_plain_bf16(head):
        transform = logit_transform(model.config.get_text_config())
        rough = RoughHead.of(head.weight) if int8 and _may_round(head) else None
        scales = None if rough is None else rough.scales
        values = frozen_head_log_probs(outputs, targets, head.weight, head.bias, *transform, scales=scales, rough=rough)
    else:
        values = head_log_probs(outputs, targets, lambda rows: final_logits(model, head(rows)), [], chunk=_chunk(model))
    return -float(values.mean())


def _chunk(model: PreTrainedModel) -> int:
    """Return the number of labels per chunk, by the size of their fp32 logits on the model's device."""
    chunk_bytes = DEVICE_CHUNK_BYTES.get(model.device.type, CHUNK_BYTES)
    return max(1, chunk_bytes // (4 * int(model.config.get_text_config().vocab_size)))


def _may_round(head: nn.Module) -> bool:
    """True if the compiled kernel can compute a head's logits in int8. It requires dimensions divisible by four.

    Without the kernel, an int8 product would need two copies of the head in fp32.
    """
    weight = head.weight
    return _is_plain_bf16(head) and isinstance(weight, Tensor) and not any(size % 4 for size in weight.shape)


def _is_plain_bf16(head: nn.Module) -> bool:
    """True for an unmodified bf16 linear layer on a CPU."""
    return type(head) is nn.Linear and head.weight.dtype == torch.bfloat16 and head.weight.device.type == "cpu"


def _is_supported_head(model: PreTrainedModel, head: nn.Module) -> bool:
    """True if the head, applied to the backbone's outputs, reproduces the model's logits for a small number of tokens.

    Fake tensors have no logits to compare, so only sizes are checked.
    """
    text = model.config.get_text_config()
    real = model_has_values(model)
    width = getattr(head, "in_features", None)
    if not real and (width, getattr(head, "out_features", None)) == (text.hidden_size, text.vocab_size):
        return True
    tokens = torch.arange(8, device=model.device)[None] % text.vocab_size
    outputs: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        try:
            expected = model(**one_row(model, tokens), use_cache=False).logits[0].float()
        finally:
            hook.remove()
        if len(outputs) != 1:
            return False
        hidden = outputs[0][0]
        if width not in (None, hidden.shape[-1]):
            return False
        actual = final_logits(model, head(hidden)).float()
    rtol = 1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2
    return expected.shape == actual.shape and (not real or bool((expected - actual).norm() <= rtol * expected.norm()))
