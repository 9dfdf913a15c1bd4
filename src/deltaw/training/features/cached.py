"""Features in place of the frozen lower layers: microbatches that resume the model from stored vectors.

A training takes them instead of its own microbatches: the frozen layers then run once for each row. Which vectors
of a row are kept follows from the layer where the model is resumed. Below a block it is every token's vector, and
microbatches are cut as ever. At a language model's head it is the vectors that predict a label, and at a
classifier one vector a row: no token goes through the model any more, and a batch is one gather.

Knows examples, batches, layer entry points and stores; not files, keys, losses or optimizers.
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

from deltaw.data.packing import Batch, Member
from deltaw.kernels.transfer import to_device
from deltaw.runtime.layer_entry import LayerEntry
from deltaw.training.features.store import FeatureStore, Shape
from deltaw.training.microbatches import AnyBatcher, AnyObjective, Feed

# Vectors in a batch that goes through nothing but a head.
VECTORS_PER_BATCH = 4096


class RowIndex:
    """Where each row's vectors are: rows of the same content share them, and their order does not matter.

    Args:
        examples: all rows. content: what a row's vectors depend on. units: how many vectors it has.

    Attributes:
        contents: of the store's rows, in their order. distinct: one example of each.
        starts: (rows,) place of the first vector. counts: (rows,) how many there are. units: of all rows.
    """

    def __init__(self, examples: Iterable[Any], content: Callable[[Any], bytes], units: Callable[[Any], int]) -> None:
        found = {content(example): example for example in examples}
        self.contents = sorted(found)
        self.distinct: list[Any] = [found[one] for one in self.contents]
        self.counts = np.fromiter(map(units, self.distinct), np.int64, len(self.distinct))
        self.starts = np.cumsum(self.counts) - self.counts
        self.units = int(self.counts.sum())
        self._content = content
        self._number = {one: n for n, one in enumerate(self.contents)}
        # Stored rows are made anew each time; of rows that stay, the content is looked at once.
        self._known: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def shape(self, vectors: Tensor) -> Shape:
        """What a store of these rows holds, by some of their vectors (n, width)."""
        return Shape.of(len(self.contents), self.units, vectors.shape[1], vectors.dtype)

    def know(self, rows: Sequence[Any]) -> bool:
        return bool((self.slots(rows) >= 0).all())

    def slots(self, rows: Sequence[Any]) -> np.ndarray:
        """(n,) the rows of the store that hold these examples; -1 for those that it has no row for."""
        return np.fromiter(map(self._slot, rows), np.int64, len(rows))

    def _slot(self, row: Any) -> int:
        slot = self._known.get(row)
        if slot is None:
            slot = self._known[row] = self._number.get(self._content(row), -1)
        return slot

    def places(self, slots: np.ndarray) -> np.ndarray:
        """The places of all their vectors, one row after another."""
        counts = self.counts[slots]
        ends = np.cumsum(counts)
        return np.arange(ends[-1]) + np.repeat(self.starts[slots] - ends + counts, counts)


class KeptFeatures(Feed):
    """The outputs of a model's frozen lower layers: computed once for each row, then read.

    :meth:`learn` comes first, then :meth:`over`, which gives the feed to train with.

    Args:
        objective, batcher: what a training without it would use. entry: where the model is resumed.

    Attributes:
        kind: distinguishes feeds that keep different vectors of the same rows.
        device: where the model is. rows: that there is room for; others run from the start.
    """

    kind = ""
    rows: RowIndex
    store: FeatureStore

    def __init__(self, objective: AnyObjective, batcher: AnyBatcher, entry: LayerEntry) -> None:
        super().__init__(objective, batcher)
        self.entry = entry
        self.device = torch.device("cpu")

    def learn(self, batch: Any) -> Tensor:
        """Run the frozen part once to see its form; what comes out, as (n, width)."""
        hidden = self.entry.outputs(lambda: self.objective(batch))
        self.device = hidden.device
        self._learn_form(batch, hidden)
        return _flat(hidden)

    def indexed(self, examples: Sequence[Any]) -> RowIndex:
        return RowIndex(examples, self.content, self.units)

    def over(self, rows: RowIndex, store: FeatureStore) -> KeptFeatures:
        """The same for these rows, whose vectors are in this store."""
        other = copy.copy(self)
        other.rows, other.store = rows, store
        other._meet()
        return other

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        return self.resumed(rows) if self.rows.know(rows) else self.batcher.batches(rows)

    def keep(self, batch: Any) -> Tensor:
        """Compute a batch of the batcher's and store its vectors; what came out of the frozen part."""
        hidden = self.entry.outputs(lambda: self.objective(batch))
        examples, places = zip(*self._sources(batch), strict=True)
        slots = self.rows.slots(examples)
        # What is stored stays: a training that is resumed reads the very values that it read before.
        new = ~self.store.done[slots]
        if not new.any():
            return hidden
        slots = slots[new]
        sources = np.concatenate(list(itertools.compress(places, new)))
        targets = self.rows.places(slots)
        if len(sources) != len(targets):
            raise RuntimeError("a row has another number of vectors than expected")
        here = to_device(torch.from_numpy(sources), self.device)
        self.store.write(slots, targets, _flat(hidden).index_select(0, here))
        return hidden

    def content(self, example: Any) -> bytes:
        """Equal for rows whose vectors are equal."""
        return content_of(example)

    def units(self, example: Any) -> int:
        """How many vectors a row has."""
        raise NotImplementedError

    def resumed(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Batches of these rows that resume the model."""
        raise NotImplementedError

    def _learn_form(self, batch: Any, hidden: Tensor) -> None:
        """Note the form of what comes out."""

    def _meet(self) -> None:
        """Note what is needed of the rows that will come."""

    def _sources(self, batch: Any) -> list[tuple[Any, np.ndarray]]:
        """Each example of the batch with the places of its vectors in what comes out, flattened."""
        raise NotImplementedError

    def _resuming(self, batch: Any, read: Callable[[], Tensor]) -> Any:
        """The batch over values that are read, or computed, where it runs: a process that goes through the batches
        of others computes nothing for them."""

        @contextlib.contextmanager
        def enter() -> Iterator[Any]:
            with self.entry.entering(read()):
                yield batch

        return dataclasses.replace(batch, enter=enter)

    def _read(self, rows: Sequence[Any], places: np.ndarray) -> Tensor:
        """The vectors at these places, which are those of ``rows``; the missing ones are computed."""
        slots = self.rows.slots(rows)
        done = self.store.done[slots]
        if not done.all():
            missing = {slot: row for slot, row, there in zip(slots, rows, done, strict=True) if not there}
            for batch in self.batcher.batches(list(missing.values())):
                self.keep(batch)
        return to_device(self.store.read(places), self.device)

    def _parts(self, rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Rows in their order, cut so that none has more than VECTORS_PER_BATCH, unless one row alone has."""
        counts = self.rows.counts[self.rows.slots(rows)]
        start = 0
        while start < len(rows):
            taken = int(np.searchsorted(np.cumsum(counts[start:]), VECTORS_PER_BATCH, side="right"))
            stop = start + max(1, taken)
            yield rows[start:stop]
            start = stop


class EveryToken(KeptFeatures):
    """The vectors of all tokens, or of all patches of an image, in batches as the microbatches make them."""

    kind = "every token"

    def _learn_form(self, batch: Any, hidden: Tensor) -> None:
        self._is_text = "input_ids" in batch.inputs
        self._patches = hidden.shape[1]
        self._tail = hidden.shape[2:]

    def units(self, example: Any) -> int:
        return len(example.tokens) if self._is_text else self._patches

    def resumed(self, rows: Sequence[Any]) -> Iterator[Any]:
        for batch in self.batcher.batches(rows):
            yield self._resuming(batch, functools.partial(self._hidden, batch))

    def _hidden(self, batch: Any) -> Tensor:
        found = self._sources(batch)
        slots = self.rows.slots([example for example, _ in found])
        if not self.store.done[slots].all():
            return self.keep(batch)
        lead = batch.inputs["input_ids"].shape if self._is_text else (batch.rows, self._patches)
        # Nothing attends to what fills a batch up; any vector that is there will do.
        places = np.full(math.prod(lead), self.rows.starts[slots[0]])
        places[np.concatenate([own for _, own in found])] = self.rows.places(slots)
        return to_device(self.store.read(places), self.device).view(*lead, *self._tail)

    def _sources(self, batch: Any) -> list[tuple[Any, np.ndarray]]:
        if isinstance(batch, Batch):
            return [(member.example, member.places) for member in batch.members]
        longest = batch.inputs["input_ids"].shape[1] if self._is_text else self._patches
        places = [np.arange(self.units(one)) + row * longest for row, one in enumerate(batch.examples)]
        return list(zip(batch.examples, places, strict=True))


class LabelTokens(KeptFeatures):
    """A language model's vectors that predict a label, as they come out of the backbone."""

    kind = "predictors"

    def content(self, example: Any) -> bytes:
        return content_of(example, example.is_label)

    def units(self, example: Any) -> int:
        return len(_predictors(example))

    def _meet(self) -> None:
        targets = [example.tokens[1:][example.is_label[1:]] for example in self.rows.distinct]
        self._targets = torch.from_numpy(np.concatenate(targets).astype(np.int64))

    def resumed(self, rows: Sequence[Any]) -> Iterator[Any]:
        for part in self._parts(rows):
            places = self.rows.places(self.rows.slots(part))
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
            yield self._resuming(batch, functools.partial(self._hidden, part, places))

    def _hidden(self, rows: Sequence[Any], places: np.ndarray) -> Tensor:
        return self._read(rows, places)[None]

    def _sources(self, batch: Any) -> list[tuple[Any, np.ndarray]]:
        return [(m.example, m.places[_predictors(m.example)]) for m in batch.members]


class WholeRows(KeptFeatures):
    """What the first trained module of a classifier is given: one vector a row."""

    kind = "head"

    def _learn_form(self, batch: Any, hidden: Tensor) -> None:
        if hidden.dim() != 2:
            raise RuntimeError("the head reads several vectors of a row")
        self._template = batch
        self._is_text = "input_ids" in batch.inputs

    def units(self, example: Any) -> int:
        return 1

    def resumed(self, rows: Sequence[Any]) -> Iterator[Any]:
        for part in self._parts(rows):
            places = self.rows.starts[self.rows.slots(part)]
            yield self._resuming(self._batch(part), functools.partial(self._read, part, places))

    def _batch(self, rows: Sequence[Any]) -> Any:
        """A batch of one token a row: above the backbone no more of its inputs is read."""
        like, count = self._template, len(rows)
        targets = torch.tensor([row.label for row in rows], dtype=like.targets.dtype)
        row_tokens = like.row_tokens // like.rows * count
        return dataclasses.replace(
            like,
            inputs={key: value[:1, :1].expand(count, 1, *value.shape[2:]) for key, value in like.inputs.items()},
            targets=to_device(targets, self.device),
            examples=tuple(rows),
            rows=count,
            row_tokens=sum(len(row.tokens) for row in rows) if self._is_text else row_tokens,
            tokens=count,
        )

    def _sources(self, batch: Any) -> list[tuple[Any, np.ndarray]]:
        return [(example, np.array([row])) for row, example in enumerate(batch.examples)]


def content_of(example: Any, *more: np.ndarray) -> bytes:
    """A hash of what a model sees of a row, and of ``more``."""
    if not hasattr(example, "tokens"):
        if not example.digest:
            raise RuntimeError("an image has no digest to distinguish it by")
        return example.digest
    digest = hashlib.blake2b(digest_size=16)
    for value in (example.tokens, getattr(example, "segments", None), *more):
        digest.update(b"-" if value is None else value.tobytes())
    return digest.digest()


def _flat(hidden: Tensor) -> Tensor:
    """(rows, d) as it is; (rows, tokens, …) as (rows · tokens, width)."""
    return hidden if hidden.dim() == 2 else hidden.flatten(0, 1).flatten(1)


def _predictors(example: Any) -> np.ndarray:
    """The tokens of a row whose output predicts a label."""
    return np.flatnonzero(example.is_label[1:])


def _members(rows: Sequence[Any]) -> tuple[Member, ...]:
    """Rows of which a batch has nothing but labels: their places count them, other tokens' places are -1."""
    members, filled = [], 0
    for example in rows:
        at = _predictors(example)
        places = np.full(len(example.tokens), -1)
        places[at + 1] = np.arange(filled, filled + len(at))
        filled += len(at)
        members.append(Member(example, places))
    return tuple(members)
