"""Which step of a run is its heaviest, and which of its microbatches show its peak.

Found by the batcher's own arithmetic, without running the model. Knows batchers and layouts; no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from deltaw.data.sequences import joined, lengths_of
from deltaw.kernels.layout import Layout
from deltaw.training.features.prompts import StoredPrompts
from deltaw.training.loop import rows_of_step
from deltaw.training.parallel.dealing import deal
from deltaw.training.session import Session
from deltaw.training.tasks.causal_batcher import ROWS_AT_ONCE, CausalMicroBatcher

# Tiles of one shape: how many, queries, keys.
TileShape: TypeAlias = tuple[int, int, int]
# Steps that are searched for the largest microbatch; of a longer run, so many of them, spread evenly.
STEPS_SEARCHED = 400
# Two steps: from the second on, the optimizer's state is there while a forward and a backward run.
DRY_RUN_STEPS = 2
# Steps whose microbatches are laid out, to see in how many shapes attention comes.
STEPS_LAID_OUT = 100
# Vectors of the model's width that a token keeps in each block, roughly; one with activation checkpointing.
# Bytes for each entry of the logits beside the entry itself: two fp32 copies. Both only choose a step.
KEPT_VECTORS, LOGIT_COPIES = 20, 8


@dataclass(frozen=True)
class Heaviest:
    """The step with the largest microbatch.

    Attributes:
        rows: of that step, or of one process in it. shapes: (rows, length) of its microbatches.
        every: the shapes of all steps that were searched. evaluated: those of evaluations.
        labeled: rows of another step, which has a shorter microbatch with so many labels that it may take
            more; empty where there is no such step.
        tiles, evaluated_tiles: as ``every`` and ``evaluated``, of attention's tiles.
    """

    rows: Sequence[Any]
    shapes: list[tuple[int, int]]
    every: set[tuple[int, int]]
    evaluated: set[tuple[int, int]]
    labeled: Sequence[Any] = ()
    tiles: set[TileShape] = field(default_factory=set)
    evaluated_tiles: set[TileShape] = field(default_factory=set)

    @property
    def token_counts(self) -> float:
        """Different numbers of tokens that kernels are built for; an evaluation's, which has no backward,
        counts a third."""
        return _kinds(token_counts(self.every), token_counts(self.evaluated))

    @property
    def row_counts(self) -> float:
        """The same of numbers of rows, which a classifier's head is applied to."""
        return _kinds({rows for rows, _ in self.every}, {rows for rows, _ in self.evaluated})

    @property
    def tile_shapes(self) -> float:
        """The same of the shapes of attention's tiles."""
        return _kinds(self.tiles, self.evaluated_tiles)


def heaviest_step(session: Session, processes: int = 1) -> Heaviest:
    """Find the step with the largest microbatch, among equals the one with the most labels; and another step
    where labels may outweigh tokens.

    Args:
        processes: that share the rows of a step; its rows are then those of one of them.
    """
    settings, batcher = session.config.train, session.batcher
    if isinstance(session.prefix, StoredPrompts):
        batcher = session.prefix.batcher
    total = session.total_steps
    if session.prefix is not None:
        # What is kept is computed in the first epoch alone.
        total = min(total, -(-len(session.data.train) // settings.batch_size))
    steps = range(0, total, max(1, -(-total // STEPS_SEARCHED)))
    laid_out = set(steps[:: max(1, -(-len(steps) // STEPS_LAID_OUT))])
    every: set[tuple[int, int]] = set()
    tiles: set[TileShape] = set()
    found: list[tuple[int, int, tuple[int, int]]] = []

    def shares_of(step: int) -> list[Sequence[Any]]:
        rows = rows_of_step(session.data.train, step, settings.batch_size, settings.seed)
        if processes == 1:
            return [rows]
        dealt = deal(rows, processes, share=bool(getattr(batcher, "share", False)))
        return [[rows[place] for place in places] for places in dealt]

    def rows_of(place: tuple[int, int]) -> Sequence[Any]:
        return shares_of(place[0])[place[1]]

    for step in steps:
        for process, rows in enumerate(shares_of(step)):
            if not rows:
                continue
            shapes = batcher.shapes(rows)
            every.update(shapes)
            labels = batcher.labels(rows) if isinstance(batcher, CausalMicroBatcher) else [0] * len(shapes)
            found += [(c * n, many, (step, process)) for (c, n), many in zip(shapes, labels, strict=True)]
            if step in laid_out:
                tiles |= _tile_shapes(session, rows)
    largest = max(found)
    labeled: Sequence[Any] = ()
    if isinstance(batcher, CausalMicroBatcher) and session.prefix is None:
        weigh = _weigher(session)
        heavy = max(found, key=weigh)
        if weigh(heavy) > 1.01 * weigh(largest):
            labeled = rows_of(heavy[2])
    # Of a large evaluation, the first rows show what shapes there are.
    held_out = [row for rows in session.data.sets.values() for row in rows[:ROWS_AT_ONCE]]
    return Heaviest(
        rows_of(largest[2]),
        batcher.shapes(rows_of(largest[2])),
        every,
        set(batcher.shapes(held_out)) if held_out else set(),
        labeled,
        tiles,
        _tile_shapes(session, held_out) if held_out else set(),
    )


def _weigher(session: Session) -> Callable[[tuple[int, int, Any]], float]:
    """Roughly the bytes that come with the tokens and the labels of a microbatch."""
    config = session.model.config.get_text_config()
    size = session.model.dtype.itemsize
    vectors = 1 if session.config.train.checkpointing else KEPT_VECTORS
    blocks, width = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "hidden_size"))
    token, label = vectors * blocks * width * size, config.vocab_size * (LOGIT_COPIES + size)
    most = getattr(session.objective, "chunk", 1)

    def weigh(one: tuple[int, int, Any]) -> float:
        return one[0] * token + min(one[1], most) * label

    return weigh


def _tile_shapes(session: Session, rows: Sequence[Any]) -> set[TileShape]:
    """Shapes of attention's tiles in the microbatches of these rows."""
    if not isinstance(session.batcher, CausalMicroBatcher):
        return set()
    return {shape for layout in session.batcher.layouts(rows) for shape in _tiles_of(session, layout)}


def _tiles_of(session: Session, layout: Layout) -> set[TileShape]:
    window = getattr(session.model.config.get_text_config(), "sliding_window", None)
    return {
        (batch.count, batch.queries, batch.keys.shape[1])
        for width in {None, window}
        for batch in layout.tiles(width).batches
    }


class TellingBatcher:
    """Of a step's microbatches those that show its peak: the smallest, which leaves gradients behind, and
    then the largest. The first step, which is there for the optimizer's state alone, has the smallest only; a
    third is made of the microbatches of ``labeled`` rows, its largest being the one with the most labels.

    Attributes:
        tokens: of the microbatches of the second step.
        sizes, rows, tiles: different numbers of tokens, of rows, and shapes of attention's tiles in all of
            them.
        made: how many microbatches there were.
    """

    def __init__(self, session: Session, labeled: Sequence[Any] = ()) -> None:
        self._session = session
        self._inner = (session.prefix or session).batcher
        self._labeled = labeled
        self._steps = 0
        self.tokens = self.made = 0
        self.sizes: set[int] = set()
        self.rows: set[int] = set()
        self.tiles: set[TileShape] = set()

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return self._inner.shapes(rows)

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        self._steps += 1
        rows = self._labeled if self._steps > DRY_RUN_STEPS else rows
        shapes = self._inner.shapes(rows)
        sizes = [count * length for count, length in shapes]
        weights = sizes
        if self._steps > DRY_RUN_STEPS and isinstance(self._inner, CausalMicroBatcher):
            weigh = _weigher(self._session)
            weights = [
                int(weigh((size, labels, 0)))
                for size, labels in zip(sizes, self._inner.labels(rows), strict=True)
            ]
        smallest, largest = sizes.index(min(sizes)), len(sizes) - 1 - weights[::-1].index(max(weights))
        if self._steps == 1:
            largest = smallest
        if self._steps <= DRY_RUN_STEPS:
            self.tokens = sum(sizes[number] for number in {smallest, largest})
        self.sizes.update(sizes[number] for number in (smallest, largest))
        self.rows.update(shapes[number][0] for number in (smallest, largest))
        self.made += len({smallest, largest})
        kept = None
        for number, batch in enumerate(self._inner.batches(rows)):
            if number == largest and number != smallest and smallest > largest:
                kept = batch  # it comes last, when gradients are there
            elif number in (smallest, largest) or number >= len(sizes):
                yield self._seen(batch)
        if kept is not None:
            yield self._seen(kept)

    def _seen(self, batch: Any) -> Any:
        layout = getattr(batch, "inputs", {}).get("packed_layout")
        if isinstance(layout, Layout):
            self.tiles |= _tiles_of(self._session, layout)
        return batch


def longest_rows(session: Session) -> Sequence[Any]:
    """Held-out rows that make up the largest microbatch of an evaluation."""
    held_out = joined(*session.data.sets.values())
    ordered = np.argsort(-lengths_of(held_out), kind="stable")
    most = getattr(session.batcher, "tokens_per_pass", 0)
    total, rows = 0, []
    for place in ordered.tolist():
        rows.append(held_out[place])
        total += sum(token_counts(session.batcher.shapes(rows[-1:])))
        if total >= 2 * most:
            break
    return rows


def _kinds(trained: set[Any], evaluated: set[Any]) -> float:
    return len(trained) + len(evaluated - trained) / 3


def token_counts(shapes: Iterable[tuple[int, int]]) -> set[int]:
    """Tokens of each microbatch: the one size of matrix products that changes."""
    return {rows * length for rows, length in shapes}
