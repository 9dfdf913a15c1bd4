"""Interface of a trained model's use: evaluation, predictions for files, scores of passages and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from transformers import PreTrainedModel

from deltaw.data.example import LabeledExample
from deltaw.data.row_reader import RowReader
from deltaw.decoding.opening import SessionGenerator
from deltaw.errors import UserError
from deltaw.hub.sentence_layout import SentenceLayout
from deltaw.inference.loaded_run import LoadedRun
from deltaw.inference.scores import EvaluationScore, ScoreOptions
from deltaw.progress import track_progress
from deltaw.settings.data import DataSettings
from deltaw.training.batcher import Batcher
from deltaw.training.evaluation.answers import answers, exact_match_warning
from deltaw.training.task import Classes, Rows, Task

# For each prediction named by the reader, a value per row.
Predictions: TypeAlias = Sequence[Sequence[Any]]
TaskType = TypeVar("TaskType", bound=Task[Any])


class TaskInference(Generic[TaskType]):
    """Use of a model after training. A task with other needs names a subclass in ``TaskEntry.inference``.

    Every part is optional. By default, a model can be evaluated with ``evaluate`` of its task, and has no predictions.

    Args:
        task: Task of the loaded model.

    Attributes:
        outputs: "vectors" if the model is used for the vectors of its tokens, or "logits".
        samples_completions: True if :meth:`score` samples completions of each prompt.
    """

    outputs: Literal["logits", "vectors"] = "logits"
    samples_completions = False

    def __init__(self, task: TaskType) -> None:
        self.task = task

    def score(
        self, opened: LoadedRun, rows: Rows, options: ScoreOptions, generator: SessionGenerator | None
    ) -> EvaluationScore:
        """Evaluate a loaded model, for ``deltaw eval``. Override it if the evaluation needs completions of the model.

        Args:
            rows: Rows without virtual tokens.
            generator: Generator of answers and samples. None uses transformers.
        """
        task = self.task
        model = opened.model
        batcher = opened.batcher([opened.example(row) for row in rows])
        with opened.base():
            rows = task.add_reference_log_probs(model, rows, batcher)
        rows = [opened.example(row) for row in rows]
        objective = task.objective(model)  # may run the model on padded rows
        with task.model_context(model, batcher), track_progress("evaluating"):
            evaluation = task.evaluate(objective, rows, batcher, opened.classes)
        warning = None
        if generator is not None and task.answers_rows:
            warning = exact_match_warning(rows, evaluation, opened.tokenizer, generator)
        if not options.num_answers or not task.answers_rows:
            return EvaluationScore(evaluation, warning=warning)
        answered = rows[: options.num_answers]
        written = answers(model, opened.tokenizer, answered, max_new_tokens=options.max_new_tokens, writer=generator)
        return EvaluationScore(evaluation, written, warning)

    def reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> RowReader[Any]:
        """Return the reader of rows to predict, which need no labels, for ``deltaw predict``.

        Its attribute ``predicts`` names the predictions.

        Args:
            columns: Columns of the rows, with the names of ``settings.columns``.

        Raises:
            UserError: if the task has no predictions.
        """
        raise UserError(f"the task {self.task.name} has no predictions", hint="use deltaw eval")

    def predict(self, objective: Any, rows: Rows, batcher: Batcher, classes: Classes) -> Predictions:
        """Return a list of values for each prediction in the reader's ``predicts``.

        Tasks that generate text do not implement this method, because their predictions are completions.

        Args:
            objective: Objective of the task for the loaded model.
            rows: Rows of :meth:`reader`.
            batcher: Cuts them into microbatches.
            classes: Names of the model's outputs, or None.
        """
        raise NotImplementedError

    def layout(self, model: PreTrainedModel) -> SentenceLayout:
        """Return pooling, normalization and prompts of the vectors of a model that serves "vectors"."""
        raise NotImplementedError

    @property
    def vector_lengths(self) -> Sequence[int]:
        """Lengths to which vectors may be truncated."""
        return ()

    def encode_pair(self, query: str, passage: str) -> LabeledExample:
        """Return the input of a model that serves "scores", for a passage and a query, without a label."""
        raise NotImplementedError
