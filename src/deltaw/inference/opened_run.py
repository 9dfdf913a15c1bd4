"""A model loaded for inference, and its evaluation."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from deltaw.decoding.opening import SessionGenerator
from deltaw.inference.loaded_run import LoadedRun
from deltaw.inference.scores import EvaluationScore, ScoreOptions
from deltaw.inference.task_inference import TaskInference
from deltaw.inference.text_inference import TextInference
from deltaw.settings import task_registry
from deltaw.training.task import Rows

DEFAULT_SCORE = ScoreOptions()


@dataclass
class OpenedRun(LoadedRun):
    """A loaded model that its task can evaluate and predict with."""

    @functools.cached_property
    def inference(self) -> TaskInference[Any]:
        """Use of the task's models (``TaskEntry.inference``)."""
        entry = task_registry.entry_of(self.task.name)
        default = TextInference if entry.generates_text else TaskInference
        inference: TaskInference[Any] = (entry.load_inference() or default)(self.task)
        return inference

    def score(
        self, examples: Rows, options: ScoreOptions = DEFAULT_SCORE, generator: SessionGenerator | None = None
    ) -> EvaluationScore:
        """Evaluate the model on examples without virtual tokens.

        The result equals the evaluation of the run's held-out rows. A task can replace this evaluation
        (:meth:`TaskInference.score`).

        Args:
            generator: Generator of answers and samples. The default is transformers.

        Raises:
            UserError: if the settings refer to code that the user did not name on this machine.
        """
        return self.inference.score(self, examples, options, generator)
