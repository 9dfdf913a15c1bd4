"""Whether the frozen lower layers run only once for each row, and where their outputs are kept.

This is verified first: a few of the user's own rows run with kept features and without. Loss and gradients
must agree, or there is no cache and the run says why. Features of an earlier run are compared with new ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.cache import key
from deltaw.data.example import RowGroup
from deltaw.errors import UserError
from deltaw.host.choices import Choice
from deltaw.host.kernel_choice import computed_on
from deltaw.hub.skeleton import has_values
from deltaw.hub.transformers_private import READ_FROM
from deltaw.runtime.layer_entry import (
    BackboneEntry,
    BlockEntry,
    HeadEntry,
    Level,
    frozen_digest,
    lowest_trained,
)
from deltaw.training.features.cached import CachedPrefix, Feed, RowIndex
from deltaw.training.features.device_store import on_device
from deltaw.training.features.feeds import EveryToken, LabelTokens, WholeRows
from deltaw.training.features.sharing import Sharing
from deltaw.training.features.store import (
    LIMIT_BYTES,
    FeatureStore,
    MemoryStore,
    Shape,
    ShapeStore,
    open_store,
    size_text,
)
from deltaw.training.features.trial import (
    TRIED_ROWS,
    few_rows,
    loss_and_gradients,
    near,
    tolerance_of,
)
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.tasks.causal_objective import CausalObjective

# Below this share of the blocks, reading features saves less than keeping them costs.
LEAST_FROZEN = 1 / 8
# Features that find no room on the disk are kept in memory up to this size.
MEMORY_BYTES = 256 * 2**20
# From so many rows on, their features are estimated before all are looked at.
MANY_ROWS = 200_000
MADE_BY = (
    *("torch", "transformers"),
    *("deltaw.kernels", "deltaw.lora", "deltaw.runtime", "deltaw.training.features"),
)
# What a configuration says that no feature depends on.
IRRELEVANT = {
    READ_FROM,
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
    "use_cache",
}


def cached_prefix(
    model: PreTrainedModel,
    objective: AnyObjective,
    batcher: AnyBatcher,
    examples: Sequence[Any],
    *,
    folder: Path | None = None,
    limit: int = LIMIT_BYTES,
    sharing: Sharing | None = None,
) -> tuple[CachedPrefix | None, Choice[str]]:
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
    few = few_rows(examples)
    try:
        feed = _feed(model, level, objective)
        vectors = feed.learn(next(iter(batcher.batches(few))))
        tolerance = tolerance_of(vectors.dtype) if has_values(model) else None
        difference = _difference(feed, objective, batcher, few, vectors, trained, tolerance)
    except Exception as error:  # whatever a foreign model raises here, it can train without kept features
        brief = f"{type(error).__name__}: {str(error)[:100]}"
        return None, Choice("off", f"{type(model).__name__} cannot be resumed there ({brief})")
    if difference is not None:
        return None, Choice("off", f"{type(model).__name__} resumed there gives {difference}")
    too_large = _too_large(feed, examples, vectors, limit)
    if too_large is not None:
        return None, Choice("off", f"features would take about {too_large}")
    sharing = sharing or Sharing()
    return _open_store(model, level, feed, objective, batcher, examples, vectors, folder, limit, sharing)


def _feed(model: PreTrainedModel, level: Level, objective: AnyObjective) -> Feed:
    """What to keep at this level."""
    if level.kind == "block":
        return EveryToken(BlockEntry(model, level.index), objective)
    if isinstance(objective, CausalObjective):
        return LabelTokens(BackboneEntry(model), objective)
    return WholeRows(HeadEntry(model), objective)


def _indexed(feed: Feed, examples: Sequence[Any]) -> RowIndex:
    return RowIndex(examples, feed.content, feed.units)


def _too_large(feed: Feed, examples: Sequence[Any], vectors: Tensor, limit: int) -> str | None:
    """Of very many rows, about what their features would take, where that is far more than the limit: they
    are not even counted then."""
    if len(examples) <= MANY_ROWS:
        return None
    few = [examples[place] for place in range(0, len(examples), len(examples) // 256)]
    units = sum(feed.units(example) for example in few) / len(few) * len(examples)
    size = int(units * vectors.shape[1] * vectors.element_size())
    return size_text(size) if size > 2 * limit else None


def _difference(
    feed: Feed,
    objective: AnyObjective,
    batcher: AnyBatcher,
    few: Sequence[Any],
    vectors: Tensor,
    trained: Sequence[nn.Parameter],
    tolerance: float | None,
) -> str | None:
    """What differs from the usual way, with features new and read again; None where nothing does.

    Without a ``tolerance`` nothing is compared, but it must run.
    """
    rows = _indexed(feed, few)
    shape = Shape.of(len(rows.contents), rows.units, vectors.shape[1], vectors.dtype)
    cached = CachedPrefix(feed, objective, batcher, rows, MemoryStore(shape))
    usual = loss_and_gradients(objective, batcher, few, trained)
    for _ in range(2):
        ours = loss_and_gradients(cached.objective, cached.batcher, few, trained)
        if tolerance is None:
            continue
        if not near(usual[:1], ours[:1], tolerance):
            return "another loss"
        if not near(usual[1:], ours[1:], tolerance):
            return "other gradients"
    return None


def _open_store(
    model: PreTrainedModel,
    level: Level,
    feed: Feed,
    objective: AnyObjective,
    batcher: AnyBatcher,
    examples: Sequence[Any],
    vectors: Tensor,
    folder: Path | None,
    limit: int,
    sharing: Sharing,
) -> tuple[CachedPrefix | None, Choice[str]]:
    rows = _indexed(feed, examples)
    shape = Shape.of(len(rows.contents), rows.units, vectors.shape[1], vectors.dtype)
    size = size_text(shape.bytes)
    store: FeatureStore
    joined = None if sharing.leads else sharing.join(shape)
    if joined is not None:
        store, kept = joined, f"{size} in {joined.folder}"
    elif not has_values(model):
        store, kept = ShapeStore(shape), f"{size} on the disk"
    else:
        try:
            key = _key(model, level, feed, rows, shape, batcher)
            about = f"{type(model).__name__}, {level}, {shape.rows} rows"
            store = open_store(key, shape, about=about, folder=folder, limit=limit)
            sharing.opened(store)
            kept = f"{size} in {store.folder}"
        except UserError as error:
            if shape.bytes > MEMORY_BYTES:
                return None, Choice("off", error.what)
            store, kept = MemoryStore(shape), f"{size} in memory, since {error.what}"
    if has_values(model):
        store = on_device(store, feed.device)
    cached = CachedPrefix(feed, objective, batcher, rows, store)
    try:
        known = _still_right(cached)
    except BaseException:
        cached.close()
        raise
    found = f", {known} of {shape.rows} rows there already" if known else ""
    return cached, Choice(str(level), f"frozen below, so run once for each row: {kept}{found}")


def _key(
    model: PreTrainedModel, level: Level, feed: Feed, rows: RowIndex, shape: Shape, batcher: AnyBatcher
) -> str:
    """A name for everything that stored values depend on."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in IRRELEVANT}
    facts = [
        str(level),
        feed.kind,
        shape.width,
        shape.dtype,
        type(model.base_model).__name__,
        config,
        frozen_digest(model, level),
        bool(getattr(batcher, "padded", True)),
        computed_on(feed.device),
        hashlib.sha256(b"".join(rows.contents)).hexdigest(),
    ]
    return key("features", facts, MADE_BY)


def _still_right(cached: CachedPrefix) -> int:
    """Rows that the store has already; none, all forgotten, where some computed anew differ from it."""
    done = np.flatnonzero(cached.store.done)
    if not len(done):
        return 0
    slots = done[:: max(1, len(done) // TRIED_ROWS)][:TRIED_ROWS]
    few = [cached.rows.distinct[slot] for slot in slots]
    before = cached.store.read(cached.rows.places(slots))
    again = _indexed(cached.feed, few)
    shape = Shape.of(len(again.contents), again.units, before.shape[1], before.dtype)
    fresh = MemoryStore(shape)
    for batch in cached.batcher.inner.batches(few):
        cached.feed.keep(batch, again, fresh)
    after = fresh.read(again.places(again.slots(few))).to(before.device)
    if near([after], [before], tolerance_of(before.dtype)):
        return len(done)
    cached.store.forget()
    return 0
