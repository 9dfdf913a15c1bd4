"""The tasks with one label a row: a text's class or number, an image's class; or a reward of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import with_chat_template
from deltaw.data.classes import check_classes
from deltaw.data.images import ImageEncoder, prepare_image_file, prepare_images
from deltaw.data.labels import PreparedLabels, prepare_label_file, prepare_labeled
from deltaw.data.report import Report
from deltaw.data.reward_pairs import RewardPair, are_pairs, prepare_reward_file, prepare_rewards
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.host.choices import Choice
from deltaw.hub.loading import read_config
from deltaw.runtime.padded import padded_rows
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.labels import evaluate_labels
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.tasks.base import ModelFiles, RunData, Task
from deltaw.training.tasks.label_batcher import choose_label_batcher
from deltaw.training.tasks.label_objective import LabelObjective, start_at_mean

# What the names of architectures end in whose files hold a classifier's head.
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


class LabelTask(Task):
    """Predict a text's class or number, or an image's class.

    Args:
        name: ``sequence-classification``, ``regression`` or ``image-classification``.
        tokenizer: of a text's model. folder: of an image's model, which says how images are prepared.
        named: the classes of the model's own head, in the order of its outputs.
        own_outputs: how many outputs the head has that the model's files hold; None where they hold none.
        model: its reference, for messages.
    """

    has_labels = True
    shares_evaluation = True
    evaluation_asks = "predictions"

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        encoder: ImageEncoder | None = None,
        named: tuple[str, ...] | None = None,
        own_outputs: int | None = None,
        model: str = "",
    ) -> None:
        self.name = name
        self.named = named
        self._own_outputs = own_outputs
        self._model = model
        self.tokenizer = tokenizer
        self.encoder = encoder

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> LabelTask:
        named, model = named_classes(files.config), files.reference
        if name == "image-classification":
            encoder = ImageEncoder(files.folder, trust_remote_code=files.trust_remote_code)
            return cls(name, None, encoder, named, own_outputs(files.config), model)
        tokenizer = files.tokenizer()
        # A regression's configuration has one output, whatever the files say.
        config = read_config(files.folder, "sequence-classification", None, files.trust_remote_code)
        return cls(name, tokenizer, None, named, own_outputs(config), model)

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        if self.are_pairs(settings.train, settings):
            self.tokenizer = with_chat_template(self._text_tokenizer(), settings.chat_template)
            self._check_reward_head()
            pairs = prepare_rewards(settings, self.tokenizer, seed=seed)
            return RunData(pairs.train, pairs.held_out, pairs.report, skipped=pairs.skipped)
        prepared = self._prepare(settings, seed, None)
        found = prepared.classes
        unordered = settings.classes is None and found is not None and found != self.named
        if unordered and self.named is not None and set(found or ()) == set(self.named):
            # A head for these very classes keeps the order of its outputs.
            prepared = self._prepare(settings, seed, self.named)
        self._check_outputs(prepared.classes)
        return RunData(
            prepared.train,
            prepared.held_out,
            prepared.report,
            prepared.classes,
            skipped=prepared.skipped,
        )

    def are_pairs(self, train: Any, settings: DataSettings) -> bool:
        """Whether the rows are pairs of answers, of which a reward is learned."""
        return self.name == "sequence-classification" and are_pairs(train, settings)

    def _text_tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.tokenizer is not None  # texts are not read without one
        return self.tokenizer

    def _check_reward_head(self) -> None:
        if self._own_outputs not in (None, 1):
            raise UserError(
                f"the model's head has {self._own_outputs} outputs, and a reward is one number",
                where=self._model,
                hint="take a model without a head, or with one output",
            )

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
        return prepare_labeled(settings, self.tokenizer, self.name, seed=seed, classes=classes)

    def read_file(
        self, reference: str, settings: DataSettings, classes: Sequence[str] | None
    ) -> tuple[Sequence[Any], Report]:
        if self.encoder is not None:
            return prepare_image_file(reference, settings, self.encoder, classes)
        if self.are_pairs(reference, settings):
            self.tokenizer = with_chat_template(self._text_tokenizer(), settings.chat_template)
            return prepare_reward_file(reference, settings, self.tokenizer)
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

    def initialize_head(
        self, model: PreTrainedModel, new_modules: Sequence[str], rows: Sequence[Any]
    ) -> None:
        """A regression begins at the mean of the labels."""
        if self.name == "regression":
            start_at_mean(model, new_modules, [row.label for row in rows])

    def trained(
        self, named: Sequence[tuple[str, nn.Parameter]], rows: Sequence[Any]
    ) -> Sequence[tuple[str, nn.Parameter]]:
        """A reward's bias, the one parameter of one number, drops out of the difference of two rewards."""
        if not isinstance(rows[0], RewardPair):
            return named
        return [(name, parameter) for name, parameter in named if parameter.numel() > 1]

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


def own_outputs(config: PretrainedConfig) -> int | None:
    """Outputs of the classifier's head that a model's files hold; None where they hold none."""
    made_for = getattr(config, "architectures", None) or [""]
    return config.num_labels if str(made_for[0]).endswith(_CLASSIFIERS) else None


def named_classes(config: PretrainedConfig) -> tuple[str, ...] | None:
    """The classes that a model's configuration names; None where they are transformers' own LABEL_0, …."""
    names = getattr(config, "id2label", None) or {}
    ordered = tuple(str(names[index]) for index in sorted(names))
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered
