"""The task ``preference``: training on preferred answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import RowGroup
from deltaw.data.packing import MicroBatch
from deltaw.data.row_reader import Reader
from deltaw.errors import UserError
from deltaw.hub.skeletons import has_values
from deltaw.machine.choices import Choice
from deltaw.methods.base import Method
from deltaw.progress import LogFunction, ignore_line, track_progress
from deltaw.settings.data import DataSettings
from deltaw.tasks.language.task import CausalTask
from deltaw.tasks.preference.evaluation import evaluate_pairs
from deltaw.tasks.preference.losses import PairLosses, PreferenceLoss
from deltaw.tasks.preference.rows import PairReader, UnpairedReader
from deltaw.tasks.preference.settings import PreferenceSettings
from deltaw.tasks.preference.unpaired_loss import UnpairedLoss, answer_metrics
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions, CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.losses import RowLogProbs
from deltaw.training.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.task import SFT, BatcherChoice, Classes, ModelFiles, RateFactor, Rows

# Unpaired preferences: answers run with gradients. Before each step, mismatched answers run without gradients to
# estimate the divergence from the reference model. An item is a group of two rows
# (:mod:`deltaw.tasks.preference.rows`): the answer, which microbatches contain, and the mismatched answer.


class UnpairedMicroBatcher(CausalMicroBatcher):
    """Microbatches of the first row of each group. Rows outside of groups are used unchanged."""

    def cost_rows(self, rows: Sequence[Any]) -> list[Any]:
        """Return the rows that microbatches contain."""
        return [row.rows[0] if isinstance(row, RowGroup) else row for row in rows]

    items = cost_rows

    def full_batches(self, rows: Sequence[Any]) -> Iterator[MicroBatch]:
        """Yield microbatches of both rows of each group, which share the computation of their prompt."""
        return map(self.build, self.cut(rows))


class UnpairedObjective(CausalObjective):
    """Loss of unpaired answers."""

    def __init__(self, model: PreTrainedModel, settings: PreferenceSettings) -> None:
        self.unpaired = UnpairedLoss(settings)
        super().__init__(model, self.unpaired)

    @torch.no_grad()
    def start_step(self, rows: Sequence[RowGroup], batcher: Batcher, processes: Reducer = SINGLE_PROCESS) -> None:
        """Estimate the divergence from the reference model on the mismatched answers of a step, without gradients.

        Each process runs a part of the answers, and all processes get the estimate over all of them.
        """
        if not has_values(self.model):
            return  # a dry run measures peak memory, which the microbatches with gradients determine
        local_rows = processes.local_rows(mismatched(rows), batcher)
        self.unpaired.estimate(processes.add(distance(self, batcher.batches(local_rows))))


def distance(objective: UnpairedObjective, batches: Iterable[Any]) -> Tensor:
    """Return (2,): the sum of log-ratios r over the rows of the microbatches, and the number of rows.

    See :meth:`deltaw.tasks.preference.unpaired_loss.UnpairedLoss.divergence_sums`.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        totals += objective.unpaired.divergence_sums(RowLogProbs.of(batch, objective.token_log_probs(batch))).cpu()
    return totals


def mismatched(rows: Sequence[RowGroup]) -> list[Any]:
    """Return the second row of each group."""
    return [group.rows[1] for group in rows]


def evaluate_preferences(objective: CausalObjective, pairs: Sequence[RowGroup], batcher: Batcher) -> Evaluation:
    """Return loss and rewards of answer pairs (:func:`deltaw.tasks.preference.evaluation.evaluate_pairs`).

    Raises:
        UserError: if the loss is not finite, or rows lack log-probabilities of the reference model.
    """
    loss = objective.loss
    assert isinstance(loss, PreferenceLoss)

    def losses_of(batch: MicroBatch) -> PairLosses:
        return loss.per_row_losses(RowLogProbs.of(batch, objective.token_log_probs(batch)))

    return evaluate_pairs(pairs, batcher, losses_of)[0]


@torch.no_grad()
def evaluate_unpaired(objective: UnpairedObjective, answers: Sequence[RowGroup], batcher: Batcher) -> Evaluation:
    """Evaluate unpaired answers.

    The metrics are the mean loss, the accuracy, the divergence from the reference model and the mean rewards of
    desirable and undesirable answers. An answer counts as accurate if its reward is on the correct side of the
    divergence, and half if it equals the divergence, which is one number for all answers.

    Raises:
        UserError: if the loss is not finite, or rows lack log-probabilities of the reference model.
    """
    loss = objective.unpaired
    loss.estimate(distance(objective, batcher.batches(mismatched(answers))))
    indices = {id(answer.rows[0]): index for index, answer in enumerate(answers)}
    table = np.empty((len(answers), 4))  # loss, accuracy, reward, 1 if desirable
    for batch in batcher.batches(answers):
        rows = RowLogProbs.of(batch, objective.token_log_probs(batch))
        row_losses = loss.per_row_losses(rows)
        is_desired = row_losses.desired.to(row_losses.rewards.dtype)
        columns = [row_losses.losses, row_losses.accuracies, row_losses.rewards, is_desired]
        table[[indices[id(row)] for row in rows.rows]] = torch.stack(columns, 1).cpu().double().numpy()
    losses, accuracies, rewards, desired = table.T
    check_finite("the losses of the evaluated answers are", losses)
    sums = accuracies, rewards * desired, rewards * (1 - desired), desired, 1 - desired
    divergence = float(loss.divergence) * len(answers)
    metrics = answer_metrics([*(float(numbers.sum()) for numbers in sums), divergence])
    return Evaluation.of_rows({"loss": float(losses.mean()), **metrics}, "accuracy", accuracies.copy())


# Learning rates of preference losses relative to SFT, which takes 5e-6 in Tulu 3 and 2e-5 in TRL and Zephyr. Tulu 3
# (arXiv 2411.15124) trains DPO at 5e-7. TRL recommends 5e-7 to 5e-6 for KTO. ORPO's loss contains the SFT loss, and its
# paper (arXiv 2403.07691) trains at 8e-6. SimPO's paper (arXiv 2405.14734) trains at 3e-7 to 1e-6.
PREFERENCE_RATES = {
    "dpo": RateFactor(0.1, "Tulu 3"),
    "ipo": RateFactor(0.1, "Tulu 3"),
    "kto": RateFactor(0.1, "TRL's guide to KTO"),
    "orpo": RateFactor(0.4, "the ORPO paper"),
    "simpo": RateFactor(0.05, "the SimPO paper"),
}
# Number of training rows from which these rates apply.
MANY_ROWS = 200
# Factor of the rate below. The model ranks few pairs correctly within about 15 steps, and further steps at the full
# rate change facts in its answers (benchmarks/preference_facts.py).
FEW_ROWS_RATE = 0.3


class PreferenceTask(CausalTask):
    """Train a model to prefer chosen to rejected answers, or desirable to undesirable ones.

    The reference model is the base model or the adapter of ``start_from``. Its log-probabilities are computed once,
    before the first step, in microbatches of the training size, and stored in the rows.

    Args:
        settings: The ``preference:`` section.
    """

    name = "preference"
    answers_rows = False
    checks_generation = True
    evaluation_method = "token_log_probs"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        log: LogFunction = ignore_line,
        settings: PreferenceSettings | None = None,
    ) -> None:
        super().__init__(tokenizer, log)
        self.settings = settings or PreferenceSettings.model_validate({})

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> PreferenceTask:
        return cls(files.tokenizer(), files.log, files.section)

    @classmethod
    def rate_factor(cls, section: PreferenceSettings | None) -> RateFactor:
        return PREFERENCE_RATES["dpo" if section is None else section.loss]

    @classmethod
    def few_rows_factor(cls, num_rows: int) -> RateFactor:
        if num_rows >= MANY_ROWS:
            return SFT
        return RateFactor(FEW_ROWS_RATE, f"fewer than {MANY_ROWS} training rows")

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        if not self.settings.is_unpaired:
            return PairReader(settings, self.tokenizer, log=self._log)
        weights = self.settings.desirable_weight, self.settings.undesirable_weight
        return UnpairedReader(settings, self.tokenizer, log=self._log, weights=weights)

    def batcher(self, model: PreTrainedModel, examples: Rows, options: BatcherOptions) -> BatcherChoice:
        batcher, choices = super().batcher(model, examples, options)
        if self.settings.is_unpaired:
            assert isinstance(batcher, CausalMicroBatcher)
            batcher = batcher.with_class(UnpairedMicroBatcher)
        if self.settings.beta == "auto":
            beta = Choice(self.settings.effective_beta, f"usual for {self.settings.loss}")
            choices = {**choices, "preference.beta": beta}
        return batcher, choices

    def check_method(self, method: Method) -> None:
        if method.is_activated:
            message = "an adapter with an invocation sequence cannot be trained on pairs"
            raise UserError(message, location="lora.active", hint="set lora.active: always")

    def add_reference_log_probs(
        self, model: PreTrainedModel, rows: Rows, batcher: Batcher, processes: Reducer = SINGLE_PROCESS
    ) -> Rows:
        if not self.settings.has_reference or not len(rows):
            return rows
        if not has_values(model):  # a dry run needs no actual values
            return [RowGroup(tuple(replace(row, reference=0.0) for row in pair.rows)) for pair in rows]
        objective = CausalObjective(model)
        indices = {id(row): n for n, row in enumerate(row for pair in rows for row in pair.rows)}
        log_probs = torch.zeros(len(indices), dtype=torch.float64)
        batches = batcher.full_batches if isinstance(batcher, UnpairedMicroBatcher) else batcher.batches
        progress = track_progress("computing the base model's log-probabilities", len(rows))
        with progress as advance, torch.no_grad(), self.model_context(model, batcher):
            done = 0
            # All processes form the same microbatches and take turns, so values do not depend on the number of
            # processes.
            for index, batch in enumerate(batches(rows)):
                if index % processes.size == processes.rank:
                    of_batch = RowLogProbs.of(batch, objective.token_log_probs(batch))
                    sums = of_batch.sums().cpu().double()
                    log_probs[[indices[id(row)] for row in of_batch.rows]] = sums
                done += len(batch.sizes)
                advance(done)
            values = iter(processes.add(log_probs, long_wait=True).tolist())
        return [RowGroup(tuple(replace(row, reference=next(values)) for row in pair.rows)) for pair in rows]

    def evaluation_batches(self, examples: Sequence[Any], batcher: Batcher) -> Iterator[Any]:
        if self.settings.is_unpaired:
            yield from batcher.batches(mismatched(examples))
        yield from batcher.batches(examples)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        if self.settings.is_unpaired:
            return UnpairedObjective(model, self.settings)
        return CausalObjective(model, PreferenceLoss(self.settings))

    def evaluate(self, objective: CausalObjective, rows: Rows, batcher: Batcher, classes: Classes = None) -> Evaluation:
        if isinstance(objective, UnpairedObjective):
            return evaluate_unpaired(objective, rows, batcher)
        return evaluate_preferences(objective, rows, batcher)
