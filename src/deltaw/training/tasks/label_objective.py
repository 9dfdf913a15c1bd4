"""The objective of labeled rows: cross-entropy of classes, the squared error of numbers, or of pairs the
likelihood that the preferred one wins.

A decoder's output is read at each row's last token, found by the row's length. Transformers finds it by the
id of the padding token, which fails where that is also the end token, or where there is none.

Knows models with a head; not data files, optimizers or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.data.label_batches import LabelBatch
from deltaw.data.labels import AnyExample
from deltaw.errors import UserError
from deltaw.training.preference_losses import PairLosses, StepMetrics


class LabelObjective:
    """Sum of a batch's losses, with gradients for whatever is trained.

    Args:
        model: of transformers with a head for the task, with or without an adapter.
        task: ``regression`` takes the squared error of one output; the others the cross-entropy of classes.

    Attributes:
        pooled: whether the head is applied here to each row's last token, as is right for a decoder.

    Raises:
        UserError: the model's output for a row depends on the padding behind it, or a regression's head has
            more than one output.
    """

    watched: StepMetrics

    def __init__(self, model: PreTrainedModel, task: str) -> None:
        self.model = model
        self.task = task
        self.watched = StepMetrics()
        if task == "regression" and model.config.num_labels != 1:
            raise UserError(
                f"the model's head has {model.config.num_labels} outputs, and a regression has one",
                where="model",
                hint="load the model for task: regression, or set task: sequence-classification",
            )
        self.head = None if task == "image-classification" else _head_of_last_token(model)
        self.pooled = self.head is not None
        if not self.pooled and task != "image-classification":
            _check_padding(model)

    def __call__(self, batch: LabelBatch) -> Tensor:
        """Sum over rows of the cross-entropy (nats), or of the squared error; a scalar in fp32."""
        predictions = self.predictions(batch)
        if batch.pairs:
            found = losses_of_pairs(predictions, batch.targets)
            self.watched.add(found)
            return found.losses.sum()
        if self.task == "regression":
            return (predictions - batch.targets.to(predictions.dtype)).square().sum()
        return nn.functional.cross_entropy(predictions, batch.targets, reduction="sum")

    def units(self, rows: Sequence[AnyExample]) -> int:
        """Labels of the rows: one each, or one a pair."""
        return sum(row.label_count for row in rows)

    def predictions(self, batch: LabelBatch) -> Tensor:
        """Logits (rows, classes), or numbers (rows,) of a regression; in fp32 (fp64 for an fp64 model)."""
        inputs = {
            name: value.to(self.model.dtype) if value.is_floating_point() else value
            for name, value in batch.inputs.items()
        }
        if self.head is not None:
            logits = _at_last_token(self.model, self.head, inputs)
        else:
            logits = self.model(**inputs).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.squeeze(-1) if self.task == "regression" else logits


def losses_of_pairs(rewards: Tensor, margins: Tensor) -> PairLosses:
    """Bradley-Terry losses and the rewards of pairs.

    With r the head's one output, −log σ(r of the chosen − r of the rejected − margin) (arXiv 2307.09288, eq.
    2; without a margin, arXiv 2203.02155, eq. 1).

    Args:
        rewards: (2 pairs, 1), a pair's rows one after the other. margins: (2 pairs,), the same for both.

    Raises:
        UserError: the head has another number of outputs.
    """
    if rewards.shape[-1] != 1:
        raise UserError(
            f"the model's head has {rewards.shape[-1]} outputs, and a reward is one number",
            where="model",
            hint="take a model without a head",
        )
    rewards = rewards.view(-1, 2)
    margins = margins.view(-1, 2)[:, 0].to(rewards.dtype)
    losses = -nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins)
    return PairLosses(losses, rewards.detach())


def start_at_mean(model: nn.Module, new_modules: Sequence[str], labels: Sequence[float]) -> bool:
    """Set the bias of a regression's new head to the mean of the training labels.

    Labels stay as they are, so that predictions and errors are in the user's unit. A new head says about 0
    whatever it sees; were labels around 80, say, the first steps would go into moving all outputs there, by
    way of whatever is trained. With the mean as bias, training begins at the best constant answer.

    Args:
        new_modules: names of the modules that were not in the model's files.
        labels: of the rows to train on.

    Returns:
        whether there was a bias to set; decoders' heads have none.
    """
    for name in reversed(list(new_modules)):
        module = model.get_submodule(name)
        bias = getattr(module, "bias", None)
        if getattr(module, "out_features", None) == 1 and isinstance(bias, Tensor):
            with torch.no_grad():
                bias.fill_(sum(labels) / len(labels))
            return True
    return False


def _head_of_last_token(model: PreTrainedModel) -> nn.Module | None:
    """The head of a decoder for classification, where applying it to the last token gives the model's logits.

    That is tried on one row without padding, on which both must agree.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module) or model.base_model is model:
        return None
    ids = _trial_ids(model, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        own = model(**inputs).logits
        ours = _at_last_token(model, head, inputs)
        agree = own.shape == ours.shape and bool(_close(own, ours))
    return head if agree else None


def _at_last_token(model: PreTrainedModel, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The head's outputs (rows, classes) at each row's last token, before the padding."""
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    hidden = model.base_model(**inputs, **extra).last_hidden_state
    last = inputs["attention_mask"].sum(1) - 1
    return head(hidden[torch.arange(len(last), device=hidden.device), last])


def _check_padding(model: PreTrainedModel) -> None:
    """Refuse a model whose output for a row depends on the padding behind it."""
    if getattr(model.config, "is_encoder_decoder", False):
        return  # these answer at the end token, which the tokenizer puts at the end of each row
    ids = _trial_ids(model, 8)
    short = ids[:, :5]
    padded = torch.ones_like(ids)
    padded[:, 5:] = 0
    with torch.no_grad():
        alone = model(input_ids=short, attention_mask=torch.ones_like(short)).logits
        behind = model(input_ids=ids, attention_mask=padded).logits
        agree = alone.shape == behind.shape and bool(_close(alone, behind))
    if not agree:
        raise UserError(
            f"the outputs of {type(model).__name__} change when padding follows a row",
            where="model",
            hint="choose another model: rows of different lengths could not go through it together",
        )


def _trial_ids(model: PreTrainedModel, count: int) -> Tensor:
    """(1, count) token ids, none of them that of padding."""
    config = model.config.get_text_config()
    ids = torch.arange(count, device=model.device)[None] + 3
    ids = ids % config.vocab_size
    pad = getattr(config, "pad_token_id", None)
    return ids if pad is None else torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)


def _close(left: Tensor, right: Tensor) -> Tensor:
    tolerance = 1e-4 if left.dtype in (torch.float32, torch.float64) else 4e-2
    left, right = left.float(), right.float()
    return (left - right).norm() <= tolerance * left.norm() + 1e-6
