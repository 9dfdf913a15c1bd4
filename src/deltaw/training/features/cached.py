"""Features in place of the frozen lower layers: a batcher and an objective that start from stored vectors.

A training uses them instead of its own: microbatches whose rows go through the frozen layers once, and an
objective that resumes the model above them. A feed decides which vectors of a row are kept
(:mod:`deltaw.training.features.cached`).

Knows examples, batches, layer entry points and stores; not files, keys or optimizers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from deltaw.data.packing import Batch, Member
from deltaw.kernels.transfer import to_device
from deltaw.runtime.layer_entry import BackboneEntry, HeadEntry, LayerEntry
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
        """As :meth:`deltaw.training.tasks.labels.LabelObjective.predictions`."""
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

    def __init__(self, examples: Iterable[Any], content: Callable[[Any], bytes], units: Callable[[Any], int]) -> None:
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


# ---- Which vectors of a row are kept, by the layer where the model is resumed, and batches made of them.
#
# Below a block: every token's vector, and batches are the microbatches. At a language model's head: the vectors
# that predict a label. At a classifier: one vector a row. The last two run no token through the model any more;
# a batch of them is one gather.
#
# Knows examples, batches and layer entry points; not files, losses or where the vectors are.


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

    def _compute_missing(self, rows: Sequence[Any], batcher: AnyBatcher, index: RowIndex, store: FeatureStore) -> None:
        done = store.done[index.slots(rows)]
        if not done.all():
            missing = {slot: row for slot, row, there in zip(index.slots(rows), rows, done, strict=True) if not there}
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
        self, rows: Sequence[Any], places: np.ndarray, batcher: AnyBatcher, index: RowIndex, store: FeatureStore
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
            targets=to_device(torch.tensor([row.label for row in rows], dtype=like.targets.dtype), self.device),
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
