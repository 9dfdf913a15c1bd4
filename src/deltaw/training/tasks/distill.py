"""The task ``distill``: give each next token the probability that a teacher gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.data.lessons import LessonReader, longest_lesson
from deltaw.data.row_reader import Reader, RunData
from deltaw.data.settings import DataSettings
from deltaw.task_settings import DistillSettings
from deltaw.training.callbacks import Say
from deltaw.training.distillation.feed import LessonFeed
from deltaw.training.distillation.loss import DistillObjective, lessons_of
from deltaw.training.distillation.teachers import require_same_vocabulary
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.tasks.base import Batched, Classes, ModelFiles, Rows, Written
from deltaw.training.tasks.causal import CausalTask, evaluate_causal
from deltaw.working import working


class DistillTask(CausalTask):
    """Learn from teachers.

    Args:
        settings: the ``distill:`` section. trust_remote_code: whether a teacher's own Python code may run.
    """

    name = "distill"
    rolls_out = True
    checks_generation = True
    shares_evaluation = False

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, say: Say, settings: DistillSettings, trust_remote_code: bool
    ) -> None:
        super().__init__(tokenizer, say)
        self.settings, self._trust_remote_code = settings, trust_remote_code

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> DistillTask:
        settings = files.section or DistillSettings()
        task = cls(files.tokenizer(), files.say, settings, files.trust_remote_code)
        task.folder = files.folder
        return task

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        """The rows of a run.

        Raises:
            UserError: they cannot be used, or a teacher has another vocabulary.
        """
        how = {"trust_remote_code": self._trust_remote_code, "say": self._say}
        require_same_vocabulary(self.tokenizer, self.settings.teachers, **how)  # type: ignore[arg-type]
        return super().read(settings, seed=seed)

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        return LessonReader(settings, self.tokenizer, self.settings.prompt_text, say=self._say)

    def batcher(self, model: PreTrainedModel, examples: Rows, **how: Any) -> Batched:
        """That of the longest prompt with the longest completion."""
        longest = np.zeros(longest_lesson(examples, self.settings.max_new_tokens), np.int32)
        return super().batcher(model, [Example(1, longest, longest == 0, 0, None)], **how)

    def written(self, data: RunData, batch_size: int) -> Written:
        """The student's completions, and the answers of a teacher that is the base model."""
        settings, first = self.settings, self.settings.all_teachers[0]
        answered = 0
        if first.is_base and first.quantize is None:
            own = settings.answers == "given"
            answered = sum(not (own and row.label_count) for row in data.every)
        drawn = batch_size if settings.on_policy else 0
        longest = longest_lesson(data.every, settings.max_new_tokens)
        return Written(max(drawn, answered), longest, tokens=settings.max_new_tokens)

    def objective(self, model: PreTrainedModel) -> DistillObjective:
        return DistillObjective(model, self.settings)

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        """The divergence over all labels as ``loss``, if the teachers are there, and what answers come to
        (:func:`deltaw.training.tasks.causal.evaluate_causal`), with the cross-entropy under its own name.

        Rows are evaluated on the answers that are learned; a row that is not given one, on the teacher's.
        """
        assert isinstance(objective, DistillObjective)
        if isinstance(batcher, LessonFeed):
            rows = batcher.with_answers(rows)
        rows = [row for row in rows if row.label_count]
        if not rows:
            return Evaluation()
        found = evaluate_causal(objective, rows, batcher)
        metrics = {**found.metrics, "cross_entropy": found.metrics["loss"]}
        if objective.teachers:
            total, labels = 0.0, 0
            with working("comparing with the teacher", len(rows)):
                for batch in batcher.batches(rows):
                    total += float(objective.divergences(batch).double().sum())
                    labels += sum(row.label_count for row in lessons_of(batch))
            metrics["loss"] = total / labels
            check_finite("the divergence of the evaluated rows is", metrics["loss"])
        return replace(found, metrics=metrics)
