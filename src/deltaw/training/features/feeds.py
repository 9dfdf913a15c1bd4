"""Which vectors of a row are kept, by the layer where the model is resumed, and batches made of them.

Below a block: every token's vector, and batches are the microbatches. At a language model's head: the vectors
that predict a label. At a classifier: one vector a row. The last two run no token through the model any more;
a batch of them is one gather.

Knows examples, batches and layer entry points; not files, losses or where the vectors are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.packing import Batch, Member
from deltaw.kernels.transfer import to_device
from deltaw.runtime.layer_entry import BackboneEntry, HeadEntry, LayerEntry
from deltaw.training.features.cached import CachedBatch, RowIndex, content_of
from deltaw.training.features.store import FeatureStore
from deltaw.training.microbatches import AnyBatcher, AnyObjective

# Vectors in a batch that goes through nothing but a head.
VECTORS_PER_BATCH = 4096


class _Feed:
    """What all feeds have in common."""

    def __init__(self, entry: LayerEntry, objective: AnyObjective) -> None:
        self.entry = entry
        self._objective = objective
        self.device = torch.device("cpu")

    def learn(self, batch: Any) -> Tensor:
        hidden = self.entry.outputs(lambda: self._objective(batch))
        self.device = hidden.device
        self._learn_form(batch, hidden)
        return _flat(hidden)

    def meet(self, rows: RowIndex) -> None:
        """Most need nothing of it."""

    def keep(self, batch: Any, rows: RowIndex, store: FeatureStore) -> Tensor:
        hidden = self.entry.outputs(lambda: self._objective(batch))
        found = self._sources(batch, hidden)
        # What is stored stays: a training that is resumed reads the very values that it read before.
        new = ~store.done[rows.slots([example for example, _ in found])]
        found = [pair for pair, is_new in zip(found, new, strict=True) if is_new]
        if not found:
            return hidden
        slots = rows.slots([example for example, _ in found])
        sources = np.concatenate([places for _, places in found])
        targets = rows.places(slots)
        if len(sources) != len(targets):
            raise RuntimeError("a row has another number of vectors than expected")
        store.write(slots, targets, _flat(hidden).index_select(0, self._tensor(sources)))
        return hidden

    def _compute_missing(
        self, rows: Sequence[Any], batcher: AnyBatcher, index: RowIndex, store: FeatureStore
    ) -> None:
        done = store.done[index.slots(rows)]
        if not done.all():
            missing = {
                slot: row for slot, row, there in zip(index.slots(rows), rows, done, strict=True) if not there
            }
            for batch in batcher.batches(list(missing.values())):
                self.keep(batch, index, store)

    def _learn_form(self, batch: Any, hidden: Tensor) -> None:
        """Note the form of what comes out."""

    def _sources(self, batch: Any, hidden: Tensor) -> list[tuple[Any, np.ndarray]]:
        """Each example of the batch with the places of its vectors in the flattened ``hidden``."""
        raise TypeError("a feed says where a row's vectors are")

    def _tensor(self, places: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(places), self.device)


class EveryToken(_Feed):
    """The vectors of all tokens, or of all patches of an image, in batches as the microbatches make them."""

    kind = "every token"

    def _learn_form(self, batch: Any, hidden: Tensor) -> None:
        self._is_text = "input_ids" in batch.inputs
        self._patches = hidden.shape[1]
        self._tail = hidden.shape[2:]

    def content(self, example: Any) -> bytes:
        return content_of(example)

    def units(self, example: Any) -> int:
        return len(example.tokens) if self._is_text else self._patches

    def batches(
        self, rows: Sequence[Any], batcher: AnyBatcher, index: RowIndex, store: FeatureStore
    ) -> Iterator[CachedBatch]:
        for batch in batcher.batches(rows):
            yield CachedBatch(batch, functools.partial(self._read, batch, index, store))

    def _read(self, batch: Any, index: RowIndex, store: FeatureStore) -> Tensor:
        found = self._sources(batch)
        slots = index.slots([example for example, _ in found])
        if not store.done[slots].all():
            return self.keep(batch, index, store)
        lead = batch.inputs["input_ids"].shape if self._is_text else (batch.rows, self._patches)
        # Nothing attends to what fills a batch up; any vector that is there will do.
        places = np.full(math.prod(lead), index.starts[slots[0]])
        places[np.concatenate([own for _, own in found])] = index.places(slots)
        return to_device(store.read(places), self.device).view(*lead, *self._tail)

    def _sources(self, batch: Any, hidden: Tensor | None = None) -> list[tuple[Any, np.ndarray]]:
        if isinstance(batch, Batch):
            return [(member.example, member.places) for member in batch.members]
        longest = batch.inputs["input_ids"].shape[1] if self._is_text else self._patches
        return [
            (example, np.arange(row * longest, row * longest + self.units(example)))
            for row, example in enumerate(batch.examples)
        ]


class LabelTokens(_Feed):
    """A language model's vectors that predict a label, as they come out of the backbone."""

    kind = "predictors"

    def __init__(self, entry: BackboneEntry, objective: AnyObjective) -> None:
        super().__init__(entry, objective)
        self._targets = torch.zeros(0, dtype=torch.int64)

    def content(self, example: Any) -> bytes:
        return content_of(example, example.is_label)

    def units(self, example: Any) -> int:
        return len(_predictors(example))

    def meet(self, rows: RowIndex) -> None:
        targets = [example.tokens[1:][example.is_label[1:]] for example in rows.distinct]
        self._targets = torch.from_numpy(np.concatenate(targets).astype(np.int64))

    def batches(
        self, rows: Sequence[Any], batcher: AnyBatcher, index: RowIndex, store: FeatureStore
    ) -> Iterator[CachedBatch]:
        for part in _parts(rows, index):
            places = index.places(index.slots(part))
            take = functools.partial(self._read, part, places, batcher, index, store)
            count = len(places)
            batch = Batch(
                inputs={},
                predictors=torch.arange(count, device=self.device),
                targets=to_device(self._targets.index_select(0, torch.from_numpy(places)), self.device),
                weights=torch.ones(count, device=self.device),
                rows=len(part),
                row_tokens=sum(len(example.tokens) for example in part),
                tokens=count,
                members=_members(part),
            )
            yield CachedBatch(batch, take)

    def _read(
        self,
        rows: Sequence[Any],
        places: np.ndarray,
        batcher: AnyBatcher,
        index: RowIndex,
        store: FeatureStore,
    ) -> Tensor:
        self._compute_missing(rows, batcher, index, store)
        return to_device(store.read(places), self.device)[None]

    def _sources(self, batch: Any, hidden: Tensor) -> list[tuple[Any, np.ndarray]]:
        return [(m.example, m.places[_predictors(m.example)]) for m in batch.members]


class WholeRows(_Feed):
    """What the first trained module of a classifier is given: one vector a row."""

    kind = "head"

    def __init__(self, entry: HeadEntry, objective: AnyObjective) -> None:
        super().__init__(entry, objective)

    def _learn_form(self, batch: Any, hidden: Tensor) -> None:
        if hidden.dim() != 2:
            raise RuntimeError("the head reads several vectors of a row")
        self._template = batch
        self._is_text = "input_ids" in batch.inputs

    def content(self, example: Any) -> bytes:
        return content_of(example)

    def units(self, example: Any) -> int:
        return 1

    def batches(
        self, rows: Sequence[Any], batcher: AnyBatcher, index: RowIndex, store: FeatureStore
    ) -> Iterator[CachedBatch]:
        for part in _parts(rows, index):
            take = functools.partial(self._read, part, batcher, index, store)
            yield CachedBatch(self._batch(part), take)

    def _read(self, rows: Sequence[Any], batcher: AnyBatcher, index: RowIndex, store: FeatureStore) -> Tensor:
        self._compute_missing(rows, batcher, index, store)
        return to_device(store.read(index.starts[index.slots(rows)]), self.device)

    def _batch(self, rows: Sequence[Any]) -> Any:
        """A batch of one token a row: above the backbone no more of its inputs is read."""
        like = self._template
        inputs = {
            key: value[:1, :1].expand(len(rows), *value[:1, :1].shape[1:])
            if isinstance(value, Tensor) and value.dim() > 1
            else value
            for key, value in like.inputs.items()
        }
        per_row = like.row_tokens // like.rows
        return dataclasses.replace(
            like,
            inputs=inputs,
            targets=to_device(
                torch.tensor([row.label for row in rows], dtype=like.targets.dtype), self.device
            ),
            examples=tuple(rows),
            rows=len(rows),
            row_tokens=sum(len(row.tokens) for row in rows) if self._is_text else per_row * len(rows),
            tokens=len(rows),
        )

    def _sources(self, batch: Any, hidden: Tensor) -> list[tuple[Any, np.ndarray]]:
        return [(example, np.array([row])) for row, example in enumerate(batch.examples)]


def _flat(hidden: Tensor) -> Tensor:
    """(rows, d) as it is; (rows, tokens, …) as (rows · tokens, width)."""
    return hidden if hidden.dim() == 2 else hidden.flatten(0, 1).flatten(1)


def _predictors(example: Any) -> np.ndarray:
    """The tokens of a row whose output predicts a label."""
    return np.flatnonzero(example.is_label[1:])


def _members(rows: Sequence[Any]) -> tuple[Member, ...]:
    """Rows of which a batch has nothing but labels: their places count them, other tokens' places are -1."""
    members = []
    filled = 0
    for example in rows:
        at = _predictors(example)
        places = np.full(len(example.tokens), -1)
        places[at + 1] = np.arange(filled, filled + len(at))
        filled += len(at)
        members.append(Member(example, places))
    return tuple(members)


def _parts(rows: Sequence[Any], index: RowIndex) -> Iterator[Sequence[Any]]:
    """Rows in their order, cut so that none has more than VECTORS_PER_BATCH, unless one row alone has."""
    counts = index.counts[index.slots(rows)]
    start = 0
    while start < len(rows):
        taken = int(np.searchsorted(np.cumsum(counts[start:]), VECTORS_PER_BATCH, side="right"))
        stop = start + max(1, taken)
        yield rows[start:stop]
        start = stop
