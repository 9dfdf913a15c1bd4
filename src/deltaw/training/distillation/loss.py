"""The loss of a student that learns a teacher's distribution over the next token, at each label.

With s and t what student and teacher give the tokens, and β, the divergence is that of GKD (arXiv 2306.13649, eq. 1):
β KL(t ‖ m) + (1−β) KL(s ‖ m) with m = β t + (1−β) s; KL(t ‖ s) for β = 0, and KL(s ‖ t) for β = 1. Several teachers are
one: the weighted mean of their probabilities. Where the teacher's k likeliest tokens alone are known, all others are
one more token, of both. As TRL's GKDTrainer has it, whose logits are divided by the temperature on both sides too.

Logits are there for a chunk of labels at a time, of student and teacher alike. Knows no text and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.lessons import Lesson
from deltaw.data.packing import Batch
from deltaw.kernels.transfer import to_device
from deltaw.task_settings import DistillSettings
from deltaw.training.distillation.teachers import Teacher
from deltaw.training.losses import Watched, label_places, log1mexp
from deltaw.training.tasks.causal_objective import EVEN_ROWS, CausalObjective, Values, chunked_sum, loss_dtype

# Of some labels, (n, k) the tokens that are known, None for all, and (n, k) the teacher's log-probabilities of them.
Taught: TypeAlias = tuple[Tensor | None, Tensor]


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """(P,) the divergence of log-probabilities (P, tokens), in nats, differentiable in both."""
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(left: Tensor, right: Tensor) -> Tensor:
    return (left.exp() * (left - right)).sum(-1)


def with_rest(logprobs: Tensor) -> Tensor:
    """(P, k) log-probabilities of some tokens to (P, k + 1), the last that of all others together."""
    return torch.cat([logprobs, log1mexp(logprobs.logsumexp(-1, keepdim=True))], -1)


class LessonMetrics(Watched):
    """How many labels there are, and how many of them the student wrote."""

    size = 2

    def add(self, rows: Sequence[Lesson], device: torch.device) -> None:
        """Add a microbatch."""
        counts = [sum(row.label_count for row in rows if row.own), sum(row.label_count for row in rows)]
        self._plus(list(torch.tensor(counts, dtype=torch.float32, device=device)))

    def means(self) -> dict[str, float]:
        own, count = self.totals().tolist()
        return {"own_tokens": own / count} if count else {}


class DistillObjective(CausalObjective):
    """The divergence from teachers over a batch of lessons; without teachers, the cross-entropy.

    Attributes:
        teachers: set once they are there.
    """

    def __init__(self, model: PreTrainedModel, settings: DistillSettings) -> None:
        super().__init__(model)
        self.settings = settings
        self.teachers: Sequence[Teacher] = ()
        self._watched = LessonMetrics() if settings.on_policy else None

    @property
    def watched(self) -> Watched | None:
        return self._watched

    @property
    def chunk(self) -> int:
        """Labels whose logits are there at a time: fewer than a cross-entropy has, which keeps less of each."""
        return self.settings.chunk or max(1, super().chunk // (2 * EVEN_ROWS)) * EVEN_ROWS

    def __call__(self, batch: Batch) -> Tensor:
        if not self.teachers:
            return super().__call__(batch)
        if self._watched is not None:
            self._watched.add(lessons_of(batch), batch.targets.device)
        outputs, values_of = self._compared(batch)
        parameters = list(self.head.parameters()) if self.chunked else []
        ones = outputs.new_ones(len(outputs))
        return chunked_sum(outputs, ones, values_of, parameters, chunk=self.chunk)

    @torch.no_grad()
    def divergences(self, batch: Batch) -> Tensor:
        """The divergence at each label, of the batch's lessons one after another."""
        outputs, values_of = self._compared(batch)
        return torch.cat([values_of(outputs[part], part) for part in self._chunks(len(outputs))])

    @torch.no_grad()
    def likeliest(self, rows: Sequence[Lesson]) -> tuple[Tensor, Tensor]:
        """The teacher's ``top_k`` likeliest tokens int32 (labels, k) and their log-probabilities fp32 (fp64 for an
        fp64 model), at each label of the rows one after another."""
        outputs, found = self._teachers_outputs(rows), []
        for part in self._chunks(len(outputs[0])):
            top = self._mixture([rows[part] for rows in outputs]).topk(min(self.settings.top_k or 1, self.width), -1)
            found.append((top.indices.int(), top.values))
        tokens, values = zip(*found, strict=True)
        return torch.cat(tokens), torch.cat(values)

    @property
    def width(self) -> int:
        """Tokens that student and teachers all have; models of one vocabulary may pad it differently."""
        models = [self.model, *(teacher.objective.model for teacher in self.teachers)]
        return min(model.config.get_text_config().vocab_size for model in models)

    def _chunks(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk) for start in range(0, count, self.chunk))

    def _compared(self, batch: Batch) -> tuple[Tensor, Values]:
        """What the head is applied to at each label, and what makes divergences of it."""
        taught_at = self._taught(lessons_of(batch))  # before the student keeps what its backward needs
        index = to_device(torch.from_numpy(label_places(batch)[0]), batch.targets.device)
        outputs, settings, width = self.label_outputs(batch).index_select(0, index), self.settings, self.width

        def values_of(part: Tensor, rows: slice) -> Tensor:
            logits = self.logits_of(part)[:, :width]
            logits = logits.to(loss_dtype(logits)) / settings.temperature
            tokens, taught = taught_at(rows)
            if tokens is None:
                return divergence(logits.log_softmax(-1), taught, settings.mixed)
            own = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
            if tokens.shape[1] < width:
                own, taught = with_rest(own), with_rest(taught)
            return divergence(own, taught, settings.mixed)

        return outputs, values_of

    def _taught(self, rows: Sequence[Lesson]) -> Callable[[slice], Taught]:
        """What gives the teacher's log-probabilities at some of the labels of the rows."""
        if self.settings.top_k is None:
            outputs = self._teachers_outputs(rows)
            return lambda part: (None, self._mixture([of_one[part] for of_one in outputs]))
        device, dtype = self.model.device, loss_dtype(next(self.model.parameters()))
        fresh = [row for row in rows if row.taught is None]
        new = iter(
            zip(*(part.split([row.label_count for row in fresh]) for part in self.likeliest(fresh)), strict=True)
            if fresh
            else ()
        )
        found = [next(new) if row.taught is None else tuple(map(torch.from_numpy, row.taught)) for row in rows]
        tokens, values = (torch.cat([part.to(device) for part in parts]) for parts in zip(*found, strict=True))
        return lambda part: (tokens[part].long(), values[part].to(dtype))

    def _teachers_outputs(self, rows: Sequence[Lesson]) -> list[Tensor]:
        """For each teacher (labels, d) what its head is applied to."""
        taught = [row.as_taught() for row in rows]
        return [teacher.outputs(taught) for teacher in self.teachers]

    @torch.no_grad()
    def _mixture(self, outputs: Sequence[Tensor]) -> Tensor:
        """(P, tokens) log-probabilities of all teachers together, from each one's outputs."""
        total = sum(teacher.weight for teacher in self.teachers)
        mixed: Tensor | None = None
        for teacher, rows in zip(self.teachers, outputs, strict=True):
            logits = teacher.logits(rows)[:, : self.width]
            own = (logits.to(loss_dtype(logits)) / self.settings.temperature).log_softmax(-1)
            own = own + math.log(teacher.weight / total)
            mixed = own if mixed is None else torch.logaddexp(mixed, own)
        assert mixed is not None
        return mixed


def lessons_of(batch: Batch) -> list[Lesson]:
    """The rows of a batch."""
    rows = [member.example for member in batch.members]
    assert all(isinstance(row, Lesson) for row in rows)
    return rows  # type: ignore[return-value]
