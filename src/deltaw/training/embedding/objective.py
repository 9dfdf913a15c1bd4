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

from deltaw.data.example import RowGroup, rows_of
from deltaw.data.images import LabelMicroBatcher
from deltaw.data.retrieval import TextGroup
from deltaw.hub.loading import has_values
from deltaw.hub.sentence_layout import Pooling, SentenceLayout
from deltaw.task_settings import EmbeddingSettings
from deltaw.training.embedding.losses import step_loss
from deltaw.training.embedding.pooling import vectors_of
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.parallel.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.packed_labels import unlabeled

# Number of microbatches with cached activations for ``auto``.
AUTO_CACHED_PASSES = 8


def text_key(row: Any) -> bytes:
    """Return a key that is equal for rows with the same tokens, which have the same vector."""
    return row.tokens.tobytes()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TextBatcher:
    """Cuts the texts of rows into microbatches, without duplicates.

    Attributes:
        inner: Pads or packs texts.
        independent: True if packed texts have no shared prefixes, as for encoders.
    """

    inner: LabelMicroBatcher | CausalMicroBatcher
    independent: bool = False

    @property
    def share(self) -> bool:
        return bool(getattr(self.inner, "share", False))

    @property
    def tokens_per_pass(self) -> int:
        return self.inner.tokens_per_pass

    @property
    def padded(self) -> bool:
        """True if rows are padded."""
        return isinstance(self.inner, LabelMicroBatcher) or self.inner.padded

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield the microbatches of these rows, laying out each one on demand."""
        return self.inner.batches(self._texts(rows))

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """Return (rows, length) of each microbatch, without laying out any."""
        return self.inner.shapes(self._texts(rows))

    def cost_rows(self, rows: Sequence[Any]) -> list[Any]:
        """The rows as the batcher within sees them."""
        if isinstance(self.inner, LabelMicroBatcher):
            return list(rows)
        return [RowGroup(tuple(map(unlabeled, row.rows))) for row in rows]

    def _texts(self, rows: Sequence[Any]) -> list[Any]:
        texts = [text for row in rows for text in (rows_of(row) if isinstance(row, RowGroup) else (row,))]
        unique = list({text_key(text): text for text in texts}.values())
        return unique if isinstance(self.inner, LabelMicroBatcher) else list(map(unlabeled, unique))


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


class EmbeddingObjective:
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
        batcher: TextBatcher | None = None,
    ) -> None:
        self.model, self.layout, self.settings, self.batcher = model, layout, settings, batcher
        self.pooling: Pooling = layout.pooling or "mean"
        self._pending = _Pending()

    def units(self, rows: Sequence[Any]) -> int:
        """Return the divisor of the summed loss."""
        return len(rows)

    def start_step(self, rows: Sequence[TextGroup], batcher: AnyBatcher, processes: Reducer = SINGLE_PROCESS) -> None:
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
                texts, vectors_of_batch = vectors_of(self.model, batch, self.pooling)
            key = _batch_key(texts)
            if state is None:
                pending.cached[key] = vectors_of_batch
            else:
                pending.random_states[key] = state
            vectors.update(zip(map(text_key, texts), vectors_of_batch.detach(), strict=True))
        keys = [text_key(text) for row in rows for text in row.rows]
        local_ids = {id(row) for row in local_rows}
        is_local = [id(row) in local_ids for row in rows for _ in row.rows]
        pending.gradients, loss = self._gradients(rows, keys, is_local, vectors, processes)
        pending.share = loss * len(local_rows) / len(rows) / max(1, len(pending.gradients))

    def __call__(self, batch: Any) -> Tensor:
        """Return a scalar with the gradient of the step's loss through these texts.

        Its value is the share of the loss of these texts, so the sum over all microbatches is the loss of the step.
        """
        keys, pending = [text_key(text) for text in texts_of(batch)], self._pending
        vectors = pending.cached.pop(_batch_key(texts_of(batch)), None)
        if vectors is None:
            pending.cached.clear()
            with _replayed_random_state(self.model, pending.random_states.get(_batch_key(texts_of(batch)))):
                _, vectors = vectors_of(self.model, batch, self.pooling)
        zero = vectors.new_zeros(vectors.shape[1])
        gradient = torch.stack([pending.gradients.get(key, zero) for key in keys])
        surrogate = (vectors * gradient.to(vectors)).sum()
        assert pending.share is not None
        return surrogate + (pending.share * len(keys) - surrogate.detach())

    def evaluate_rows(self, batch: Any) -> Tensor:
        """Return the vectors (rows, width) of a microbatch's texts."""
        return vectors_of(self.model, batch, self.pooling)[1]

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
        limit, per_pass = self.settings.kept_tokens, 0 if self.batcher is None else self.batcher.tokens_per_pass
        max_tokens = AUTO_CACHED_PASSES * per_pass if limit == "auto" else int(limit)
        return int((np.cumsum([count * length for count, length in shapes]) <= max_tokens).sum())


def texts_of(batch: Any) -> list[Any]:
    """Return the rows of a microbatch, in the order of :func:`deltaw.training.embedding.pooling.vectors_of`."""
    return list(getattr(batch, "examples", ())) or [member.example for member in batch.members]


def _batch_key(texts: Sequence[Any]) -> bytes:
    """Return a key of a microbatch. Each text occurs in only one microbatch."""
    return text_key(texts[0])


def _random_state(model: PreTrainedModel) -> list[Tensor]:
    """Return the state of the generators that a forward pass uses, for example for dropout."""
    on_device = [torch.cuda.get_rng_state(model.device)] if model.device.type == "cuda" else []
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
