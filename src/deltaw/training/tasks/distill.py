"""The task ``distill``: match the next-token distribution of a teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.distill_rows import DistillReader, max_example_length
from deltaw.data.example import Example
from deltaw.data.row_reader import Reader, RunData
from deltaw.data.settings import DataSettings
from deltaw.progress import track_progress
from deltaw.task_settings import DistillSettings
from deltaw.training.callbacks import LogFunction
from deltaw.training.distillation.feed import DistillFeed
from deltaw.training.distillation.loss import DistillObjective, distill_rows_of
from deltaw.training.distillation.teachers import require_same_vocabulary
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.tasks.base import BatcherChoice, Classes, ModelFiles, Rows, TaskGeneration
from deltaw.training.tasks.causal import CausalTask, evaluate_causal


class DistillTask(CausalTask):
    """Train a student to match one or several teachers.

    Args:
        settings: The ``distill:`` section.
        trust_remote_code: True to allow Python code from a teacher's repository.
    """

    name = "distill"
    uses_rollouts = True
    checks_generation = True
    shares_evaluation = False

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, log: LogFunction, settings: DistillSettings, trust_remote_code: bool
    ) -> None:
        super().__init__(tokenizer, log)
        self.settings, self._trust_remote_code = settings, trust_remote_code

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> DistillTask:
        settings = files.section or DistillSettings()
        task = cls(files.tokenizer(), files.log, settings, files.trust_remote_code)
        task.folder = files.folder
        return task

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        """Read the rows of a run.

        Raises:
            UserError: if the rows are unusable, or a teacher has a different vocabulary.
        """
        options = {"trust_remote_code": self._trust_remote_code, "log": self._log}
        require_same_vocabulary(self.tokenizer, self.settings.teachers, **options)  # type: ignore[arg-type]
        return super().read(settings, seed=seed)

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        return DistillReader(settings, self.tokenizer, self.settings.prompt_text, log=self._log)

    def batcher(self, model: PreTrainedModel, examples: Rows, **options: Any) -> BatcherChoice:
        """Choose a batcher that fits the longest prompt with the longest completion."""
        longest = np.zeros(max_example_length(examples, self.settings.max_new_tokens), np.int32)
        return super().batcher(model, [Example(1, longest, longest == 0, 0, None)], **options)

    def generation_limits(self, data: RunData, batch_size: int) -> TaskGeneration:
        """Return the size of the student's completions and of the answers of a teacher that is the base model."""
        settings, first = self.settings, self.settings.all_teachers[0]
        num_teacher_answers = 0
        if first.is_base and first.quantize is None:
            uses_row_answers = settings.answers == "given"
            num_teacher_answers = sum(not (uses_row_answers and row.label_count) for row in data.all_rows)
        num_sampled = batch_size if settings.on_policy else 0
        max_length = max_example_length(data.all_rows, settings.max_new_tokens)
        return TaskGeneration(max(num_sampled, num_teacher_answers), max_length, max_new_tokens=settings.max_new_tokens)

    def objective(self, model: PreTrainedModel) -> DistillObjective:
        return DistillObjective(model, self.settings)

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        """Evaluate the answers that are trained on: given answers, or a teacher's answers for rows without one.

        The metric ``loss`` is the divergence over all labels if teachers are loaded. The metrics of
        :func:`deltaw.training.tasks.causal.evaluate_causal` are included, with the cross-entropy as ``cross_entropy``.
        """
        assert isinstance(objective, DistillObjective)
        if isinstance(batcher, DistillFeed):
            rows = batcher.with_answers(rows)
        rows = [row for row in rows if row.label_count]
        if not rows:
            return Evaluation()
        evaluation = evaluate_causal(objective, rows, batcher)
        metrics = {**evaluation.metrics, "cross_entropy": evaluation.metrics["loss"]}
        if objective.teachers:
            total, labels = 0.0, 0
            with track_progress("comparing with the teacher", len(rows)):
                for batch in batcher.batches(rows):
                    total += float(objective.divergences(batch).double().sum())
                    labels += sum(row.label_count for row in distill_rows_of(batch))
            metrics["loss"] = total / labels
            check_finite("the divergence of the evaluated rows is", metrics["loss"])
        return replace(evaluation, metrics=metrics)
