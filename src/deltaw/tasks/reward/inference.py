"""Evaluation of a loaded model by the rewards of its completions."""

from __future__ import annotations

import contextlib

from deltaw.decoding.opening import SessionGenerator
from deltaw.inference.loaded_run import LoadedRun
from deltaw.inference.scores import EvaluationScore, ScoreOptions
from deltaw.inference.text_inference import TextInference
from deltaw.progress import ignore_line
from deltaw.tasks.reward.scoring import Scorer
from deltaw.tasks.reward.task import RewardTask
from deltaw.training.task import Rows


class RewardInference(TextInference[RewardTask]):
    """Generates completions and rewards them."""

    samples_completions = True

    def score(
        self, opened: LoadedRun, rows: Rows, options: ScoreOptions, generator: SessionGenerator | None
    ) -> EvaluationScore:
        """See :meth:`RewardTask.score_completions`."""
        task = self.task
        if opened.adapter_folder is not None:
            opened.adapter_folder.require_code()
        generator = generator or SessionGenerator(opened, ignore_line)
        scorer = Scorer(task.settings)
        with contextlib.closing(scorer), contextlib.closing(task.turns(generator.sample)) as write:
            score = task.score_completions(rows, write, scorer, options)
        return score if options.num_answers else EvaluationScore(score.evaluation)
