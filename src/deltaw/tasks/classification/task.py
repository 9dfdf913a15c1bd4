"""Tasks with one label per row: text classification, regression, image classification, and rewards of answer pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.data.example import RowGroup, rows_of
from deltaw.data.images import ImageEncoder
from deltaw.data.row_reader import Reader, RunData
from deltaw.errors import UserError
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.empty_models import head_outputs
from deltaw.hub.skeletons import has_values
from deltaw.runtime.packing_checks import can_pack
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.objective import LabelObjective, check_outputs, head_of_last_token, uses_first_token
from deltaw.tasks.classification.regression_head import (
    LABELS_KEY,
    LabelUnits,
    RegressionHead,
    find_head,
    regression_head,
)
from deltaw.tasks.classification.rows import LabelReader, RewardPair, RewardReader, are_pairs, check_classes
from deltaw.tasks.preference.evaluation import evaluate_pairs
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions, LabelMicroBatcher, choose_label_batcher, choose_packed_batcher
from deltaw.training.evaluation.base import (
    Evaluation,
    Outcomes,
    RowOutcome,
    check_finite,
    classification_metrics,
    confusion_matrix,
    format_numbers,
    regression_metrics,
)
from deltaw.training.task import BatcherChoice, Classes, ModelFiles, NamedParameters, Rows, Task


def evaluate_labels(
    objective: LabelObjective, examples: Rows, batcher: Batcher, classes: Sequence[str] = ()
) -> Evaluation:
    """Evaluate a model on labeled rows or on pairs. The predictions for pairs are rewards.

    Raises:
        UserError: if the predictions are not finite.
    """
    if isinstance(examples[0], RowGroup):
        evaluation, rewards = evaluate_pairs(examples, batcher, objective.pair_losses)
        return replace(evaluation, predictions=rewards)
    predictions = predict_rows(objective, examples, batcher)
    truth = np.array([example.label for example in examples])
    format_value: Callable[[Any], str]
    if objective.task == "regression":
        if truth.shape != predictions.shape:
            model, rows = (np.size(array[0]) for array in (predictions, truth))
            raise UserError(f"the model predicts {model} numbers per row, and the rows have {rows}", location="label")
        result, confidence, name = evaluate_numbers(truth, predictions, objective.label_scale)
        errors = confidence
        format_value = format_numbers
    else:
        result = _evaluate_classes(truth, predictions, tuple(classes))
        name = "confidence"
        probabilities = np.exp(predictions - predictions.max(1, keepdims=True).astype(np.float64))
        predictions = predictions.argmax(1)
        confidence = probabilities.max(1) / probabilities.sum(1)
        errors = confidence * (predictions != truth)
        format_value = classes.__getitem__ if classes else str

    def outcome(index: int) -> RowOutcome:
        return examples[index], format_value(truth[index]), format_value(predictions[index]), float(confidence[index])

    return replace(result, outcomes=Outcomes.of_errors(name, errors, outcome))


@torch.no_grad()
def predict_rows(objective: LabelObjective, items: Rows, batcher: Batcher) -> np.ndarray:
    """Return the predictions (rows, …) for all rows, with groups flattened.

    Raises:
        UserError: if the predictions are not finite.
    """
    parts = []
    order = []
    indices = {id(row): index for index, row in enumerate(row for item in items for row in rows_of(item))}
    for batch in batcher.batches(items):
        parts.append(objective.predictions(batch).cpu().numpy())
        order += [indices[id(row)] for row in batch.examples]
    gathered = np.concatenate(parts)
    check_finite("the model's predictions are", gathered)
    predictions = np.empty_like(gathered)
    predictions[order] = gathered
    return predictions


def evaluate_numbers(
    truth: np.ndarray, predictions: np.ndarray, scale: Sequence[float] | None
) -> tuple[Evaluation, np.ndarray, str]:
    """Evaluate numbers, in the units of the labels.

    Several targets are compared by their errors relative to the scale of the labels.

    Args:
        truth: (rows,) or (rows, targets) labels.
        predictions: Predictions of the same shape.
        scale: (targets,) scale of the training labels. None if it is unknown, as for a merged model: the standard
            deviation of these labels is used.

    Returns:
        The evaluation, the error (rows,) of each row, and the name of this error.
    """
    squared = (predictions.astype(np.float64) - truth) ** 2
    if truth.ndim == 1:
        main = "mse"
        name = "error"
        metrics = regression_metrics(truth, predictions)
        errors = np.sqrt(squared)
    else:
        if scale is None:
            scale = [deviation or 1.0 for deviation in truth.std(0).tolist()]
        main = "relative_mse"
        name = "relative error"
        squared = (squared / np.square(scale)).mean(1)
        errors = np.sqrt(squared)
        metrics = {main: float(squared.mean())}
        for index, columns in enumerate(zip(truth.T, predictions.T, strict=True), 1):
            metrics |= {f"{metric}_{index}": value for metric, value in regression_metrics(*columns).items()}
    evaluation = Evaluation.of_rows(metrics, main, squared, higher_is_better=False)
    return replace(evaluation, predictions=predictions), errors, name


def _evaluate_classes(truth: np.ndarray, logits: np.ndarray, classes: tuple[str, ...]) -> Evaluation:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(truth)), truth]
    predicted = logits.argmax(1)
    counts = confusion_matrix(truth, predicted, logits.shape[1])
    is_correct = (predicted == truth).astype(np.float64)
    metrics = {"loss": float(losses.mean()), **classification_metrics(counts)}
    evaluation = Evaluation.of_rows(metrics, "accuracy", is_correct)
    return replace(evaluation, classes=classes, confusion=counts, predictions=logits)


@dataclass(eq=False)
class LabelTask(Task[LabelObjective]):
    """Predict the class or number of a text, or the class of an image.

    Args:
        name: ``sequence-classification``, ``regression`` or ``image-classification``.
        tokenizer: Tokenizer of a text model.
        encoder: Encoder of an image model.
        class_names: Classes of the model's existing head, in the order of its outputs.
        head_outputs: Number of outputs of the head in the model's files, or None without a head.
        model: Model reference, for messages.
        folder: Folder of the model's files.
    """

    trains_head = True
    uses_chat_template = False
    shares_evaluation = True
    evaluation_method = "predictions"
    _is_new_head = False

    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    encoder: ImageEncoder | None = None
    class_names: tuple[str, ...] | None = None
    head_outputs: int | None = None
    model: str = ""
    folder: Path = Path()
    _label_units: LabelUnits | None = field(default=None, init=False)  # of an opened adapter

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> LabelTask:
        class_names = named_classes(files.config)
        model = files.reference
        trust_remote_code = files.trust_remote_code
        if name == "image-classification":
            encoder = ImageEncoder(files.folder, trust_remote_code=trust_remote_code)
            return cls(name, None, encoder, class_names, head_outputs(files.config), model)
        return cls(name, files.tokenizer(), None, class_names, head_outputs(files.config), model, files.folder)

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        if self.name == "sequence-classification" and are_pairs(settings.train, settings):
            assert self.tokenizer is not None
            self.tokenizer = with_chat_template(self.tokenizer, settings.chat_template)
            return RewardReader(settings, self.tokenizer)
        return LabelReader(settings, self.tokenizer, self.name, classes=classes, encoder=self.encoder)

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        reader = self.reader(settings)
        data = reader.prepare(seed)
        classes = data.classes
        reordered = classes is not None and self.class_names is not None and set(classes) == set(self.class_names)
        if reordered and not isinstance(settings.classes, list) and classes != self.class_names:
            # An existing head for the same classes determines their order.
            data = self.reader(settings, self.class_names).prepare(seed)
        if self.head_outputs is not None and data.classes is not None:
            check_classes(self.head_outputs, data.classes, self.model)
        elif self.head_outputs is not None:
            kind = "reward" if isinstance(reader, RewardReader) else "regression of these labels"
            check_outputs(self.head_outputs, self.num_outputs(data), kind, self.model)
        return data

    def num_outputs(self, data: RunData) -> int:
        return np.size(data.train[0].label) if self.name == "regression" else len(data.classes or ("reward",))

    def batcher(self, model: PreTrainedModel, examples: Rows, options: BatcherOptions) -> BatcherChoice:
        if isinstance(examples[0], RowGroup) and not options.virtual_tokens:
            at_last = head_of_last_token(model) is not None
            can_use = can_pack(model).value if at_last else uses_first_token(model)
            packed = choose_packed_batcher(model, examples, options) if can_use else None
            if packed is not None and not (packed[0].independent and packed[0].fill):
                return packed[0].with_class(LabelMicroBatcher), packed[1]
        return choose_label_batcher(model, examples, options, self.tokenizer, self.encoder)

    def initialize_head(self, model: PreTrainedModel, new_modules: Sequence[str], rows: Sequence[Any]) -> None:
        """Convert the head of a regression, and scale a new one to the labels."""
        if self.name != "regression" or (linear := find_head(model)) is None:
            return
        head = RegressionHead.convert(linear)
        self._is_new_head = any(head in model.get_submodule(name).modules() for name in new_modules)
        if not self._is_new_head and has_values(head):
            stored = read_checkpoint(self.folder).tensors  # in fp32, if the model was loaded in 16 bits
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for parameter in head.parameters():
                if (tensor := stored.get(names[id(parameter)])) is not None:
                    parameter.data.copy_(tensor.rows(0, len(parameter)))
        if self._is_new_head and len(rows):
            identity = head.units
            head.units = LabelUnits.of_labels([row.label for row in rows])
            head.load_state_dict(head.folded())
            head.units = identity

    def prepare_head(
        self, model: PreTrainedModel, rows: Rows, start: Path | None, calibrate: Callable[[], None]
    ) -> list[str]:
        """Convert the trained head of a regression to standardized labels.

        The head of an adapter for another quantity retains its weights for standardized labels.
        """
        if (head := regression_head(model)) is None:
            return []
        units = LabelUnits.of_labels([row.label for row in rows])
        stored = None if start is None else LabelUnits.of_adapter(start, head.out_features)
        if stored is None or stored.is_similar(units):
            head.standardize(units)
        else:
            head.standardize(stored)
            head.units = units
        if start is None and self._is_new_head and head.bias is None and has_values(head):
            inputs: list[Tensor] = []
            with head.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
                calibrate()
            head.predict_mean(inputs)
        return [f"labels are standardized: {units}"]

    def adapter_metadata(self, model: PreTrainedModel) -> dict[str, str]:
        head = regression_head(model)
        return {} if head is None else {LABELS_KEY: json.dumps(asdict(head.units))}

    def read_adapter_metadata(self, model: PreTrainedModel, folder: Path) -> None:
        if self.name == "regression":
            self._label_units = LabelUnits.of_adapter(folder, model.config.num_labels or 1)

    def saved_form(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        head = regression_head(model)
        return nullcontext() if head is None else head.saved_form()

    def trainable_parameters(self, parameters: NamedParameters, rows: Rows) -> NamedParameters:
        """Exclude the bias of a reward head, because rewards enter the loss only as differences."""
        if not isinstance(rows[0], RewardPair):
            return parameters
        return [(name, parameter) for name, parameter in parameters if parameter.numel() > 1]

    def objective(self, model: PreTrainedModel) -> LabelObjective:
        return LabelObjective(model, self.name, None if self._label_units is None else self._label_units.scale)

    def evaluate(self, objective: LabelObjective, rows: Rows, batcher: Batcher, classes: Classes = None) -> Evaluation:
        return evaluate_labels(objective, rows, batcher, classes or ())


def named_classes(config: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the class names in a model's configuration, or None if they are the default names LABEL_0, …."""
    names = getattr(config, "id2label", None) or {}
    ordered = tuple(str(names[index]) for index in sorted(names))
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered
