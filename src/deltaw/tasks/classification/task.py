"""Tasks with one label per row: text classification, regression, image classification, and rewards of answer pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.data.example import RowGroup, rows_of
from deltaw.data.images import ImageEncoder
from deltaw.data.row_reader import Reader, RowReader, RunData
from deltaw.hub.loading import head_outputs, read_config
from deltaw.runtime.packed import can_pack
from deltaw.settings.data import DataSettings
from deltaw.settings.row_kinds import PAIR_COLUMNS
from deltaw.tasks.classification.objective import (
    LabelObjective,
    check_one_output,
    head_of_last_token,
    start_at_mean,
    uses_first_token,
)
from deltaw.tasks.classification.rows import (
    AnswerScoreReader,
    LabelReader,
    RewardPair,
    RewardReader,
    are_pairs,
    check_classes,
)
from deltaw.tasks.preference.losses import evaluate_pairs
from deltaw.training.batchers import BatcherOptions, LabelMicroBatcher, choose_label_batcher, choose_packed_batcher
from deltaw.training.evaluation.base import (
    Evaluation,
    Outcomes,
    RowOutcome,
    check_finite,
    classification_metrics,
    confusion_matrix,
    regression_metrics,
)
from deltaw.training.microbatches import Batcher
from deltaw.training.task import BatcherChoice, Classes, ModelFiles, NamedParameters, Predictions, Rows, Task


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
    if objective.task == "regression":
        result, confidence, name = _evaluate_numbers(truth, predictions), np.abs(predictions - truth), "error"
        errors, format_value = confidence, lambda number: f"{number:.6g}"
    else:
        result, name = _evaluate_classes(truth, predictions, tuple(classes)), "confidence"
        probabilities = np.exp(predictions - predictions.max(1, keepdims=True).astype(np.float64))
        predictions, confidence = predictions.argmax(1), probabilities.max(1) / probabilities.sum(1)
        errors, format_value = confidence * (predictions != truth), lambda n: str(classes[n] if classes else n)

    def outcome(index: int) -> RowOutcome:
        return examples[index], format_value(truth[index]), format_value(predictions[index]), float(confidence[index])

    return replace(result, outcomes=Outcomes.of_errors(name, errors, outcome))


@torch.no_grad()
def predict_rows(objective: LabelObjective, items: Rows, batcher: Batcher) -> np.ndarray:
    """Return the predictions (rows, …) for all rows, with groups flattened.

    Raises:
        UserError: if the predictions are not finite.
    """
    parts, order = [], []
    indices = {id(row): index for index, row in enumerate(row for item in items for row in rows_of(item))}
    for batch in batcher.batches(items):
        parts.append(objective.predictions(batch).cpu().numpy())
        order += [indices[id(row)] for row in batch.examples]
    gathered = np.concatenate(parts)
    check_finite("the model's predictions are", gathered)
    predictions = np.empty_like(gathered)
    predictions[order] = gathered
    return predictions


def _evaluate_numbers(truth: np.ndarray, predictions: np.ndarray) -> Evaluation:
    metrics, squared = regression_metrics(truth, predictions), (predictions.astype(np.float64) - truth) ** 2
    return replace(Evaluation.of_rows(metrics, "mse", squared, higher_is_better=False), predictions=predictions)


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
    """

    trains_head = True
    uses_chat_template = False
    shares_evaluation = True
    evaluation_method = "predictions"

    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    encoder: ImageEncoder | None = None
    class_names: tuple[str, ...] | None = None
    head_outputs: int | None = None
    model: str = ""

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> LabelTask:
        class_names, model, trust_remote_code = named_classes(files.config), files.reference, files.trust_remote_code
        if name == "image-classification":
            encoder = ImageEncoder(files.folder, trust_remote_code=trust_remote_code)
            return cls(name, None, encoder, class_names, head_outputs(files.config), model)
        # For a regression the loaded configuration always has one output, so read the configuration of the files.
        config = read_config(files.folder, "sequence-classification", None, trust_remote_code)
        return cls(name, files.tokenizer(), None, class_names, head_outputs(config), model)

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        if self.name == "sequence-classification" and are_pairs(settings.train, settings):
            assert self.tokenizer is not None
            self.tokenizer = with_chat_template(self.tokenizer, settings.chat_template)
            return RewardReader(settings, self.tokenizer)
        return LabelReader(settings, self.tokenizer, self.name, classes=classes, encoder=self.encoder)

    def input_reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> RowReader[Any]:
        if self._rewards(classes):
            assert self.tokenizer is not None
            if set(PAIR_COLUMNS) <= set(columns):
                return RewardReader(settings, self.tokenizer)
            if "text" not in columns or "prompt" in columns:
                return AnswerScoreReader(settings, self.tokenizer)
        return LabelReader(settings, self.tokenizer, self.name, classes=classes, encoder=self.encoder, labeled=False)

    def predict(self, objective: LabelObjective, rows: Rows, batcher: Batcher, classes: Classes) -> Predictions:
        predictions = predict_rows(objective, rows, batcher).astype(np.float64)
        if self.name == "regression":
            return [predictions.tolist()]
        if self._rewards(classes):
            return predictions.reshape(len(rows), -1).T.tolist()
        names = classes or ()
        probabilities = np.exp(predictions - predictions.max(1, keepdims=True))
        table = [[float(f"{p:.7g}") for p in row] for row in probabilities / probabilities.sum(1, keepdims=True)]
        return [names[index] for index in predictions.argmax(1)], [dict(zip(names, row, strict=True)) for row in table]

    def _rewards(self, classes: Classes) -> bool:
        """True if the model has a single output that is a reward."""
        return self.name == "sequence-classification" and len(classes or ()) == 1

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
            kind = "reward" if isinstance(reader, RewardReader) else "regression"
            check_one_output(self.head_outputs, kind, self.model)
        return data

    def num_outputs(self, data: RunData) -> int | None:
        return 1 if data.classes is None else len(data.classes)

    def batcher(self, model: PreTrainedModel, examples: Rows, options: BatcherOptions) -> BatcherChoice:
        if isinstance(examples[0], RowGroup) and not options.virtual_tokens:
            at_last = head_of_last_token(model) is not None
            can_use = can_pack(model).value if at_last else uses_first_token(model)
            packed = choose_packed_batcher(model, examples, options) if can_use else None
            if packed is not None and not (packed[0].independent and packed[0].fill):
                return packed[0].with_class(LabelMicroBatcher), packed[1]
        return choose_label_batcher(model, examples, options, self.tokenizer, self.encoder)

    def initialize_head(self, model: PreTrainedModel, new_modules: Sequence[str], rows: Sequence[Any]) -> None:
        """Initialize the bias of a regression head with the mean of the labels."""
        if self.name == "regression" and len(rows):
            start_at_mean(model, new_modules, [row.label for row in rows])

    def trainable_parameters(self, parameters: NamedParameters, rows: Rows) -> NamedParameters:
        """Exclude the bias of a reward head, because rewards enter the loss only as differences."""
        if not isinstance(rows[0], RewardPair):
            return parameters
        return [(name, parameter) for name, parameter in parameters if parameter.numel() > 1]

    def evaluate_batch(self, objective: Any, batch: Any) -> Any:
        return objective.predictions(batch)

    def objective(self, model: PreTrainedModel) -> LabelObjective:
        return LabelObjective(model, self.name)

    def evaluate(self, objective: LabelObjective, rows: Rows, batcher: Batcher, classes: Classes = None) -> Evaluation:
        return evaluate_labels(objective, rows, batcher, classes or ())


def named_classes(config: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the class names in a model's configuration, or None if they are the default names LABEL_0, …."""
    names = getattr(config, "id2label", None) or {}
    ordered = tuple(str(names[index]) for index in sorted(names))
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered
