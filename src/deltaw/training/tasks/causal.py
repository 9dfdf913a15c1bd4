"""The tasks ``causal-lm`` and ``preference``: next-token prediction, and training on preferred answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.data.example import Example, Item, RowGroup, rows_of
from deltaw.data.packing import PackedBatch
from deltaw.data.preferences import PairReader, UnpairedReader
from deltaw.data.prepare import TextReader
from deltaw.data.prompts import QuestionReader, TokenizedPrompt
from deltaw.data.row_reader import Reader, RunData
from deltaw.data.settings import DataSettings
from deltaw.hub.loading import has_values
from deltaw.machine.choices import Choice
from deltaw.progress import track_progress
from deltaw.runtime.generation import Progress, TextGenerator, generate
from deltaw.runtime.packed import packed_rows, padded_rows
from deltaw.task_settings import PreferenceSettings
from deltaw.training.callbacks import LogFunction, ignore_line
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.losses import PairLosses, PreferenceLoss, RowLogProbs, UnpairedLoss, answer_metrics, label_indices
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.parallel.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.tasks.base import BatcherChoice, Classes, ModelFiles, RateFactor, Rows, Task, evaluate_pairs
from deltaw.training.tasks.causal_batcher import MAX_BUFFERED_ROWS, CausalMicroBatcher, choose_causal_batcher
from deltaw.training.tasks.causal_objective import CausalObjective

# Columns that contain a prompt. Without any of them, the column ``text`` is a text to continue.
_PROMPTS = {"prompt", "messages", "conversations", "instruction", "input", "chosen"}


@dataclass(frozen=True)
class EvaluatedAnswer:
    """A generated answer and the expected one.

    Attributes:
        row: Number of the row.
        question: Last user turn of the prompt.
        expected: Answer in the data, or an empty string.
        output: Generated answer.
    """

    row: int
    question: str
    expected: str
    output: str

    @property
    def exact(self) -> bool:
        """True if the answers are equal, ignoring leading and trailing white space."""
        return self.output.strip() == self.expected.strip()

    @property
    def display_text(self) -> str:
        """Text of the answer in a table."""
        return self.output


def evaluate_causal(objective: CausalObjective, examples: Sequence[Item], batcher: AnyBatcher) -> Evaluation:
    """Return loss and perplexity over all label tokens, and the share of exact answers if rows have answers.

    An answer is exact if each of its labels, including the end token, is the argmax prediction given the preceding
    ones. Greedy decoding would generate exactly this answer, so one forward pass replaces decoding.

    Raises:
        UserError: if the loss is not finite.
    """
    total, labels = 0.0, 0
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
    return Evaluation.of_rows(metrics, "exact_match", exact, predicted=predicted)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | None = None,
    batch_tokens: int = 4096,
    on_progress: Progress = None,
    writer: TextGenerator | None = None,
) -> list[EvaluatedAnswer]:
    """Generate greedy completions of the examples that have a prompt, in order.

    Args:
        max_new_tokens: By default slightly more than the longest expected answer.
        batch_tokens: Maximum number of tokens in a decoding batch.
        writer: Generates the completions. By default, or if it returns None, transformers is used.
    """
    prompted = [e for e in examples if has_prompt(e)]
    if not prompted:
        return []
    prompts = [e.tokens[: e.prompt_length] for e in prompted]
    count = max_new_tokens or 4 + max(len(e.tokens) - e.prompt_length for e in prompted)
    completions = None if writer is None else writer(prompts, count, batch_tokens, on_progress)
    if completions is None:
        options: dict[str, Any] = {"batch_tokens": batch_tokens, "on_progress": on_progress}
        completions = generate(model, tokenizer, prompts, max_new_tokens=count, **options)
    pairs = zip(prompted, completions, strict=True)
    return [EvaluatedAnswer(e.row, question_of(tokenizer, e), e.answer or "", c.text) for e, c in pairs]


def has_prompt(row: Example) -> bool:
    """True if a row has a prompt that a model can answer."""
    return row.prompt_length > 0 and (row.answer is not None or isinstance(row, TokenizedPrompt))


def question_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Return the last user turn of the prompt as plain text.

    Chat templates put the speaker's name on a line by itself.
    """
    prompt = example.tokens[: example.prompt_length]
    prompt = prompt[prompt < len(tokenizer)]  # a soft prompt has no text
    text = str(tokenizer.decode(prompt, skip_special_tokens=True)).rstrip()
    lines = text.removesuffix("assistant").rstrip().splitlines()
    speaker = max((n for n, line in enumerate(lines) if line.strip().lower() == "user"), default=-1)
    return "\n".join(lines[speaker + 1 :])


@dataclass(frozen=True)
class EvaluationScore:
    """Evaluation of a model, and its answers to some of the examples."""

    evaluation: Evaluation
    answers: list[EvaluatedAnswer] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        return self.evaluation.metrics


class CausalTask(Task):
    """Predict the next token at each label position."""

    name = "causal-lm"
    generates_text = True
    shares_evaluation = True
    folder: Path | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, log: LogFunction = ignore_line) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self._log = log

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> CausalTask:
        task = cls(files.tokenizer(), files.log)
        task.folder = files.folder
        return task

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        self.tokenizer = with_chat_template(self.tokenizer, settings.chat_template)
        return super().read(settings, seed=seed)

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        return TextReader(settings, self.tokenizer, folder=self.folder, log=self._log)

    def input_reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> QuestionReader:
        continues = "text" in columns and not _PROMPTS & {*columns}
        return QuestionReader(settings, self.tokenizer, continues=continues)

    def batcher(self, model: PreTrainedModel, examples: Rows, **options: Any) -> BatcherChoice:
        return choose_causal_batcher(model, examples, **options)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        return CausalObjective(model)

    def model_context(self, model: PreTrainedModel, batcher: AnyBatcher) -> AbstractContextManager[None]:
        return padded_rows(model) if getattr(batcher, "padded", False) else packed_rows(model)

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        return evaluate_causal(objective, rows, batcher)  # type: ignore[arg-type]


# Unpaired preferences: answers run with gradients. Before each step, mismatched answers run without gradients to
# estimate the divergence from the reference model. An item is a group of two rows (:mod:`deltaw.data.preferences`):
# the answer, which microbatches contain, and the mismatched answer.


@dataclass(frozen=True)
class UnpairedMicroBatcher(CausalMicroBatcher):
    """Microbatches of the first row of each group. Rows outside of groups are used unchanged."""

    def cost_rows(self, rows: Sequence[Any]) -> list[Any]:
        """Return the rows that microbatches contain."""
        return [row.rows[0] if isinstance(row, RowGroup) else row for row in rows]

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        return super().batches(self.cost_rows(rows))

    def split(self, rows: Sequence[Any]) -> Iterator[list[Any]]:
        return super().split(self.cost_rows(rows))

    def full_batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield microbatches of both rows of each group, which share the computation of their prompt."""
        return super().batches(rows)


class UnpairedObjective(CausalObjective):
    """Loss of unpaired answers."""

    def __init__(self, model: PreTrainedModel, settings: PreferenceSettings) -> None:
        self.unpaired = UnpairedLoss(settings)
        super().__init__(model, self.unpaired)

    @torch.no_grad()
    def start_step(self, rows: Sequence[RowGroup], batcher: AnyBatcher, processes: Reducer = SINGLE_PROCESS) -> None:
        """Estimate the divergence from the reference model on the mismatched answers of a step, without gradients.

        Each process runs a part of the answers, and all processes get the estimate over all of them.
        """
        if not has_values(self.model):
            return  # a dry run measures peak memory, which the microbatches with gradients determine
        local_rows = processes.local_rows(mismatched(rows), batcher)
        self.unpaired.estimate(processes.add(distance(self, batcher.batches(local_rows))))


def distance(objective: UnpairedObjective, batches: Iterable[Any]) -> Tensor:
    """Return (2,): the sum of log-ratios r over the rows of the microbatches, and the number of rows.

    See :meth:`deltaw.training.losses.UnpairedLoss.divergence_sums`.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        totals += objective.unpaired.divergence_sums(RowLogProbs.of(batch, objective.token_log_probs(batch))).cpu()
    return totals


def mismatched(rows: Sequence[RowGroup]) -> list[Any]:
    """Return the second row of each group."""
    return [group.rows[1] for group in rows]


def evaluate_preferences(objective: CausalObjective, pairs: Sequence[RowGroup], batcher: AnyBatcher) -> Evaluation:
    """Return loss and rewards of answer pairs (:func:`deltaw.training.tasks.base.evaluate_pairs`).

    Raises:
        UserError: if the loss is not finite, or rows lack log-probabilities of the reference model.
    """
    loss = objective.loss
    assert isinstance(loss, PreferenceLoss)

    def of_batch(batch: PackedBatch) -> tuple[Sequence[Any], PairLosses]:
        rows = RowLogProbs.of(batch, objective.token_log_probs(batch))
        return [rows.rows[group[0]] for group in rows.groups], loss.per_row_losses(rows)

    return evaluate_pairs(pairs, batcher, of_batch)[0]


@torch.no_grad()
def evaluate_unpaired(objective: UnpairedObjective, answers: Sequence[RowGroup], batcher: AnyBatcher) -> Evaluation:
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


class PreferenceTask(CausalTask):
    """Train a model to prefer chosen to rejected answers, or desirable to undesirable ones.

    The reference model of the losses is the base model. Its log-probabilities are computed once, before the adapter is
    added or with the adapter disabled, in microbatches of the training size, and stored in the rows.

    Args:
        settings: The ``preference:`` section.
    """

    name = "preference"
    has_pairs = True
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

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        if not self.settings.is_unpaired:
            return PairReader(settings, self.tokenizer, log=self._log)
        weights = self.settings.desirable_weight, self.settings.undesirable_weight
        return UnpairedReader(settings, self.tokenizer, log=self._log, weights=weights)

    def batcher(self, model: PreTrainedModel, examples: Rows, **options: Any) -> BatcherChoice:
        batcher, choices = super().batcher(model, examples, **options)
        if self.settings.is_unpaired:
            assert isinstance(batcher, CausalMicroBatcher)
            batcher = UnpairedMicroBatcher(**{f.name: getattr(batcher, f.name) for f in fields(batcher)})
        if self.settings.beta == "auto":
            beta = Choice(self.settings.effective_beta, f"usual for {self.settings.loss}")
            choices = {**choices, "preference.beta": beta}
        return batcher, choices

    def add_reference_log_probs(
        self, model: PreTrainedModel, rows: Rows, batcher: AnyBatcher, processes: Reducer = SINGLE_PROCESS
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
                done += len(batch.groups)
                advance(done)
            values = iter(processes.add(log_probs, long_wait=True).tolist())
        return [RowGroup(tuple(replace(row, reference=next(values)) for row in pair.rows)) for pair in rows]

    def evaluation_batches(self, examples: Sequence[Any], batcher: AnyBatcher) -> Iterator[Any]:
        if self.settings.is_unpaired:
            yield from batcher.batches(mismatched(examples))
        yield from batcher.batches(examples)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        if self.settings.is_unpaired:
            return UnpairedObjective(model, self.settings)
        return CausalObjective(model, PreferenceLoss(self.settings))

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        if self.settings.is_unpaired:
            return evaluate_unpaired(objective, rows, batcher)  # type: ignore[arg-type]
        return evaluate_preferences(objective, rows, batcher)  # type: ignore[arg-type]
