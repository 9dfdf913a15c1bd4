"""Selection of the step and the microbatches with the largest memory.

It uses the sizes that the batcher computes, without running the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from deltaw.data.example import RowGroup, concat_rows, lengths_of
from deltaw.kernels.layout import Layout
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import MAX_BUFFERED_ROWS, CausalMicroBatcher, choose_tokens_per_pass
from deltaw.training.features.prompts import StoredPrompts
from deltaw.training.parallel.row_distribution import distribute_rows
from deltaw.training.session import Session

# Attention tiles of one shape: count, queries, keys.
TileShape: TypeAlias = tuple[int, int, int]
# Maximum number of steps that are searched for the largest microbatch, evenly spaced over the run.
MAX_SEARCHED_STEPS = 400
# Maximum share of rows that count as exceptionally long.
LONG_ROW_SHARE = 0.05
# The second step runs with an allocated optimizer state.
DRY_RUN_STEPS = 2
# Maximum number of steps with layouts that are built in order to count attention tile shapes.
MAX_LAID_OUT_STEPS = 100
# Approximate number of hidden-size vectors that each block stores per token, without activation checkpointing.
# Additional bytes per logit: two fp32 copies. Both are used only to select a step.
STORED_VECTORS = 20
LOGIT_COPIES = 8


@dataclass(frozen=True)
class HeaviestStep:
    """Step with the largest microbatch.

    Attributes:
        rows: Rows of the step, or of one process in it.
        shapes: (rows, length) of its microbatches.
        all_shapes: Shapes of all steps that were searched.
        evaluated: Shapes of evaluations.
        head_rows: Numbers of rows that a head is applied to in these steps.
        evaluated_head_rows: The same for evaluations.
        labeled: Rows of another step with a shorter microbatch whose labels may need more memory. Empty if there is
            none.
        tiles: Attention tile shapes of the steps.
        evaluated_tiles: Attention tile shapes of evaluations.
        long: Length limit that a few training rows exceed, number of these rows, and maximum microbatch tokens of the
            remaining rows. Empty if there are none.
    """

    rows: Sequence[Any]
    shapes: list[tuple[int, int]]
    all_shapes: set[tuple[int, int]]
    evaluated: set[tuple[int, int]]
    head_rows: set[int]
    evaluated_head_rows: set[int]
    labeled: Sequence[Any] = ()
    tiles: set[TileShape] = field(default_factory=set)
    evaluated_tiles: set[TileShape] = field(default_factory=set)
    long: tuple[int, ...] = ()

    @property
    def token_counts(self) -> float:
        """Number of different microbatch sizes in tokens, for which kernels are prepared.

        Sizes of evaluations count a third, because they have no backward pass.
        """
        return _weighted_count(token_counts(self.all_shapes), token_counts(self.evaluated))

    @property
    def row_counts(self) -> float:
        """Number of different row counts of a classifier's head, weighted in the same way."""
        return _weighted_count(self.head_rows, self.evaluated_head_rows)

    @property
    def tile_shapes(self) -> float:
        """Number of different attention tile shapes, weighted in the same way."""
        return _weighted_count(self.tiles, self.evaluated_tiles)


class _Microbatch(NamedTuple):
    """Numbers of tokens and labels of a microbatch, its step and its process. Ordered by size."""

    tokens: int
    labels: int
    step: int
    process: int


def heaviest_step(session: Session, processes: int = 1) -> HeaviestStep:
    """Find the step with the largest microbatch, and another step if its labels may outweigh tokens.

    Args:
        session: Session on fake tensors.
        processes: Number of processes that share the rows of a step. The result is for one process.
    """
    settings = session.config.train
    feed = session.feed
    causal_batcher = feed.batcher if isinstance(feed.batcher, CausalMicroBatcher) else None
    causal_batcher = None if isinstance(feed, StoredPrompts) else causal_batcher
    total = session.total_steps
    if feed.store is not None:
        # Stored features are computed only in the first epoch.
        total = min(total, -(-len(session.data.train) // settings.batch_size))
    steps = range(0, total, max(1, -(-total // MAX_SEARCHED_STEPS)))
    laid_out_steps = set(steps[:: max(1, -(-len(steps) // MAX_LAID_OUT_STEPS))])
    all_shapes = set[tuple[int, int]]()
    head_row_counts = set[int]()
    tiles = set[TileShape]()
    microbatches: list[_Microbatch] = []
    limit, num_long_rows = _long_row_limit(session)
    other_tokens = 0

    def shares_of(step: int) -> list[Sequence[Any]]:
        rows = session.planned_rows(step)
        if processes == 1:
            return [rows]
        return [[rows[index] for index in indices] for indices in distribute_rows(rows, processes, share=feed.share)]

    def rows_of(microbatch: _Microbatch) -> Sequence[Any]:
        return shares_of(microbatch.step)[microbatch.process]

    for step in steps:
        for process, rows in enumerate(shares_of(step)):
            if not rows:
                continue
            shapes = feed.shapes(rows)
            all_shapes.update(shapes)
            head_row_counts.update(feed.batcher.head_rows(rows, shapes))
            if num_long_rows:
                short = [length for length in map(row_length, rows) if length <= limit]
                other_tokens = max(other_tokens, min(limit, len(short) * max(short, default=0)))
            labels = [0] * len(shapes) if causal_batcher is None else causal_batcher.labels(rows)
            if (cached := session.objective.cached_passes(shapes)) is not None:
                tokens = sum(c * n for c, n in shapes[:cached]) + max(c * n for c, n in shapes)
                microbatches.append(_Microbatch(tokens, 0, step, process))
                continue
            counts = zip(shapes, labels, strict=True)
            microbatches += [_Microbatch(c * n, num_labels, step, process) for (c, n), num_labels in counts]
            if step in laid_out_steps:
                tiles |= _tile_shapes(session, rows)
    largest = max(microbatches)
    labeled: Sequence[Any] = ()
    if causal_batcher is not None and feed.store is None:
        weight = _weight_function(session)
        heavy = max(microbatches, key=lambda item: weight(item.tokens, item.labels))
        if weight(heavy.tokens, heavy.labels) > 1.01 * weight(largest.tokens, largest.labels):
            labeled = rows_of(heavy)
    # The first rows of a large evaluation contain its typical shapes.
    sets = () if session.feed.generates_rows else session.data.sets.values()
    held_out = [row for rows in sets for row in rows[:MAX_BUFFERED_ROWS]]
    evaluated = set(feed.shapes(held_out)) if held_out else set()
    heaviest = rows_of(largest)
    if session.feed.generates_rows and not labeled:
        labeled = _fullest_batch(session, heaviest)
    return HeaviestStep(
        rows=heaviest,
        shapes=feed.shapes(heaviest),
        all_shapes=all_shapes,
        evaluated=evaluated,
        head_rows=head_row_counts,
        evaluated_head_rows=set(feed.batcher.head_rows(held_out, list(evaluated))) if held_out else set(),
        labeled=labeled,
        tiles=tiles,
        evaluated_tiles=_tile_shapes(session, held_out) if held_out else set(),
        long=(limit - session.method.virtual_tokens, num_long_rows, other_tokens) if num_long_rows else (),
    )


def _fullest_batch(session: Session, rows: Sequence[Any]) -> Sequence[Any]:
    """Return the maximum-length completions that fill a microbatch best, or an empty sequence if these are all rows.

    Shorter or fewer completions can have any number of tokens, and so fill a microbatch better than all rows.
    """

    def largest(count: int) -> int:
        return max(token_counts(session.feed.shapes(rows[:count])))

    best = max(range(1, len(rows) + 1), key=lambda count: (largest(count), count))
    return () if best == len(rows) else rows[:best]


def _long_row_limit(session: Session) -> tuple[int, int]:
    """Return a length limit that only exceptionally long training rows exceed, and the number of these rows.

    At most a share of :data:`LONG_ROW_SHARE` of the rows exceeds it. A row that fits into a default microbatch does not
    count.
    """
    rows = session.data.train
    max_long_rows = int(LONG_ROW_SHARE * len(rows))
    if not max_long_rows or session.task.tokenizer is None:
        return 0, 0
    lengths = np.array([row_length(row) for row in rows]) if isinstance(rows[0], RowGroup) else lengths_of(rows)
    limit = -(-int(np.partition(lengths, -max_long_rows - 1)[-max_long_rows - 1]) // 64) * 64
    device = str(session.model.device)
    limit = max(limit, choose_tokens_per_pass(session.config.train.tokens_per_pass, limit, device).value)
    return limit, int((lengths > limit).sum())


def row_length(row: Any) -> int:
    """Return the number of tokens of a row, or of the longest row of a group."""
    return max(map(len, row.rows)) if isinstance(row, RowGroup) else len(row)


def _weight_function(session: Session) -> Callable[[int, int], float]:
    """Return a function that estimates the bytes for the tokens and labels of a microbatch."""
    config = session.model.config.get_text_config()
    size = session.model.dtype.itemsize
    vectors = 1 if session.config.train.checkpointing else STORED_VECTORS
    blocks, width = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "hidden_size"))
    token = vectors * blocks * width * size
    label = config.vocab_size * (LOGIT_COPIES + size)
    max_labels = session.objective.chunk
    return lambda tokens, labels: float(tokens * token + min(labels, max_labels) * label)


def _tile_shapes(session: Session, rows: Sequence[Any]) -> set[TileShape]:
    """Shapes of attention's tiles in the microbatches of these rows."""
    if not isinstance(session.batcher, CausalMicroBatcher):
        return set()
    return {shape for layout in session.batcher.layouts(rows) for shape in _tiles_of(session, layout)}


def _tiles_of(session: Session, layout: Layout) -> set[TileShape]:
    window = getattr(session.model.config.get_text_config(), "sliding_window", None)
    tile_batches = (batch for width in {None, window} for batch in layout.tiles(width).batches)
    return {(batch.count, batch.queries, batch.keys.shape[1]) for batch in tile_batches}


class PeakBatcher(Batcher):
    """Batcher that yields only the microbatches of a step that determine its peak memory.

    These are the smallest, which leaves gradients behind, and then the largest. The first step only allocates the
    optimizer state and has the smallest microbatch only. A third step has the microbatches of ``labeled`` rows, with
    the one with the most labels as the largest.

    Attributes:
        tokens: Tokens of the microbatches in the second step.
        num_batches: Number of microbatches in all steps.
        sizes: Different microbatch sizes in tokens.
        rows: Different row counts of a head.
        tiles: Different attention tile shapes.
    """

    def __init__(self, session: Session, labeled: Sequence[Any] = ()) -> None:
        self._session = session
        self._inner = session.feed
        self._labeled = labeled
        self._steps = self.tokens = self.num_batches = 0
        self.sizes = set[int]()
        self.rows = set[int]()
        self.tiles = set[TileShape]()

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return self._inner.shapes(rows)

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        self._steps += 1
        rows = self._labeled if self._steps > DRY_RUN_STEPS else rows
        batcher = self._inner.batcher
        shapes = self._inner.shapes(rows)
        weights = sizes = [count * length for count, length in shapes]
        if self._steps > DRY_RUN_STEPS and isinstance(batcher, CausalMicroBatcher):
            weight = _weight_function(self._session)
            labels = batcher.labels(rows)
            weights = [int(weight(size, count)) for size, count in zip(sizes, labels, strict=True)]
        smallest = sizes.index(min(sizes))
        largest = len(sizes) - 1 - weights[::-1].index(max(weights))
        if self._steps == 1:
            largest = smallest
        selected = {smallest, largest}
        # The step computes these before its first microbatch and stores them for the backward pass.
        selected |= set(range(self._session.objective.cached_passes(shapes) or 0))
        if self._steps <= DRY_RUN_STEPS:
            self.tokens = sum(sizes[number] for number in selected)
        self.sizes.update(sizes[number] for number in (smallest, largest))
        head_rows = batcher.head_rows(rows, shapes)
        self.rows.update(head_rows[number] for number in (smallest, largest))
        self.num_batches += len(selected)
        last_batch = None
        for number, batch in enumerate(self._inner.batches(rows)):
            if number == largest and number != smallest and smallest > largest:
                last_batch = batch  # run it last, when gradients are allocated
            elif number in selected or number >= len(sizes):
                yield self._record(batch)
        if last_batch is not None:
            yield self._record(last_batch)

    def _record(self, batch: Any) -> Any:
        layout = getattr(batch, "inputs", {}).get("packed_layout")
        if isinstance(layout, Layout):
            self.tiles |= _tiles_of(self._session, layout)
        return batch


def longest_rows(session: Session) -> Sequence[Any]:
    """Return the longest rows that are computed without a gradient, enough to fill two microbatches.

    These are the held-out rows. The base model also computes the training rows if the loss has a reference model.
    """
    has_reference = getattr(getattr(session.task, "settings", None), "has_reference", False)
    computed = session.data.all_rows if has_reference else concat_rows(*session.data.sets.values())
    batch_tokens = session.batcher.tokens_per_pass
    total = 0
    rows = []
    for index in np.argsort(-lengths_of(computed), kind="stable").tolist():
        rows.append(computed[index])
        total += sum(token_counts(session.batcher.shapes(rows[-1:])))
        if total >= 2 * batch_tokens:
            break
    return rows


def _weighted_count(trained: set[Any], evaluated: set[Any]) -> float:
    return len(trained) + len(evaluated - trained) / 3


def token_counts(shapes: Iterable[tuple[int, int]]) -> set[int]:
    """Return the number of tokens of each microbatch, which determines the shapes of matrix products."""
    return {rows * length for rows, length in shapes}
