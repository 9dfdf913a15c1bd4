"""What a model is trained to do: how its rows are read, what its loss is, how it is judged.

Everything after this module treats tasks alike. It knows no methods and no files but those of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data import prepare, prepare_file
from deltaw.data.classes import check_classes
from deltaw.data.images import ImageEncoder, prepare_image_file, prepare_images
from deltaw.data.labels import PreparedLabels, prepare_label_file, prepare_labelled
from deltaw.data.report import Report
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.host.choices import Choice
from deltaw.hub.folders import config_folder, say_on_stderr
from deltaw.hub.loading import check_architecture, read_config
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.padded import padded_rows
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.causal import evaluate_causal
from deltaw.training.evaluation.labels import evaluate_labels
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.tasks.causal_batcher import choose_causal_batcher
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.training.tasks.label_batcher import choose_label_batcher
from deltaw.training.tasks.label_objective import LabelObjective

# What the names of architectures end in whose files hold a classifier's head.
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


@dataclass(frozen=True)
class RunData:
    """The rows of a run.

    Attributes:
        train, held_out: examples.
        report: the account of all rows.
        classes: names of the classes in the order of the model's outputs; None where there are none.
        read_peak_bytes: the most main memory that the process held while tokenizer and rows were read; 0
            where nobody watched.
    """

    train: Sequence[Any]
    held_out: Sequence[Any]
    report: Report
    classes: tuple[str, ...] | None = None
    read_peak_bytes: int = 0

    @property
    def every(self) -> list[Any]:
        return [*self.train, *self.held_out]


class Task(Protocol):
    """One thing that a model can be trained to do.

    Attributes:
        name: as in the setting ``task``.
        tokenizer: None for images.
        has_labels: whether a row has one label, which a head of its own tells.
    """

    name: str
    has_labels: bool
    tokenizer: PreTrainedTokenizerBase | None

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        """The rows of a run."""

    def read_file(
        self, reference: str, settings: DataSettings, classes: Sequence[str] | None
    ) -> tuple[Sequence[Any], Report]:
        """One file to evaluate on; ``classes`` are those of the trained adapter."""

    def outputs(self, data: RunData) -> int | None:
        """How many outputs the model's head must have; None where the model itself says so."""

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
        """How rows go through the model, and what was chosen for it and why."""

    def objective(self, model: PreTrainedModel) -> AnyObjective:
        """The sum of a batch's losses."""

    def running(self, model: PreTrainedModel, batcher: AnyBatcher) -> AbstractContextManager[None]:
        """While open, the model takes batches of ``microbatches``."""

    def evaluate(
        self,
        objective: AnyObjective,
        examples: Sequence[Any],
        batcher: AnyBatcher,
        classes: Sequence[str] | None = None,
    ) -> Evaluation:
        """How well the model does on examples; ``classes`` are the names of its outputs."""


class CausalTask:
    """Predict the next token wherever a label is."""

    name = "causal-lm"
    has_labels = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: PreTrainedTokenizerBase | None = tokenizer
        self._tokenizer = tokenizer

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        prepared = prepare(settings, self._tokenizer, seed=seed)
        return RunData(prepared.train, prepared.held_out, prepared.report)

    def read_file(
        self, reference: str, settings: DataSettings, classes: Sequence[str] | None
    ) -> tuple[Sequence[Any], Report]:
        return prepare_file(reference, settings, self._tokenizer)

    def outputs(self, data: RunData) -> int | None:
        return None

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


class LabelTask:
    """Tell a text's class or number, or an image's class.

    Args:
        name: ``sequence-classification``, ``regression`` or ``image-classification``.
        tokenizer: of a text's model. folder: of an image's model, which says how images are prepared.
        named: the classes that the model's own head tells apart, in the order of its outputs.
        own_outputs: how many outputs the head has that the model's files hold; None where they hold none.
        model: its reference, for messages.
    """

    has_labels = True

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        folder: Path | None = None,
        named: tuple[str, ...] | None = None,
        own_outputs: int | None = None,
        model: str = "",
    ) -> None:
        self.name = name
        self.named = named
        self._own_outputs = own_outputs
        self._model = model
        self.tokenizer = tokenizer
        self.encoder = ImageEncoder(folder) if folder is not None else None

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        prepared = self._prepare(settings, seed, None)
        found = prepared.classes
        unordered = settings.classes is None and found is not None and found != self.named
        if unordered and self.named is not None and set(found or ()) == set(self.named):
            # A head that tells these very classes apart keeps the order of its outputs.
            prepared = self._prepare(settings, seed, self.named)
        self._check_outputs(prepared.classes)
        return RunData(prepared.train, prepared.held_out, prepared.report, prepared.classes)

    def _check_outputs(self, classes: Sequence[str] | None) -> None:
        """Refuse rows that the model's own head is not made for, before its weights are read."""
        if self._own_outputs is None:
            return
        if classes is not None:
            check_classes(self._own_outputs, classes, self._model)
        elif self._own_outputs != 1:
            raise UserError(
                f"the model's head has {self._own_outputs} outputs, and a regression has one",
                where=self._model,
                hint="set task: sequence-classification, or take a model without a head",
            )

    def _prepare(self, settings: DataSettings, seed: int, classes: Sequence[str] | None) -> PreparedLabels:
        if self.encoder is not None:
            return prepare_images(settings, self.encoder, seed=seed, classes=classes)
        return prepare_labelled(settings, self.tokenizer, self.name, seed=seed, classes=classes)

    def read_file(
        self, reference: str, settings: DataSettings, classes: Sequence[str] | None
    ) -> tuple[Sequence[Any], Report]:
        if self.encoder is not None:
            return prepare_image_file(reference, settings, self.encoder, classes)
        return prepare_label_file(reference, settings, self.tokenizer, self.name, classes)

    def outputs(self, data: RunData) -> int | None:
        return 1 if data.classes is None else len(data.classes)

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
        return choose_label_batcher(
            model,
            examples,
            device=device,
            tokens_per_pass=tokens_per_pass,
            virtual_tokens=virtual_tokens,
            tokenizer=self.tokenizer,
            encoder=self.encoder,
        )

    def objective(self, model: PreTrainedModel) -> LabelObjective:
        return LabelObjective(model, self.name)

    def running(self, model: PreTrainedModel, batcher: AnyBatcher) -> AbstractContextManager[None]:
        return padded_rows(model)

    def evaluate(
        self,
        objective: AnyObjective,
        examples: Sequence[Any],
        batcher: AnyBatcher,
        classes: Sequence[str] | None = None,
    ) -> Evaluation:
        return evaluate_labels(objective, examples, batcher, classes or ())  # type: ignore[arg-type]


def task_of(
    name: str,
    model: str,
    dtype: str,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = say_on_stderr,
) -> Task:
    """The task of this name for the model that the reference ``model`` means.

    Args:
        dtype: what the weights will be loaded as, such as ``bf16``: a file that must be converted is
            converted to it.

    Raises:
        UserError: the reference leads nowhere, the architecture does not fit the task, or the model has no
            tokenizer.
    """
    folder = config_folder(model, dtype, trust_remote_code, say=say)
    config = check_architecture(folder, name, trust_remote_code)
    named = named_classes(config)
    if name == "image-classification":
        outputs = own_outputs(config)
        return LabelTask(name, folder=folder, named=named, own_outputs=outputs, model=model)
    tokenizer = load_tokenizer(str(folder), say=say, trust_remote_code=trust_remote_code)
    if name == "causal-lm":
        return CausalTask(tokenizer)
    # A regression's configuration has one output whatever the files say.
    outputs = own_outputs(read_config(folder, "sequence-classification", None, trust_remote_code))
    return LabelTask(name, tokenizer, named=named, own_outputs=outputs, model=model)


def own_outputs(config: PretrainedConfig) -> int | None:
    """Outputs of the classifier's head that a model's files hold; None where they hold none."""
    made_for = getattr(config, "architectures", None) or [""]
    return config.num_labels if str(made_for[0]).endswith(_CLASSIFIERS) else None


def named_classes(config: PretrainedConfig) -> tuple[str, ...] | None:
    """The classes that a model's configuration names; None where they are transformers' own LABEL_0, …."""
    names = getattr(config, "id2label", None) or {}
    ordered = tuple(str(names[index]) for index in sorted(names))
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered
