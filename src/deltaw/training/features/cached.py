"""Features in place of the frozen lower layers: a batcher and an objective that start from stored vectors.

A training uses them instead of its own: microbatches whose rows go through the frozen layers once, and an
objective that resumes the model above them. A feed decides which vectors of a row are kept
(:mod:`deltaw.training.features.feeds`).

Knows examples, batches, layer entry points and stores; not files, keys or optimizers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from deltaw.runtime.layer_entry import LayerEntry
from deltaw.training.features.store import FeatureStore
from deltaw.training.microbatches import AnyBatcher, AnyObjective


@dataclasses.dataclass(frozen=True, eq=False)
class CachedBatch:
    """A batch and the values that the model is resumed with; all else is asked of the batch.

    Attributes:
        take: reads the values, or computes them; called where they are needed, so that a process which goes
            through the batches of others computes nothing for them.
    """

    inner: Any
    take: Callable[[], Tensor]

    @functools.cached_property
    def features(self) -> Tensor:
        """The values."""
        return self.take()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class CachedPrefix:
    """The outputs of a model's frozen lower layers: computed once for each row, then read.

    Args:
        feed: which vectors are kept, and how batches are made of them.
        objective, batcher: what a training without it would use.
        rows: the rows that there is room for; others run from the start.
        store: where the vectors are.

    Attributes:
        objective, batcher: to be used in place of the given ones, together.
    """

    def __init__(
        self, feed: Feed, objective: AnyObjective, batcher: AnyBatcher, rows: RowIndex, store: FeatureStore
    ) -> None:
        self.feed = feed
        self.rows = rows
        self.store = store
        self.objective = CachedObjective(objective, feed.entry)
        self.batcher = CachedMicroBatcher(batcher, self)
        feed.meet(rows)

    def close(self) -> None:
        """Bring everything to the disk and let other runs have it."""
        self.store.close()


class CachedMicroBatcher:
    """Microbatches with features, read or computed where missing; all else is asked of the inner batcher."""

    def __init__(self, inner: AnyBatcher, prefix: CachedPrefix) -> None:
        self.inner = inner
        self._prefix = prefix

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        cached = self._prefix
        if not cached.rows.know(rows):
            return self.inner.batches(rows)
        return cached.feed.batches(rows, self.inner, cached.rows, cached.store)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class CachedObjective:
    """The inner objective with the model resumed above its frozen layers; other batches run from the start.

    All else is asked of the inner objective.
    """

    def __init__(self, inner: AnyObjective, entry: LayerEntry) -> None:
        self.inner = inner
        self._entry = entry

    def __call__(self, batch: Any) -> Tensor:
        return self._within("__call__", batch)

    def units(self, rows: Sequence[Any]) -> int:
        """As the inner objective counts."""
        return self.inner.units(rows)

    def evaluate_rows(self, batch: Any) -> tuple[Tensor, Tensor]:
        """As :meth:`deltaw.training.tasks.causal_objective.CausalObjective.evaluate_rows`."""
        return self._within("evaluate_rows", batch)

    def predictions(self, batch: Any) -> Tensor:
        """As :meth:`deltaw.training.tasks.label_objective.LabelObjective.predictions`."""
        return self._within("predictions", batch)

    def _within(self, name: str, batch: Any) -> Any:
        method = getattr(self.inner, name)
        if not isinstance(batch, CachedBatch):
            return method(batch)
        with self._entry.entering(batch.features):
            return method(batch.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class RowIndex:
    """Where each row's vectors are: rows of the same content share them, and their order does not matter.

    Args:
        examples: all rows. content: what a row's vectors depend on. units: how many vectors it has.

    Attributes:
        contents: of the store's rows, in their order. distinct: one example of each.
        starts: (rows,) place of the first vector. counts: (rows,) how many there are.
    """

    def __init__(
        self, examples: Iterable[Any], content: Callable[[Any], bytes], units: Callable[[Any], int]
    ) -> None:
        found = {content(example): example for example in examples}
        self.contents = sorted(found)
        self.distinct: list[Any] = [found[one] for one in self.contents]
        self.counts = np.fromiter(map(units, self.distinct), np.int64, len(self.distinct))
        self._content = content
        self._number = {one: n for n, one in enumerate(self.contents)}
        # Stored rows are made anew each time; of rows that stay, the content is looked at once.
        self._known: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self.starts = np.cumsum(self.counts) - self.counts

    @property
    def units(self) -> int:
        return int(self.counts.sum())

    def know(self, rows: Sequence[Any]) -> bool:
        return all(self._slot(row) >= 0 for row in rows)

    def slots(self, rows: Sequence[Any]) -> np.ndarray:
        """(n,) the rows of the store that hold these examples."""
        return np.fromiter(map(self._slot, rows), np.int64, len(rows))

    def _slot(self, row: Any) -> int:
        """The row of the store; -1 where there is none."""
        slot = self._known.get(row)
        if slot is None:
            slot = self._known[row] = self._number.get(self._content(row), -1)
        return slot

    def places(self, slots: np.ndarray) -> np.ndarray:
        """The places of all their vectors, one row after another."""
        counts = self.counts[slots]
        ends = np.cumsum(counts)
        return np.arange(ends[-1]) + np.repeat(self.starts[slots] - ends + counts, counts)


class Feed(Protocol):
    """Which vectors of a row are kept, and how batches are made of them.

    Attributes:
        entry: where the model is resumed. device: where the model is.
        kind: tells feeds apart that keep different vectors of the same rows.
    """

    entry: LayerEntry
    device: torch.device
    kind: str

    def learn(self, batch: Any) -> Tensor:
        """Run the frozen part once to see its form; what comes out, as (n, width)."""

    def content(self, example: Any) -> bytes:
        """Equal for rows whose vectors are equal."""

    def units(self, example: Any) -> int:
        """How many vectors a row has."""

    def meet(self, rows: RowIndex) -> None:
        """Be told the rows that will come."""

    def keep(self, batch: Any, rows: RowIndex, store: FeatureStore) -> Tensor:
        """Compute a batch of the microbatches' and store its vectors; what came out of the frozen part."""

    def batches(
        self, rows: Sequence[Any], batcher: AnyBatcher, index: RowIndex, store: FeatureStore
    ) -> Iterator[CachedBatch]:
        """Batches of these rows with the values that the model is resumed with."""


def content_of(example: Any, *more: np.ndarray) -> bytes:
    """A hash of what a model sees of a row, and of ``more``."""
    if not hasattr(example, "tokens"):
        if not example.digest:
            raise RuntimeError("an image without a digest cannot be told from others")
        return example.digest
    digest = hashlib.blake2b(digest_size=16)
    for value in (example.tokens, getattr(example, "segments", None), *more):
        digest.update(b"-" if value is None else value.tobytes())
    return digest.digest()
