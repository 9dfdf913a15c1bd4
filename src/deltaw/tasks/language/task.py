"""The tasks ``causal-lm`` and ``preference``: next-token prediction, and training on preferred answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.data.example import Item, rows_of
from deltaw.data.row_reader import Reader, RunData
from deltaw.data.stored_rows import TextReader
from deltaw.progress import LogFunction, ignore_line, track_progress
from deltaw.settings.data import DataSettings
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import MAX_BUFFERED_ROWS, BatcherOptions, choose_causal_batcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.features.images import RowImages, has_images
from deltaw.training.losses import label_indices
from deltaw.training.task import BatcherChoice, Classes, ModelFiles, Rows, Task


def evaluate_causal(objective: CausalObjective, examples: Sequence[Item], batcher: Batcher) -> Evaluation:
    """Return loss and perplexity over all label tokens, and the share of exact answers if rows have answers.

    An answer is exact if each of its labels, including the end token, is the argmax prediction given the preceding
    ones. Greedy decoding would generate exactly this answer, so one forward pass replaces decoding.

    Raises:
        UserError: if the loss is not finite.
    """
    total = 0.0
    labels = 0
    losses: list[float] = []
    predicted: list[tuple[np.ndarray, np.ndarray]] = []
    with track_progress("evaluating", len(examples)) as advance:
        for start in range(0, len(examples), MAX_BUFFERED_ROWS):
            part = list(examples[start : start + MAX_BUFFERED_ROWS])
            results: dict[int, tuple[float, tuple[np.ndarray, np.ndarray]]] = {}
            for batch in batcher.batches(part):
                token_losses, likeliest = (tensor.cpu().numpy() for tensor in objective.evaluate_rows(batch))
                targets = batch.targets.cpu().numpy()
                index, member_indices = label_indices(batch)
                for number, member in enumerate(batch.members):
                    member_labels = index[member_indices == number]
                    mean_loss = float(token_losses[member_labels].mean())
                    results[id(member.example)] = mean_loss, (likeliest[member_labels], targets[member_labels])
                    total += float(token_losses[member_labels].sum())
                    labels += len(member_labels)
                advance(len(losses) + len(results))
            part_rows = [row for item in part for row in rows_of(item)]
            losses += [results[id(row)][0] for row in part_rows]
            predicted += [results[id(row)][1] for row in part_rows if row.answer is not None]
    loss = total / labels
    check_finite("the loss of the evaluated rows is", loss)
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if not predicted:
        return Evaluation.of_rows(metrics, "loss", np.array(losses), higher_is_better=False)
    exact = np.array([np.array_equal(*pair) for pair in predicted], dtype=np.float64)
    metrics["exact_match"] = float(exact.mean())
    return replace(Evaluation.of_rows(metrics, "exact_match", exact), predicted=predicted)


class CausalTask(Task[CausalObjective]):
    """Predict the next token at each label position."""

    name = "causal-lm"
    generates_text = True
    answers_rows = True
    shares_evaluation = True
    folder: Path | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, log: LogFunction = ignore_line) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self._log = log

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> CausalTask:
        task = cls(files.tokenizer(), files.log)
        task.folder = files.folder
        if cls is CausalTask and has_images(files.config, files.folder):
            task.inputs = RowImages(files.folder, files.config, task.tokenizer, files.dtype)
        return task

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        self.tokenizer = with_chat_template(self.tokenizer, settings.chat_template)
        return super().read(settings, seed=seed)

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        return TextReader(settings, self.tokenizer, folder=self.folder, log=self._log, images=self.images)

    def batcher(self, model: PreTrainedModel, examples: Rows, options: BatcherOptions) -> BatcherChoice:
        return choose_causal_batcher(model, examples, options)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        return CausalObjective(model)

    def evaluate(self, objective: CausalObjective, rows: Rows, batcher: Batcher, classes: Classes = None) -> Evaluation:
        return evaluate_causal(objective, rows, batcher)
