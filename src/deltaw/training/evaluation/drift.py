"""Drift: how far a fine-tuned model has moved away from the base model where it was not trained.

Measured on the base model's own answers to general prompts (:mod:`deltaw.training.evaluation.general`): the
change of the loss on them, the Kullback-Leibler divergence from the base model, and the share of tokens that
the fine-tuned model would still choose. Two forward passes over some 1,300 label tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.data.example import Example
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.tasks.causal_objective import CausalObjective

# A change of the loss above this, in nats a token, is worth a warning (docs/eval.md has what was measured).
LARGE = 0.25


@dataclass(frozen=True)
class Drift:
    """What a fine-tuning did to general answers.

    Attributes:
        base_loss, loss: mean cross-entropy of the base model's answers, in nats a token: of the base model
            itself, and of the fine-tuned model.
        divergence: mean KL(base model ‖ fine-tuned model) over the answers' tokens, in nats; None where the
            model's output head is not known.
        same: share of the tokens for which both models choose the same next token.
        answers, tokens: how many were measured.
    """

    base_loss: float
    loss: float
    divergence: float | None
    same: float
    answers: int
    tokens: int

    @property
    def change(self) -> float:
        """By how much the loss rose, in nats a token."""
        return self.loss - self.base_loss

    @property
    def large(self) -> bool:
        """Whether a person should be warned; a change that is not finite counts."""
        return not self.change <= LARGE

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        numbers = {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return {**numbers, "change": self.change if np.isfinite(self.change) else None}

    def lines(self) -> list[str]:
        """For a person: the change, and what to try where it is large."""
        divergence = "" if self.divergence is None else f", KL {self.divergence:.2f}"
        said = [
            f"drift: general answers' loss {self.base_loss:.2f} → {self.loss:.2f} nats/token "
            f"({self.change:+.2f}{divergence}); {self.same:.0%} of {self.tokens:,} tokens unchanged"
        ]
        if self.large:
            said.append(
                "  this is large: the model may answer other questions worse than the base model. Try "
                "train.keep_general: 1, a lower train.learning_rate, fewer train.epochs, or general rows in "
                "the data"
            )
        return said


@torch.no_grad()
def measure_drift(
    model: PreTrainedModel,
    answers: Sequence[Example],
    batcher: AnyBatcher,
    *,
    base: Callable[[], AbstractContextManager[None]],
    running: Callable[[], AbstractContextManager[None]],
    as_trained: Callable[[Example], Example] = lambda example: example,
) -> Drift:
    """Compare the fine-tuned model with its base model on the base model's answers.

    Args:
        model: with what was trained on it.
        answers: of the base model.
        batcher: how rows go through the model.
        base: while open, the model answers as the base model.
        running: while open, the model takes the batches of ``batcher``.
        as_trained: a row as the fine-tuned model is to see it.
    """
    with base(), running():
        before = _Side(model, answers, batcher)
    with running():
        after = _Side(model, [as_trained(example) for example in answers], batcher)
    targets = torch.from_numpy(np.concatenate([e.tokens[e.is_label] for e in answers])).long()
    losses: list[Tensor] = []
    for start in range(0, len(targets), before.chunk):
        part = slice(start, start + before.chunk)
        with base():
            own = before.log_probabilities(part)
        losses.append(_compare(own, after.log_probabilities(part), targets[part].to(own.device)))
    base_loss, loss, divergence, same = torch.cat(losses, 1).double().mean(1).tolist()
    return Drift(base_loss, loss, divergence, same, len(answers), len(targets))


def _compare(base: Tensor, tuned: Tensor, targets: Tensor) -> Tensor:
    """(4, p): both losses, the divergence, and whether both choose alike, of log-probabilities (p, V)."""
    at = targets[:, None]
    return torch.stack(
        [
            -base.gather(1, at)[:, 0],
            -tuned.gather(1, at)[:, 0],
            nn.functional.kl_div(tuned, base, reduction="none", log_target=True).sum(1),
            (base.argmax(1) == tuned.argmax(1)).to(base.dtype),
        ]
    ).cpu()


class _Side:
    """One of the two models: what its head is applied to, for each label in the order of the rows."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Example], batcher: AnyBatcher) -> None:
        self._objective = CausalObjective(model)
        self.chunk = self._objective.chunk
        outputs: dict[int, Tensor] = {}
        for batch in batcher.batches(rows):
            picked = self._objective.label_outputs(batch)
            where = [member.places[member.example.is_label] for member in batch.members]
            labelled = np.unique(np.concatenate(where))
            for member, places in zip(batch.members, where, strict=True):
                at = torch.from_numpy(np.searchsorted(labelled, places)).to(picked.device)
                outputs[member.example.row] = picked[at]
        self._outputs = torch.cat([outputs[row.row] for row in rows])

    def log_probabilities(self, part: slice) -> Tensor:
        """fp32 (p, V) of these labels."""
        logits = self._objective.logits_of(self._outputs[part])
        return nn.functional.log_softmax(logits.float(), -1)
