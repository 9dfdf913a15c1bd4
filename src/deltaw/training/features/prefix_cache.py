"""Decide whether outputs of the frozen lower layers are stored, and where.

The cache is verified first: a few rows of the user are run with and without it, and loss and gradients must agree.
Otherwise it is not used, and the run reports the reason. Stored features of an earlier run are compared with new ones.
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
from deltaw.data.example import RowGroup, lengths_of
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.hub.transformers_private import NAME_OR_PATH
from deltaw.kernels.layout import to_device
from deltaw.machine.cards import card_memory
from deltaw.machine.choices import Choice
from deltaw.machine.kernel_choice import numerics_key
from deltaw.runtime.layer_entry import BackboneEntry, BlockEntry, HeadEntry, Level, frozen_digest, frozen_level
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.features.cached import AllTokenFeatures, FeatureCache, PooledFeatures, PredictorFeatures, RowIndex
from deltaw.training.features.store import (
    DiskStore,
    FeatureStore,
    MemoryStore,
    Shape,
    ShapeStore,
    StoreLocation,
    WrappedStore,
    is_complete,
    open_store,
    size_text,
)
from deltaw.training.microbatches import SINGLE_PROCESS, Feed, Reducer

NUM_PROBE_ROWS = 3
# Number of gradient elements to compare at a time.
_CHUNK_SIZE = 1 << 20


def select_probe_rows(examples: Sequence[Any]) -> list[Any]:
    """Return a few rows of different lengths, without very long ones."""
    ordered = np.argsort(lengths_of(examples), kind="stable").tolist()
    return [examples[ordered[index]] for index in sorted({0, len(ordered) // 4, len(ordered) // 2})][:NUM_PROBE_ROWS]


def loss_and_gradients(feed: Feed, rows: Sequence[Any], trained: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the summed loss and its gradient for each trained parameter, or None for a parameter without gradient."""
    total: list[Tensor | None] = [None] * (1 + len(trained))
    for batch in feed.batches(rows):
        loss = feed.objective(batch)
        parts = [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]
        for n, part in enumerate(parts):
            partial_sum = total[n]
            total[n] = part if partial_sum is None or part is None else partial_sum + part
    return total


def compare_feeds(
    model: nn.Module, reference: Feed, cached: Feed, rows: Sequence[Any], *, loss: float | None, gradients: float = 0.0
) -> str | None:
    """Compare the loss and gradients of two feeds of a model.

    The cached feed runs twice: it first computes its features and then reads them.

    Args:
        reference: Feed without a cache.
        cached: Feed with a cache.
        rows: Rows to run.
        loss: Maximum relative difference of the loss. If it is None, the feeds only have to run without an error.
        gradients: Maximum relative difference of the gradients. The default 0 is for that of the loss.

    Returns:
        A description of the difference, or None.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = loss_and_gradients(reference, rows, trained)
    for _ in range(2):
        actual = loss_and_gradients(cached, rows, trained)
        if loss is not None and not is_close(expected[:1], actual[:1], loss):
            return "a different loss"
        if loss is not None and not is_close(expected[1:], actual[1:], gradients or loss):
            return "different gradients"
    return None


def short_error(error: Exception) -> str:
    """Return type and message of a third-party error, shortened for use in a sentence."""
    return f"{type(error).__name__}: {str(error)[:100]}"


def is_close(expected: Sequence[Tensor | None], actual: Sequence[Tensor | None], tolerance: float) -> bool:
    """Return True if the tensors together differ by at most ``tolerance``, relative to their norm."""
    if [e is None for e in expected] != [f is None for f in actual]:
        return False
    difference = norm = 0.0
    for e, f in zip(expected, actual, strict=True):
        if e is None or f is None:
            continue
        # Compare in chunks, because a gradient can be as large as the model's largest weight.
        parts = (e.flatten().split(_CHUNK_SIZE), f.flatten().split(_CHUNK_SIZE))
        for expected_chunk, actual_chunk in zip(*parts, strict=True):
            difference += float((expected_chunk.float() - actual_chunk.float()).square().sum())
            norm += float(expected_chunk.float().square().sum())
    return math.sqrt(difference) <= tolerance * math.sqrt(norm)


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative difference of norms that rounding in this type can cause."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 6e-2


# The processes of a machine that train together share one store. The first process opens it, and the others join.
#
# Values and completion flags are memory-mapped files, so writes of one process are visible in the others. The flags of
# the running training are in a separate mapped file. The persistent flags are written after the values are on disk.
# Processes have different rows in a step. Two processes that write the same row write equal values up to rounding.

_DONE_PREFIX = "seen-"


class Sharing:
    """Shares a store between the processes of a machine.

    Args:
        processes: Processes that train together. Each creates the same object.

    Attributes:
        is_leader: True if this process opens the store of its machine.
    """

    def __init__(self, processes: Reducer = SINGLE_PROCESS) -> None:
        self._processes = processes
        self._location: tuple[str, str] | None = None
        self.is_leader = processes.local_rank == 0

    def publish(self, store: DiskStore) -> None:
        """Make a store of this process available to the others."""
        if self._processes.local_size == 1:
            return
        for old in store.folder.glob(f"{_DONE_PREFIX}*"):  # from killed runs
            platforms.remove_path(old)
        name = f"{_DONE_PREFIX}{os.getpid()}.bin"
        (store.folder / name).write_bytes(store.done.astype(np.uint8).tobytes())
        _map_done(store, name)
        store.run_file = store.folder / name
        self._location = str(store.folder), name

    def exchange(self, *, has_store: bool) -> bool:
        """Return True if this machine stores features.

        Each process calls it once, the leader after it opened the store.
        """
        processes = self._processes
        replies = processes.texts(json.dumps([has_store, self._location]))
        has_store, self._location = json.loads(replies[processes.rank - processes.local_rank])
        return has_store

    def join(self, shape: Shape) -> DiskStore | None:
        """Return the store of this machine's leader, or None if it has none on disk.

        Raises:
            UserError: if the store does not match the one that this process would create.
        """
        if self._location is None:
            return None
        folder, name = self._location
        if not is_complete(Path(folder), shape):
            message = "the features stored by the first process of this machine do not match those of this process"
            hint = "let all processes of a machine see the same folder, or set train.keep_features: false"
            raise UserError(message, location=folder, hint=hint)
        store = DiskStore(Path(folder), shape, None)
        _map_done(store, name)
        return store


def _map_done(store: DiskStore, name: str) -> None:
    store.done = np.asarray(np.memmap(store.folder / name, np.uint8, "r+", shape=(store.shape.rows,))).view(bool)


# Vectors of a store can be mirrored on the device. The first epoch writes to both. Later epochs gather on the device
# without copies or synchronization. Vectors of an earlier run are copied on first use.

# Maximum share of the device's free memory for vectors. The rest is for training.
MAX_MEMORY_SHARE = 0.25


class DeviceStore(WrappedStore):
    """Store with a copy of its vectors on ``device``."""

    def __init__(self, inner: FeatureStore, device: torch.device) -> None:
        super().__init__(inner)
        self.device, shape = device, inner.shape
        self._values = torch.empty(shape.units, shape.width, dtype=shape.torch_dtype, device=device)
        self._present = np.zeros(shape.units, bool)

    def read(self, indices: np.ndarray) -> Tensor:
        """Return (n, width) the vectors at (n,) indices, on the device."""
        missing = np.unique(indices[~self._present[indices]])
        if len(missing):
            self._put(missing, to_device(self.inner.read(missing), self.device))
        return self._values.index_select(0, to_device(torch.from_numpy(indices), self.device))

    def write(self, rows: np.ndarray, indices: np.ndarray, values: Tensor) -> None:
        self._put(indices, values.detach().to(self.device))
        self.inner.write(rows, indices, values)

    def _put(self, indices: np.ndarray, values: Tensor) -> None:
        self._values.index_copy_(0, to_device(torch.from_numpy(indices), self.device), values)
        self._present[indices] = True

    def clear(self) -> None:
        self._present[:] = False
        super().clear()

    def close(self) -> None:
        """Release the device memory and the inner store."""
        self._values = self._values[:0].clone()
        self._present[:] = False
        super().close()


def with_device_copy(store: FeatureStore, device: torch.device) -> FeatureStore:
    """Mirror the store on the device, if the device has its own memory and enough of it."""
    card = card_memory(str(device)) if device.type == "cuda" else None
    fits = card is not None and store.shape.bytes <= MAX_MEMORY_SHARE * card[0]
    return DeviceStore(store, device) if fits else store


# If a smaller share of the blocks is frozen, storing features costs more than it saves.
MIN_FROZEN_SHARE = 1 / 8
# Features that do not fit on disk are stored in memory up to this size.
MEMORY_BYTES = 256 * 2**20
# From this number of rows on, the size of their features is estimated from a sample first.
ESTIMATE_ROWS = 200_000
CACHE_DEPENDENCIES = (
    "torch",
    "transformers",
    "deltaw.kernels",
    "deltaw.lora",
    "deltaw.runtime",
    "deltaw.training.features",
)
# Keys of a model configuration that do not affect features.
IGNORED_CONFIG_KEYS = {NAME_OR_PATH, "transformers_version", "architectures", "id2label", "label2id"}
IGNORED_CONFIG_KEYS |= {"problem_type", "use_cache"}


def cached_prefix(
    model: PreTrainedModel, reference: Feed, examples: Sequence[Any], location: StoreLocation, sharing: Sharing
) -> tuple[FeatureCache | None, Choice[str]]:
    """Create the feature cache of a training. Call it when the model accepts these batches, without dropout.

    The frozen layers are derived from the parameters that require a gradient. In a dry run on fake tensors the store
    contains only shapes, so that a plan runs the same steps.

    Args:
        model: Model to train.
        reference: Feed of the training without a cache.
        examples: All rows, including held-out ones.
        location: Location of the stores.
        sharing: Sharing with the other processes of this machine.

    Returns:
        The cache, which the caller closes, and the layers that it covers. Or None and the reason.
    """
    if any(isinstance(example, RowGroup) for example in examples[:1]):
        return None, Choice("off", "rows come in groups")
    level = frozen_level(model, [p for p in model.parameters() if p.requires_grad])
    if level is None:
        return None, Choice("off", "training reaches down to the first block")
    if level.kind == "block" and level.index < MIN_FROZEN_SHARE * level.count:
        return None, Choice("off", f"only {level} are frozen")
    probe_rows, has_weights = select_probe_rows(examples), has_values(model)
    try:
        feed = _feed(model, level, reference)
        vectors = feed.inspect(next(iter(reference.batcher.batches(probe_rows))))
        rows = feed.index_rows(probe_rows)
        trial = feed.with_store(rows, MemoryStore(rows.shape(vectors)))
        tolerance = tolerance_of(vectors.dtype) if has_weights else None
        difference = compare_feeds(model, reference, trial, probe_rows, loss=tolerance)
    except Exception as error:  # a third-party model can raise any error, and trains without stored features
        return None, Choice("off", f"{type(model).__name__} cannot be resumed there ({short_error(error)})")
    if difference is not None:
        return None, Choice("off", f"{type(model).__name__} resumed there gives {difference}")
    if too_large := _too_large(feed, examples, vectors, location.limit):
        return None, Choice("off", f"features would take about {too_large}")

    rows = feed.index_rows(examples)
    shape = rows.shape(vectors)
    store: FeatureStore | None = None if sharing.is_leader else sharing.join(shape)
    if isinstance(store, DiskStore):
        position = f"{size_text(shape.bytes)} in {store.folder}"
    else:
        name = _store_key(model, level, feed, rows, shape) if has_weights else ""
        about = f"{type(model).__name__}, {level}, {shape.rows} rows"
        try:
            store, position = create_store(name, shape, about, location)
        except UserError as error:
            return None, Choice("off", error.message)
        if isinstance(store, DiskStore):
            sharing.publish(store)
    cached = feed.with_store(rows, with_device_copy(store, feed.device) if has_weights else store)
    try:
        num_stored = _verify_stored(cached)
    except BaseException:
        cached.close()
        raise
    suffix = f", {num_stored} of {shape.rows} rows already stored" if num_stored else ""
    return cached, Choice(str(level), f"frozen below, so run once for each row: {position}{suffix}")


def create_store(
    name: str, shape: Shape, about: str, location: StoreLocation, since: str = ""
) -> tuple[FeatureStore, str]:
    """Create a store on disk, or in memory if the disk refuses.

    Args:
        name: Key of everything that the values depend on. An empty string on fake tensors creates a store of shapes.
        shape: Shape of the store.
        about: Description for the user.
        location: Location of the stores.
        since: Reason why the disk refused a larger store before.

    Returns:
        The store and a description of its location.

    Raises:
        UserError: if the disk refuses and the store is too large for memory.
    """
    size = size_text(shape.bytes)
    if not name:
        return ShapeStore(shape), f"{size} on the disk"
    try:
        store = open_store(name, shape, about=about, folder=location.folder, limit=location.limit)
        return store, f"{size} in {store.folder}"
    except UserError as error:
        if shape.bytes > MEMORY_BYTES:
            raise
        return MemoryStore(shape), f"{size} in memory, since {since or error.message}"


def _feed(model: PreTrainedModel, level: Level, reference: Feed) -> FeatureCache:
    """Return the cache for this level."""
    if level.kind == "block":
        return AllTokenFeatures(reference, BlockEntry(model, level.index))
    if isinstance(reference.objective, CausalObjective):
        return PredictorFeatures(reference, BackboneEntry(model))
    return PooledFeatures(reference, HeadEntry(model))


def _too_large(feed: FeatureCache, examples: Sequence[Any], vectors: Tensor, limit: int) -> str | None:
    """Return the approximate size of the features of very large data if it is far above the limit, else None."""
    if len(examples) <= ESTIMATE_ROWS:
        return None
    sampled = [examples[index] for index in range(0, len(examples), len(examples) // 256)]
    units = sum(feed.units(example) for example in sampled) / len(sampled) * len(examples)
    size = int(units * vectors.shape[1] * vectors.element_size())
    return size_text(size) if size > 2 * limit else None


def model_key(model: PreTrainedModel, level: Level, device: torch.device) -> list[object]:
    """Return everything that the values below a level depend on, except rows."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in IGNORED_CONFIG_KEYS}
    return [type(model.base_model).__name__, config, frozen_digest(model, level), numerics_key(device)]


def _store_key(model: PreTrainedModel, level: Level, feed: FeatureCache, rows: RowIndex, shape: Shape) -> str:
    """Return a key of everything that the stored values depend on."""
    contents = hashlib.sha256(b"".join(rows.contents)).hexdigest()
    parts = [str(level), feed.kind, shape.width, shape.dtype, *model_key(model, level, feed.device)]
    return key("features", [*parts, feed.batcher.padded, contents], CACHE_DEPENDENCIES)


def _verify_stored(cached: FeatureCache) -> int:
    """Return the number of stored rows. Clear the store and return 0 if recomputed rows differ."""
    done = np.flatnonzero(cached.store.done)
    if not len(done):
        return 0
    slots = done[:: max(1, len(done) // NUM_PROBE_ROWS)][:NUM_PROBE_ROWS]
    probe_rows = [cached.rows.distinct[slot] for slot in slots]
    stored = cached.store.read(cached.rows.vector_indices(slots))
    index = cached.index_rows(probe_rows)
    recomputed = cached.with_store(index, MemoryStore(index.shape(stored)))
    for batch in cached.batcher.batches(probe_rows):
        recomputed.store_batch(batch)
    new_values = recomputed.store.read(index.vector_indices(index.slots(probe_rows))).to(stored.device)
    if is_close([new_values], [stored], tolerance_of(stored.dtype)):
        return len(done)
    cached.store.clear()
    return 0
