"""Objective of embeddings: the loss of a step's vectors, with gradients computed per microbatch.

The loss needs the vectors of all texts of a step, but a device processes only some texts at a time. Each step therefore
has two phases (gradient caching, arXiv 2101.06983). The first computes all vectors, and the gradient of the loss for
each vector. The second runs the microbatches again and backpropagates these gradients. The first phase caches the
activations of up to ``embedding.kept_tokens`` tokens, so their microbatches run only once. The gradient is that of the
full step. Processes exchange their vectors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.example import rows_of
from deltaw.data.packing import MicroBatch
from deltaw.hub.sentence_layout import Pooling, SentenceLayout
from deltaw.hub.skeletons import has_values
from deltaw.inference.pooling import vectors_of
from deltaw.tasks.embedding.losses import step_loss
from deltaw.tasks.embedding.rows import TextGroup
from deltaw.tasks.embedding.settings import EmbeddingSettings
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import MicroBatcher
from deltaw.training.objective import Objective
from deltaw.training.reducer import SINGLE_PROCESS, Reducer

# Number of microbatches with cached activations for ``auto``.
AUTO_CACHED_PASSES = 8


def text_key(row: Any) -> bytes:
    """Return a key that is equal for rows with the same tokens, which have the same vector."""
    return row.tokens.tobytes()


class TextMicroBatcher(MicroBatcher):
    """Microbatches of the texts of rows, without duplicates."""

    def items(self, rows: Sequence[Any]) -> list[Any]:
        """Return each distinct text of the rows once."""
        return list({text_key(text): text for row in rows for text in rows_of(row)}.values())


@dataclass
class _Pending:
    """State between the two phases of a step.

    Attributes:
        gradients: Gradient of the loss for the vector of each text, by text key.
        share: Share of the loss attributed to each text.
        cached: Vectors with their autograd graph, by microbatch key.
        random_states: Random state before the computation without a graph, by microbatch key.
    """

    gradients: dict[bytes, Tensor] = field(default_factory=dict)
    share: Tensor | None = None
    cached: dict[bytes, Tensor] = field(default_factory=dict)
    random_states: dict[bytes, list[Tensor]] = field(default_factory=dict)


class EmbeddingObjective(Objective):
    """Loss of text vectors, differentiable with respect to all trainable parameters.

    Args:
        model: Model without a head.
        layout: Pooling and normalization of vectors.
        settings: Settings of the loss.
        batcher: Batcher of the session, used by dry runs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: SentenceLayout,
        settings: EmbeddingSettings,
        batcher: TextMicroBatcher | None = None,
    ) -> None:
        self.model = model
        self.layout = layout
        self.settings = settings
        self.batcher = batcher
        self.pooling: Pooling = layout.pooling or "mean"
        self._pending = _Pending()

    def units(self, rows: Sequence[Any]) -> int:
        """Return the divisor of the summed loss."""
        return len(rows)

    def start_step(self, rows: Sequence[TextGroup], batcher: Batcher, processes: Reducer = SINGLE_PROCESS) -> None:
        """Compute the vectors of a step, and the gradient of the loss for each.

        Each process runs a part of the rows.
        """
        has_weights = has_values(self.model)
        local_rows = processes.local_rows(rows, batcher)
        step_batcher = batcher if has_weights or self.batcher is None else self.batcher
        pending = self._pending = _Pending()
        vectors: dict[bytes, Tensor] = {}
        num_cached = self.cached_passes(step_batcher.shapes(local_rows)) if local_rows else 0
        for index, batch in enumerate(step_batcher.batches(local_rows) if local_rows else ()):
            if not has_weights and index == num_cached:
                break  # in a dry run, the training loop measures the remaining microbatches
            state = None if index < num_cached else _random_state(self.model)
            with torch.set_grad_enabled(index < num_cached):
                batch_vectors = vectors_of(self.model, batch, self.pooling)
            key = _batch_key(batch)
            if state is None:
                pending.cached[key] = batch_vectors
            else:
                pending.random_states[key] = state
            vectors.update(zip(map(text_key, batch.examples), batch_vectors.detach(), strict=True))
        keys = [text_key(text) for row in rows for text in row.rows]
        local_ids = {id(row) for row in local_rows}
        is_local = [id(row) in local_ids for row in rows for _ in row.rows]
        pending.gradients, loss = self._gradients(rows, keys, is_local, vectors, processes)
        pending.share = loss * len(local_rows) / len(rows) / max(1, len(pending.gradients))

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Return a scalar with the gradient of the step's loss through these texts.

        Its value is the share of the loss of these texts, so the sum over all microbatches is the loss of the step.
        """
        keys = [text_key(text) for text in batch.examples]
        pending = self._pending
        vectors = pending.cached.pop(_batch_key(batch), None)
        if vectors is None:
            pending.cached.clear()
            with _replayed_random_state(self.model, pending.random_states.get(_batch_key(batch))):
                vectors = vectors_of(self.model, batch, self.pooling)
        zero = vectors.new_zeros(vectors.shape[1])
        gradient = torch.stack([pending.gradients.get(key, zero) for key in keys])
        surrogate = (vectors * gradient.to(vectors)).sum()
        assert pending.share is not None
        return surrogate + (pending.share * len(keys) - surrogate.detach())

    def evaluate_rows(self, batch: MicroBatch) -> Tensor:
        """Return the vectors (rows, width) of a microbatch's texts."""
        return vectors_of(self.model, batch, self.pooling)

    def _gradients(
        self,
        rows: Sequence[TextGroup],
        keys: Sequence[bytes],
        is_local: Sequence[bool],
        vectors: dict[bytes, Tensor],
        processes: Reducer,
    ) -> tuple[dict[bytes, Tensor], Tensor]:
        """Return the gradient of the step's summed loss for each vector of this process, by text key, and the summed
        loss.
        """
        width = int(self.model.config.get_text_config().hidden_size)
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        zero = torch.zeros(width, device=self.model.device, dtype=dtype)
        flags = zip(keys, is_local, strict=True)
        all_vectors = torch.stack([vectors.get(key, zero) if local else zero for key, local in flags])
        all_vectors = processes.add(all_vectors).requires_grad_()
        with torch.enable_grad():
            loss = step_loss(all_vectors, rows, self.settings, normalize=self.layout.normalize) * len(rows)
            (vector_gradients,) = torch.autograd.grad(loss, all_vectors)
        gradients: dict[bytes, Tensor] = {}
        for key, local, gradient in zip(keys, is_local, vector_gradients, strict=True):
            if local:
                gradients[key] = gradients[key] + gradient if key in gradients else gradient
        return gradients, loss.detach()

    def cached_passes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Return the number of leading microbatches with cached activations."""
        limit = self.settings.kept_tokens
        per_pass = 0 if self.batcher is None else self.batcher.tokens_per_pass
        max_tokens = AUTO_CACHED_PASSES * per_pass if limit == "auto" else int(limit)
        return int((np.cumsum([count * length for count, length in shapes]) <= max_tokens).sum())


def _batch_key(batch: MicroBatch) -> bytes:
    """Return a key of a microbatch. Each text occurs in only one microbatch."""
    return text_key(batch.members[0].example)


def _random_state(model: PreTrainedModel) -> list[Tensor]:
    """Return the state of the generators that a forward pass uses, for example for dropout."""
    has_generator = model.device.type == "cuda" and torch.cuda.is_available()  # a plan may be for another machine
    on_device = [torch.cuda.get_rng_state(model.device)] if has_generator else []
    return [torch.get_rng_state(), *on_device]


@contextlib.contextmanager
def _replayed_random_state(model: PreTrainedModel, state: list[Tensor] | None) -> Iterator[None]:
    """Replay the random numbers after ``state`` and restore the current state on exit."""
    if state is None:
        yield
        return
    previous = _random_state(model)
    _restore(model, state)
    try:
        yield
    finally:
        _restore(model, previous)


def _restore(model: PreTrainedModel, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    for device_state in state[1:]:
        torch.cuda.set_rng_state(device_state, model.device)
