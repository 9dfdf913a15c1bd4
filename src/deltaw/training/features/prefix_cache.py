"""Whether the frozen lower layers run only once for each row, and where their outputs are kept.

This is verified first: a few of the user's own rows run with kept features and without. Loss and gradients
must agree, or there is no cache and the run says why. Features of an earlier run are compared with new ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw import platforms
from deltaw.cache import key
from deltaw.data.example import RowGroup
from deltaw.data.sequences import lengths_of
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.hub.transformers_private import READ_FROM
from deltaw.kernels.transfer import to_device
from deltaw.machine.choices import Choice
from deltaw.machine.kernel_choice import computed_on
from deltaw.runtime.layer_entry import BackboneEntry, BlockEntry, HeadEntry, Level, frozen_digest, lowest_trained
from deltaw.training.features.cached import EveryToken, KeptFeatures, LabelTokens, RowIndex, WholeRows
from deltaw.training.features.store import (
    LIMIT_BYTES,
    DiskStore,
    FeatureStore,
    MemoryStore,
    Shape,
    ShapeStore,
    StoreOver,
    is_whole,
    open_store,
    size_text,
)
from deltaw.training.microbatches import AnyBatcher, AnyObjective, Feed
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.training.tasks.causal_objective import CausalObjective

# Two ways to run the same rows are compared by the loss and gradients of a few of them.

TRIED_ROWS = 3
# Numbers of a gradient that are compared at a time.
_AT_ONCE = 1 << 20


def few_rows(examples: Sequence[Any]) -> list[Any]:
    """A few rows of different lengths, none of them long."""
    ordered = np.argsort(lengths_of(examples), kind="stable").tolist()
    places = sorted({0, len(ordered) // 4, len(ordered) // 2})
    return [examples[ordered[place]] for place in places][:TRIED_ROWS]


def loss_and_gradients(feed: Feed, few: Sequence[Any], trained: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The sum of losses, and its gradient for each trained parameter, None where it has none."""
    total: list[Tensor | None] = [None] * (1 + len(trained))
    for batch in feed.batches(few):
        loss = feed.objective(batch)
        parts = [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]
        for n, part in enumerate(parts):
            before = total[n]
            total[n] = part if before is None or part is None else before + part
    return total


def difference_of(
    usual: Feed,
    ours: Feed,
    few: Sequence[Any],
    trained: Sequence[nn.Parameter],
    *,
    loss: float | None,
    gradients: float | None = None,
) -> str | None:
    """What differs between two ways to run rows, of which ours first computes what it keeps and then reads it; None
    where nothing does.

    Args:
        loss, gradients: the relative differences that are allowed; without that of the loss nothing is compared,
            but it must run. That of the gradients is the same unless given.
    """
    expected = loss_and_gradients(usual, few, trained)
    for _ in range(2):
        found = loss_and_gradients(ours, few, trained)
        if loss is not None and not near(expected[:1], found[:1], loss):
            return "another loss"
        if loss is not None and not near(expected[1:], found[1:], gradients or loss):
            return "other gradients"
    return None


def brief(error: Exception) -> str:
    """An error of a foreign model, in part of a line."""
    return f"{type(error).__name__}: {str(error)[:100]}"


def near(expected: Sequence[Tensor | None], found: Sequence[Tensor | None], tolerance: float) -> bool:
    """Whether all together differ by no more than ``tolerance`` of their norm."""
    if [e is None for e in expected] != [f is None for f in found]:
        return False
    difference = norm = 0.0
    for e, f in zip(expected, found, strict=True):
        if e is None or f is None:
            continue
        # A part at a time: a gradient may be as large as the model's largest weight.
        for mine, other in zip(e.flatten().split(_AT_ONCE), f.flatten().split(_AT_ONCE), strict=True):
            difference += float((mine.float() - other.float()).square().sum())
            norm += float(mine.float().square().sum())
    return math.sqrt(difference) <= tolerance * math.sqrt(norm)


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference of norms that rounding in this type may make."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 6e-2


# One store for all processes of a machine that train together: the first opens it, the others join.
#
# Values and marks are mapped files, so what one process writes is there for the others. Which rows have their
# values is told by a mapped file of its own, which lasts as long as the run: marks for later runs are written
# once values are on the disk. Processes of a step have different rows; two that write the same row write equal
# values up to rounding.

_SEEN = "seen-"


class Sharing:
    """How a process comes by its store.

    Args:
        processes: that train together, each of which asks the same.

    Attributes:
        leads: whether this process opens the store of its machine.
    """

    def __init__(self, processes: Reducer = ALONE) -> None:
        self._processes = processes
        self._place: tuple[str, str] | None = None
        self.leads = processes.local_rank == 0

    def opened(self, store: DiskStore) -> None:
        """Let the others join a store that this process opened."""
        if self._processes.local_size == 1:
            return
        for old in store.folder.glob(f"{_SEEN}*"):  # of runs that were killed
            platforms.removed(old)
        name = f"{_SEEN}{os.getpid()}.bin"
        (store.folder / name).write_bytes(store.done.astype(np.uint8).tobytes())
        _use_seen(store, name)
        store.of_run = store.folder / name
        self._place = str(store.folder), name

    def tell(self, *, keeps: bool) -> bool:
        """Once by each process, the first of each machine after it opened its store: whether features are
        kept on this machine."""
        processes = self._processes
        told = processes.texts(json.dumps([keeps, self._place]))
        keeps, self._place = json.loads(told[processes.rank - processes.local_rank])
        return keeps

    def join(self, shape: Shape) -> DiskStore | None:
        """The store that the first process of this machine opened; None where it has none on the disk.

        Raises:
            UserError: it is another one than this process would make.
        """
        if self._place is None:
            return None
        folder, name = self._place
        if not is_whole(Path(folder), shape):
            what = "the features that the first process of this machine keeps are not those of this one"
            hint = "let all processes of a machine see the same folder, or set train.keep_features: false"
            raise UserError(what, where=folder, hint=hint)
        store = DiskStore(Path(folder), shape, None)
        _use_seen(store, name)
        return store


def _use_seen(store: DiskStore, name: str) -> None:
    mapped = np.memmap(store.folder / name, np.uint8, "r+", shape=(store.shape.rows,))
    store.done = np.asarray(mapped).view(bool)


# A store's vectors on the device that uses them, besides where they are kept.
#
# The first epoch writes them to both. Later epochs gather them on the device, so that a step neither copies
# vectors nor waits for one. Vectors of an earlier run are brought over as they are asked for.

# Share of the device's free memory that vectors may take; the rest is for training.
SHARE = 0.25


class DeviceStore(StoreOver):
    """``inner`` with a copy of its vectors on ``device``."""

    def __init__(self, inner: FeatureStore, device: torch.device) -> None:
        super().__init__(inner)
        self.device, shape = device, inner.shape
        self._values = torch.empty(shape.units, shape.width, dtype=shape.torch_dtype, device=device)
        self._there = np.zeros(shape.units, bool)

    def read(self, places: np.ndarray) -> Tensor:
        """(n,) places to (n, width) on the device."""
        missing = np.unique(places[~self._there[places]])
        if len(missing):
            self._put(missing, to_device(self.inner.read(missing), self.device))
        return self._values.index_select(0, to_device(torch.from_numpy(places), self.device))

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        self._put(places, values.detach().to(self.device))
        self.inner.write(rows, places, values)

    def _put(self, places: np.ndarray, values: Tensor) -> None:
        self._values.index_copy_(0, to_device(torch.from_numpy(places), self.device), values)
        self._there[places] = True

    def forget(self) -> None:
        self._there[:] = False
        super().forget()

    def close(self) -> None:
        """Let others have the inner store, and the device its memory."""
        self._values = self._values[:0].clone()
        self._there[:] = False
        super().close()


def on_device(store: FeatureStore, device: torch.device) -> FeatureStore:
    """The store with its vectors on the device too, where that has memory of its own and room for them."""
    fits = device.type == "cuda" and store.shape.bytes <= SHARE * torch.cuda.mem_get_info(device)[0]
    return DeviceStore(store, device) if fits else store


# Whether frozen layers run once for each row.

# Below this share of the blocks, reading features saves less than keeping them costs.
LEAST_FROZEN = 1 / 8
# Features that find no room on the disk are kept in memory up to this size.
MEMORY_BYTES = 256 * 2**20
# From so many rows on, their features are estimated before all are looked at.
MANY_ROWS = 200_000
MADE_BY = (*("torch", "transformers"), *("deltaw.kernels", "deltaw.lora", "deltaw.runtime", "deltaw.training.features"))
# What a configuration says that no feature depends on.
IRRELEVANT = {READ_FROM, "transformers_version", "architectures", "id2label", "label2id", "problem_type", "use_cache"}


def cached_prefix(
    model: PreTrainedModel,
    objective: AnyObjective,
    batcher: AnyBatcher,
    examples: Sequence[Any],
    *,
    folder: Path | None = None,
    limit: int = LIMIT_BYTES,
    sharing: Sharing | None = None,
) -> tuple[KeptFeatures | None, Choice[str]]:
    """A training's frozen prefix, kept; to be called where the model can run these batches, nothing random.

    What is trained is read off the parameters that require a gradient. In a dry run on fake tensors the store
    holds shapes alone, so that a plan sees the same steps.

    Args:
        objective, batcher: what the training would use otherwise.
        examples: every row that will come, held-out ones too.
        folder: where stores are. limit: bytes that all stores may take.
        sharing: with the other processes of this machine; None where there are none.

    Returns:
        the prefix, which is to be closed in the end, and how far up it goes; None and why not.
    """
    if any(isinstance(example, RowGroup) for example in examples[:1]):
        return None, Choice("off", "rows come in groups")
    trained = [p for p in model.parameters() if p.requires_grad]
    level = lowest_trained(model, trained)
    if level is None:
        return None, Choice("off", "training reaches down to the first block")
    if level.kind == "block" and level.index < LEAST_FROZEN * level.count:
        return None, Choice("off", f"only {level} are frozen")
    few, real = few_rows(examples), has_values(model)
    try:
        feed = _feed(model, level, objective, batcher)
        vectors = feed.learn(next(iter(batcher.batches(few))))
        rows = feed.indexed(few)
        trial = feed.over(rows, MemoryStore(rows.shape(vectors)))
        tolerance = tolerance_of(vectors.dtype) if real else None
        difference = difference_of(Feed(objective, batcher), trial, few, trained, loss=tolerance)
    except Exception as error:  # whatever a foreign model raises here, it can train without kept features
        return None, Choice("off", f"{type(model).__name__} cannot be resumed there ({brief(error)})")
    if difference is not None:
        return None, Choice("off", f"{type(model).__name__} resumed there gives {difference}")
    if too_large := _too_large(feed, examples, vectors, limit):
        return None, Choice("off", f"features would take about {too_large}")

    sharing = sharing or Sharing()
    rows = feed.indexed(examples)
    shape = rows.shape(vectors)
    store: FeatureStore | None = None if sharing.leads else sharing.join(shape)
    if isinstance(store, DiskStore):
        kept = f"{size_text(shape.bytes)} in {store.folder}"
    else:
        name = _name(model, level, feed, rows, shape) if real else ""
        about = f"{type(model).__name__}, {level}, {shape.rows} rows"
        try:
            store, kept = placed(name, shape, about=about, folder=folder, limit=limit)
        except UserError as error:
            return None, Choice("off", error.what)
        if isinstance(store, DiskStore):
            sharing.opened(store)
    cached = feed.over(rows, on_device(store, feed.device) if real else store)
    try:
        known = _still_right(cached)
    except BaseException:
        cached.close()
        raise
    found = f", {known} of {shape.rows} rows there already" if known else ""
    return cached, Choice(str(level), f"frozen below, so run once for each row: {kept}{found}")


def placed(
    name: str, shape: Shape, *, about: str, folder: Path | None, limit: int, since: str = ""
) -> tuple[FeatureStore, str]:
    """A store, and where it is, in words: on the disk, or in memory where that refuses.

    Args:
        name: of all that the values depend on; '' on fake tensors, which have none: it holds shapes alone.
        since: why the disk refused before, where it did.

    Raises:
        UserError: the disk refuses, and it is too large for memory.
    """
    size = size_text(shape.bytes)
    if not name:
        return ShapeStore(shape), f"{size} on the disk"
    try:
        store = open_store(name, shape, about=about, folder=folder, limit=limit)
        return store, f"{size} in {store.folder}"
    except UserError as error:
        if shape.bytes > MEMORY_BYTES:
            raise
        return MemoryStore(shape), f"{size} in memory, since {since or error.what}"


def _feed(model: PreTrainedModel, level: Level, objective: AnyObjective, batcher: AnyBatcher) -> KeptFeatures:
    """What to keep at this level."""
    if level.kind == "block":
        return EveryToken(objective, batcher, BlockEntry(model, level.index))
    if isinstance(objective, CausalObjective):
        return LabelTokens(objective, batcher, BackboneEntry(model))
    return WholeRows(objective, batcher, HeadEntry(model))


def _too_large(feed: KeptFeatures, examples: Sequence[Any], vectors: Tensor, limit: int) -> str | None:
    """Of very many rows, about what their features would take, where that is far more than the limit: they
    are not even counted then."""
    if len(examples) <= MANY_ROWS:
        return None
    few = [examples[place] for place in range(0, len(examples), len(examples) // 256)]
    units = sum(feed.units(example) for example in few) / len(few) * len(examples)
    size = int(units * vectors.shape[1] * vectors.element_size())
    return size_text(size) if size > 2 * limit else None


def facts_of(model: PreTrainedModel, level: Level, device: torch.device) -> list[object]:
    """What the values below a level depend on, besides rows."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in IRRELEVANT}
    return [type(model.base_model).__name__, config, frozen_digest(model, level), computed_on(device)]


def _name(model: PreTrainedModel, level: Level, feed: KeptFeatures, rows: RowIndex, shape: Shape) -> str:
    """A name for everything that stored values depend on."""
    padded = bool(getattr(feed.batcher, "padded", True))
    contents = hashlib.sha256(b"".join(rows.contents)).hexdigest()
    facts = [str(level), feed.kind, shape.width, shape.dtype, *facts_of(model, level, feed.device), padded, contents]
    return key("features", facts, MADE_BY)


def _still_right(cached: KeptFeatures) -> int:
    """Rows that the store has already; none, all forgotten, where some computed anew differ from it."""
    done = np.flatnonzero(cached.store.done)
    if not len(done):
        return 0
    slots = done[:: max(1, len(done) // TRIED_ROWS)][:TRIED_ROWS]
    few = [cached.rows.distinct[slot] for slot in slots]
    before = cached.store.read(cached.rows.places(slots))
    again = cached.indexed(few)
    fresh = cached.over(again, MemoryStore(again.shape(before)))
    for batch in cached.batcher.batches(few):
        fresh.keep(batch)
    after = fresh.store.read(again.places(again.slots(few))).to(before.device)
    if near([after], [before], tolerance_of(before.dtype)):
        return len(done)
    cached.store.forget()
    return 0
