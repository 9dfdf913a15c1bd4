"""The task ``causal-lm``: predict the next token wherever a label is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data import prepare, prepare_file
from deltaw.data.chat_template import with_chat_template
from deltaw.data.report import Report
from deltaw.data.settings import DataSettings
from deltaw.host.choices import Choice
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.padded import padded_rows
from deltaw.training.callbacks import Say, silent
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.causal import evaluate_causal
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.tasks.base import ModelFiles, RunData, Task
from deltaw.training.tasks.causal_batcher import choose_causal_batcher
from deltaw.training.tasks.causal_objective import CausalObjective


class CausalTask(Task):
    """Predict the next token wherever a label is."""

    name = "causal-lm"
    writes_text = True
    shares_evaluation = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say = silent) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self._say = say

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> CausalTask:
        return cls(files.tokenizer(), files.say)

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        self.tokenizer = with_chat_template(self.tokenizer, settings.chat_template)
        prepared = prepare(settings, self.tokenizer, seed=seed, say=self._say)
        return RunData(prepared.train, prepared.held_out, prepared.report, skipped=prepared.skipped)

    def read_file(
        self, reference: str, settings: DataSettings, classes: Sequence[str] | None
    ) -> tuple[Sequence[Any], Report]:
        return prepare_file(reference, settings, self.tokenizer, say=self._say)

    def batcher(
        self,
        model: PreTrainedModel,
        examples: Sequence[Any],
        *,
        device: str,
        tokens_per_pass: int | str,
        share: bool | str,
        method_shares: bool,
        virtual_tokens: int,
    ) -> tuple[AnyBatcher, dict[str, Choice]]:
        return choose_causal_batcher(
            model,
            examples,
            device=device,
            tokens_per_pass=tokens_per_pass,
            share=share,
            method_shares=method_shares,
            virtual_tokens=virtual_tokens,
        )

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        return CausalObjective(model)

    def running(self, model: PreTrainedModel, batcher: AnyBatcher) -> AbstractContextManager[None]:
        return padded_rows(model) if getattr(batcher, "padded", False) else packed_rows(model)

    def evaluate(
        self,
        objective: AnyObjective,
        examples: Sequence[Any],
        batcher: AnyBatcher,
        classes: Sequence[str] | None = None,
    ) -> Evaluation:
        return evaluate_causal(objective, examples, batcher)  # type: ignore[arg-type]
