"""Loss of models with one output per row: classes, numbers, and rewards of answer pairs.

The head of a decoder is applied to the last token of each row. In packed rows, all layers of an encoder above its
backbone are applied to the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deltaw.data.packing import MicroBatch
from deltaw.data.pixels import AnyExample
from deltaw.errors import UserError
from deltaw.hub.skeletons import has_values
from deltaw.kernels.layout import to_device
from deltaw.runtime.packed import without_cache
from deltaw.runtime.recognition import TOLERANCE
from deltaw.runtime.small_copy import measure_once
from deltaw.tasks.classification.regression_head import regression_head
from deltaw.tasks.preference.losses import PairLosses, StepMetrics
from deltaw.training.feed import enter_batch
from deltaw.training.objective import Objective


class LabelObjective(Objective):
    """Sum of a batch's losses: cross-entropy of classes, squared error of numbers, or Bradley-Terry loss of pairs.

    A decoder's output is taken at each row's last token, located by the row's length. Transformers locates it by the
    padding token, which fails if this is also the end token or is not defined.

    Args:
        model: Model of transformers with a head for the task, with or without an adapter.
        task: ``regression`` uses the squared error, relative to the scale of the labels, averaged over the targets. The
            other tasks use the cross-entropy of classes.
        label_scale: (targets,) scale of the labels that a finished regression was trained on. In training, the head
            knows it.

    Attributes:
        pooled: True if the head is applied here to each row's last token, as for decoders.

    Raises:
        UserError: if the model's output for a row depends on trailing padding.
    """

    accumulator: StepMetrics

    def __init__(self, model: PreTrainedModel, task: str, label_scale: tuple[float, ...] | None = None) -> None:
        self.model = model
        self.task = task
        self._label_scale = label_scale
        self.accumulator = StepMetrics()
        self.head = None if task == "image-classification" else head_of_last_token(model)
        self.pooled = self.head is not None
        if not self.pooled and task != "image-classification":
            _check_padding(model)

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Return the sum of the losses over the rows or pairs, a scalar in fp32."""
        predictions = self.predictions(batch)
        if batch.sizes:
            losses = pair_losses(predictions, batch.targets)
            self.accumulator.add(losses)
            return losses.losses.sum()
        if self.task == "regression":
            errors = (predictions - batch.targets.to(predictions.dtype)).reshape(len(batch.targets), -1)
            scales = self.label_scale or (1.0,) * errors.shape[1]
            columns = zip(errors.unbind(1), scales, strict=True)
            return torch.stack([(column / scale).square() for column, scale in columns]).mean(0).sum()
        return nn.functional.cross_entropy(predictions, batch.targets, reduction="sum")

    @property
    def label_scale(self) -> tuple[float, ...] | None:
        """Scale of each target of a regression, by which the loss divides errors. None if it is unknown."""
        if self._label_scale is not None:
            return self._label_scale
        head = regression_head(self.model)
        return None if head is None or not head.is_standardized else head.units.scale

    def units(self, rows: Sequence[AnyExample]) -> int:
        """Return the number of labels: one per row or pair."""
        return sum(row.label_count for row in rows)

    def pair_losses(self, batch: MicroBatch) -> PairLosses:
        """Return the losses of the pairs of a batch."""
        return pair_losses(self.predictions(batch), batch.targets)

    def predictions(self, batch: MicroBatch) -> Tensor:
        """Return logits (rows, classes), or numbers (rows,) or (rows, targets), in fp32 (fp64 for an fp64 model)."""
        with enter_batch(batch) as run:
            inputs = dict(run.inputs)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            if self.head is not None:
                logits = self.head(self._token_vectors(run, -1))
            elif "packed_layout" in inputs:
                logits = _apply_head(self.model, self._token_vectors(run, 0))
            else:
                logits = self.model(**inputs).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.squeeze(-1) if self.task == "regression" and logits.shape[-1] == 1 else logits

    def evaluate_rows(self, batch: MicroBatch) -> Tensor:
        return self.predictions(batch)

    def _token_vectors(self, batch: MicroBatch, index: int) -> Tensor:
        """Return the last hidden states (rows, width) at the token of each row with this index."""
        hidden = _hidden(self.model, batch.inputs)
        token_indices = torch.tensor([int(member.indices[index]) for member in batch.members])
        return hidden.flatten(0, 1).index_select(0, to_device(token_indices, hidden.device))


def check_outputs(outputs: int | None, required: int, kind: str, model: str = "model") -> None:
    """Reject a head with another number of outputs.

    Args:
        required: Required number.
        kind: Kind of the outputs, for the message.
        model: Model reference, for the message.
    """
    if outputs != required:
        hint = f"take a model without a head, or with {required}; for classes set task: sequence-classification"
        message = f"the model's head has {outputs} outputs, but a {kind} has {required}"
        raise UserError(message, location=model, hint=hint)


def pair_losses(rewards: Tensor, margins: Tensor) -> PairLosses:
    """Return Bradley-Terry losses and rewards of pairs.

    With the head's output r, the loss is −log σ(r(chosen) − r(rejected) − margin) (arXiv 2307.09288, eq. 2; without a
    margin arXiv 2203.02155, eq. 1).

    Args:
        rewards: (2 · pairs, 1), with the rows of a pair adjacent.
        margins: (2 · pairs,), equal for both rows of a pair.

    Raises:
        UserError: if the head has more than one output.
    """
    check_outputs(rewards.shape[-1], 1, "reward")
    rewards = rewards.view(-1, 2)
    margins = margins.view(-1, 2)[:, 0].to(rewards.dtype)
    losses = -nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins)
    return PairLosses(losses, rewards.detach())


def head_of_last_token(model: PreTrainedModel) -> nn.Module | None:
    """Return a decoder's classification head if applying it to the last token reproduces the model's logits.

    The check uses rows without padding. The model's logits must match the outputs of the last of their tokens.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module) or model.base_model is model:
        return None
    ids = _trial_ids(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        outputs = head(_hidden(model, inputs))
        # Without a padding token, transformers accepts only one row per batch.
        single_rows = ({"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids)
        logits = torch.cat([model(**row, **without_cache(model)).logits for row in single_rows])
    if logits.shape != outputs[:, -1].shape:
        return None
    nearest = (outputs - logits[:, None]).float().norm(dim=-1).argmin(1)
    at_last = not has_values(model) or bool((nearest == ids.shape[1] - 1).all())
    return head if at_last and _close(logits, outputs[:, -1], model.dtype) else None


def _hidden(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the last hidden states (rows, tokens, width) of a decoder."""
    return model.base_model(**inputs, **without_cache(model)).last_hidden_state


def _check_padding(model: PreTrainedModel) -> None:
    """Reject a model if trailing padding changes its output for a row.

    In 16 bits, outputs at two lengths also differ by rounding, by a large relative amount if they are small sums of
    large terms. The difference is therefore compared with the effect of the same tokens without a mask.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return  # the output is read at the end token, which the tokenizer appends to each row
    ids = _trial_ids(model)
    short = ids[:, :5]
    padded = torch.ones_like(ids)
    padded[:, 5:] = 0
    with torch.no_grad():
        unpadded_logits = model(input_ids=short, attention_mask=torch.ones_like(short)).logits
        padded_logits = model(input_ids=ids, attention_mask=padded).logits
        unmasked_logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if not _close(unpadded_logits, padded_logits, model.dtype, moved=unmasked_logits):
        message = f"the outputs of {type(model).__name__} change when padding follows a row"
        hint = "choose another model: this one cannot batch rows of different lengths"
        raise UserError(message, location="model", hint=hint)


def _trial_ids(model: PreTrainedModel) -> Tensor:
    """Return (4, 8) token ids without padding tokens."""
    config = model.config.get_text_config()
    ids = torch.arange(32, device=model.device).view(4, 8) + 3
    ids = ids % config.vocab_size
    pad = getattr(config, "pad_token_id", None)
    return ids if pad is None else torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)


def _close(left: Tensor, right: Tensor, dtype: torch.dtype, moved: Tensor | None = None) -> bool:
    """True if outputs of the same rows are equal except for rounding.

    Args:
        dtype: Type of the model. Its head may compute in another one.
        moved: For 16-bit models, outputs of changed rows. A tenth of their difference counts as rounding.
    """
    if left.shape != right.shape:
        return False
    exact = dtype in (torch.float32, torch.float64)
    left = left.float()
    right = right.float()
    bound = (1e-4 if exact else 4e-2) * left.norm() + 1e-6
    if moved is not None and not exact:
        bound = torch.maximum(bound, 0.1 * (left - moved.float()).norm())
    return bool((left - right).norm() <= bound)


def _apply_head(model: PreTrainedModel, vectors: Tensor) -> Tensor:
    """Return the model's outputs for first-token vectors (rows, width), computed by all layers above the backbone."""
    base: Any = model.base_model
    hidden = vectors[:, None]

    def read(*_: Any, **__: Any) -> BaseModelOutputWithPooling:
        pooler = getattr(base, "pooler", None)
        return BaseModelOutputWithPooling(hidden, None if pooler is None else pooler(hidden))

    ids = torch.zeros(len(vectors), 1, dtype=torch.int64, device=vectors.device)
    original_forward = vars(base).get("forward")
    base.forward = read
    try:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    finally:
        if original_forward is None:
            del base.forward
        else:
            base.forward = original_forward


_DIFFERENCES: dict[Any, float] = {}


def uses_first_token(model: PreTrainedModel) -> bool:
    """True if the head depends only on a row's first token. This is tested on a small copy of the model."""
    if model.base_model is model:
        return False
    try:
        return measure_once(_DIFFERENCES, model, _first_token_error) < TOLERANCE
    except Exception:  # any error of a third-party model means that it needs padded rows
        return False


@torch.no_grad()
def _first_token_error(small: PreTrainedModel) -> float:
    """Return the relative difference of norms between outputs from first tokens only and the model's outputs."""
    ids = (torch.arange(24).view(3, 8) * 5 + 3) % small.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = small(**inputs).logits
    computed = _apply_head(small, small.base_model(**inputs).last_hidden_state[:, 0])
    return float((computed - expected).norm() / expected.norm())
