"""A model loaded for inference, with its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from deltaw.data.messages import Message
from deltaw.decoding.model import AdaptedModel
from deltaw.hub.loading import LoadedModel
from deltaw.inference.prompting import Prompting
from deltaw.methods.trust import AdapterFolder
from deltaw.settings.config import RunConfig
from deltaw.settings.data import DataSettings
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions
from deltaw.training.rendered_rows import render_example
from deltaw.training.task import Task


@dataclass
class LoadedRun(AdaptedModel):
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
