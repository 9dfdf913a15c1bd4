"""Interface of a training task: reading rows, batching, the objective and evaluation.

Code above this package uses every task through this interface. To add a task, write a subclass of :class:`Task` and
register it in :mod:`deltaw.settings.task_registry` (``docs/development/task.md``).
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.report import PreparationReport
from deltaw.data.row_reader import Reader, RunData
from deltaw.decoding.generation import Sampler, TextGenerator
from deltaw.errors import UserError
from deltaw.hub.empty_models import check_architecture
from deltaw.hub.folders import config_folder
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.machine.choices import Choice
from deltaw.methods.base import Method
from deltaw.progress import LogFunction, ignore_line
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.padded import padded_rows
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.data import DataSettings, eval_sets, sampled_eval_set
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.features.images import RowImages
from deltaw.training.feed import Feed
from deltaw.training.objective import Objective
from deltaw.training.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.task_inputs import TaskInputs

# Names of a model's outputs, by output index.
Classes: TypeAlias = Sequence[str] | None
# Rows of a data set, or row groups.
Rows: TypeAlias = Sequence[Any]
NamedParameters: TypeAlias = Sequence[tuple[str, nn.Parameter]]
# A batcher, and the chosen value of each setting with its reason.
BatcherChoice: TypeAlias = tuple[Batcher, dict[str, Choice[Any]]]


# Objective of a task.
ObjectiveType = TypeVar("ObjectiveType", bound=Objective)


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
        dtype: Precision that the weights will be loaded in.
    """

    reference: str
    folder: Path
    config: PretrainedConfig
    trust_remote_code: bool
    log: LogFunction
    section: Any = None
    dtype: str = "bf16"

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
        source: Reason for the factor. Empty for supervised fine-tuning.
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


class Measurement(Protocol):
    """A measurement after training. Its text is a line for the user."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""


class TrainingSession(Protocol):
    """Parts of :class:`deltaw.training.session.Session` that tasks use."""

    config: RunConfig
    model: PreTrainedModel
    method: Method
    data: RunData
    feed: Any
    notes: list[str]
    processes: Reducer

    @property
    def objective(self) -> Any: ...
    @property
    def batcher(self) -> Batcher: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def uses_start_reference(self) -> bool: ...
    def reference_active(self) -> AbstractContextManager[None]:
        """Return a context in which the model is the reference model."""

    def running(self) -> AbstractContextManager[None]:
        """Return a context in which the model accepts the session's batches."""

    def generator(self, *, of_base: bool) -> TextGenerator | None:
        """Return the text generator of the trained model, or of the base model."""

    def sampler(self) -> Sampler | None:
        """Return the sampler of completions, or None in a dry run."""


class Task(abc.ABC, Generic[ObjectiveType]):
    """A training task: defines rows, batches, objective and evaluation.

    A task implements the abstract methods, which come first. The other methods are hooks with a default, by topic.
    Inputs besides tokens are an object of their own (``inputs``). Predictions and serving are defined by
    ``TaskEntry.inference``.

    Attributes:
        name: Value of the setting ``task``.
        tokenizer: Tokenizer of the model, or None for images.
        inputs: Inputs of the rows besides tokens, or None.
        generates_text: True if the model generates text, as ``generate`` and ``chat`` require.
        trains_head: True if a classification or regression head predicts one label per row. Each method trains it.
        uses_chat_template: True if the tokenizer's chat template renders rows.
        answers_rows: True if generated answers can be compared with the answers of the rows.
        needs_session: True if an evaluation during training needs the session's feed.
        caches_features: False if stored outputs of frozen layers cannot be reused, because the rows of each step are
            new or the loss depends on all rows of a step.
        shares_evaluation: True if several processes can share :meth:`evaluate`. This requires that it calls only
            ``evaluation_method`` of the objective, once per microbatch of :meth:`evaluation_batches`, in order. A
            subclass that overrides :meth:`evaluate` must set this itself.
        evaluation_method: Name of the method of the objective that evaluates a microbatch.
        checks_generation: True if a run compares greedy answers before and after training, because the training
            loss does not show whether the model still generates text.
    """

    name = ""
    tokenizer: PreTrainedTokenizerBase | None = None
    inputs: TaskInputs | None = None
    generates_text = False
    trains_head = False
    uses_chat_template = True
    answers_rows = False
    needs_session = False
    caches_features = True
    shares_evaluation = False
    evaluation_method = "evaluate_rows"
    checks_generation = False

    @property
    def images(self) -> RowImages | None:
        """Images in prompts of a vision-language model, or None if the model reads text only."""
        return self.inputs if isinstance(self.inputs, RowImages) else None

    # Required.

    @classmethod
    @abc.abstractmethod
    def open(cls, name: str, files: ModelFiles) -> Task[Any]:
        """Create the task for a model.

        Args:
            name: Value of the setting ``task``.

        Raises:
            UserError: if the model does not support the task.
        """

    @abc.abstractmethod
    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        """Return the reader of ``settings.train``, for example a :class:`deltaw.data.row_reader.RowReader`.

        Args:
            classes: Class names of the trained adapter.
        """

    @abc.abstractmethod
    def batcher(self, model: PreTrainedModel, examples: Rows, options: BatcherOptions) -> BatcherChoice:
        """Create the batcher that cuts rows into microbatches.

        Returns:
            The batcher, and the chosen value of each setting with its reason.
        """

    @abc.abstractmethod
    def objective(self, model: PreTrainedModel) -> ObjectiveType:
        """Return the objective, which computes the summed loss of a microbatch."""

    @abc.abstractmethod
    def evaluate(self, objective: ObjectiveType, rows: Rows, batcher: Batcher, classes: Classes = None) -> Evaluation:
        """Evaluate the model on rows.

        Comparisons and searches minimize the metric ``loss``, or ``mse`` if the task has no ``loss``.

        Args:
            batcher: Batcher of the task, or the feed of the run (:meth:`feed`).
            classes: Names of the model's outputs.
        """

    # Settings: override these if the task has a settings section or another learning rate.

    @classmethod
    def check_settings(cls, section: Any) -> None:
        """Check everything that ``section``, the settings of this task, refers to and that needs neither rows nor a
        model.

        Raises:
            UserError: if for example a file or a package is missing.
        """

    @classmethod
    def rate_factor(cls, section: Any) -> RateFactor:
        """Return the factor on the method's usual learning rate for the settings ``section`` of this task."""
        return SFT

    @classmethod
    def few_rows_factor(cls, num_rows: int) -> RateFactor:
        """Return the factor on the default learning rate for a small number of training rows."""
        return SFT

    # Rows: override these if the reader alone is not enough to read or to reject rows.

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        """Read the rows of a run."""
        return self.reader(settings).prepare(seed)

    def read_file(self, file: str, settings: DataSettings, classes: Classes) -> tuple[Sequence[Any], PreparationReport]:
        """Read a file to evaluate on.

        Args:
            classes: Class names of the trained adapter.
        """
        return self.reader(replace(settings, train=file), classes).file(file)

    def check(self, data: RunData, *, call: bool) -> None:
        """Reject settings that do not fit the rows, before a model is loaded.

        Args:
            call: True to also call user functions and other slow checks.
        """

    def check_steps(self, rows: Rows, batch_size: int) -> None:
        """Reject rows or a number of rows per step for which the loss has no gradient, before a model is loaded.

        Raises:
            UserError: if training on these rows has no effect.
        """

    # Method: override these if not every method or parameter can be trained.

    def check_method(self, method: Method) -> None:
        """Reject a method that does not fit the task.

        Raises:
            UserError: if the method does not fit.
        """

    def trainable_parameters(self, parameters: NamedParameters, rows: Rows) -> NamedParameters:
        """Return the parameters of a method that the loss of these rows depends on. By default all of them."""
        return parameters

    def forward(self, objective: Any, batch: Any) -> None:
        """Run the model on a microbatch outside of a step, to record the inputs of layers for a method.

        Override it if the loss can only be computed in a step.
        """
        objective(batch)

    # Head: override these if the model has a head whose size or initial values depend on the rows.

    def num_outputs(self, data: RunData) -> int | None:
        """Return the required number of outputs of the model's head, or None to use the model's configuration."""
        return None

    def initialize_head(self, model: PreTrainedModel, new_modules: Sequence[str], rows: Rows) -> None:
        """Initialize modules that the model's files do not contain, using the rows."""

    def prepare_head(
        self, model: PreTrainedModel, rows: Rows, start: Path | None, calibrate: Callable[[], None]
    ) -> list[str]:
        """Prepare the trained head of a model for the rows, after the method is attached.

        Args:
            start: Adapter that the training starts from, if any.
            calibrate: Runs the model on a sample of the rows.

        Returns:
            Messages about the head.
        """
        return []

    # Steps: override these if the rows of a step are generated, or the loss needs values of another model.

    def feed(self, session: TrainingSession) -> Feed:
        """Return the feed of a run, which supplies rows to the model.

        Override it to generate the rows of a step, for example with a
        :class:`deltaw.training.rollouts.RolloutFeed`.
        """
        return Feed(session.objective, session.batcher)

    def generation_limits(self, data: RunData, batch_size: int) -> TaskGeneration:
        """Return the size of the generations of a run on these rows, for the plan. By default none."""
        return TaskGeneration()

    def add_reference_log_probs(
        self, model: PreTrainedModel, rows: Rows, batcher: Batcher, processes: Reducer = SINGLE_PROCESS
    ) -> Rows:
        """Return the rows with the values of the reference model that their loss needs, if any.

        Args:
            model: Reference model: the base model, or the adapter of ``start_from``.
            rows: Rows as the reference model receives them.
            batcher: Batcher that training uses.
            processes: Processes that share the work. All call this method with the same rows.
        """
        return rows

    def model_context(self, model: PreTrainedModel, batcher: Batcher) -> AbstractContextManager[None]:
        """Return a context in which the model accepts the batches of ``batcher``."""
        return padded_rows(model) if batcher.padded else packed_rows(model, independent=batcher.independent)

    # Evaluation: override these if `evaluate` runs other rows than it is given, or the run measures more at its end.

    def evaluated_rows(self, rows: Rows) -> Iterator[Rows]:
        """Yield the rows that :meth:`evaluate` computes for ``rows``, in order and in parts."""
        yield rows

    def evaluation_batches(self, examples: Sequence[Any], batcher: Batcher) -> Iterator[Any]:
        """Yield the microbatches that :meth:`evaluate` runs, in order."""
        return itertools.chain.from_iterable(batcher.batches(part) for part in self.evaluated_rows(examples))

    def final_measurements(self, session: TrainingSession, evaluation: Evaluation) -> Iterator[tuple[str, Measurement]]:
        """Yield measurements after training, with their names in the metrics file.

        Args:
            evaluation: Evaluation of the saved adapter on the first set of held-out rows.
        """
        return iter(())

    # Adapter: override these if the adapter needs more than its weights.

    def saved_form(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Context manager in which the parameters have the values to save, if they differ during training."""
        return nullcontext()

    def adapter_metadata(self, model: PreTrainedModel) -> dict[str, str]:
        """Return entries for the metadata of the adapter's weights."""
        return {}

    def read_adapter_metadata(self, model: PreTrainedModel, folder: Path) -> None:
        """Read what :meth:`adapter_metadata` returned from the folder of an opened adapter."""

    def save_extra_files(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the files that other programs need to use the adapter in ``folder`` for this task.

        A merged model gets the same files (:data:`deltaw.hub.sentence_layout.LAYOUT_FILES`).
        """


def task_of(
    name: str, model: str, dtype: str, *, trust_remote_code: bool = False, log: LogFunction = ignore_line, section: Any
) -> Task[Any]:
    """Create the named task for a model.

    Args:
        model: Model reference.
        dtype: Type that the weights will be loaded in, for example ``bf16``. A file that needs conversion is converted
            to it.
        section: Settings section of the task. None uses its defaults.

    Raises:
        UserError: if the task does not exist, the reference cannot be resolved, the architecture does not support
            the task, or the model has no tokenizer.
    """
    entry = task_registry.entry_of(name)
    folder = config_folder(model, dtype, trust_remote_code, log=log)
    config = check_architecture(folder, name, trust_remote_code)
    task: Task[Any] = entry.load().open(name, ModelFiles(model, folder, config, trust_remote_code, log, section, dtype))
    return task


def read_run_data(task: Task[Any], settings: DataSettings, *, seed: int, log: LogFunction = ignore_line) -> RunData:
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


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a classifier's modules above its backbone that have parameters."""
    base = getattr(model, "base_model_prefix", "")
    children = [(name, child) for name, child in model.named_children() if name != base]
    return [name for name, child in children if any(True for _ in child.parameters())]
