"""The tasks with one label a row: a text's class or number, an image's class; or a reward of pairs."""

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
    confusion,
    regression_metrics,
)
from deltaw.training.losses import PairLosses, StepMetrics
from deltaw.training.microbatches import AnyBatcher, AnyObjective, entered
from deltaw.training.tasks.base import Batched, Classes, ModelFiles, Named, Predictions, Rows, Task, evaluate_pairs
from deltaw.training.tasks.causal_batcher import choose_tokens_per_pass, longest_row
from deltaw.training.tasks.packed_labels import choose_packed_batcher, logits_at

# How labeled rows become microbatches: how many tokens, what pads them, and why.


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
    """Resolve the settings that the user left at ``auto``.

    Args:
        virtual_tokens: positions that the method will prepend to each text.
        tokenizer: of texts. encoder: of images.

    Returns:
        the batcher, and by setting the value chosen with its reason.

    Raises:
        UserError: a row is longer than the model has positions, or images are not what the model takes.
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
    """Let the model see one image, so that one of another size than its own is refused in words."""
    pixels = encoder.encode([example]).to(device=model.device, dtype=model.dtype)
    try:
        with torch.no_grad():
            model(pixel_values=pixels)
    except (ValueError, RuntimeError, TypeError) as error:
        what = f"the model does not take its images as prepared: {str(error).splitlines()[0]}"
        where = f"images of {pixels.shape[2]}×{pixels.shape[3]} pixels in {pixels.shape[1]} channels"
        hint = "check that preprocessor_config.json belongs to the model; without it, images get the model's image_size"
        raise UserError(what, where=where, hint=hint) from error


def text_positions(model: PreTrainedModel) -> int | None:
    """The most tokens that a row may have; RoBERTa and its kin count positions from the pad id's on."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return position_limit(model)


# The objective of labeled rows: cross-entropy of classes, the squared error of numbers, or of pairs the
# likelihood that the preferred one wins.
#
# A decoder's output is read at each row's last token, found by the row's length. Transformers finds it by the
# id of the padding token, which fails where that is also the end token, or where there is none.
#
# Knows models with a head; not data files, optimizers or schedules.


class LabelObjective:
    """Sum of a batch's losses, with gradients for whatever is trained.

    Args:
        model: of transformers with a head for the task, with or without an adapter.
        task: ``regression`` takes the squared error of one output; the others the cross-entropy of classes.

    Attributes:
        pooled: whether the head is applied here to each row's last token, as is right for a decoder.

    Raises:
        UserError: the model's output for a row depends on the padding behind it, or a regression's head has
            more than one output.
    """

    watched: StepMetrics

    def __init__(self, model: PreTrainedModel, task: str) -> None:
        self.model = model
        self.task = task
        self.watched = StepMetrics()
        if task == "regression":
            check_one_output(model.config.num_labels, "regression")
        self.head = None if task == "image-classification" else _head_of_last_token(model)
        self.pooled = self.head is not None
        if not self.pooled and task != "image-classification":
            _check_padding(model)

    def __call__(self, batch: LabelBatch) -> Tensor:
        """Sum over rows of the cross-entropy (nats), or of the squared error; a scalar in fp32."""
        predictions = self.predictions(batch)
        if batch.sizes:
            found = losses_of_pairs(predictions, batch.targets)
            self.watched.add(found)
            return found.losses.sum()
        if self.task == "regression":
            return (predictions - batch.targets.to(predictions.dtype)).square().sum()
        return nn.functional.cross_entropy(predictions, batch.targets, reduction="sum")

    def units(self, rows: Sequence[AnyExample]) -> int:
        """Labels of the rows: one each, or one a pair."""
        return sum(row.label_count for row in rows)

    def of_pairs(self, batch: LabelBatch) -> tuple[Sequence[Any], PairLosses]:
        """The preferred row of each pair of a batch, and the losses of the pairs."""
        return batch.examples[::2], losses_of_pairs(self.predictions(batch), batch.targets)

    def predictions(self, batch: LabelBatch) -> Tensor:
        """Logits (rows, classes), or numbers (rows,) of a regression; in fp32 (fp64 for an fp64 model)."""
        with entered(batch) as run:
            inputs = dict(run.inputs)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            if run.places is not None:
                logits = logits_at(self.model, inputs, run.places, self.head)
            elif self.head is not None:
                logits = _at_last_token(self.model, self.head, inputs)
            else:
                logits = self.model(**inputs).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.squeeze(-1) if self.task == "regression" else logits


def check_one_output(outputs: int | None, what: str, model: str = "model") -> None:
    """Refuse a head with several outputs for a number.

    Args:
        what: the head gives. model: its reference, for the message.
    """
    if outputs != 1:
        hint = "take a model without a head, or with one output; for classes set task: sequence-classification"
        raise UserError(f"the model's head has {outputs} outputs, and a {what} has one", where=model, hint=hint)


def losses_of_pairs(rewards: Tensor, margins: Tensor) -> PairLosses:
    """Bradley-Terry losses and the rewards of pairs.

    With r the head's one output, −log σ(r of the chosen − r of the rejected − margin) (arXiv 2307.09288, eq.
    2; without a margin, arXiv 2203.02155, eq. 1).

    Args:
        rewards: (2 pairs, 1), a pair's rows one after the other. margins: (2 pairs,), the same for both.

    Raises:
        UserError: the head has another number of outputs.
    """
    check_one_output(rewards.shape[-1], "reward")
    rewards = rewards.view(-1, 2)
    margins = margins.view(-1, 2)[:, 0].to(rewards.dtype)
    losses = -nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins)
    return PairLosses(losses, rewards.detach())


def start_at_mean(model: nn.Module, new_modules: Sequence[str], labels: Sequence[float]) -> bool:
    """Set the bias of a regression's new head to the mean of the training labels.

    Labels stay as they are, so that predictions and errors are in the user's unit. A new head says about 0
    whatever it sees; were labels around 80, say, the first steps would go into moving all outputs there, by
    way of whatever is trained. With the mean as bias, training begins at the best constant answer.

    Args:
        new_modules: names of the modules that were not in the model's files.
        labels: of the rows to train on.

    Returns:
        whether there was a bias to set; decoders' heads have none.
    """
    for module in map(model.get_submodule, reversed(new_modules)):
        bias = getattr(module, "bias", None)
        if getattr(module, "out_features", None) == 1 and isinstance(bias, Tensor):
            with torch.no_grad():
                bias.fill_(sum(labels) / len(labels))
            return True
    return False


def _head_of_last_token(model: PreTrainedModel) -> nn.Module | None:
    """The head of a decoder for classification, where applying it to the last token gives the model's logits.

    That is tried on rows without padding: of all their tokens, the last one's outputs must be the model's.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module) or model.base_model is model:
        return None
    ids = _trial_ids(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        outputs = head(_hidden(model, inputs))
        # One row at a time: without a padding token transformers takes no more.
        alone = ({"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids)
        logits = torch.cat([model(**row, **without_cache(model)).logits for row in alone])
    if logits.shape != outputs[:, -1].shape:
        return None
    nearest = (outputs - logits[:, None]).float().norm(dim=-1).argmin(1)
    at_last = not has_values(model) or bool((nearest == ids.shape[1] - 1).all())
    return head if at_last and _close(logits, outputs[:, -1]) else None


def _hidden(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states (rows, tokens, width) of a decoder."""
    return model.base_model(**inputs, **without_cache(model)).last_hidden_state


def _at_last_token(model: PreTrainedModel, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The head's outputs (rows, classes) at each row's last token, before the padding."""
    hidden = _hidden(model, inputs)
    last = inputs["attention_mask"].sum(1) - 1
    return head(hidden[torch.arange(len(last), device=hidden.device), last])


def _check_padding(model: PreTrainedModel) -> None:
    """Refuse a model whose output for a row depends on the padding behind it.

    In 16 bits, the outputs of one row differ by rounding between two lengths, by much where they are small
    sums of large terms. They are told from a model that sees its padding by how far the same tokens move
    them when they are not masked.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return  # these answer at the end token, which the tokenizer puts at the end of each row
    ids = _trial_ids(model)
    short = ids[:, :5]
    padded = torch.ones_like(ids)
    padded[:, 5:] = 0
    with torch.no_grad():
        alone = model(input_ids=short, attention_mask=torch.ones_like(short)).logits
        behind = model(input_ids=ids, attention_mask=padded).logits
        seen = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if not _close(alone, behind, moved=seen):
        what = f"the outputs of {type(model).__name__} change when padding follows a row"
        hint = "choose another model: rows of different lengths could not go through it together"
        raise UserError(what, where="model", hint=hint)


def _trial_ids(model: PreTrainedModel, rows: int = 4, count: int = 8) -> Tensor:
    """(rows, count) token ids, none of them that of padding."""
    config = model.config.get_text_config()
    ids = torch.arange(rows * count, device=model.device).view(rows, count) + 3
    ids = ids % config.vocab_size
    pad = getattr(config, "pad_token_id", None)
    return ids if pad is None else torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)


def _close(left: Tensor, right: Tensor, moved: Tensor | None = None) -> bool:
    """Whether outputs of the same rows are equal up to rounding.

    Args:
        moved: of 16-bit models, the outputs when the rows really change: a tenth of that way is rounding.
    """
    if left.shape != right.shape:
        return False
    exact = left.dtype in (torch.float32, torch.float64)
    left, right = left.float(), right.float()
    bound = (1e-4 if exact else 4e-2) * left.norm() + 1e-6
    if moved is not None and not exact:
        bound = torch.maximum(bound, 0.1 * (left - moved.float()).norm())
    return bool((left - right).norm() <= bound)


# How well a model predicts classes, numbers, or which of two texts is preferred: metrics, predictions row by
# row, and their interval.


@dataclass(frozen=True)
class LabelEvaluation(Evaluation):
    """With ``predictions`` in the order of the examples: (rows, classes) logits, or (rows,) numbers.

    ``per_row`` is 1.0 where the class is right and 0.0 elsewhere, or the squared error.
    """

    predictions: np.ndarray = field(default_factory=lambda: np.zeros(0))


def evaluate_labels(
    objective: LabelObjective, examples: Sequence[AnyExample], batcher: LabelMicroBatcher, classes: Sequence[str] = ()
) -> LabelEvaluation:
    """Evaluate a model on labeled rows, or on pairs, of which the predictions are the rewards.

    Raises:
        UserError: the model's predictions are not finite.
    """
    if isinstance(examples[0], RowGroup):
        evaluation, rewards = evaluate_pairs(examples, batcher, objective.of_pairs)  # type: ignore[arg-type]
        return LabelEvaluation(**vars(evaluation), predictions=rewards)
    predictions = predicted(objective, examples, batcher)
    truth = np.array([example.label for example in examples])
    if objective.task == "regression":
        found, confidence, name = _of_numbers(truth, predictions), np.abs(predictions - truth), "error"
        errors, shown = confidence, lambda number: f"{number:.6g}"
    else:
        found, name = _of_classes(truth, predictions, tuple(classes)), "confidence"
        chances = np.exp(predictions - predictions.max(1, keepdims=True).astype(np.float64))
        predictions, confidence = predictions.argmax(1), chances.max(1) / chances.sum(1)
        errors, shown = confidence * (predictions != truth), lambda label: str(classes[label] if classes else label)

    def of_row(place: int) -> RowOutcome:
        return examples[place], shown(truth[place]), shown(predictions[place]), float(confidence[place])

    return replace(found, outcomes=Outcomes.of_errors(name, errors, of_row))


@torch.no_grad()
def predicted(objective: LabelObjective, items: Rows, batcher: LabelMicroBatcher) -> np.ndarray:
    """What the model predicts for each row, of groups one row after the other: (rows, …).

    Raises:
        UserError: the predictions are not finite.
    """
    parts, order = [], []
    place = {id(row): index for index, row in enumerate(row for item in items for row in rows_of(item))}
    for batch in batcher.batches(items):
        parts.append(objective.predictions(batch).cpu().numpy())
        order += [place[id(row)] for row in batch.examples]
    gathered = np.concatenate(parts)
    check_finite("the model's predictions are", gathered)
    found = np.empty_like(gathered)
    found[order] = gathered
    return found


def _of_numbers(truth: np.ndarray, predictions: np.ndarray) -> LabelEvaluation:
    metrics, squared = regression_metrics(truth, predictions), (predictions.astype(np.float64) - truth) ** 2
    return LabelEvaluation.of_rows(metrics, "mse", squared, higher_is_better=False, predictions=predictions)


def _of_classes(truth: np.ndarray, logits: np.ndarray, classes: tuple[str, ...]) -> LabelEvaluation:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(truth)), truth]
    chosen = logits.argmax(1)
    counts = confusion(truth, chosen, logits.shape[1])
    right = (chosen == truth).astype(np.float64)
    metrics = {"loss": float(losses.mean()), **classification_metrics(counts)}
    told = {"classes": classes, "confusion": counts, "predictions": logits}
    return LabelEvaluation.of_rows(metrics, "accuracy", right, **told)


# What the names of architectures end in whose files hold a classifier's head.
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


@dataclass(eq=False)
class LabelTask(Task):
    """Predict a text's class or number, or an image's class.

    Args:
        name: ``sequence-classification``, ``regression`` or ``image-classification``.
        tokenizer: of a text's model. encoder: of an image's, which says how images are prepared.
        named: the classes of the model's own head, in the order of its outputs.
        own_outputs: how many outputs the head has that the model's files hold; None where they hold none.
        model: its reference, for messages.
    """

    has_labels = True
    shares_evaluation = True
    evaluation_asks = "predictions"

    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    encoder: ImageEncoder | None = None
    named: tuple[str, ...] | None = None
    own_outputs: int | None = None
    model: str = ""

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> LabelTask:
        named, model, code = named_classes(files.config), files.reference, files.trust_remote_code
        if name == "image-classification":
            encoder = ImageEncoder(files.folder, trust_remote_code=code)
            return cls(name, None, encoder, named, own_outputs(files.config), model)
        # A regression's configuration has one output, whatever the files say.
        config = read_config(files.folder, "sequence-classification", None, code)
        return cls(name, files.tokenizer(), None, named, own_outputs(config), model)

    def reader(self, settings: DataSettings, classes: Classes = None) -> LabelReader | RewardReader:
        if self.name == "sequence-classification" and are_pairs(settings.train, settings):
            assert self.tokenizer is not None  # texts are not read without one
            self.tokenizer = with_chat_template(self.tokenizer, settings.chat_template)
            return RewardReader(settings, self.tokenizer)
        return LabelReader(settings, self.tokenizer, self.name, classes=classes, encoder=self.encoder)

    def input_reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> RowReader[Any]:
        if self._rewards(classes):
            assert self.tokenizer is not None  # texts are not read without one
            if set(PAIR_COLUMNS) <= set(columns):
                return RewardReader(settings, self.tokenizer)
            if "text" not in columns or "prompt" in columns:
                return AnswerScoreReader(settings, self.tokenizer)
        return LabelReader(settings, self.tokenizer, self.name, classes=classes, encoder=self.encoder, labeled=False)

    def predict(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes) -> Predictions:
        found = predicted(objective, rows, batcher).astype(np.float64)  # type: ignore[arg-type]
        if self.name == "regression":
            return [found.tolist()]
        if self._rewards(classes):
            return found.reshape(len(rows), -1).T.tolist()
        names = classes or ()
        chances = np.exp(found - found.max(1, keepdims=True))
        table = [[float(f"{p:.7g}") for p in row] for row in chances / chances.sum(1, keepdims=True)]
        return [names[index] for index in found.argmax(1)], [dict(zip(names, row, strict=True)) for row in table]

    def _rewards(self, classes: Classes) -> bool:
        """True if the model has one output that is a reward."""
        return self.name == "sequence-classification" and len(classes or ()) == 1

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        reader = self.reader(settings)
        data = reader.prepared(seed)
        found = data.classes
        reordered = found is not None and self.named is not None and set(found) == set(self.named)
        if reordered and settings.classes is None and found != self.named:
            # A head for these very classes keeps the order of its outputs.
            data = self.reader(settings, self.named).prepared(seed)
        if self.own_outputs is not None and data.classes is not None:
            check_classes(self.own_outputs, data.classes, self.model)
        elif self.own_outputs is not None:
            kind = "reward" if isinstance(reader, RewardReader) else "regression"
            check_one_output(self.own_outputs, kind, self.model)
        return data

    def outputs(self, data: RunData) -> int | None:
        return 1 if data.classes is None else len(data.classes)

    def batcher(self, model: PreTrainedModel, examples: Rows, **how: Any) -> Batched:
        if isinstance(examples[0], RowGroup):
            at_last = _head_of_last_token(model) is not None
            packed = choose_packed_batcher(model, examples, at_last=at_last, limit=text_positions(model), **how)
            if packed is not None:
                return packed
        known = {name: how[name] for name in ("device", "tokens_per_pass", "virtual_tokens") if name in how}
        return choose_label_batcher(model, examples, tokenizer=self.tokenizer, encoder=self.encoder, **known)

    def initialize_head(self, model: PreTrainedModel, new_modules: Sequence[str], rows: Sequence[Any]) -> None:
        """A regression begins at the mean of the labels."""
        if self.name == "regression" and len(rows):
            start_at_mean(model, new_modules, [row.label for row in rows])

    def trained(self, named: Named, rows: Rows) -> Named:
        """A reward's bias, the one parameter of one number, drops out of the difference of two rewards."""
        if not isinstance(rows[0], RewardPair):
            return named
        return [(name, parameter) for name, parameter in named if parameter.numel() > 1]

    def objective(self, model: PreTrainedModel) -> LabelObjective:
        return LabelObjective(model, self.name)

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        return evaluate_labels(objective, rows, batcher, classes or ())  # type: ignore[arg-type]


def own_outputs(config: PretrainedConfig) -> int | None:
    """Outputs of the classifier's head that a model's files hold; None where they hold none."""
    made_for = getattr(config, "architectures", None) or [""]
    return config.num_labels if str(made_for[0]).endswith(_CLASSIFIERS) else None


def named_classes(config: PretrainedConfig) -> tuple[str, ...] | None:
    """The classes that a model's configuration names; None where they are transformers' own LABEL_0, …."""
    names = getattr(config, "id2label", None) or {}
    ordered = tuple(str(names[index]) for index in sorted(names))
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered
