"""Cached features: microbatches that resume the model after its frozen lower layers.

The frozen layers run once per row. The stored vectors depend on the layer at which the model is resumed. Below a block,
each token has a vector and microbatches are unchanged. At the head of a language model, only vectors that predict a
label are stored. A classifier has one vector per row. In the last two cases a batch is a gather of vectors.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from deltaw.data.packing import Member, MicroBatch, row_targets
from deltaw.kernels.layout import to_device
from deltaw.runtime.layer_entry import LayerEntry
from deltaw.training.features.store import FeatureStore, Shape
from deltaw.training.feed import Feed

# Number of vectors in a batch that only a head processes.
VECTORS_PER_BATCH = 4096


class RowIndex:
    """Assigns a range of stored vectors to each distinct row. Equal rows share their vectors, in any order.

    Args:
        examples: All rows.
        content: Returns a digest of everything that a row's vectors depend on.
        units: Returns the number of vectors of a row.

    Attributes:
        contents: Sorted digests of the stored rows.
        distinct: One example for each digest.
        starts: (rows,) index of the first vector of each row.
        counts: (rows,) number of vectors of each row.
        units: Total number of vectors.
    """

    def __init__(self, examples: Iterable[Any], content: Callable[[Any], bytes], units: Callable[[Any], int]) -> None:
        examples_by_content = {content(example): example for example in examples}
        self.contents = sorted(examples_by_content)
        self.distinct: list[Any] = [examples_by_content[digest] for digest in self.contents]
        self.counts = np.fromiter(map(units, self.distinct), np.int64, len(self.distinct))
        self.starts = np.cumsum(self.counts) - self.counts
        self.units = int(self.counts.sum())
        self._content = content
        self._slot_of_content = {digest: n for n, digest in enumerate(self.contents)}
        # Rows read from disk are new objects on each access. Rows in memory are hashed once.
        self._slot_cache: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def shape(self, vectors: Tensor) -> Shape:
        """Return the shape of a store of these rows, given some of their vectors (n, width)."""
        return Shape.of(len(self.contents), self.units, vectors.shape[1], vectors.dtype)

    def contains(self, rows: Sequence[Any]) -> bool:
        """Return True if the index contains all these rows."""
        return bool((self.slots(rows) >= 0).all())

    def slots(self, rows: Sequence[Any]) -> np.ndarray:
        """Return (n,) the stored rows of these examples, or -1 for unknown ones."""
        return np.fromiter(map(self._slot, rows), np.int64, len(rows))

    def _slot(self, row: Any) -> int:
        slot = self._slot_cache.get(row)
        if slot is None:
            slot = self._slot_cache[row] = self._slot_of_content.get(self._content(row), -1)
        return slot

    def vector_indices(self, slots: np.ndarray) -> np.ndarray:
        """Return the indices of all vectors of the stored rows, row by row."""
        counts = self.counts[slots]
        stops = np.cumsum(counts)
        indices: np.ndarray = np.arange(stops[-1]) + np.repeat(self.starts[slots] - stops + counts, counts)
        return indices


class FeatureCache(Feed):
    """Feed that stores the outputs of a model's frozen lower layers.

    Call :meth:`inspect` first, then :meth:`with_store`, which returns the feed for the training.

    Args:
        reference: Feed of the training without a cache.
        entry: Layer at which the model is resumed.

    Attributes:
        kind: Distinguishes feeds that store different vectors of the same rows.
        device: Device of the model.
        rows: Index of the stored rows. Other rows run from the first layer.
    """

    kind = ""
    rows: RowIndex
    store: FeatureStore

    def __init__(self, reference: Feed, entry: LayerEntry) -> None:
        super().__init__(reference.objective, reference.batcher)
        self.entry = entry
        self.device = torch.device("cpu")

    def inspect(self, batch: Any) -> Tensor:
        """Run the frozen layers once to determine the shape of their output. Returns it as (n, width)."""
        hidden = self.entry.outputs(lambda: self.objective(batch))
        self.device = hidden.device
        self._inspect_output(batch, hidden)
        return _flat(hidden)

    def index_rows(self, examples: Sequence[Any]) -> RowIndex:
        return RowIndex(examples, self.content, self.units)

    def with_store(self, rows: RowIndex, store: FeatureStore) -> FeatureCache:
        """Return a copy of the feed for these rows with their vectors in ``store``."""
        feed = copy.copy(self)
        feed.rows = rows
        feed.store = store
        feed._prepare_rows()
        return feed

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        return self.resuming_batches(rows) if self.rows.contains(rows) else self.batcher.batches(rows)

    def store_batch(self, batch: Any) -> Tensor:
        """Compute a batch of the batcher, store its vectors, and return the output of the frozen layers."""
        hidden = self.entry.outputs(lambda: self.objective(batch))
        examples, positions = zip(*self._vector_positions(batch), strict=True)
        slots = self.rows.slots(examples)
        # Stored vectors are never overwritten, so that a resumed training reads the same values as before.
        is_new = ~self.store.done[slots]
        if not is_new.any():
            return hidden
        slots = slots[is_new]
        sources = np.concatenate(list(itertools.compress(positions, is_new)))
        targets = self.rows.vector_indices(slots)
        if len(sources) != len(targets):
            raise RuntimeError("a row has an unexpected number of vectors")
        source_indices = to_device(torch.from_numpy(sources), self.device)
        self.store.write(slots, targets, _flat(hidden).index_select(0, source_indices))
        return hidden

    def content(self, example: Any) -> bytes:
        """Return a digest that is equal for rows with equal vectors."""
        return content_of(example)

    def units(self, example: Any) -> int:
        """Return the number of vectors of a row."""
        raise NotImplementedError

    def resuming_batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield batches of these rows that resume the model from stored vectors."""
        raise NotImplementedError

    def _inspect_output(self, batch: Any, hidden: Tensor) -> None:
        """Record the shape of the output."""

    def _prepare_rows(self) -> None:
        """Precompute values for the indexed rows."""

    def _vector_positions(self, batch: Any) -> list[tuple[Any, np.ndarray]]:
        """Return each example of the batch with the positions of its vectors in the flattened output."""
        raise NotImplementedError

    def _resume_from(self, batch: Any, read: Callable[[], Tensor]) -> Any:
        """Return the batch with a context that enters the model with these values.

        The values are read or computed when the batch runs, because a process also iterates over batches of other
        processes.
        """

        @contextlib.contextmanager
        def enter() -> Iterator[Any]:
            with self.entry.enter(read()):
                yield batch

        return dataclasses.replace(batch, enter=enter)

    def _read(self, rows: Sequence[Any], indices: np.ndarray) -> Tensor:
        """Return the vectors at these indices, which belong to ``rows``. Missing vectors are computed."""
        slots = self.rows.slots(rows)
        if not (done := self.store.done[slots]).all():
            missing = {slot: row for slot, row, is_stored in zip(slots, rows, done, strict=True) if not is_stored}
            for batch in self.batcher.batches(list(missing.values())):
                self.store_batch(batch)
        return to_device(self.store.read(indices), self.device)

    def _parts(self, rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Split rows in order into parts with at most VECTORS_PER_BATCH vectors, or a single row."""
        counts = self.rows.counts[self.rows.slots(rows)]
        start = 0
        while start < len(rows):
            stop = start + max(1, int(np.searchsorted(np.cumsum(counts[start:]), VECTORS_PER_BATCH, side="right")))
            yield rows[start:stop]
            start = stop


class AllTokenFeatures(FeatureCache):
    """Vectors of all tokens, or of all patches of an image, in batches with unchanged microbatches."""

    kind = "every token"

    def _inspect_output(self, batch: Any, hidden: Tensor) -> None:
        self._is_text = "input_ids" in batch.inputs
        self._patches = hidden.shape[1]
        self._tail = hidden.shape[2:]

    def units(self, example: Any) -> int:
        return len(example.tokens) if self._is_text else self._patches

    def resuming_batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        for batch in self.batcher.batches(rows):
            yield self._resume_from(batch, functools.partial(self._hidden, batch))

    def _hidden(self, batch: Any) -> Tensor:
        sources = self._vector_positions(batch)
        slots = self.rows.slots([example for example, _ in sources])
        if not self.store.done[slots].all():
            return self.store_batch(batch)
        leading_shape = batch.inputs["input_ids"].shape if self._is_text else (batch.rows, self._patches)
        # Padding is never attended to, so any stored vector can fill it.
        indices = np.full(math.prod(leading_shape), self.rows.starts[slots[0]])
        indices[np.concatenate([positions for _, positions in sources])] = self.rows.vector_indices(slots)
        return to_device(self.store.read(indices), self.device).view(*leading_shape, *self._tail)

    def _vector_positions(self, batch: Any) -> list[tuple[Any, np.ndarray]]:
        if self._is_text:
            return [(member.example, member.indices) for member in batch.members]
        indices = np.arange(batch.rows * self._patches).reshape(batch.rows, -1)
        return list(zip(batch.examples, indices, strict=True))


class PredictorFeatures(FeatureCache):
    """Backbone outputs of a language model at the tokens that predict a label."""

    kind = "predictors"

    def content(self, example: Any) -> bytes:
        return content_of(example, example.is_label)

    def units(self, example: Any) -> int:
        return len(_predictors(example))

    def _prepare_rows(self) -> None:
        targets = [example.tokens[1:][example.is_label[1:]] for example in self.rows.distinct]
        self._targets = torch.from_numpy(np.concatenate(targets).astype(np.int64))

    def resuming_batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        for part in self._parts(rows):
            indices = self.rows.vector_indices(self.rows.slots(part))
            count = len(indices)
            batch = MicroBatch(
                inputs={},
                targets=to_device(self._targets.index_select(0, torch.from_numpy(indices)), self.device),
                members=_members(part),
                tokens=count,
                predictors=torch.arange(count, device=self.device),
                weights=torch.ones(count, device=self.device),
            )
            yield self._resume_from(batch, functools.partial(self._hidden, part, indices))

    def _hidden(self, rows: Sequence[Any], indices: np.ndarray) -> Tensor:
        return self._read(rows, indices)[None]

    def _vector_positions(self, batch: Any) -> list[tuple[Any, np.ndarray]]:
        return [(m.example, m.indices[_predictors(m.example)]) for m in batch.members]


class PooledFeatures(FeatureCache):
    """Inputs of a classifier's first trained module: one vector per row."""

    kind = "head"

    def _inspect_output(self, batch: Any, hidden: Tensor) -> None:
        if hidden.dim() != 2:
            raise RuntimeError("the head reads several vectors per row")
        self._template = batch
        self._is_text = "input_ids" in batch.inputs

    def units(self, example: Any) -> int:
        return 1

    def resuming_batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        for part in self._parts(rows):
            indices = self.rows.starts[self.rows.slots(part)]
            yield self._resume_from(self._batch(part), functools.partial(self._read, part, indices))

    def _batch(self, rows: Sequence[Any]) -> Any:
        """Return a batch with one token per row, because modules above the backbone do not read the other inputs."""
        count = len(rows)
        inputs = self._template.inputs
        lengths = [len(row.tokens) if self._is_text else len(self._template.members[0].indices) for row in rows]
        return MicroBatch(
            inputs={key: value[:1, :1].expand(count, 1, *value.shape[2:]) for key, value in inputs.items()},
            targets=row_targets(rows, self.device),
            members=tuple(Member(row, np.full(lengths[index], index)) for index, row in enumerate(rows)),
            tokens=count,
        )

    def _vector_positions(self, batch: Any) -> list[tuple[Any, np.ndarray]]:
        return [(example, np.array([row])) for row, example in enumerate(batch.examples)]


def content_of(example: Any, *more: np.ndarray) -> bytes:
    """Return a digest of the model's input for a row, and of ``more``."""
    if not hasattr(example, "tokens"):
        if not example.digest:
            raise RuntimeError("an image has no digest to distinguish it by")
        return bytes(example.digest)
    digest = hashlib.blake2b(digest_size=16)
    for value in (example.tokens, getattr(example, "segments", None), *more):
        digest.update(b"-" if value is None else value.tobytes())
    return digest.digest()


def _flat(hidden: Tensor) -> Tensor:
    """Return (rows, d) unchanged, and (rows, tokens, …) as (rows · tokens, width)."""
    return hidden if hidden.dim() == 2 else hidden.flatten(0, 1).flatten(1)


def _predictors(example: Any) -> np.ndarray:
    """Return the positions of a row's tokens whose output predicts a label."""
    return np.flatnonzero(example.is_label[1:])


def _members(rows: Sequence[Any]) -> tuple[Member, ...]:
    """Return batch members for rows without tokens: label positions index the batch's vectors, all others are -1."""
    members = []
    offset = 0
    for example in rows:
        predictors = _predictors(example)
        indices = np.full(len(example.tokens), -1)
        indices[predictors + 1] = np.arange(offset, offset + len(predictors))
        offset += len(predictors)
        members.append(Member(example, indices))
    return tuple(members)
