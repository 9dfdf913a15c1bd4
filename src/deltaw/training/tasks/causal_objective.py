"""The language-model objective: cross-entropy at the label positions and nowhere else.

The output head is applied only to the outputs that predict a label, a chunk of them at a time, and each
chunk's gradient is taken as soon as its loss is known: all logits never exist at once.

Knows a model's backbone and head; not data files, optimizers or schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.data.example import Example
from deltaw.data.packing import Batch
from deltaw.hub.skeleton import has_values
from deltaw.kernels import linear as products
from deltaw.kernels.rows import cross_entropy_
from deltaw.lora.layers_int8 import weight_scales
from deltaw.runtime.packed import backbone_of, one_row, outputs_at

# Bytes that the fp32 logits of one chunk may take; the soft-max and its gradient take about twice that again.
CHUNK_BYTES = 32 * 2**20
# Bytes of a frozen head's logits at a time, which become their own gradient. The head's weight is read anew
# for each chunk, so that small ones are slow.
FROZEN_CHUNK_BYTES = 24 * 2**20


class CausalObjective:
    """Sum of cross-entropies over a batch's labels, with gradients for whatever is trained.

    Args:
        model: a causal language model of transformers, with or without an adapter.

    Attributes:
        chunked: whether the head is applied in chunks; False where the model does something between its
            backbone and its logits that is not known here, and its own logits are taken instead.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.backbone = backbone_of(model)
        head = model.get_output_embeddings()
        self.chunked = head is not None and self.backbone is not model and _head_is_known(model, head)
        self.head = head
        # What the head's rows are divided by to be rounded to bytes, where the blocks' weights are bytes. The
        # head's weight stays as it is, for gradients and for evaluation.
        self._scales: Tensor | None = None
        if self.chunked and _may_round(head) and _is_int8(self.backbone):
            self._scales = products.scales_of_rows(head.weight.detach())

    def __call__(self, batch: Batch) -> Tensor:
        """Sum over labels of weight · cross-entropy, a scalar in fp32."""
        picked = self._picked(batch)
        if not self.chunked:
            return _cross_entropy_sum(picked, batch.targets, batch.weights)
        if self._head_is_frozen():
            config = self.model.config.get_text_config()
            return frozen_head_cross_entropy(
                picked,
                batch.targets,
                batch.weights,
                self.head.weight,
                self.head.bias,
                *_logits_change(config),
                scales=self._scales,
            )
        return chunked_cross_entropy(
            picked,
            batch.targets,
            batch.weights,
            self._logits,
            list(self.head.parameters()),
            chunk=self.chunk,
        )

    def units(self, rows: Sequence[Example]) -> int:
        """Label tokens of the rows, which a step's sum of losses is divided by."""
        return sum(row.label_count for row in rows)

    @torch.no_grad()
    def evaluate_rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each label its cross-entropy (P,), and whether it is the likeliest token (P,)."""
        losses, right = [], []
        for rows, targets in zip(
            self._picked(batch).split(self.chunk), batch.targets.split(self.chunk), strict=True
        ):
            logits = (self._logits(rows) if self.chunked else rows).float()
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
            right.append(logits.argmax(-1) == targets)
        return torch.cat(losses), torch.cat(right)

    def _picked(self, batch: Batch) -> Tensor:
        """(P, d) outputs of the backbone that predict labels; (P, vocabulary) logits where not chunked."""
        if self.chunked:
            with outputs_at(self.model, batch.asked):
                outputs = self.backbone(**batch.inputs, use_cache=False).last_hidden_state
        else:
            outputs = self.model(**batch.inputs, use_cache=False).logits
        return outputs.flatten(0, 1).index_select(0, batch.predictors)

    def _head_is_frozen(self) -> bool:
        """Whether the head is a plain matrix that nobody trains, on a processor."""
        if type(self.head) is not nn.Linear or self.head.weight.device.type != "cpu":
            return False
        return not any(p.requires_grad for p in self.head.parameters()) and not torch.is_autocast_enabled(
            "cpu"
        )

    def _logits(self, rows: Tensor) -> Tensor:
        return final_logits(self.model, self.head(rows))

    @property
    def chunk(self) -> int:
        """Labels whose logits are there at a time."""
        return max(1, CHUNK_BYTES // (4 * self.model.config.get_text_config().vocab_size))


@torch.no_grad()
def loss_of_outputs(model: PreTrainedModel, outputs: Tensor, targets: Tensor, *, int8: bool) -> float:
    """Mean cross-entropy of targets (P) from the backbone's outputs (P, d), the head as training computes it
    with weights in int8 or without."""
    head = model.get_output_embeddings()
    weights = torch.ones(len(targets))
    if _may_round(head):
        change = _logits_change(model.config.get_text_config())
        scales = products.scales_of_rows(head.weight) if int8 else None
        total = frozen_head_cross_entropy(
            outputs, targets, weights, head.weight, head.bias, *change, scales=scales
        )
    else:
        chunk = max(1, CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size))
        total = chunked_cross_entropy(
            outputs, targets, weights, lambda rows: final_logits(model, head(rows)), [], chunk=chunk
        )
    return float(total) / len(targets)


def _is_int8(model: nn.Module) -> bool:
    return any(weight_scales(module) is not None for module in model.modules())


def _may_round(head: nn.Module) -> bool:
    """Whether logits can be computed in int8: of a plain bf16 matrix, on a processor."""
    return (
        type(head) is nn.Linear and head.weight.dtype == torch.bfloat16 and head.weight.device.type == "cpu"
    )


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    *,
    chunk: int,
) -> Tensor:
    """Σ weightᵢ · cross-entropy(head(hiddenᵢ), targetᵢ) without ever holding all logits.

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
        total = hidden.new_zeros((), dtype=_loss_dtype(hidden))
        sums = [torch.zeros_like(t) for t in trained]
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach().requires_grad_(hidden.requires_grad)
            with torch.set_grad_enabled(bool(wanted)):
                loss = _cross_entropy_sum(head(part), targets[rows], weights[rows])
            total += loss.detach()
            if wanted:
                leaves = [t for t in (part, *trained) if t.requires_grad]
                grads = list(torch.autograd.grad(loss, leaves))
                if grad_hidden is not None:
                    grad_hidden[rows] = grads.pop(0)
                for kept, new in zip(sums, grads, strict=True):
                    kept += new
        ctx.grad_hidden, ctx.sums = grad_hidden, sums
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        grad_hidden = None if ctx.grad_hidden is None else (ctx.grad_hidden * grad).to(ctx.grad_hidden.dtype)
        return grad_hidden, None, None, None, None, *[(s * grad).to(s.dtype) for s in ctx.sums]


def frozen_head_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    *,
    scales: Tensor | None = None,
) -> Tensor:
    """Σ weightᵢ · cross-entropy of a frozen linear head, in chunks whose logits become their own gradient.

    Args:
        hidden: (P, d). targets: (P). weights: (P). head: (classes, d). bias: (classes) or None.
        scale, softcap: what becomes of the logits, as in :func:`deltaw.kernels.rows.cross_entropy_`.
        scales: (classes): the logits are computed in int8, the head's rows divided by these, and so is their
            gradient where there are rows enough to be worth it.

    Returns:
        a scalar in fp32, or fp64 for fp64 inputs.
    """
    return _FrozenHead.apply(hidden, targets, weights, head, bias, scale, softcap, scales)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, weights, head, bias, scale, softcap, scales):  # type: ignore[override]
        wanted = hidden.requires_grad
        weights = weights.to(_loss_dtype(hidden))
        grad_hidden = torch.empty_like(hidden) if wanted else None
        total = hidden.new_zeros((), dtype=_loss_dtype(hidden))
        chunk = max(1, FROZEN_CHUNK_BYTES // (hidden.element_size() * head.shape[0]))
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits, _ = products.linear(hidden[part], head, scale=scales, bias=bias)
            losses = cross_entropy_(
                logits, targets[part], weights[part], scale=scale, softcap=softcap, grad=wanted
            )
            total += (losses * weights[part]).sum()
            if grad_hidden is None:
                continue
            if scales is not None and products.can_round_classes(logits, head):
                grad_hidden[part] = products.class_gradient_(logits, targets[part], head, scales)
            else:
                grad_hidden[part] = products.linear_backward(logits, head)[0]
        ctx.grad_hidden = grad_hidden
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        return ctx.grad_hidden.mul_(grad), None, None, None, None, None, None, None


def _logits_change(config: PretrainedConfig) -> tuple[float, float]:
    """What a model does to its head's outputs: a scale (Cohere, Granite), and a soft cap (Gemma) or 0."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    return scale / (1.0 if divisor is None else float(divisor)), 0.0 if cap is None else float(cap)


def final_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """The model's logits from its head's outputs."""
    scale, cap = _logits_change(model.config.get_text_config())
    if scale != 1.0:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


def _head_is_known(model: PreTrainedModel, head: nn.Module) -> bool:
    """Try a few tokens: the head on the backbone's outputs must give the model's own logits."""
    tokens = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        inputs = one_row(model, tokens)
        own = model(**inputs, use_cache=False).logits[0].float()
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        if hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
            return False
        ours = final_logits(model, head(hidden)).float()
    if own.shape != ours.shape:
        return False
    if not has_values(model):
        return True  # that the shapes fit is all that can be seen on fake tensors
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((own - ours).norm() <= tolerance * own.norm())


def _cross_entropy_sum(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(logits.to(_loss_dtype(logits)), targets, reduction="none")
    return (losses * weights.to(losses.dtype)).sum()


def _loss_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
