"""Decide whether outputs of the frozen lower layers are stored, and the location.

The cache is verified first: sample rows of the user are run with and without it, and loss and gradients must agree.
Otherwise it is not used, and the run reports the reason. Stored features of an earlier run are compared with new ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.cache.keys import key
from deltaw.data.example import RowGroup
from deltaw.errors import UserError
from deltaw.hub.skeletons import has_values
from deltaw.hub.transformers_private import NAME_OR_PATH
from deltaw.machine.choices import Choice
from deltaw.machine.kernel_choice import numerics_key
from deltaw.runtime.layer_entry import BackboneEntry, BlockEntry, HeadEntry, Level, frozen_digest, frozen_level
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.features.cached import AllTokenFeatures, FeatureCache, PooledFeatures, PredictorFeatures, RowIndex
from deltaw.training.features.device_store import with_device_copy
from deltaw.training.features.feed_comparison import (
    NUM_PROBE_ROWS,
    compare_feeds,
    is_close,
    select_probe_rows,
    short_error,
    tolerance_of,
)
from deltaw.training.features.shared_store import Sharing
from deltaw.training.features.store import (
    DiskStore,
    FeatureStore,
    MemoryStore,
    Shape,
    ShapeStore,
    StoreLocation,
    open_store,
    size_text,
)
from deltaw.training.feed import Feed

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
    probe_rows = select_probe_rows(examples)
    has_weights = has_values(model)
    try:
        feed = _feed(model, level, reference)
        vectors = feed.inspect(next(iter(reference.batcher.batches(probe_rows))))
        rows = feed.index_rows(probe_rows)
        trial = feed.with_store(rows, MemoryStore(rows.shape(vectors)))
        tolerance = tolerance_of(vectors.dtype) if has_weights else None
        difference = compare_feeds(model, reference, trial, probe_rows, loss_tolerance=tolerance)
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
