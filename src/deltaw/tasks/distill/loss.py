"""Divergence between the next-token distributions of a student and its teachers.

With student s, teacher t and m = β t + (1−β) s, the loss per label is β KL(t ‖ m) + (1−β) KL(s ‖ m) (GKD, arXiv
2306.13649, eq. 1). β = 0 means KL(t ‖ s), and β = 1 means KL(s ‖ t). Several teachers are combined as the weighted mean
of their probabilities. If only the teacher's top k tokens are available, all remaining tokens count as one additional
token. As in TRL's GKDTrainer, the logits of both sides are divided by the temperature.

Logits of student and teachers are computed for a chunk of labels at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.packing import MicroBatch
from deltaw.kernels.layout import to_device
from deltaw.tasks.distill.rows import DistillExample
from deltaw.tasks.distill.settings import DistillSettings
from deltaw.tasks.distill.teachers import Teacher
from deltaw.training.causal_objective import ROW_MULTIPLE, CausalObjective, Values, chunked_sum, loss_dtype
from deltaw.training.losses import MetricAccumulator, kl_divergence, label_indices, with_remainder

# Tokens (n, k) of n labels, or None for the full vocabulary, and their log-probabilities (n, k) from the teacher.
TeacherLogProbs: TypeAlias = tuple[Tensor | None, Tensor]


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return (P,) divergences in nats of log-probabilities (P, tokens), differentiable in both arguments."""
    if beta == 0:
        return kl_divergence(teacher, student)
    if beta == 1:
        return kl_divergence(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


class DistillMetrics(MetricAccumulator):
    """Counts labels, and labels of completions that the student generated."""

    size = 2

    def add(self, rows: Sequence[DistillExample], device: torch.device) -> None:
        """Add a microbatch."""
        counts = [sum(row.label_count for row in rows if row.by_student), sum(row.label_count for row in rows)]
        self._plus(list(torch.tensor(counts, dtype=torch.float32, device=device)))

    def means(self) -> dict[str, float]:
        by_student, count = self.totals().tolist()
        return {"student_tokens": by_student / count} if count else {}


class DistillObjective(CausalObjective):
    """Divergence from the teachers over a batch, or the cross-entropy without teachers.

    Attributes:
        teachers: Teachers, set after construction.
    """

    def __init__(self, model: PreTrainedModel, settings: DistillSettings) -> None:
        super().__init__(model)
        self.settings = settings
        self.teachers: Sequence[Teacher] = ()
        self.accumulator = DistillMetrics() if settings.on_policy else None

    @property
    def chunk(self) -> int:
        """Labels per chunk. Smaller than for a cross-entropy, because more values per label are stored."""
        return self.settings.chunk or max(1, super().chunk // (2 * ROW_MULTIPLE)) * ROW_MULTIPLE

    def __call__(self, batch: MicroBatch) -> Tensor:
        if not self.teachers:
            return super().__call__(batch)
        if isinstance(self.accumulator, DistillMetrics):
            self.accumulator.add(distill_rows_of(batch), batch.targets.device)
        outputs, values_of = self._student_and_divergence(batch)
        parameters = list(self.head.parameters()) if self.chunked else []
        ones = outputs.new_ones(len(outputs))
        return chunked_sum(outputs, ones, values_of, parameters, chunk=self.chunk)

    @torch.no_grad()
    def divergences(self, batch: MicroBatch) -> Tensor:
        """Return the divergence at each label of the batch, row by row."""
        outputs, values_of = self._student_and_divergence(batch)
        return torch.cat([values_of(outputs[part], part) for part in self._chunks(len(outputs))])

    @torch.no_grad()
    def top_tokens(self, rows: Sequence[DistillExample]) -> tuple[Tensor, Tensor]:
        """Return the teacher's ``top_k`` tokens and their log-probabilities at each label, row by row.

        Returns:
            Tokens (labels, k) in int32, and log-probabilities (labels, k) in fp32 (fp64 for an fp64 model).
        """
        outputs = self._teacher_outputs(rows)
        chunk_results = []
        for part in self._chunks(len(outputs[0])):
            top = self._mixture([rows[part] for rows in outputs]).topk(min(self.settings.top_k or 1, self.width), -1)
            chunk_results.append((top.indices.int(), top.values))
        tokens, values = zip(*chunk_results, strict=True)
        return torch.cat(tokens), torch.cat(values)

    @property
    def width(self) -> int:
        """Number of tokens shared by student and teachers. Models with the same vocabulary may pad it differently."""
        models = [self.model, *(teacher.objective.model for teacher in self.teachers)]
        return min(model.config.get_text_config().vocab_size for model in models)

    def _chunks(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk) for start in range(0, count, self.chunk))

    def _student_and_divergence(self, batch: MicroBatch) -> tuple[Tensor, Values]:
        """Return the student's outputs at each label, and a function from a chunk of outputs to divergences."""
        # Before the student's forward pass, to limit peak memory.
        teacher_at = self._teacher_log_probs(distill_rows_of(batch))
        index = to_device(torch.from_numpy(label_indices(batch)[0]), batch.targets.device)
        outputs = self.label_outputs(batch).index_select(0, index)
        settings = self.settings
        width = self.width

        def values_of(part: Tensor, rows: slice) -> Tensor:
            logits = self.logits_of(part)[:, :width]
            logits = logits.to(loss_dtype(logits)) / settings.temperature
            tokens, teacher = teacher_at(rows)
            if tokens is None:
                return divergence(logits.log_softmax(-1), teacher, settings.mixture_weight)
            student = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
            if tokens.shape[1] < width:
                student = with_remainder(student)
                teacher = with_remainder(teacher)
            return divergence(student, teacher, settings.mixture_weight)

        return outputs, values_of

    def _teacher_log_probs(self, rows: Sequence[DistillExample]) -> Callable[[slice], TeacherLogProbs]:
        """Return a function from a slice of labels to the teacher's log-probabilities."""
        if self.settings.top_k is None:
            outputs = self._teacher_outputs(rows)
            return lambda part: (None, self._mixture([teacher_outputs[part] for teacher_outputs in outputs]))
        device = self.model.device
        dtype = loss_dtype(next(self.model.parameters()))
        missing = [row for row in rows if row.taught is None]
        label_counts = [row.label_count for row in missing]
        parts = zip(*(part.split(label_counts) for part in self.top_tokens(missing)), strict=True) if missing else ()
        computed = iter(parts)
        row_tokens = (None if row.taught is None else tuple(map(torch.from_numpy, row.taught)) for row in rows)
        top_tokens = [next(computed) if tokens is None else tokens for tokens in row_tokens]
        tokens, values = (torch.cat([part.to(device) for part in parts]) for parts in zip(*top_tokens, strict=True))
        return lambda part: (tokens[part].long(), values[part].to(dtype))

    def _teacher_outputs(self, rows: Sequence[DistillExample]) -> list[Tensor]:
        """Return, for each teacher, the inputs (labels, d) of its head."""
        teacher_rows = [row.as_taught() for row in rows]
        return [teacher.outputs(teacher_rows) for teacher in self.teachers]

    @torch.no_grad()
    def _mixture(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the log-probabilities (P, tokens) of the weighted mixture of teachers."""
        total = sum(teacher.weight for teacher in self.teachers)
        mixture: Tensor | None = None
        for teacher, rows in zip(self.teachers, outputs, strict=True):
            logits = teacher.logits(rows)[:, : self.width]
            weighted = (logits.to(loss_dtype(logits)) / self.settings.temperature).log_softmax(-1)
            weighted = weighted + math.log(teacher.weight / total)
            mixture = weighted if mixture is None else torch.logaddexp(mixture, weighted)
        assert mixture is not None
        return mixture


def distill_rows_of(batch: MicroBatch) -> list[DistillExample]:
    """Return the rows of a batch."""
    rows = [member.example for member in batch.members]
    assert all(isinstance(row, DistillExample) for row in rows)
    return rows
