"""A task as somebody outside of the library writes one: learn which of two answers is preferred.

Rows are ``{"prompt": …, "chosen": …, "rejected": …}``. This file and its entry are all of it.
"""

from __future__ import annotations

import numpy as np

from deltaw.data import Example, Report, read_rows
from deltaw.data.example import RowGroup
from deltaw.tasks import TaskEntry
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.losses import RowLogProbs
from deltaw.training.tasks.base import RunData
from deltaw.training.tasks.causal import CausalTask
from deltaw.training.tasks.causal_objective import CausalObjective
from tests.training.toy_preference import Preference


class PreferenceTask(CausalTask):
    """Prefer the chosen answer; evaluated by the share of pairs whose chosen answer is the likelier one."""

    name = "toy-preference"

    def read(self, settings, *, seed):
        groups, report = self.read_file(settings.train, settings, None)
        count = int(settings.eval)
        return RunData(groups[:-count], groups[-count:], report)

    def read_file(self, reference, settings, classes):
        groups = [self._pair(number, row) for number, row in read_rows(reference)]
        report = Report(reference, "pairs", "plain", rows_read=len(groups), rows_kept=len(groups))
        return groups, report

    def _pair(self, number, row):
        prompt = self.tokenizer.encode(row["prompt"])
        rows = []
        for key in ("chosen", "rejected"):
            tokens = np.asarray([*prompt, *self.tokenizer.encode(row[key])], np.int32)
            rows.append(Example(number, tokens, np.arange(len(tokens)) >= len(prompt), len(prompt), row[key]))
        return RowGroup(tuple(rows))

    def objective(self, model):
        return CausalObjective(model, Preference())

    def evaluate(self, objective, examples, batcher, classes=None):
        right = []
        for batch in batcher.batches(examples):
            losses, _ = objective.evaluate_rows(batch)
            told = RowLogProbs.of(batch, -losses)
            chosen, rejected = told.grouped(told.sums()).unbind(1)
            right += (chosen > rejected).tolist()
        rows = np.asarray(right, np.float64)
        return Evaluation({"preferred": float(rows.mean())}, "preferred", True, rows, mean_interval(rows))


ENTRY = TaskEntry("toy-preference", PreferenceTask, "AutoModelForCausalLM", "generate text")
