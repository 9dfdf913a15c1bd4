"""A model loaded for inference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from deltaw.data.messages import Message
from deltaw.decoding.model import AdaptedModel
from deltaw.decoding.opening import SessionGenerator
from deltaw.hub.loading import LoadedModel
from deltaw.inference.prompting import Prompting
from deltaw.inference.scores import EvaluationScore, ScoreOptions
from deltaw.inference.task_inference import TaskInference
from deltaw.inference.text_inference import TextInference
from deltaw.methods.trust import AdapterFolder
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.data import DataSettings
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions
from deltaw.training.rendered_rows import render_example
from deltaw.training.task import Rows, Task

DEFAULT_SCORE = ScoreOptions()


@dataclass
class OpenedRun(AdaptedModel):
    """Model loaded for evaluation, generation or chat, with or without an adapter.

    Attributes:
        loaded: The loaded model.
        config: Settings of the run, or None if the reference is not a deltaw run.
        task: Task of the model.
        classes: Names of a classifier's outputs.
        identity: Identity of the base model and its precision, used in cache keys.
        adapter_folder: The opened folder, or None for a base model.
        prompting: Prompt format of the training rows, as stored in the folder.
    """

    loaded: LoadedModel
    config: RunConfig | None
    task: Task[Any]
    classes: tuple[str, ...] | None = None
    identity: str | None = None
    adapter_folder: AdapterFolder | None = None
    prompting: Prompting = field(default_factory=Prompting)

    @functools.cached_property
    def inference(self) -> TaskInference[Any]:
        """Use of the task's models (``TaskEntry.inference``)."""
        entry = task_registry.entry_of(self.task.name)
        default = TextInference if entry.generates_text else TaskInference
        inference: TaskInference[Any] = (entry.load_inference() or default)(self.task)
        return inference

    def score(
        self, examples: Rows, options: ScoreOptions = DEFAULT_SCORE, generator: SessionGenerator | None = None
    ) -> EvaluationScore:
        """Evaluate the model on examples without virtual tokens.

        The result equals the evaluation of the run's held-out rows. A task can replace this evaluation
        (:meth:`TaskInference.score`).

        Args:
            generator: Generator of answers and samples. The default is transformers.

        Raises:
            UserError: if the settings refer to code that the user did not name on this machine.
        """
        return self.inference.score(self, examples, options, generator)

    @property
    def data(self) -> DataSettings | None:
        """Data settings of the run, or None if unknown."""
        return self.config.data if self.config is not None else None

    def encode(self, prompt: str | Sequence[Message], images: Sequence[Path | bytes | Image] = ()) -> np.ndarray:
        """Tokenize a prompt or a conversation as the training rows were rendered: int32 (length,).

        Args:
            prompt: Text, or messages whose content is text or a list of content parts.
            images: Images of the markers ``<image>`` in the prompt, in order. Without markers, they precede the first
                question. Without images, markers are text.

        Raises:
            UserError: if the chat template rejects it, an image cannot be read, or the model reads text only.
        """
        return self.prompting.prompt(prompt, self.data, self.tokenizer, self.task.images, images)

    def example(self, example: Any) -> Any:
        """Render an example for the current state of the model."""
        return example if self.method is None or self.is_base else render_example(example, self.method)

    def batcher(self, rows: Sequence[Any], virtual_tokens: int = 0) -> Batcher:
        """Return the batcher for these rows, with the run's settings if there is a run."""
        shares = self.method is None or self.method.can_share_prefixes()
        device = str(self.loaded.choices["device"].value)
        options = BatcherOptions(device, method_shares=shares, virtual_tokens=virtual_tokens)
        if (train := None if self.config is None else self.config.train) is not None:
            options = replace(options, tokens_per_pass=train.tokens_per_pass, share=train.share_prefixes)
        return self.task.batcher(self.model, rows, options)[0]
