"""Drift: change of the model's answers to general prompts by fine-tuning.

Measured on the answers of the base model (:mod:`deltaw.training.evaluation.general`): change of their loss,
Kullback-Leibler divergence from the base model, and share of tokens that the fine-tuned model still prefers. A
measurement takes two forward passes over about 1,300 label tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.data.example import Example
from deltaw.hub.skeletons import has_values
from deltaw.progress import track_progress
from deltaw.training.batcher import Batcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.losses import in_fp64

# Warn if the loss rises by more than this, in nats per token. A model that answers every question with a label of its
# task differs mostly at the first token. About 4 nats there are 0.1 nats per token of an answer with 40 tokens.
LARGE = 0.1


@dataclass(frozen=True)
class Drift:
    """Measured drift on general answers.

    Attributes:
        base_loss: Mean cross-entropy of the base model on its answers, in nats per token.
        loss: Mean cross-entropy of the fine-tuned model on the same answers.
        divergence: Mean KL(base model ‖ fine-tuned model) over the answers' tokens, in nats. None if the base model was
            not available at the same time.
        same: Share of the tokens for which both models prefer the same next token.
        answers: Number of answers.
        tokens: Number of tokens in the answers.
        start_loss: Loss of the adapter that the run started from, or None if it started from the base model.
    """

    base_loss: float
    loss: float
    divergence: float | None
    same: float
    answers: int
    tokens: int
    start_loss: float | None = None

    @property
    def change(self) -> float:
        """Increase of the loss in nats per token."""
        return self.loss - self.base_loss

    @property
    def large(self) -> bool:
        """True if the drift is worth a warning, also if it is not finite."""
        return not self.change <= LARGE

    def as_dict(self) -> dict[str, object]:
        """Return JSON values, with None for numbers that are not finite."""
        numbers = {**asdict(self), "change": self.change}
        return {name: value if value is None or math.isfinite(value) else None for name, value in numbers.items()}

    def lines(self) -> list[str]:
        """Return a description of the drift, with advice if it is large."""
        divergence = "" if self.divergence is None else f", KL {self.divergence:.2f}"
        loss = f"loss {self.base_loss:.2f} → {self.loss:.2f} nats/token ({self.change:+.2f}{divergence})"
        lines = [f"drift: general answers' {loss}; {self.same:.0%} of {self.tokens:,} tokens unchanged"]
        if self.start_loss is not None and math.isfinite(self.start_loss):
            lines.append(f"  {self.loss - self.start_loss:+.2f} nats/token of it since the adapter of start_from")
        if self.large:
            effect = "the model may answer other questions worse than the base model"
            advice = "a lower train.learning_rate, fewer train.epochs, or general rows in the data"
            lines.append(f"  this is large: {effect}. Try train.keep_general: 1, {advice}")
        return lines


BATCH_TOKENS = 4096

# Creates a context that changes the model.
OpenContext: TypeAlias = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class BaseLosses:
    """Losses and preferred tokens of the base model for each label of its answers."""

    answers: Sequence[Example]
    losses: Tensor
    choices: Tensor


@torch.no_grad()
def base_losses(
    model: PreTrainedModel, answers: Sequence[Example], batcher: Batcher, running: OpenContext
) -> BaseLosses:
    """Measure the base model before a training that overwrites its parameters.

    Args:
        model: Base model.
        answers: Its answers to general prompts.
        batcher: Batcher for the answers.
        running: Context in which the model accepts the batches of ``batcher``.
    """
    with running():
        drift_model = _DriftModel(model, answers, batcher)
    losses = []
    choices = []
    for chunk in drift_model.parts():
        _, loss, choice = drift_model.of_labels(chunk)
        losses.append(loss.cpu())
        choices.append(choice.cpu())
    return BaseLosses(answers, torch.cat(losses), torch.cat(choices))


@torch.no_grad()
@track_progress("measuring drift")
def measure_drift(
    model: PreTrainedModel,
    answers: Sequence[Example],
    batcher: Batcher,
    *,
    base: OpenContext | BaseLosses,
    running: OpenContext,
    render: Callable[[Example], Example] = lambda example: example,
) -> Drift:
    """Compare the fine-tuned model with its base model on the base model's answers.

    Args:
        model: Fine-tuned model.
        answers: Answers of the base model.
        batcher: Batcher for the answers.
        base: Context in which the model computes as the base model, or stored losses of the base model. The divergence
            is not measured with stored losses.
        running: Context in which the model accepts the batches of ``batcher``.
        render: Renders an example for the fine-tuned model.
    """
    base_model = None
    if not isinstance(base, BaseLosses):
        with base(), running():
            base_model = _DriftModel(model, answers, batcher)
    if base_model is not None and not has_values(model):
        tuned_model = base_model  # in a dry run on fake tensors both need the same memory
    else:
        with running():
            tuned_model = _DriftModel(model, [render(example) for example in answers], batcher, base_model)
    sums = torch.zeros(4, dtype=torch.float64)
    for chunk in tuned_model.parts():
        log_probs, loss, chosen = tuned_model.of_labels(chunk)
        if isinstance(base, BaseLosses):
            base_loss = base.losses[chunk]
            base_choice = base.choices[chunk]
            divergence = base_loss.new_zeros(())
        else:
            assert base_model is not None
            with base():
                base_log_probs, base_loss, base_choice = base_model.of_labels(chunk)
            divergence = nn.functional.kl_div(log_probs, base_log_probs, reduction="sum", log_target=True)
        same = (base_choice.to(chosen.device) == chosen).sum()
        chunk_sums = in_fp64(base_loss).sum(), in_fp64(loss).sum(), divergence, same
        sums += torch.stack([value.cpu().double() for value in chunk_sums])
    count = len(tuned_model.targets)
    base_mean, mean, divergence_mean, same_share = (sums / count).tolist()
    return Drift(base_mean, mean, None if base_model is None else divergence_mean, same_share, len(answers), count)


class _DriftModel:
    """Hidden states of one of the two models for each label, in row order."""

    def __init__(
        self, model: PreTrainedModel, rows: Sequence[Example], batcher: Batcher, other: _DriftModel | None = None
    ) -> None:
        # An objective is bound to a head. Share it if both models have the same head.
        shares_head = other is not None and other.objective.head is model.get_output_embeddings()
        self.objective: CausalObjective = other.objective if shares_head and other else CausalObjective(model)
        self._model = model
        outputs: dict[int, Tensor] = {}
        for batch in batcher.batches(rows):
            label_outputs = self.objective.label_outputs(batch)
            label_positions = [member.indices[member.example.is_label] for member in batch.members]
            unique_positions = np.unique(np.concatenate(label_positions))
            for member, positions in zip(batch.members, label_positions, strict=True):
                index = torch.from_numpy(np.searchsorted(unique_positions, positions)).to(label_outputs.device)
                outputs[member.example.row] = label_outputs[index]
        self._outputs = torch.cat([outputs[row.row] for row in rows])
        # (P,) labels of all rows, in row order
        self.targets = torch.from_numpy(np.concatenate([row.tokens[row.is_label] for row in rows])).long()

    def parts(self) -> list[slice]:
        """Return slices of labels whose logits fit in memory about eight times.

        In a dry run on fake tensors a single chunk suffices.
        """
        chunk_size = max(1, self.objective.chunk // 8)
        chunks = [slice(start, start + chunk_size) for start in range(0, len(self.targets), chunk_size)]
        return chunks if has_values(self._model) else chunks[:1]

    def of_labels(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return fp32 log-probabilities (p, V), losses (p,) and preferred tokens (p,) of these labels."""
        log_probs = nn.functional.log_softmax(self.objective.logits_of(self._outputs[chunk]).float(), -1)
        targets = self.targets[chunk].to(log_probs.device)[:, None]
        return log_probs, -log_probs.gather(1, targets)[:, 0], log_probs.argmax(1)
