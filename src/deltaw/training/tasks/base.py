"""Interface of a training task: reading rows, batching, the objective and evaluation.

Code above this package uses every task through this interface. To add a task, write a subclass of :class:`Task` and
register it in :mod:`deltaw.tasks`.
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
from deltaw.data.report import PreparationReport
from deltaw.data.row_reader import Reader, RowReader, RunData
from deltaw.data.settings import DataSettings, eval_sets, sampled_eval_set
from deltaw.errors import UserError
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import check_architecture
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.machine.choices import Choice
from deltaw.runtime.packed import packed_rows, padded_rows
from deltaw.training.callbacks import LogFunction, ignore_line
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.losses import PairLosses, preference_metrics
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.parallel.reducer import SINGLE_PROCESS, Reducer

# Names of a model's outputs, by output index.
Classes: TypeAlias = Sequence[str] | None
# Rows of a data set, or row groups.
Rows: TypeAlias = Sequence[Any]
NamedParameters: TypeAlias = Sequence[tuple[str, nn.Parameter]]
# For each prediction named by the reader, a value per row.
Predictions: TypeAlias = Sequence[Sequence[Any]]
# A batcher, and the chosen value of each setting with its reason.
BatcherChoice: TypeAlias = tuple[AnyBatcher, dict[str, Choice]]


# Maximum number of passages that an evaluation during a run searches. `deltaw eval` searches all.
MAX_SEARCHED_PASSAGES = 10_000


@dataclass(frozen=True)
class ModelFiles:
    """A model before its weights are loaded.

    Attributes:
        reference: Model reference as the user wrote it.
        folder: Folder that contains config.json.
        config: Model configuration, already checked against the task.
        trust_remote_code: Value of the setting.
        log: Receives a line about slow operations.
        section: Settings section of the task. None uses its defaults.
    """

    reference: str
    folder: Path
    config: PretrainedConfig
    trust_remote_code: bool
    log: LogFunction
    section: Any = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer.

        Raises:
            UserError: if the model has no tokenizer.
        """
        return load_tokenizer(str(self.folder), log=self.log, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class RateFactor:
    """Learning rate of a task relative to supervised fine-tuning with the same method.

    Attributes:
        value: Factor applied to the method's usual rate.
        source: Publication or default that the factor follows. Empty for supervised fine-tuning.
    """

    value: float = 1.0
    source: str = ""


SFT = RateFactor()


@dataclass(frozen=True)
class TaskGeneration:
    """Size of the generations of a run.

    Attributes:
        num_concurrent: Number of sequences that may be generated at once.
        max_length: Maximum length of a sequence in tokens, including its prompt.
        evaluation_tokens: Maximum number of tokens that one evaluation generates.
        completions_per_row: Completions per row of a step.
        max_new_tokens: Maximum length of a completion in tokens. 0 if the task does not generate.
    """

    num_concurrent: int = 0
    max_length: int = 0
    evaluation_tokens: int = 0
    completions_per_row: int = 1
    max_new_tokens: int = 0


class Task(abc.ABC):
    """A training task: defines rows, batches, objective and evaluation.

    Attributes:
        name: Value of the setting ``task``.
        has_labels: True if each row has one label, predicted by a classification or regression head.
        has_pairs: True if a row is a group of a chosen and a rejected answer.
        uses_rollouts: True if the task trains on completions that the model generates before each step.
        has_step_loss: True if the loss depends on all rows of a step, so that a microbatch has no loss by itself.
        generates_text: True if the model generates text, as ``generate`` and ``chat`` require.
        tokenizer: Tokenizer of the model, or None for images.
        shares_evaluation: True if several processes can share :meth:`evaluate`. This requires that it calls only
            ``evaluation_method`` of the objective, once per microbatch of :meth:`evaluation_batches`, in order. A
            subclass
            that overrides :meth:`evaluate` must set this itself.
        evaluation_method: Name of the method of the objective that evaluates a microbatch.
        max_searched_passages: Passages of a file that a retrieval evaluation searches, or None for all. A limited
            evaluation reports the number of passages that it searched.
        checks_generation: True if a run compares greedy answers before and after training, because the training
            loss does not show whether the model still generates text.
    """

    name = ""
    has_labels = False
    has_pairs = False
    uses_rollouts = False
    has_step_loss = False
    generates_text = False
    shares_evaluation = False
    checks_generation = False
    evaluation_method = "evaluate_rows"
    max_searched_passages: int | None = MAX_SEARCHED_PASSAGES
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    @abc.abstractmethod
    def open(cls, name: str, files: ModelFiles) -> Task:
        """Create the task for a model.

        Raises:
            UserError: if the model does not support the task.
        """

    @classmethod
    def rate_factor(cls, section: Any) -> RateFactor:
        """Return the factor on the method's usual learning rate for the settings ``section`` of this task."""
        return SFT

    @abc.abstractmethod
    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        """Return the reader of ``settings.train``, for example a :class:`deltaw.data.row_reader.RowReader`.

        Args:
            classes: Class names of the trained adapter.
        """

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        """Read the rows of a run."""
        return self.reader(settings).prepare(seed)

    def read_file(self, file: str, settings: DataSettings, classes: Classes) -> tuple[Sequence[Any], PreparationReport]:
        """Read a file to evaluate on.

        Args:
            classes: Class names of the trained adapter.
        """
        return self.reader(replace(settings, train=file), classes).file(file)

    def input_reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> RowReader[Any]:
        """Return the reader of rows to predict, which need no labels.

        Args:
            columns: Columns of the rows, with the names of ``settings.columns``.

        Raises:
            UserError: if the task has no predictions.
        """
        raise UserError(f"the task {self.name} has no predictions", hint="use deltaw eval")

    def predict(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes) -> Predictions:
        """Return a list of values for each prediction in the reader's ``predicts``.

        Tasks that generate text do not implement this method, because their predictions are completions.
        """
        raise NotImplementedError

    def num_outputs(self, data: RunData) -> int | None:
        """Return the required number of outputs of the model's head, or None to use the model's configuration."""
        return None

    @abc.abstractmethod
    def batcher(self, model: PreTrainedModel, examples: Rows, **options: Any) -> BatcherChoice:
        """Create the batcher that cuts rows into microbatches.

        Args:
            options: ``device``, and ``tokens_per_pass``, ``share``, ``method_shares`` and ``virtual_tokens`` as in
                :func:`deltaw.training.tasks.causal_batcher.choose_causal_batcher`.

        Returns:
            The batcher, and the chosen value of each setting with its reason.
        """

    def initialize_head(self, model: PreTrainedModel, new_modules: Sequence[str], rows: Rows) -> None:  # noqa: B027
        """Initialize modules that the model's files do not contain, using the rows."""

    def trainable_parameters(self, parameters: NamedParameters, rows: Rows) -> NamedParameters:
        """Return the parameters of a method that the loss of these rows depends on. By default all of them."""
        return parameters

    def add_reference_log_probs(
        self, model: PreTrainedModel, rows: Rows, batcher: AnyBatcher, processes: Reducer = SINGLE_PROCESS
    ) -> Rows:
        """Return the rows with the values of the base model that their loss needs, if any.

        Args:
            model: Base model, or a model with its adapter disabled.
            rows: Rows as the base model receives them.
            batcher: Batcher that training uses.
            processes: Processes that share the work. All call this method with the same rows.
        """
        return rows

    def save_extra_files(self, model: PreTrainedModel, folder: Path) -> None:  # noqa: B027
        """Write the files that other programs need to use the adapter in ``folder`` for this task.

        A merged model gets the same files (:data:`deltaw.hub.sentence_layout.LAYOUT_FILES`).
        """

    def check(self, data: RunData, *, call: bool) -> None:  # noqa: B027
        """Reject settings that do not fit the rows, before a model is loaded.

        Args:
            call: True to also call user functions and other slow checks.
        """

    def generation_limits(self, data: RunData, batch_size: int) -> TaskGeneration:
        """Return the size of the generations of a run on these rows. Empty by default."""
        return TaskGeneration()

    def evaluated_rows(self, rows: Rows) -> Iterator[Rows]:
        """Yield the rows that :meth:`evaluate` computes for ``rows``, in order and in parts."""
        yield rows

    def evaluation_batches(self, examples: Sequence[Any], batcher: AnyBatcher) -> Iterator[Any]:
        """Yield the microbatches that :meth:`evaluate` runs, in order."""
        return itertools.chain.from_iterable(batcher.batches(part) for part in self.evaluated_rows(examples))

    @abc.abstractmethod
    def objective(self, model: PreTrainedModel) -> AnyObjective:
        """Return the objective, which computes the summed loss of a microbatch."""

    def model_context(self, model: PreTrainedModel, batcher: AnyBatcher) -> AbstractContextManager[None]:
        """Return a context in which the model accepts the batches of ``batcher``."""
        if getattr(batcher, "padded", True):
            return padded_rows(model)
        return packed_rows(model, independent=getattr(batcher, "independent", False))

    @abc.abstractmethod
    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        """Evaluate the model on rows.

        Comparisons and searches minimize the metric ``loss``, or ``mse`` if the task has no ``loss``.

        Args:
            classes: Names of the model's outputs.
        """


def task_of(
    name: str,
    model: str,
    dtype: str,
    *,
    trust_remote_code: bool = False,
    log: LogFunction = ignore_line,
    section: Any = None,
) -> Task:
    """Create the named task for a model.

    Args:
        model: Model reference.
        dtype: Type that the weights will be loaded in, for example ``bf16``. A file that needs conversion is converted
            to
            it.
        section: Settings section of the task. None uses its defaults.

    Raises:
        UserError: if the task does not exist, the reference cannot be resolved, the architecture does not support
            the task, or the model has no tokenizer.
    """
    entry = tasks.entry_of(name)
    folder = config_folder(model, dtype, trust_remote_code, log=log)
    config = check_architecture(folder, name, trust_remote_code)
    files = ModelFiles(model, folder, config, trust_remote_code, log, section)
    task: Task = entry.load().open(name, files)
    return task


@torch.no_grad()
def evaluate_pairs(
    pairs: Sequence[RowGroup], batcher: AnyBatcher, of_batch: Callable[[Any], tuple[Sequence[Any], PairLosses]]
) -> tuple[Evaluation, np.ndarray]:
    """Evaluate pairs of a chosen and a rejected row.

    The metrics are the mean loss, the accuracy (share of pairs whose chosen row has the higher reward, where equal
    rewards count half), the mean reward margin and the mean rewards.

    Args:
        of_batch: Returns the first row of each pair of a microbatch, and the losses of the pairs.

    Returns:
        The evaluation with primary metric ``accuracy``, and the rewards (pairs, 2) of chosen and rejected rows.

    Raises:
        UserError: if a loss or a reward is not finite.
    """
    indices = {id(pair.rows[0]): index for index, pair in enumerate(pairs)}
    table = np.empty((len(pairs), 4))  # loss, accuracy, rewards
    for batch in batcher.batches(pairs):
        rows, pair_losses = of_batch(batch)
        values = torch.cat([pair_losses.losses[:, None], pair_losses.accuracies[:, None], pair_losses.rewards], 1)
        table[[indices[id(row)] for row in rows]] = values.cpu().double().numpy()
    check_finite("the losses and rewards of the evaluated pairs are", table)
    loss, *means = table.mean(0).tolist()
    accuracies = table[:, 1].copy()
    return Evaluation.of_rows({"loss": loss, **preference_metrics(*means)}, "accuracy", accuracies), table[:, 2:].copy()


def read_run_data(task: Task, settings: DataSettings, *, seed: int, log: LogFunction = ignore_line) -> RunData:
    """Read the rows of a run, including all evaluation sets (``data.eval``).

    The task itself reads the training rows and one evaluation set: the one that is split off the training rows, or a
    file. The remaining files are read here with the same task.

    Args:
        log: Receives a line per additional evaluation set, including its overlap with the training rows.

    Raises:
        UserError: if the data cannot be used.
    """
    if not isinstance(settings.eval, dict):
        return task.read(settings, seed=seed)
    sets = eval_sets(settings.eval)
    first = sampled_eval_set(settings.eval) or next(iter(sets))
    data = task.read(replace(settings, eval=sets[first]), seed=seed)
    eval_rows: dict[str, Sequence[Any]] = {}
    for name, reference in sets.items():
        if name == first:
            eval_rows[name] = data.held_out
            continue
        try:
            rows, report = task.read_file(str(reference), settings, data.classes)
        except UserError as error:
            location = f"data.eval.{name}" + (f": {error.location}" if error.location else "")
            raise UserError(error.message, location=location, hint=error.hint) from error
        eval_rows[name] = rows
        log(f"evaluation set '{name}': {report.rows_kept:,} rows of {reference}{_overlap(data.train, rows)}")
    return replace(data, held_out=next(iter(eval_rows.values())), eval_sets=eval_rows)


def _overlap(train: Sequence[Any], rows: Sequence[Any]) -> str:
    """Return a note about rows that are also training rows. Rows without tokens are not compared."""
    if not all(hasattr(row, "tokens") for row in rows):
        return ""
    row_tokens = {row.tokens.tobytes() for row in rows}
    shared_tokens = row_tokens.intersection(row.tokens.tobytes() for row in train if hasattr(row, "tokens"))
    count = sum(row.tokens.tobytes() in shared_tokens for row in rows)
    return f"; {count:,} of them are also training rows, which inflates its scores" if count else ""
