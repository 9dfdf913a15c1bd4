"""The task ``distill``: match the next-token distribution of a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.data.row_reader import Reader, RunData
from deltaw.progress import LogFunction, track_progress
from deltaw.settings.data import DataSettings
from deltaw.tasks.distill.feed import DistillFeed
from deltaw.tasks.distill.loss import DistillObjective, distill_rows_of
from deltaw.tasks.distill.rows import DistillReader, max_example_length
from deltaw.tasks.distill.settings import DistillSettings
from deltaw.tasks.distill.teachers import load_teacher, reference_as_teacher, require_same_vocabulary
from deltaw.tasks.language.task import CausalTask, evaluate_causal
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.losses import in_fp64
from deltaw.training.state import RowOrder
from deltaw.training.task import BatcherChoice, Classes, Measurement, ModelFiles, Rows, TaskGeneration, TrainingSession


class DistillTask(CausalTask):
    """Train a student to match one or several teachers.

    Args:
        settings: The ``distill:`` section.
        trust_remote_code: True to allow Python code from a teacher's repository.
    """

    name = "distill"
    needs_session = True
    caches_features = False
    checks_generation = True
    shares_evaluation = False

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, log: LogFunction, settings: DistillSettings, trust_remote_code: bool
    ) -> None:
        super().__init__(tokenizer, log)
        self.settings = settings
        self._trust_remote_code = trust_remote_code

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
        trust = self._trust_remote_code
        log = self._log
        require_same_vocabulary(self.tokenizer, self.settings.teachers, trust_remote_code=trust, log=log)
        return super().read(settings, seed=seed)

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        return DistillReader(settings, self.tokenizer, self.settings.prompt_text, log=self._log)

    def batcher(self, model: PreTrainedModel, examples: Rows, options: BatcherOptions) -> BatcherChoice:
        """Choose a batcher that fits the longest prompt with the longest completion."""
        longest = np.zeros(max_example_length(examples, self.settings.max_new_tokens), np.int32)
        return super().batcher(model, [Example(1, longest, longest == 0, 0, None)], options)

    def generation_limits(self, data: RunData, batch_size: int) -> TaskGeneration:
        """Return the size of the student's completions and of the answers of a teacher that is the base model."""
        settings = self.settings
        first = self.settings.all_teachers[0]
        num_teacher_answers = 0
        if first.is_base and first.quantize is None:
            uses_row_answers = settings.answers == "given"
            num_teacher_answers = sum(not (uses_row_answers and row.label_count) for row in data.all_rows)
        num_sampled = batch_size if settings.on_policy else 0
        max_length = max_example_length(data.all_rows, settings.max_new_tokens)
        return TaskGeneration(max(num_sampled, num_teacher_answers), max_length, max_new_tokens=settings.max_new_tokens)

    def objective(self, model: PreTrainedModel) -> DistillObjective:
        return DistillObjective(model, self.settings)

    def feed(self, session: TrainingSession) -> DistillFeed:
        """Return the feed that queries teachers and generates completions before each step.

        Raises:
            UserError: if a teacher cannot be loaded.
        """
        config = session.config
        data = session.data
        objective = session.objective
        settings = self.settings
        train = config.train
        longest = max_example_length(data.all_rows, settings.max_new_tokens)
        teachers = []
        for teacher in settings.all_teachers:
            if teacher.is_base and teacher.quantize is None:
                teachers.append(reference_as_teacher(session, teacher.weight))
            else:
                teachers.append(load_teacher(config, teacher, longest, session.model, session.notes.append))
        order = RowOrder(len(data.train), train.batch_size, train.seed)
        steps = range(min(session.total_steps, order.steps_per_epoch))
        used_indices = sorted({int(index) for step in steps for index in order.indices(step)})
        rows = [data.train[index] for index in used_indices]
        held_out = [row for rows in data.sets.values() for row in rows]
        sampler = session.sampler() if settings.on_policy else None
        return DistillFeed(
            objective,
            session.batcher,
            teachers,
            settings,
            self.tokenizer,
            rows=rows,
            held_out=held_out,
            seed=train.seed,
            sampler=sampler,
            processes=session.processes,
        )

    def final_measurements(self, session: TrainingSession, evaluation: Evaluation) -> Iterator[tuple[str, Measurement]]:
        if (comparison := compare_with_prompt(session, evaluation)) is not None:
            yield "distilled", comparison

    def evaluate(self, objective: CausalObjective, rows: Rows, batcher: Batcher, classes: Classes = None) -> Evaluation:
        """Evaluate the answers that are trained on: given answers, or a teacher's answers for rows without one.

        The metric ``loss`` is the divergence over all labels if teachers are loaded. The metrics of
        :func:`deltaw.tasks.language.task.evaluate_causal` are included, with the cross-entropy as ``cross_entropy``.
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
            total = 0.0
            labels = 0
            with track_progress("comparing with the teacher", len(rows)):
                for batch in batcher.batches(rows):
                    total += float(in_fp64(objective.divergences(batch)).sum())
                    labels += sum(row.label_count for row in distill_rows_of(batch))
            metrics["loss"] = total / labels
            check_finite("the divergence of the evaluated rows is", metrics["loss"])
        return replace(evaluation, metrics=metrics)


@dataclass(frozen=True)
class PromptComparison:
    """Scores of the base model with and without the prompt, and of the student without it.

    Attributes:
        saved: Mean number of saved prompt tokens per request.
        rows: Number of evaluated rows.
        scores: Evaluation by model, in order. Empty if the run has no evaluation rows.
    """

    saved: float
    rows: int
    scores: Mapping[str, Evaluation]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        scores = {model: evaluation.score() for model, evaluation in self.scores.items()}
        return {"prompt_tokens_saved": self.saved, "rows": self.rows, **scores}

    def __str__(self) -> str:
        text = f"a request saves {self.saved:,.0f} prompt tokens"
        if not self.scores:
            return text
        main = next(iter(self.scores.values())).main
        scores = [f"{model.replace('_', ' ')} {_format_score(score)}" for model, score in self.scores.items()]
        return f"{text}; {main} on {self.rows:,} held-out rows: {', '.join(scores)}"


def compare_with_prompt(session: TrainingSession, student: Evaluation) -> PromptComparison | None:
    """Compare the models after a run that distilled a prompt. Returns None for other runs.

    Args:
        session: Session of the run.
        student: Evaluation of the saved adapter on the first set of held-out rows.
    """
    feed = session.feed
    method = session.method
    model = session.model
    if not isinstance(feed, DistillFeed) or not feed.settings.prompt:
        return None
    measured_rows = session.data.held_out or session.data.train
    saved = float(np.mean([len(row.teacher_prompt) - row.prompt_length for row in measured_rows]))
    if not session.data.held_out or not student.metrics or not method.can_restore_base(model):
        return PromptComparison(saved, 0, {})
    num_virtual_tokens = method.virtual_tokens
    progress = track_progress("comparing with the prompt")
    with session.running(), method.evaluating(model), session.reference_active(), progress:
        rows = [row for row in feed.with_answers(session.data.held_out) if row.label_count]
        prompted: Sequence[Example] = [row.as_taught() for row in rows]
        plain: Sequence[Example] = [row.without_prefix(num_virtual_tokens) for row in rows]
        base_with_prompt = evaluate_causal(feed.objective, prompted, feed.batcher)
        base = evaluate_causal(feed.objective, plain, feed.batcher)
    scores = {"base_with_prompt": base_with_prompt, "base": base, "student": student}
    return PromptComparison(saved, len(rows), scores)


def _format_score(evaluation: Evaluation) -> str:
    value = evaluation.metrics[evaluation.main]
    if evaluation.interval is None:
        return f"{value:.3f}"
    low, high = evaluation.interval
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
