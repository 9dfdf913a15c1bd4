"""A task as an external package would define it: learn which of two answers is preferred.

Rows are ``{"prompt": …, "chosen": …, "rejected": …}``. The file contains the reader, the loss, the metric, and the
registry entry.
"""

from __future__ import annotations

import numpy as np
import torch

from deltaw.data.bad_rows import BadRowError
from deltaw.data.example import Example, RowGroup
from deltaw.data.row_reader import RowReader
from deltaw.settings.task_registry import TaskEntry
from deltaw.tasks.language.task import CausalTask
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.losses import RowLogProbs
from tests.training.toy_preference import Preference


class PairReader(RowReader):
    """Reads a row as a group of two examples, or rejects it with a reason."""

    form = "toy pairs"
    needs = ("prompt", "chosen", "rejected")

    def example(self, row, number, location):
        if row["chosen"] == row["rejected"]:
            raise BadRowError("both answers are the same", reason="nothing to prefer", location=location)
        prompt = self.tokenizer.encode(row["prompt"])
        rows = []
        for key in ("chosen", "rejected"):
            tokens = np.asarray([*prompt, *self.tokenizer.encode(row[key])], np.int32)
            rows.append(Example(number, tokens, np.arange(len(tokens)) >= len(prompt), len(prompt), row[key]))
        return RowGroup(tuple(rows))


class PreferenceTask(CausalTask):
    """Preference task, evaluated by the share of pairs whose chosen answer is more likely."""

    name = "toy-preference"

    def reader(self, settings, classes=None):
        return PairReader(settings, self.tokenizer)

    def objective(self, model):
        return CausalObjective(model, Preference())

    def evaluate(self, objective, examples, batcher, classes=None):
        right = []
        total = 0.0
        with torch.no_grad():
            for batch in batcher.batches(examples):
                logprobs = RowLogProbs.of(batch, objective.token_log_probs(batch))
                chosen, rejected = logprobs.grouped(logprobs.sums()).unbind(1)
                right += (chosen > rejected).tolist()
                total += float(objective.loss(logprobs))
        rows = np.asarray(right, np.float64)
        metrics = {"loss": total / len(rows), "preferred": float(rows.mean())}
        return Evaluation(metrics, "preferred", True, rows, mean_interval(rows))


ENTRY = TaskEntry("toy-preference", PreferenceTask, "AutoModelForCausalLM", "generate text")
