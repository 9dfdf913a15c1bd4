"""The task ``preference``: of two answers to a prompt, make the chosen one likelier than the rejected one; or
of single answers, make those likelier that are desired.

The reference of losses that have one is the base model itself: its log-probabilities are computed once,
before an adapter is put on it or with the adapter disabled, in microbatches of the size that training uses,
and each row carries its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.data.example import RowGroup
from deltaw.data.preferences import prepare_pair_file, prepare_pairs
from deltaw.data.report import Report
from deltaw.data.settings import DataSettings
from deltaw.data.unpaired import prepare_unpaired, prepare_unpaired_file
from deltaw.host.choices import Choice
from deltaw.hub.skeleton import has_values
from deltaw.preference_settings import PreferenceSettings
from deltaw.training.callbacks import Say, silent
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.preference import evaluate_preferences, evaluate_unpaired
from deltaw.training.losses import RowLogProbs
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.training.preference_losses import PreferenceLoss
from deltaw.training.tasks.base import ModelFiles, RunData
from deltaw.training.tasks.causal import CausalTask
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.training.tasks.unpaired import UnpairedMicroBatcher, UnpairedObjective, mismatched
from deltaw.working import working


class PreferenceTask(CausalTask):
    """Prefer chosen answers to rejected ones.

    Args:
        settings: the ``preference:`` section.
    """

    name = "preference"
    has_pairs = True
    evaluation_asks = "token_log_probs"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        say: Say = silent,
        settings: PreferenceSettings | None = None,
    ) -> None:
        super().__init__(tokenizer, say)
        self.settings = settings or PreferenceSettings.model_validate({})

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> PreferenceTask:
        return cls(files.tokenizer(), files.say, files.preference)

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        self.tokenizer = with_chat_template(self.tokenizer, settings.chat_template)
        prepare = prepare_unpaired if self.settings.is_unpaired else prepare_pairs
        prepared = prepare(settings, self.tokenizer, seed=seed, say=self._say)
        return RunData(prepared.train, prepared.held_out, prepared.report, skipped=prepared.skipped)

    def read_file(
        self, reference: str, settings: DataSettings, classes: Sequence[str] | None
    ) -> tuple[Sequence[Any], Report]:
        prepare = prepare_unpaired_file if self.settings.is_unpaired else prepare_pair_file
        return prepare(reference, settings, self.tokenizer, say=self._say)

    def batcher(self, model: PreTrainedModel, *args: Any, **named: Any) -> tuple[Any, dict[str, Choice]]:
        batcher, chosen = super().batcher(model, *args, **named)
        if self.settings.is_unpaired:
            assert isinstance(batcher, CausalMicroBatcher)
            batcher = UnpairedMicroBatcher(**{f.name: getattr(batcher, f.name) for f in fields(batcher)})
        if self.settings.beta == "auto":
            beta = Choice(self.settings.strength, f"usual for {self.settings.loss}")
            chosen = {**chosen, "preference.beta": beta}
        return batcher, chosen

    def referenced(
        self,
        model: PreTrainedModel,
        rows: Sequence[Any],
        batcher: AnyBatcher,
        processes: Reducer = ALONE,
    ) -> Sequence[RowGroup]:
        if not self.settings.has_reference or not len(rows):
            return rows
        if not has_values(model):  # a dry run: no value is known, and none is needed
            return [RowGroup(tuple(replace(row, reference=0.0) for row in pair.rows)) for pair in rows]
        objective = CausalObjective(model)
        place = {id(row): n for n, row in enumerate(row for pair in rows for row in pair.rows)}
        found = torch.zeros(len(place), dtype=torch.float64)
        batches = batcher.whole if isinstance(batcher, UnpairedMicroBatcher) else batcher.batches
        told = working("computing the base model's log-probabilities", len(rows))
        with told as advance, torch.no_grad(), self.running(model, batcher):
            done = 0
            # All lay out the same microbatches and compute them in turn, so that each value is the one that
            # a process alone gives it.
            for number, batch in enumerate(batches(rows)):
                if number % processes.size == processes.rank:
                    of_batch = RowLogProbs.of(batch, objective.token_log_probs(batch))
                    sums = of_batch.sums().cpu().double()
                    found[[place[id(row)] for row in of_batch.rows]] = sums
                done += len(batch.groups)
                advance(done)
            values = iter(processes.add(found, patient=True).tolist())
        return [RowGroup(tuple(replace(row, reference=next(values)) for row in pair.rows)) for pair in rows]

    def evaluation_batches(self, examples: Sequence[Any], batcher: AnyBatcher) -> Iterator[Any]:
        if self.settings.is_unpaired:
            yield from batcher.batches(mismatched(examples))
        yield from batcher.batches(examples)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        if self.settings.is_unpaired:
            return UnpairedObjective(model, self.settings)
        return CausalObjective(model, PreferenceLoss(self.settings))

    def evaluate(
        self,
        objective: AnyObjective,
        examples: Sequence[Any],
        batcher: AnyBatcher,
        classes: Sequence[str] | None = None,
    ) -> Evaluation:
        if self.settings.is_unpaired:
            return evaluate_unpaired(objective, examples, batcher)  # type: ignore[arg-type]
        return evaluate_preferences(objective, examples, batcher)  # type: ignore[arg-type]
