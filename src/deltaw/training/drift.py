"""Drift: how far a fine-tuned model has moved away from the base model where it was not trained.

Measured on the base model's own answers to general prompts (:mod:`deltaw.training.evaluation.general`): the
change of the loss on them, the Kullback-Leibler divergence from the base model, and the share of tokens that
the fine-tuned model would still choose. Two forward passes over some 1,300 label tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.data.example import Example
from deltaw.data.prepare import encode_prompt
from deltaw.hub.loading import has_values
from deltaw.runtime.generation import Completion, Writer, generate
from deltaw.training.evaluation.general import ANSWER_TOKENS, SHOWN, NoGeneralAnswers, check_size, general_answers
from deltaw.training.evaluation.general_prompts import MEASURED
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.origin import InferenceSession
from deltaw.training.seen import as_seen
from deltaw.training.session import Session
from deltaw.training.tasks.base import Task
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.working import working

# A change of the loss above this, in nats per token, is worth a warning. A model that answers every question
# with its task's label differs from the base model mostly at the first token of an answer: some 4 nats there
# are 0.1 nats per token over an answer of 40.
LARGE = 0.1


@dataclass(frozen=True)
class Drift:
    """What a fine-tuning did to general answers.

    Attributes:
        base_loss, loss: mean cross-entropy of the base model's answers, in nats a token: of the base model
            itself, and of the fine-tuned model.
        divergence: mean KL(base model ‖ fine-tuned model) over the answers' tokens, in nats; None where the
            base model was not kept beside the fine-tuned one.
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
        numbers = {**asdict(self), "change": self.change}
        return {name: value if value is None or math.isfinite(value) else None for name, value in numbers.items()}

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
                "train.keep_general: 1, a lower train.learning_rate, fewer train.epochs, or general rows in the data"
            )
        return said


_BATCH_TOKENS = 4096

# What changes a model while it is open.
Open: TypeAlias = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class BaseLosses:
    """The base model on its own answers, for each label: its loss, and the token that it would choose."""

    answers: Sequence[Example]
    losses: Tensor
    choices: Tensor


@torch.no_grad()
def base_losses(model: PreTrainedModel, answers: Sequence[Example], batcher: AnyBatcher, running: Open) -> BaseLosses:
    """What :func:`measure_drift` needs of a base model that will not be there any more.

    Args:
        model: the base model. running: while open, it takes the batches of ``batcher``.
    """
    with running():
        side = _Side(model, answers, batcher)
    losses, choices = [], []
    for part in side.parts():
        _, loss, choice = side.of_labels(part)
        losses.append(loss.cpu())
        choices.append(choice.cpu())
    return BaseLosses(answers, torch.cat(losses), torch.cat(choices))


@torch.no_grad()
@working("measuring drift")
def measure_drift(
    model: PreTrainedModel,
    answers: Sequence[Example],
    batcher: AnyBatcher,
    *,
    base: Open | BaseLosses,
    running: Open,
    as_trained: Callable[[Example], Example] = lambda example: example,
) -> Drift:
    """Compare the fine-tuned model with its base model on the base model's answers.

    Args:
        model: with what was trained on it.
        answers: of the base model.
        batcher: how rows go through the model.
        base: while open, the model answers as the base model; or what was noted of the base model, which
            gives no divergence.
        running: while open, the model takes the batches of ``batcher``.
        as_trained: a row as the fine-tuned model is to see it.
    """
    before = None
    if not isinstance(base, BaseLosses):
        with base(), running():
            before = _Side(model, answers, batcher)
    if before is not None and not has_values(model):
        after = before  # in a dry run on fake tensors one side takes what the other takes
    else:
        with running():
            after = _Side(model, [as_trained(example) for example in answers], batcher, before)
    sums = torch.zeros(4, dtype=torch.float64)
    for part in after.parts():
        tuned, loss, chosen = after.of_labels(part)
        if isinstance(base, BaseLosses):
            base_loss, choice = base.losses[part], base.choices[part]
            divergence = base_loss.new_zeros(())
        else:
            assert before is not None
            with base():
                own, base_loss, choice = before.of_labels(part)
            divergence = nn.functional.kl_div(tuned, own, reduction="sum", log_target=True)
        same = (choice.to(chosen.device) == chosen).sum()
        parts = base_loss.double().sum(), loss.double().sum(), divergence, same
        sums += torch.stack([value.double().cpu() for value in parts])
    count = len(after.targets)
    base_mean, mean, divergence_mean, same_share = (sums / count).tolist()
    return Drift(base_mean, mean, None if before is None else divergence_mean, same_share, len(answers), count)


class _Side:
    """One of the two models: what its head is applied to, for each label in the order of the rows."""

    def __init__(
        self, model: PreTrainedModel, rows: Sequence[Example], batcher: AnyBatcher, other: _Side | None = None
    ) -> None:
        # An objective knows its head: one of the other side serves where both have the same.
        same = other is not None and other.objective.head is model.get_output_embeddings()
        self.objective: CausalObjective = other.objective if other is not None and same else CausalObjective(model)
        self._model = model
        outputs: dict[int, Tensor] = {}
        for batch in batcher.batches(rows):
            picked = self.objective.label_outputs(batch)
            where = [member.places[member.example.is_label] for member in batch.members]
            labeled = np.unique(np.concatenate(where))
            for member, places in zip(batch.members, where, strict=True):
                at = torch.from_numpy(np.searchsorted(labeled, places)).to(picked.device)
                outputs[member.example.row] = picked[at]
        self._outputs = torch.cat([outputs[row.row] for row in rows])
        # (P,) the labels of all rows, in their order.
        self.targets = torch.from_numpy(np.concatenate([row.tokens[row.is_label] for row in rows])).long()

    def parts(self) -> list[slice]:
        """The labels in chunks whose logits are small: some eight tensors of that size are there at once. In a
        dry run on fake tensors one chunk tells what all of them take."""
        chunk = max(1, self.objective.chunk // 8)
        parts = [slice(start, start + chunk) for start in range(0, len(self.targets), chunk)]
        return parts if has_values(self._model) else parts[:1]

    def of_labels(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """For these labels fp32 log-probabilities (p, V), losses (p,), and the tokens that it would choose (p,)."""
        found = nn.functional.log_softmax(self.objective.logits_of(self._outputs[part]).float(), -1)
        return found, -found.gather(1, self.targets[part].to(found.device)[:, None])[:, 0], found.argmax(1)


# Drift of a finished run, and its general answers beside the base model's.
#
# What :class:`DriftMeter` is to a run that trains, this is to one that is opened again.


@dataclass(frozen=True)
class GeneralAnswer:
    """One general prompt, answered by the base model and by the fine-tuned one."""

    prompt: str
    base: str
    adapter: str


def drift_of(opened: InferenceSession, writer: Writer | None = None) -> Drift | None:
    """How far general answers have moved from the base model's; None without an adapter, where the model
    writes no text, and where the run's ``train.drift`` is false.

    Args:
        writer: writes the session's texts; None for transformers.

    Raises:
        NoGeneralAnswers: the base model gives none that could be measured; the message says why.
    """
    asked = "auto" if opened.config is None else opened.config.train.drift
    if opened.method is None or not _is_wanted(asked, opened.task):
        return None
    if asked == "auto":
        check_size(opened.model)
    answers = _base_answers(opened, writer)
    batcher = opened.batcher(answers, virtual_tokens=opened.method.virtual_tokens)
    running = functools.partial(opened.task.running, opened.model, batcher)
    how: dict[str, Any] = {"base": opened.base, "running": running, "as_trained": opened.example}
    return measure_drift(opened.model, answers, batcher, **how)


def _is_wanted(asked: bool | str, task: Task) -> bool:
    """Whether drift is measured, by the setting ``train.drift`` and what the model writes."""
    return asked is not False and task.tokenizer is not None and task.writes_text


def answers_side_by_side(opened: InferenceSession, count: int, writer: Writer | None = None) -> list[GeneralAnswer]:
    """Greedy answers of both models to ``count`` of the general prompts, taken evenly from all kinds.

    Args:
        writer: writes the session's texts; None for transformers.

    Raises:
        NoGeneralAnswers: as :func:`drift_of`.
    """
    chosen = _evenly(_base_answers(opened, writer), count)
    prompts = [MEASURED[answer.row - 1] for answer in chosen]
    encoded = [opened.prompt(encode_prompt(p, opened.data or "auto", opened.tokenizer)) for p in prompts]
    written = None if writer is None else writer(encoded, ANSWER_TOKENS, _BATCH_TOKENS, None)
    return _pairs(chosen, written or generate(opened.model, opened.tokenizer, encoded, max_new_tokens=ANSWER_TOKENS))


def _evenly(answers: Sequence[Example], count: int) -> Sequence[Example]:
    """``count`` of the answers, from all kinds of prompts."""
    return answers[:: max(1, len(answers) // count)][:count]


def _pairs(chosen: Sequence[Example], written: Sequence[Completion]) -> list[GeneralAnswer]:
    answered = zip(chosen, written, strict=True)
    return [GeneralAnswer(MEASURED[base.row - 1], base.answer or "", done.text) for base, done in answered]


def _base_answers(opened: InferenceSession, writer: Writer | None) -> list[Example]:
    reserved = 0 if opened.method is None else opened.method.virtual_tokens
    how: dict[str, Any] = {"identity": opened.identity, "reserved": reserved, "writer": writer}
    with opened.base():
        return general_answers(opened.model, opened.tokenizer, MEASURED, opened.data or "auto", **how)


# Drift of a run that trains: what is noted before the first step, and measured after the last.
#
# Most methods keep the base model, and everything is measured at the end. Methods that train the base model's
# own parameters keep no copy of them: of those the base model's answers are evaluated before training.


class DriftMeter:
    """Measures how far a session's training moves general answers. Made before the first step.

    Args:
        session: ready to train. Nothing is measured where ``train.drift`` is false or the model writes no
            text.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        asked = session.config.train.drift
        self._wanted = _is_wanted(asked, session.task)
        self._noted: BaseLosses | None = None
        self._answers: Sequence[Example] = ()
        self._reason: NoGeneralAnswers | None = None
        if not self._wanted:
            return
        try:
            if asked == "auto":
                check_size(session.model)
            if not session.method.keeps_base(session.model):
                answers = session.general_answers(MEASURED)
                with session.method.evaluating(session.model):
                    self._noted = base_losses(session.model, answers, session.batcher, session.running)
        except NoGeneralAnswers as reason:
            self._reason = reason

    def measure(self) -> Drift | None:
        """The drift of the trained model; None where it is not wanted. Call outside of ``session.running``.

        Raises:
            NoGeneralAnswers: the base model gives none that could be measured; the message says why.
        """
        if not self._wanted:
            return None
        if self._reason is not None:
            raise self._reason
        session, model = self._session, self._session.model
        noted = self._noted
        answers = session.general_answers(MEASURED) if noted is None else noted.answers
        base = noted or functools.partial(session.method.without, model)
        how: dict[str, Any] = {"base": base, "as_trained": functools.partial(as_seen, method=session.method)}
        self._answers = answers
        with session.method.evaluating(model):
            return measure_drift(model, answers, session.batcher, running=session.running, **how)

    def side_by_side(self, count: int = SHOWN) -> list[GeneralAnswer]:
        """What the base model and the trained one answer to some of the prompts, once it is measured. Call outside of
        ``session.running``."""
        session, chosen = self._session, _evenly(self._answers, count)
        seen = [as_seen(answer, session.method) for answer in chosen]
        prompts = [one.tokens[: one.prompt_length] for one in seen]
        return _pairs(chosen, session.complete(prompts, ANSWER_TOKENS))
