"""The language-model objective: a loss of the label tokens' log-probabilities, cross-entropy by default.

The output head is applied only to the outputs that predict a label, a chunk of them at a time
(:mod:`deltaw.training.tasks.causal_head`).

Knows a model's backbone and head; not data files, optimizers or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.data.packing import Batch, Item
from deltaw.hub.skeleton import has_values
from deltaw.kernels import loader
from deltaw.kernels.head_gradient import CLASSES
from deltaw.lora.layers_blocks import BlockLinear
from deltaw.lora.stored import block_weight, weight_scales
from deltaw.runtime.packed import backbone_of, one_row, outputs_at
from deltaw.training.losses import CrossEntropy, Loss, RowLogProbs, Watched
from deltaw.training.tasks.causal_head import (
    CHUNK_BYTES,
    DEVICE_CHUNK_BYTES,
    chunked_cross_entropy,
    cross_entropy_sum,
    final_logits,
    frozen_head_log_probs,
    head_log_probs,
    log_probs,
    logits_change,
)
from deltaw.training.tasks.rough_logits import ROWS_FOR_APART, RoughHead


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
        self._int8 = self.chunked and _may_round(head) and _is_int8(self.backbone)

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
        picked = self._picked(batch)
        if not self.chunked:
            return log_probs(picked, batch.targets)
        if self._head_is_frozen():
            return self._frozen(picked, batch.targets)
        parameters = list(self.head.parameters())
        return head_log_probs(picked, batch.targets, self._logits, parameters, chunk=self.chunk)

    def _cross_entropy(self, batch: Batch) -> Tensor:
        """Σ weight · cross-entropy: as the loss of :meth:`token_log_probs`, without logits computed twice."""
        picked = self._picked(batch)
        if not self.chunked:
            return cross_entropy_sum(picked, batch.targets, batch.weights)
        if self._head_is_frozen():
            values = self._frozen(picked, batch.targets)
            return -(values * batch.weights.to(values.dtype)).sum()
        parameters = list(self.head.parameters())
        return chunked_cross_entropy(
            picked, batch.targets, batch.weights, self._logits, parameters, chunk=self.chunk
        )

    @property
    def approximable(self) -> tuple[str, ...]:
        """What of the head can be approximate: those of ``APPROXIMATIONS`` that would change something."""
        if not (self.chunked and _may_round(self.head) and self._head_is_frozen()):
            return ()
        if self.head.weight.shape[0] < CLASSES:
            return ("int8_logits",) if self._int8 else ()
        return "int8_logits", "summed_classes"

    @cached_property
    def _rough_head(self) -> RoughHead:
        return RoughHead.of(self.head.weight)

    def _frozen(self, picked: Tensor, targets: Tensor) -> Tensor:
        change = logits_change(self.model.config.get_text_config())
        rough = None
        if loader.arithmetic().int8_logits and _may_round(self.head) and picked.dtype == torch.bfloat16:
            rough = replace(self._rough_head, least_rows=self.rough_rows)
        return frozen_head_log_probs(
            picked,
            targets,
            self.head.weight,
            self.head.bias,
            *change,
            scales=rough.scales if rough is not None and self._int8 else None,
            blocks=block_weight(self.head),
            rough=rough,
        )

    @torch.no_grad()
    def evaluate_rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each label its cross-entropy (P,), and the likeliest token in its place, int64 (P,)."""
        losses, likeliest = [], []
        for rows, targets in zip(
            self._picked(batch).split(self.chunk), batch.targets.split(self.chunk), strict=True
        ):
            logits = (self._logits(rows) if self.chunked else rows).float()
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
            likeliest.append(logits.argmax(-1))
        return torch.cat(losses), torch.cat(likeliest)

    @torch.no_grad()
    def label_outputs(self, batch: Batch) -> Tensor:
        """What :meth:`logits_of` takes, for each distinct label position of the batch in ascending order."""
        return self._picked(batch)

    @torch.no_grad()
    def logits_of(self, outputs: Tensor) -> Tensor:
        """(P, vocabulary) logits of :meth:`label_outputs`."""
        return self._logits(outputs) if self.chunked else outputs

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
        if type(self.head) not in (nn.Linear, BlockLinear) or self.head.weight.device.type != "cpu":
            return False
        return not any(p.requires_grad for p in self.head.parameters()) and not torch.is_autocast_enabled(
            "cpu"
        )

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
    if _may_round(head):
        change = logits_change(model.config.get_text_config())
        rough = RoughHead.of(head.weight) if int8 else None
        scales = None if rough is None else rough.scales
        values = frozen_head_log_probs(
            outputs, targets, head.weight, head.bias, *change, scales=scales, rough=rough
        )
    else:
        logits = lambda rows: final_logits(model, head(rows))  # noqa: E731
        values = head_log_probs(outputs, targets, logits, [], chunk=_chunk(model))
    return -float(values.mean())


def _chunk(model: PreTrainedModel) -> int:
    """Labels whose fp32 logits fit in what a chunk may take on the model's device."""
    room = DEVICE_CHUNK_BYTES.get(model.device.type, CHUNK_BYTES)
    return max(1, room // (4 * model.config.get_text_config().vocab_size))


def _is_int8(model: nn.Module) -> bool:
    return any(weight_scales(module) is not None for module in model.modules())


def _may_round(head: nn.Module) -> bool:
    """Whether logits can be computed in int8: of a plain bf16 matrix, on a processor."""
    return (
        type(head) is nn.Linear and head.weight.dtype == torch.bfloat16 and head.weight.device.type == "cpu"
    )


def _head_is_known(model: PreTrainedModel, head: nn.Module) -> bool:
    """Try a few tokens: the head on the backbone's outputs must give the model's own logits.

    On fake tensors there are no logits to compare: sizes that fit are all that can be seen.
    """
    text = model.config.get_text_config()
    sizes = getattr(head, "in_features", None), getattr(head, "out_features", None)
    if not has_values(model) and sizes == (text.hidden_size, text.vocab_size):
        return True
    tokens = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
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
        if hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
            return False
        ours = final_logits(model, head(hidden)).float()
    if own.shape != ours.shape:
        return False
    if not has_values(model):
        return True  # that the shapes fit is all that can be seen on fake tensors
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((own - ours).norm() <= tolerance * own.norm())
