"""What a task is: how its rows are read, what their loss is, how they are batched, how a model is evaluated.

Everything above this package treats tasks alike. A new one is a class in a file of its own and an entry in
:mod:`deltaw.tasks`. Knows no methods, and no files but those of the data and the model.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw import tasks
from deltaw.data.example import RowGroup
from deltaw.data.report import Report
from deltaw.data.row_reader import Reader, RowReader, RunData
from deltaw.data.settings import DataSettings, drawn_set, eval_sets
from deltaw.errors import UserError
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import check_architecture
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.machine.choices import Choice
from deltaw.runtime.packed import packed_rows, padded_rows
from deltaw.training.callbacks import Say, silent
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.losses import PairLosses, named
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.parallel.reducer import ALONE, Reducer

# Names of a model's outputs, in their order.
Classes: TypeAlias = Sequence[str] | None
# Rows of a data set, or groups of them.
Rows: TypeAlias = Sequence[Any]
Named: TypeAlias = Sequence[tuple[str, nn.Parameter]]
# Of each prediction that a reader names, a value for each row.
Predictions: TypeAlias = Sequence[Sequence[Any]]
# A batcher, and by setting the value chosen with its reason.
Batched: TypeAlias = tuple[AnyBatcher, dict[str, Choice]]


# Passages that an evaluation of a run searches. `deltaw eval` searches all.
MOST_SEARCHED = 10_000


@dataclass(frozen=True)
class ModelFiles:
    """A model before its weights are read.

    Attributes:
        reference: as the user wrote it. folder: with its config.json. config: that fits the task.
        trust_remote_code: as in the settings. say: told what takes long.
        section: the settings' section for the task; None: its defaults.
    """

    reference: str
    folder: Path
    config: PretrainedConfig
    trust_remote_code: bool
    say: Say
    section: Any = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            UserError: it has none.
        """
        return load_tokenizer(str(self.folder), say=self.say, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class RateFactor:
    """Learning rate of a task relative to supervised fine-tuning with the same method.

    Attributes:
        value: factor on the method's usual rate.
        source: publication or default that the factor follows; empty for supervised fine-tuning.
    """

    value: float = 1.0
    source: str = ""


SFT = RateFactor()


@dataclass(frozen=True)
class Written:
    """What a model writes in a run.

    Attributes:
        at_once: texts that may be written together. longest: tokens of the longest, its prompt among them.
        evaluation: tokens that an evaluation writes at most. each: texts for a row of a step.
        tokens: that an answer has at most; 0 where nothing is written.
    """

    at_once: int = 0
    longest: int = 0
    evaluation: int = 0
    each: int = 1
    tokens: int = 0


class Task(abc.ABC):
    """One thing that a model can be trained to do.

    Attributes:
        name: as in the setting ``task``.
        has_labels: whether a row has one label, which a head of its own predicts.
        has_pairs: whether a row is a group of two: a chosen and a rejected answer.
        rolls_out: whether it trains on completions that the model writes before each step.
        sees_steps: whether its loss is that of a step's rows together, which no microbatch has alone.
        writes_text: whether the model answers in text, so that ``generate`` and ``chat`` take it.
        tokenizer: None for images.
        shares_evaluation: whether :meth:`evaluate` asks the objective for nothing but ``evaluation_asks``,
            once for each microbatch of :meth:`evaluation_batches` in order, so that several processes can
            share it; a task with an ``evaluate`` of its own says so itself.
        evaluation_asks: the name of a method of the objective that takes a microbatch.
        most_searched: Passages of a file that a retrieval evaluation searches, or None for all. A limited evaluation
            reports how many passages it searched.
        checks_generation: True if a run compares greedy answers before and after training, because the training
            loss does not show whether the model still writes text.
    """

    name = ""
    has_labels = False
    has_pairs = False
    rolls_out = False
    sees_steps = False
    writes_text = False
    shares_evaluation = False
    checks_generation = False
    evaluation_asks = "evaluate_rows"
    most_searched: int | None = MOST_SEARCHED
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    @abc.abstractmethod
    def open(cls, name: str, files: ModelFiles) -> Task:
        """The task for the model in these files.

        Raises:
            UserError: the model cannot do it.
        """

    @classmethod
    def rate_factor(cls, section: Any) -> RateFactor:
        """Return the factor on the method's usual learning rate for the settings ``section`` of this task."""
        return SFT

    @abc.abstractmethod
    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        """How the rows of ``settings.train`` are read, such as a :class:`deltaw.data.row_reader.RowReader`;
        ``classes`` are those of the trained adapter."""

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        """The rows of a run."""
        return self.reader(settings).prepared(seed)

    def read_file(self, reference: str, settings: DataSettings, classes: Classes) -> tuple[Sequence[Any], Report]:
        """One file to evaluate on; ``classes`` are those of the trained adapter."""
        return self.reader(replace(settings, train=reference), classes).file(reference)

    def input_reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> RowReader[Any]:
        """Return the reader of rows to predict, which need no labels.

        Args:
            columns: Columns of the rows, under the names that ``settings.columns`` gives them.

        Raises:
            UserError: if the task has no predictions.
        """
        raise UserError(f"there are no predictions for the task {self.name}", hint="use deltaw eval")

    def predict(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes) -> Predictions:
        """Return a list for each of the predictions that the reader of the rows names in ``predicts``. Tasks that write
        text have no such method: their predictions are completions."""
        raise NotImplementedError

    def outputs(self, data: RunData) -> int | None:
        """How many outputs the model's head must have; None where the model itself says so."""
        return None

    @abc.abstractmethod
    def batcher(self, model: PreTrainedModel, examples: Rows, **how: Any) -> Batched:
        """How rows become microbatches, and what was chosen for it and why.

        Args:
            how: ``device``; and ``tokens_per_pass``, ``share``, ``method_shares``, ``virtual_tokens``, as in
                :func:`deltaw.training.tasks.causal_batcher.choose_causal_batcher`.
        """

    def initialize_head(self, model: PreTrainedModel, new_modules: Sequence[str], rows: Rows) -> None:  # noqa: B027
        """Give modules that the model's files do not hold a better start than chance, from the rows."""

    def trained(self, named: Named, rows: Rows) -> Named:
        """Of a method's parameters those that the loss of these rows depends on; for most losses all."""
        return named

    def referenced(self, model: PreTrainedModel, rows: Rows, batcher: AnyBatcher, processes: Reducer = ALONE) -> Rows:
        """The rows with what their loss needs to know of the base model; most losses need nothing.

        Args:
            model: the base model, or one whose adapter is disabled for the time.
            rows: as the base model sees them. batcher: that training uses.
            processes: that all ask for the same rows, and share the work.
        """
        return rows

    def write_beside(self, model: PreTrainedModel, folder: Path) -> None:  # noqa: B027
        """Write what other programs need to use the adapter in ``folder`` for this task; a merged model gets the same
        files (:data:`deltaw.hub.sentence_layout.BESIDE`)."""

    def check(self, data: RunData, *, call: bool) -> None:  # noqa: B027
        """Refuse settings that do not fit the rows, before a model is loaded.

        Args:
            call: Also call functions of the user's, and others that take long.
        """

    def written(self, data: RunData, batch_size: int) -> Written:
        """What the model writes in a run with these rows; of most tasks nothing."""
        return Written()

    def evaluated_rows(self, rows: Rows) -> Iterator[Rows]:
        """Yield all rows that :meth:`evaluate` computes for ``rows``, in parts and in order."""
        yield rows

    def evaluation_batches(self, examples: Sequence[Any], batcher: AnyBatcher) -> Iterator[Any]:
        """The microbatches that :meth:`evaluate` asks for, in order."""
        return itertools.chain.from_iterable(batcher.batches(part) for part in self.evaluated_rows(examples))

    @abc.abstractmethod
    def objective(self, model: PreTrainedModel) -> AnyObjective:
        """The sum of a batch's losses."""

    def running(self, model: PreTrainedModel, batcher: AnyBatcher) -> AbstractContextManager[None]:
        """Return a context in which the model takes the batches of ``batcher``."""
        if getattr(batcher, "padded", True):
            return padded_rows(model)
        return packed_rows(model, apart=getattr(batcher, "apart", False))

    @abc.abstractmethod
    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        """How well the model does on examples; ``classes`` are the names of its outputs. Comparisons and searches
        minimize the metric ``loss``, or ``mse`` where there is none."""


def task_of(
    name: str, model: str, dtype: str, *, trust_remote_code: bool = False, say: Say = silent, section: Any = None
) -> Task:
    """The task of this name for the model that the reference ``model`` means.

    Args:
        dtype: what the weights will be loaded as, such as ``bf16``: a file that must be converted is
            converted to it.
        section: the settings' section for this task; None: its defaults.

    Raises:
        UserError: there is no such task, the reference leads nowhere, the architecture does not fit the task,
            or the model has no tokenizer.
    """
    entry = tasks.entry_of(name)
    folder = config_folder(model, dtype, trust_remote_code, say=say)
    config = check_architecture(folder, name, trust_remote_code)
    files = ModelFiles(model, folder, config, trust_remote_code, say, section)
    task: Task = entry.load().open(name, files)
    return task


@torch.no_grad()
def evaluate_pairs(
    pairs: Sequence[RowGroup], batcher: AnyBatcher, of_batch: Callable[[Any], tuple[Sequence[Any], PairLosses]]
) -> tuple[Evaluation, np.ndarray]:
    """The mean loss of pairs, the share whose chosen row has the higher reward (pairs with equal rewards count
    half), the mean difference of rewards, and the mean rewards.

    Args:
        of_batch: a microbatch's pairs: the first row of each, and their losses.

    Returns:
        the evaluation, by ``accuracy``, and the rewards (pairs, 2) of chosen and rejected rows.

    Raises:
        UserError: a loss or a reward is not finite.
    """
    place = {id(pair.rows[0]): number for number, pair in enumerate(pairs)}
    table = np.empty((len(pairs), 4))  # loss, accuracy, rewards
    for batch in batcher.batches(pairs):
        rows, found = of_batch(batch)
        values = torch.cat([found.losses[:, None], found.accuracies[:, None], found.rewards], 1)
        table[[place[id(row)] for row in rows]] = values.cpu().double().numpy()
    check_finite("the losses and rewards of the evaluated pairs are", table)
    loss, *means = table.mean(0).tolist()
    accuracies = table[:, 1].copy()
    return Evaluation.of_rows({"loss": loss, **named(*means)}, "accuracy", accuracies), table[:, 2:].copy()


def read_run_data(task: Task, settings: DataSettings, *, seed: int, say: Say = silent) -> RunData:
    """The rows of a run, with all its sets of held-out rows (``data.eval``).

    The task reads the training rows and one set: that which is drawn from them, or a file. The other files are
    read here, each by the same task.

    Args:
        say: told of sets that have rows of the training data.

    Raises:
        UserError: the data cannot be used.
    """
    if not isinstance(settings.eval, dict):
        return task.read(settings, seed=seed)
    sets = eval_sets(settings.eval)
    first = drawn_set(settings.eval) or next(iter(sets))
    data = task.read(replace(settings, eval=sets[first]), seed=seed)
    found: dict[str, Sequence[Any]] = {}
    for name, reference in sets.items():
        if name == first:
            found[name] = data.held_out
            continue
        try:
            rows, report = task.read_file(str(reference), settings, data.classes)
        except UserError as error:
            where = f"data.eval.{name}" + (f": {error.where}" if error.where else "")
            raise UserError(error.what, where=where, hint=error.hint) from error
        found[name] = rows
        say(f"evaluation set '{name}': {report.rows_kept:,} rows of {reference}{_overlap(data.train, rows)}")
    return replace(data, held_out=next(iter(found.values())), eval_sets=found)


def _overlap(train: Sequence[Any], rows: Sequence[Any]) -> str:
    """What to say of rows that are trained on too; rows without tokens are not compared."""
    if not all(hasattr(row, "tokens") for row in rows):
        return ""
    asked = {row.tokens.tobytes() for row in rows}
    seen = asked.intersection(row.tokens.tobytes() for row in train if hasattr(row, "tokens"))
    count = sum(row.tokens.tobytes() in seen for row in rows)
    return f"; {count:,} of them are also training rows, which inflates its scores" if count else ""
