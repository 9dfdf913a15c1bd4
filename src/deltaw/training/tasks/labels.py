"""Tasks with one label per row: text classification, regression, image classification, and rewards of answer pairs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.data.classes import check_classes
from deltaw.data.columns import PAIR_COLUMNS
from deltaw.data.example import RowGroup, rows_of
from deltaw.data.images import ImageEncoder, LabelBatch, LabelMicroBatcher
from deltaw.data.labels import LabelReader
from deltaw.data.pixels import AnyExample, ImageExample
from deltaw.data.reward_pairs import AnswerScoreReader, RewardPair, RewardReader, are_pairs
from deltaw.data.row_reader import RowReader, RunData
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.hub.loading import has_values, read_config
from deltaw.machine.choices import Choice
from deltaw.runtime.generation import position_limit
from deltaw.runtime.packed import without_cache
from deltaw.training.evaluation.base import (
    Evaluation,
    Outcomes,
    RowOutcome,
    check_finite,
    classification_metrics,
    confusion_matrix,
    regression_metrics,
)
from deltaw.training.losses import PairLosses, StepMetrics
from deltaw.training.microbatches import AnyBatcher, AnyObjective, enter_batch
from deltaw.training.tasks.base import (
    BatcherChoice,
    Classes,
    ModelFiles,
    NamedParameters,
    Predictions,
    Rows,
    Task,
    evaluate_pairs,
)
from deltaw.training.tasks.causal_batcher import choose_tokens_per_pass, longest_row
from deltaw.training.tasks.packed_labels import choose_packed_batcher, logits_at


def choose_label_batcher(
    model: PreTrainedModel,
    examples: Sequence[AnyExample],
    *,
    device: str,
    tokens_per_pass: int | str = "auto",
    virtual_tokens: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    encoder: ImageEncoder | None = None,
) -> tuple[LabelMicroBatcher, dict[str, Choice]]:
    """Create the batcher of labeled rows, resolving settings that are ``auto``.

    Args:
        virtual_tokens: Positions that the method prepends to each text.
        tokenizer: Tokenizer of texts.
        encoder: Encoder of images.

    Returns:
        The batcher, and the chosen value of each setting with its reason.

    Raises:
        UserError: if a row is longer than the model has positions, or the model rejects the prepared images.
    """
    images = [example for example in examples if isinstance(example, ImageExample)]
    limit = None if images else text_positions(model)
    if images and encoder is not None:
        longest = encoder.tokens(images[0])
        _try(model, encoder, images[0])
    else:
        longest = longest_row(examples, virtual_tokens, limit)
    tokens = choose_tokens_per_pass(tokens_per_pass, longest, device)
    pad = getattr(tokenizer, "pad_token_id", None)
    batcher = LabelMicroBatcher(
        tokens.value,
        device,
        pad_id=pad if isinstance(pad, int) else 0,
        segments="token_type_ids" in inspect.signature(model.forward).parameters,
        encoder=encoder,
        tokens_per_image=longest if images else 1,
        limit=limit,
    )
    return batcher, {"train.tokens_per_pass": tokens}


def _try(model: PreTrainedModel, encoder: ImageEncoder, example: ImageExample) -> None:
    """Run the model on one image, so that a mismatch of sizes is reported as a UserError."""
    pixels = encoder.encode([example]).to(device=model.device, dtype=model.dtype)
    try:
        with torch.no_grad():
            model(pixel_values=pixels)
    except (ValueError, RuntimeError, TypeError) as error:
        message = f"the model rejects the prepared images: {str(error).splitlines()[0]}"
        location = f"images of {pixels.shape[2]}×{pixels.shape[3]} pixels in {pixels.shape[1]} channels"
        hint = "check that preprocessor_config.json belongs to the model; without it, images get the model's image_size"
        raise UserError(message, location=location, hint=hint) from error


def text_positions(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens of a row. RoBERTa-like models count positions from the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return position_limit(model)


class LabelObjective:
    """Sum of a batch's losses: cross-entropy of classes, squared error of numbers, or Bradley-Terry loss of pairs.

    A decoder's output is taken at each row's last token, located by the row's length. Transformers locates it by the
    padding token, which fails if this is also the end token or is not defined.

    Args:
        model: Model of transformers with a head for the task, with or without an adapter.
        task: ``regression`` uses the squared error of one output, the other tasks the cross-entropy of classes.

    Attributes:
        pooled: True if the head is applied here to each row's last token, as for decoders.

    Raises:
        UserError: if the model's output for a row depends on trailing padding, or a regression head has more than one
            output.
    """

    accumulator: StepMetrics

    def __init__(self, model: PreTrainedModel, task: str) -> None:
        self.model = model
        self.task = task
        self.accumulator = StepMetrics()
        if task == "regression":
            check_one_output(model.config.num_labels, "regression")
        self.head = None if task == "image-classification" else _head_of_last_token(model)
        self.pooled = self.head is not None
        if not self.pooled and task != "image-classification":
            _check_padding(model)

    def __call__(self, batch: LabelBatch) -> Tensor:
        """Return the sum of the losses over the rows or pairs, a scalar in fp32."""
        predictions = self.predictions(batch)
        if batch.sizes:
            losses = pair_losses(predictions, batch.targets)
            self.accumulator.add(losses)
            return losses.losses.sum()
        if self.task == "regression":
            return (predictions - batch.targets.to(predictions.dtype)).square().sum()
        return nn.functional.cross_entropy(predictions, batch.targets, reduction="sum")

    def units(self, rows: Sequence[AnyExample]) -> int:
        """Return the number of labels: one per row or pair."""
        return sum(row.label_count for row in rows)

    def of_pairs(self, batch: LabelBatch) -> tuple[Sequence[Any], PairLosses]:
        """Return the preferred row of each pair of a batch, and the losses of the pairs."""
        return batch.examples[::2], pair_losses(self.predictions(batch), batch.targets)

    def predictions(self, batch: LabelBatch) -> Tensor:
        """Return logits (rows, classes), or numbers (rows,) for regression, in fp32 (fp64 for an fp64 model)."""
        with enter_batch(batch) as run:
            inputs = dict(run.inputs)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            if run.read_indices is not None:
                logits = logits_at(self.model, inputs, run.read_indices, self.head)
            elif self.head is not None:
                logits = _at_last_token(self.model, self.head, inputs)
            else:
                logits = self.model(**inputs).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.squeeze(-1) if self.task == "regression" else logits


def check_one_output(outputs: int | None, kind: str, model: str = "model") -> None:
    """Reject a head with more than one output.

    Args:
        kind: Kind of the output, for the message.
        model: Model reference, for the message.
    """
    if outputs != 1:
        hint = "take a model without a head, or with one output; for classes set task: sequence-classification"
        raise UserError(f"the model's head has {outputs} outputs, but a {kind} has one", location=model, hint=hint)


def pair_losses(rewards: Tensor, margins: Tensor) -> PairLosses:
    """Return Bradley-Terry losses and rewards of pairs.

    With the head's output r, the loss is −log σ(r(chosen) − r(rejected) − margin) (arXiv 2307.09288, eq. 2; without a
    margin arXiv 2203.02155, eq. 1).

    Args:
        rewards: (2 · pairs, 1), with the rows of a pair adjacent.
        margins: (2 · pairs,), equal for both rows of a pair.

    Raises:
        UserError: if the head has more than one output.
    """
    check_one_output(rewards.shape[-1], "reward")
    rewards = rewards.view(-1, 2)
    margins = margins.view(-1, 2)[:, 0].to(rewards.dtype)
    losses = -nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins)
    return PairLosses(losses, rewards.detach())


def start_at_mean(model: nn.Module, new_modules: Sequence[str], labels: Sequence[float]) -> bool:
    """Set the bias of a new regression head to the mean of the training labels.

    Labels are not normalized, so predictions and errors have the user's unit. Without this bias, the first steps would
    only move all outputs from about 0 to the mean of the labels.

    Args:
        new_modules: Names of the modules that the model's files do not contain.
        labels: Labels of the training rows.

    Returns:
        True if the head has a bias, unlike heads of decoders.
    """
    for module in map(model.get_submodule, reversed(new_modules)):
        bias = getattr(module, "bias", None)
        if getattr(module, "out_features", None) == 1 and isinstance(bias, Tensor):
            with torch.no_grad():
                bias.fill_(sum(labels) / len(labels))
            return True
    return False


def _head_of_last_token(model: PreTrainedModel) -> nn.Module | None:
    """Return a decoder's classification head if applying it to the last token reproduces the model's logits.

    The check uses rows without padding. The model's logits must match the outputs of the last of their tokens.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module) or model.base_model is model:
        return None
    ids = _trial_ids(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        outputs = head(_hidden(model, inputs))
        # Without a padding token, transformers accepts only one row per batch.
        single_rows = ({"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids)
        logits = torch.cat([model(**row, **without_cache(model)).logits for row in single_rows])
    if logits.shape != outputs[:, -1].shape:
        return None
    nearest = (outputs - logits[:, None]).float().norm(dim=-1).argmin(1)
    at_last = not has_values(model) or bool((nearest == ids.shape[1] - 1).all())
    return head if at_last and _close(logits, outputs[:, -1]) else None


def _hidden(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the last hidden states (rows, tokens, width) of a decoder."""
    return model.base_model(**inputs, **without_cache(model)).last_hidden_state


def _at_last_token(model: PreTrainedModel, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the head's outputs (rows, classes) at the last token before the padding."""
    hidden = _hidden(model, inputs)
    last = inputs["attention_mask"].sum(1) - 1
    return head(hidden[torch.arange(len(last), device=hidden.device), last])


def _check_padding(model: PreTrainedModel) -> None:
    """Reject a model if trailing padding changes its output for a row.

    In 16 bits, outputs at two lengths also differ by rounding, by a large relative amount if they are small sums of
    large terms. The difference is therefore compared with the effect of the same tokens without a mask.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return  # the output is read at the end token, which the tokenizer appends to each row
    ids = _trial_ids(model)
    short = ids[:, :5]
    padded = torch.ones_like(ids)
    padded[:, 5:] = 0
    with torch.no_grad():
        unpadded_logits = model(input_ids=short, attention_mask=torch.ones_like(short)).logits
        padded_logits = model(input_ids=ids, attention_mask=padded).logits
        unmasked_logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if not _close(unpadded_logits, padded_logits, moved=unmasked_logits):
        message = f"the outputs of {type(model).__name__} change when padding follows a row"
        hint = "choose another model: this one cannot batch rows of different lengths"
        raise UserError(message, location="model", hint=hint)


def _trial_ids(model: PreTrainedModel, rows: int = 4, count: int = 8) -> Tensor:
    """Return (rows, count) token ids without padding tokens."""
    config = model.config.get_text_config()
    ids = torch.arange(rows * count, device=model.device).view(rows, count) + 3
    ids = ids % config.vocab_size
    pad = getattr(config, "pad_token_id", None)
    return ids if pad is None else torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)


def _close(left: Tensor, right: Tensor, moved: Tensor | None = None) -> bool:
    """True if outputs of the same rows are equal except for rounding.

    Args:
        moved: For 16-bit models, outputs of changed rows. A tenth of their difference counts as rounding.
    """
    if left.shape != right.shape:
        return False
    exact = left.dtype in (torch.float32, torch.float64)
    left, right = left.float(), right.float()
    bound = (1e-4 if exact else 4e-2) * left.norm() + 1e-6
    if moved is not None and not exact:
        bound = torch.maximum(bound, 0.1 * (left - moved.float()).norm())
    return bool((left - right).norm() <= bound)


@dataclass(frozen=True)
class LabelEvaluation(Evaluation):
    """Evaluation with predictions per row.

    Attributes:
        predictions: (rows, classes) logits or (rows,) numbers, in the order of the examples.

    ``per_row`` is 1.0 for a correct class and 0.0 otherwise, or the squared error.
    """

    predictions: np.ndarray = field(default_factory=lambda: np.zeros(0))


def evaluate_labels(
    objective: LabelObjective, examples: Sequence[AnyExample], batcher: LabelMicroBatcher, classes: Sequence[str] = ()
) -> LabelEvaluation:
    """Evaluate a model on labeled rows or on pairs. The predictions for pairs are rewards.

    Raises:
        UserError: if the predictions are not finite.
    """
    if isinstance(examples[0], RowGroup):
        evaluation, rewards = evaluate_pairs(examples, batcher, objective.of_pairs)  # type: ignore[arg-type]
        return LabelEvaluation(**vars(evaluation), predictions=rewards)
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
def predict_rows(objective: LabelObjective, items: Rows, batcher: LabelMicroBatcher) -> np.ndarray:
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


def _evaluate_numbers(truth: np.ndarray, predictions: np.ndarray) -> LabelEvaluation:
    metrics, squared = regression_metrics(truth, predictions), (predictions.astype(np.float64) - truth) ** 2
    return LabelEvaluation.of_rows(metrics, "mse", squared, higher_is_better=False, predictions=predictions)


def _evaluate_classes(truth: np.ndarray, logits: np.ndarray, classes: tuple[str, ...]) -> LabelEvaluation:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(truth)), truth]
    predicted = logits.argmax(1)
    counts = confusion_matrix(truth, predicted, logits.shape[1])
    is_correct = (predicted == truth).astype(np.float64)
    metrics = {"loss": float(losses.mean()), **classification_metrics(counts)}
    arguments = {"classes": classes, "confusion": counts, "predictions": logits}
    return LabelEvaluation.of_rows(metrics, "accuracy", is_correct, **arguments)


# Suffixes of architectures with a classification head in the weight files.
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


@dataclass(eq=False)
class LabelTask(Task):
    """Predict the class or number of a text, or the class of an image.

    Args:
        name: ``sequence-classification``, ``regression`` or ``image-classification``.
        tokenizer: Tokenizer of a text model.
        encoder: Encoder of an image model.
        class_names: Classes of the model's existing head, in the order of its outputs.
        head_outputs: Number of outputs of the head in the model's files, or None without a head.
        model: Model reference, for messages.
    """

    has_labels = True
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

    def reader(self, settings: DataSettings, classes: Classes = None) -> LabelReader | RewardReader:
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

    def predict(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes) -> Predictions:
        predictions = predict_rows(objective, rows, batcher).astype(np.float64)  # type: ignore[arg-type]
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
        if reordered and settings.classes is None and classes != self.class_names:
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

    def batcher(self, model: PreTrainedModel, examples: Rows, **options: Any) -> BatcherChoice:
        if isinstance(examples[0], RowGroup):
            at_last = _head_of_last_token(model) is not None
            packed = choose_packed_batcher(model, examples, at_last=at_last, limit=text_positions(model), **options)
            if packed is not None:
                return packed
        label_options = {n: options[n] for n in ("device", "tokens_per_pass", "virtual_tokens") if n in options}
        return choose_label_batcher(model, examples, tokenizer=self.tokenizer, encoder=self.encoder, **label_options)

    def initialize_head(self, model: PreTrainedModel, new_modules: Sequence[str], rows: Sequence[Any]) -> None:
        """Initialize the bias of a regression head with the mean of the labels."""
        if self.name == "regression" and len(rows):
            start_at_mean(model, new_modules, [row.label for row in rows])

    def trainable_parameters(self, parameters: NamedParameters, rows: Rows) -> NamedParameters:
        """Exclude the bias of a reward head, because rewards enter the loss only as differences."""
        if not isinstance(rows[0], RewardPair):
            return parameters
        return [(name, parameter) for name, parameter in parameters if parameter.numel() > 1]

    def objective(self, model: PreTrainedModel) -> LabelObjective:
        return LabelObjective(model, self.name)

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        return evaluate_labels(objective, rows, batcher, classes or ())  # type: ignore[arg-type]


def head_outputs(config: PretrainedConfig) -> int | None:
    """Return the number of outputs of the classification head in a model's files, or None without a head."""
    architectures = getattr(config, "architectures", None) or [""]
    return config.num_labels if str(architectures[0]).endswith(_CLASSIFIERS) else None


def named_classes(config: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the class names in a model's configuration, or None if they are the default names LABEL_0, …."""
    names = getattr(config, "id2label", None) or {}
    ordered = tuple(str(names[index]) for index in sorted(names))
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered
