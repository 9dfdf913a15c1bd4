"""The task ``causal-lm``: predict the next token wherever a label is."""

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
from deltaw.data.packing import Batch
from deltaw.data.preferences import PairReader, UnpairedReader
from deltaw.data.prepare import TextReader
from deltaw.data.prompts import Prompt, QuestionReader
from deltaw.data.row_reader import Reader, RunData
from deltaw.data.settings import DataSettings
from deltaw.hub.loading import has_values
from deltaw.machine.choices import Choice
from deltaw.runtime.generation import Progress, Writer, generate
from deltaw.runtime.packed import packed_rows, padded_rows
from deltaw.task_settings import PreferenceSettings
from deltaw.training.callbacks import Say, silent
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.losses import PairLosses, PreferenceLoss, RowLogProbs, UnpairedLoss, label_places, named_answers
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.training.tasks.base import Batched, Classes, ModelFiles, RateFactor, Rows, Task, evaluate_pairs
from deltaw.training.tasks.causal_batcher import ROWS_AT_ONCE, CausalMicroBatcher, choose_causal_batcher
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.working import working

# Columns that hold a prompt; without them the column ``text`` is a text to continue.
_PROMPTS = {"prompt", "messages", "conversations", "instruction", "input", "chosen"}


# How well a model does on examples: loss, perplexity, and the share that it would write exactly.


@dataclass(frozen=True)
class Answer:
    """What the model wrote where ``expected`` stands in the data."""

    row: int
    question: str
    expected: str
    written: str

    @property
    def exact(self) -> bool:
        """Equal but for white space at both ends."""
        return self.written.strip() == self.expected.strip()

    @property
    def shown(self) -> str:
        """What was written, in a table."""
        return self.written


def evaluate_causal(objective: CausalObjective, examples: Sequence[Item], batcher: AnyBatcher) -> Evaluation:
    """Loss and perplexity over all label tokens, and, where rows have answers, the share of exact ones.

    A row's answer counts as exact where every label of it, its end mark too, is the likeliest token after
    the ones before: greedy decoding would then write it, and no other. That takes one forward pass and no
    decoding.

    Raises:
        UserError: the loss is not finite.
    """
    total, labels = 0.0, 0
    losses: list[float] = []
    predicted: list[tuple[np.ndarray, np.ndarray]] = []
    with working("evaluating", len(examples)) as advance:
        for start in range(0, len(examples), ROWS_AT_ONCE):
            part = list(examples[start : start + ROWS_AT_ONCE])
            found: dict[int, tuple[float, tuple[np.ndarray, np.ndarray]]] = {}
            for batch in batcher.batches(part):
                each, likeliest = (tensor.cpu().numpy() for tensor in objective.evaluate_rows(batch))
                targets = batch.targets.cpu().numpy()
                index, owner = label_places(batch)
                for number, member in enumerate(batch.members):
                    at = index[owner == number]
                    found[id(member.example)] = float(each[at].mean()), (likeliest[at], targets[at])
                    total += float(each[at].sum())
                    labels += len(at)
                advance(len(losses) + len(found))
            rows_alone = [row for item in part for row in rows_of(item)]
            losses += [found[id(row)][0] for row in rows_alone]
            predicted += [found[id(row)][1] for row in rows_alone if row.answer is not None]
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
    writer: Writer | None = None,
) -> list[Answer]:
    """Greedy completions of the examples that have an answer, or are a prompt alone, in their order.

    Args:
        max_new_tokens: by default as many as the longest answer has, and a few more.
        batch_tokens: the most tokens that are decoded together.
        writer: writes them; None for transformers.
    """
    asked = [e for e in examples if has_prompt(e)]
    if not asked:
        return []
    prompts = [e.tokens[: e.prompt_length] for e in asked]
    count = max_new_tokens or 4 + max(len(e.tokens) - e.prompt_length for e in asked)
    written = None if writer is None else writer(prompts, count, batch_tokens, on_progress)
    if written is None:
        how: dict[str, Any] = {"batch_tokens": batch_tokens, "on_progress": on_progress}
        written = generate(model, tokenizer, prompts, max_new_tokens=count, **how)
    answered = zip(asked, written, strict=True)
    return [Answer(e.row, question_of(tokenizer, e), e.answer or "", done.text) for e, done in answered]


def has_prompt(row: Example) -> bool:
    """Whether a row has a prompt that a model can be asked to answer."""
    return row.prompt_length > 0 and (row.answer is not None or isinstance(row, Prompt))


def question_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The last turn of the prompt as a person would read it: templates put each speaker's name on a line."""
    prompt = example.tokens[: example.prompt_length]
    prompt = prompt[prompt < len(tokenizer)]  # a soft prompt has no text
    text = str(tokenizer.decode(prompt, skip_special_tokens=True)).rstrip()
    lines = text.removesuffix("assistant").rstrip().splitlines()
    speaker = max((n for n, line in enumerate(lines) if line.strip().lower() == "user"), default=-1)
    return "\n".join(lines[speaker + 1 :])


@dataclass(frozen=True)
class Score:
    """What a model came to on examples, and the answers that it wrote to some of them."""

    evaluation: Evaluation
    answers: list[Answer] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        return self.evaluation.metrics


class CausalTask(Task):
    """Predict the next token wherever a label is."""

    name = "causal-lm"
    writes_text = True
    shares_evaluation = True
    folder: Path | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say = silent) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self._say = say

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> CausalTask:
        task = cls(files.tokenizer(), files.say)
        task.folder = files.folder
        return task

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        self.tokenizer = with_chat_template(self.tokenizer, settings.chat_template)
        return super().read(settings, seed=seed)

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        return TextReader(settings, self.tokenizer, folder=self.folder, say=self._say)

    def input_reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> QuestionReader:
        continues = "text" in columns and not _PROMPTS & {*columns}
        return QuestionReader(settings, self.tokenizer, continues=continues)

    def batcher(self, model: PreTrainedModel, examples: Rows, **how: Any) -> Batched:
        return choose_causal_batcher(model, examples, **how)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        return CausalObjective(model)

    def running(self, model: PreTrainedModel, batcher: AnyBatcher) -> AbstractContextManager[None]:
        return padded_rows(model) if getattr(batcher, "padded", False) else packed_rows(model)

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        return evaluate_causal(objective, rows, batcher)  # type: ignore[arg-type]


# How single answers are trained: their own rows with gradients, and before each step those of mismatched
# answers without, which tell how far the model has moved.
#
# An item of the data is a group of two rows (:mod:`deltaw.data.preferences`); microbatches hold the first of each.


@dataclass(frozen=True)
class UnpairedMicroBatcher(CausalMicroBatcher):
    """Lays out the first row of each group; rows that come alone as they are."""

    def costing(self, rows: Sequence[Any]) -> list[Any]:
        """What a microbatch holds of each row."""
        return [row.rows[0] if isinstance(row, RowGroup) else row for row in rows]

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        return super().batches(self.costing(rows))

    def split(self, rows: Sequence[Any]) -> Iterator[list[Any]]:
        return super().split(self.costing(rows))

    def whole(self, rows: Sequence[Any]) -> Iterator[Any]:
        """The microbatches of both rows of each group, their prompt computed once."""
        return super().batches(rows)


class UnpairedObjective(CausalObjective):
    """The loss of single answers."""

    def __init__(self, model: PreTrainedModel, settings: PreferenceSettings) -> None:
        self.unpaired = UnpairedLoss(settings)
        super().__init__(model, self.unpaired)

    @torch.no_grad()
    def begin(self, rows: Sequence[RowGroup], batcher: AnyBatcher, processes: Reducer = ALONE) -> None:
        """Run the model on the mismatched answers of a step, without gradients, and estimate its distance
        from the reference: each process on its own part of them, the estimate of all."""
        if not has_values(self.model):
            return  # a dry run sees what a step needs at most: the microbatches with gradients
        own = processes.deal(mismatched(rows), batcher)
        self.unpaired.estimate(processes.add(distance(self, batcher.batches(own))))


def distance(objective: UnpairedObjective, batches: Iterable[Any]) -> Tensor:
    """(2,) the sum of r over the rows of microbatches, and their number
    (:meth:`deltaw.training.losses.UnpairedLoss.distance`)."""
    found = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        found += objective.unpaired.distance(RowLogProbs.of(batch, objective.token_log_probs(batch))).cpu()
    return found


def mismatched(rows: Sequence[RowGroup]) -> list[Any]:
    """The second row of each group."""
    return [group.rows[1] for group in rows]


def evaluate_preferences(objective: CausalObjective, pairs: Sequence[RowGroup], batcher: AnyBatcher) -> Evaluation:
    """The loss and the rewards of pairs of answers (:func:`deltaw.training.tasks.base.evaluate_pairs`).

    Raises:
        UserError: the loss is not finite, or rows lack what their loss needs of the reference model.
    """
    loss = objective.loss
    assert isinstance(loss, PreferenceLoss)

    def of_batch(batch: Batch) -> tuple[Sequence[Any], PairLosses]:
        rows = RowLogProbs.of(batch, objective.token_log_probs(batch))
        return [rows.rows[group[0]] for group in rows.groups], loss.of_rows(rows)

    return evaluate_pairs(pairs, batcher, of_batch)[0]


@torch.no_grad()
def evaluate_unpaired(objective: UnpairedObjective, answers: Sequence[RowGroup], batcher: AnyBatcher) -> Evaluation:
    """The mean loss of single answers, the share whose reward is on the right side of the model's distance
    from the reference (half where it is on neither), that distance, and the mean rewards of either kind.

    The distance is one number of all these answers.

    Raises:
        UserError: the loss is not finite, or rows lack what their loss needs of the reference model.
    """
    loss = objective.unpaired
    loss.estimate(distance(objective, batcher.batches(mismatched(answers))))
    place = {id(answer.rows[0]): number for number, answer in enumerate(answers)}
    table = np.empty((len(answers), 4))  # loss, accuracy, reward, whether it is desired
    for batch in batcher.batches(answers):
        rows = RowLogProbs.of(batch, objective.token_log_probs(batch))
        found = loss.of_rows(rows)
        columns = [found.losses, found.accuracies, found.rewards, found.desired.to(found.rewards.dtype)]
        table[[place[id(row)] for row in rows.rows]] = torch.stack(columns, 1).cpu().double().numpy()
    losses, accuracies, rewards, desired = table.T
    check_finite("the losses of the evaluated answers are", losses)
    sums = accuracies, rewards * desired, rewards * (1 - desired), desired, 1 - desired
    divergence = float(loss.divergence) * len(answers)
    metrics = named_answers([*(float(numbers.sum()) for numbers in sums), divergence])
    return Evaluation.of_rows({"loss": float(losses.mean()), **metrics}, "accuracy", accuracies.copy())


# The task ``preference``: of two answers to a prompt, make the chosen one likelier than the rejected one; or
# of single answers, make those likelier that are desired.
#
# The reference of losses that have one is the base model itself: its log-probabilities are computed once,
# before an adapter is put on it or with the adapter disabled, in microbatches of the size that training uses,
# and each row carries its own.


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
    """Prefer chosen answers to rejected ones.

    Args:
        settings: the ``preference:`` section.
    """

    name = "preference"
    has_pairs = True
    checks_generation = True
    evaluation_asks = "token_log_probs"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, say: Say = silent, settings: PreferenceSettings | None = None
    ) -> None:
        super().__init__(tokenizer, say)
        self.settings = settings or PreferenceSettings.model_validate({})

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> PreferenceTask:
        return cls(files.tokenizer(), files.say, files.section)

    @classmethod
    def rate_factor(cls, section: PreferenceSettings | None) -> RateFactor:
        return PREFERENCE_RATES["dpo" if section is None else section.loss]

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        if not self.settings.is_unpaired:
            return PairReader(settings, self.tokenizer, say=self._say)
        weights = self.settings.desirable_weight, self.settings.undesirable_weight
        return UnpairedReader(settings, self.tokenizer, say=self._say, weights=weights)

    def batcher(self, model: PreTrainedModel, examples: Rows, **how: Any) -> Batched:
        batcher, chosen = super().batcher(model, examples, **how)
        if self.settings.is_unpaired:
            assert isinstance(batcher, CausalMicroBatcher)
            batcher = UnpairedMicroBatcher(**{f.name: getattr(batcher, f.name) for f in fields(batcher)})
        if self.settings.beta == "auto":
            beta = Choice(self.settings.strength, f"usual for {self.settings.loss}")
            chosen = {**chosen, "preference.beta": beta}
        return batcher, chosen

    def referenced(self, model: PreTrainedModel, rows: Rows, batcher: AnyBatcher, processes: Reducer = ALONE) -> Rows:
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

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        if self.settings.is_unpaired:
            return evaluate_unpaired(objective, rows, batcher)  # type: ignore[arg-type]
        return evaluate_preferences(objective, rows, batcher)  # type: ignore[arg-type]
