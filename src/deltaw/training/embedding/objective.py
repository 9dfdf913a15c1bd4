"""The loss of a step's vectors, with gradients microbatch by microbatch.

The loss sees all texts of a step together, and a processor few of them at a time. So each step has two parts (gradient
caching, arXiv 2101.06983): all texts become vectors, the loss's gradient for each vector is taken, and microbatches go
through the model again to bring it to what is trained. Activations of the first microbatches are kept from the first
part, as far as ``embedding.kept_tokens`` goes, so that these are computed once. Both give the gradient of the whole
step. Several processes add their vectors up to those of all.
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
from deltaw.training.embedding.losses import loss_of_step
from deltaw.training.embedding.pooling import vectors_of
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.packed_labels import unlabeled

# Microbatches whose activations are kept where the setting is ``auto``.
KEPT_PASSES = 8


def key_of_text(row: Any) -> bytes:
    """Equal for rows with the same tokens, which have the same vector."""
    return row.tokens.tobytes()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TextBatcher:
    """Cuts the texts of rows into microbatches, equal ones once.

    Attributes:
        inner: pads texts, or packs them. apart: whether packed texts share nothing, as an encoder's.
    """

    inner: LabelMicroBatcher | CausalMicroBatcher
    apart: bool = False

    @property
    def share(self) -> bool:
        return bool(getattr(self.inner, "share", False))

    @property
    def tokens_per_pass(self) -> int:
        return self.inner.tokens_per_pass

    @property
    def padded(self) -> bool:
        """Whether rows go through the model side by side."""
        return isinstance(self.inner, LabelMicroBatcher) or self.inner.padded

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """The microbatches of these rows, each laid out only when its turn comes."""
        return self.inner.batches(self._texts(rows))

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """(rows, length) of each microbatch, without laying any out."""
        return self.inner.shapes(self._texts(rows))

    def costing(self, rows: Sequence[Any]) -> list[Any]:
        """The rows as the batcher within sees them."""
        if isinstance(self.inner, LabelMicroBatcher):
            return list(rows)
        return [RowGroup(tuple(map(unlabeled, row.rows))) for row in rows]

    def _texts(self, rows: Sequence[Any]) -> list[Any]:
        texts = [text for row in rows for text in (rows_of(row) if isinstance(row, RowGroup) else (row,))]
        different = list({key_of_text(text): text for text in texts}.values())
        return different if isinstance(self.inner, LabelMicroBatcher) else list(map(unlabeled, different))


@dataclass
class _Pending:
    """What is left to do of a step.

    Attributes:
        gradients: by text, of the loss for its vector. share: of the loss that is counted for each text.
        kept: by microbatch, its vectors with what their backward needs.
        drawn: by microbatch, the state of the random numbers before it was computed without a graph.
    """

    gradients: dict[bytes, Tensor] = field(default_factory=dict)
    share: Tensor | None = None
    kept: dict[bytes, Tensor] = field(default_factory=dict)
    drawn: dict[bytes, list[Tensor]] = field(default_factory=dict)


class EmbeddingObjective:
    """A loss of vectors, with gradients for whatever is trained.

    Args:
        model: without a head. layout: how it embeds a text.
        settings: of the loss.
        batcher: of the session, for a dry run; None where there is none.
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
        """What the sum over these rows is divided by."""
        return len(rows)

    def begin(self, rows: Sequence[TextGroup], batcher: AnyBatcher, processes: Reducer = ALONE) -> None:
        """Compute the vectors of a step's rows, each process those of its own, and the loss's gradient for them."""
        real = has_values(self.model)
        own = processes.deal(rows, batcher)
        given = batcher if real or self.batcher is None else self.batcher
        pending = self._pending = _Pending()
        vectors: dict[bytes, Tensor] = {}
        kept = self.kept_passes(given.shapes(own)) if own else 0
        for number, batch in enumerate(given.batches(own) if own else ()):
            if not real and number == kept:
                break  # the rest is computed again one by one, which the loop shows
            state = None if number < kept else _random_state(self.model)
            with torch.set_grad_enabled(number < kept):
                texts, found = vectors_of(self.model, batch, self.pooling)
            name = _key(texts)
            if state is None:
                pending.kept[name] = found
            else:
                pending.drawn[name] = state
            vectors.update(zip(map(key_of_text, texts), found.detach(), strict=True))
        keys = [key_of_text(text) for row in rows for text in row.rows]
        mine = {id(row) for row in own}
        is_own = [id(row) in mine for row in rows for _ in row.rows]
        pending.gradients, loss = self._gradients(rows, keys, is_own, vectors, processes)
        pending.share = loss * len(own) / len(rows) / max(1, len(pending.gradients))

    def __call__(self, batch: Any) -> Tensor:
        """A number whose gradient is that of the step's loss by way of these texts, and whose value is their share of
        it: over all microbatches, the step's sum."""
        names, pending = [key_of_text(text) for text in texts_of(batch)], self._pending
        found = pending.kept.pop(_key(texts_of(batch)), None)
        if found is None:
            pending.kept.clear()
            with _as_drawn(self.model, pending.drawn.get(_key(texts_of(batch)))):
                _, found = vectors_of(self.model, batch, self.pooling)
        zero = found.new_zeros(found.shape[1])
        gradient = torch.stack([pending.gradients.get(name, zero) for name in names])
        through = (found * gradient.to(found)).sum()
        assert pending.share is not None
        return through + (pending.share * len(names) - through.detach())

    def evaluate_rows(self, batch: Any) -> Tensor:
        """(rows, width) the vectors of a microbatch's texts."""
        return vectors_of(self.model, batch, self.pooling)[1]

    def _gradients(
        self,
        rows: Sequence[TextGroup],
        keys: Sequence[bytes],
        is_own: Sequence[bool],
        vectors: dict[bytes, Tensor],
        processes: Reducer,
    ) -> tuple[dict[bytes, Tensor], Tensor]:
        """By own text, the gradient of the step's sum of losses for its vector; and that sum."""
        width = int(self.model.config.get_text_config().hidden_size)
        wide = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        zero = torch.zeros(width, device=self.model.device, dtype=wide)
        every = torch.stack([vectors.get(key, zero) if own else zero for key, own in zip(keys, is_own, strict=True)])
        every = processes.add(every).requires_grad_()
        with torch.enable_grad():
            loss = loss_of_step(every, rows, self.settings, normalize=self.layout.normalize) * len(rows)
            (found,) = torch.autograd.grad(loss, every)
        gradients: dict[bytes, Tensor] = {}
        for key, own, gradient in zip(keys, is_own, found, strict=True):
            if own:
                gradients[key] = gradients[key] + gradient if key in gradients else gradient
        return gradients, loss.detach()

    def kept_passes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Of microbatches of these shapes, how many of the first have their activations kept."""
        asked, per_pass = self.settings.kept_tokens, 0 if self.batcher is None else self.batcher.tokens_per_pass
        most = KEPT_PASSES * per_pass if asked == "auto" else int(asked)
        return int((np.cumsum([count * length for count, length in shapes]) <= most).sum())


def texts_of(batch: Any) -> list[Any]:
    """The rows of a microbatch, in the order of :func:`deltaw.training.embedding.pooling.vectors_of`."""
    return list(getattr(batch, "examples", ())) or [member.example for member in batch.members]


def _key(texts: Sequence[Any]) -> bytes:
    """Names a microbatch: no text is in two."""
    return key_of_text(texts[0])


def _random_state(model: PreTrainedModel) -> list[Tensor]:
    """Of the random numbers that a forward draws, such as an adapter's dropout."""
    on_device = [torch.cuda.get_rng_state(model.device)] if model.device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


@contextlib.contextmanager
def _as_drawn(model: PreTrainedModel, state: list[Tensor] | None) -> Iterator[None]:
    """While open, random numbers are those drawn from ``state`` on; None: as they come."""
    if state is None:
        yield
        return
    later = _random_state(model)
    _restore(model, state)
    try:
        yield
    finally:
        _restore(model, later)


def _restore(model: PreTrainedModel, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    for one in state[1:]:
        torch.cuda.set_rng_state(one, model.device)
