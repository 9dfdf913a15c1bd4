"""Labeled rows become batches: texts side by side, padded as little as pays, or images of one size.

A pair of texts, one of which is preferred, stays within one batch.

Knows tokens, pixels and labels; not files or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import RowGroup
from deltaw.data.images import ImageEncoder
from deltaw.data.labels import AnyExample, LabeledExample
from deltaw.data.padding import cut_by_length, microbatch_cost, side_by_side
from deltaw.data.pixels import ImageExample
from deltaw.errors import UserError
from deltaw.kernels.transfer import to_device

# Rows are padded to multiples of this: matrix libraries build a kernel for each new shape.
GRID = 8


@dataclass(frozen=True, eq=False)
class LabelBatch:
    """A microbatch: what one forward and backward sees.

    Attributes:
        inputs: the model's keyword arguments: ``input_ids`` and ``attention_mask`` (rows, longest), with
            ``token_type_ids`` for pairs; or ``pixel_values`` (rows, channels, height, width) in fp32.
        targets: (rows,), int64 class indices, or fp32 numbers.
        examples: the rows, in the order of the batch.
        pairs: whether the rows are pairs, the preferred one first; ``targets`` are their margins then.
        rows: rows in it. row_tokens: tokens of all rows. tokens: tokens computed, padding included.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    examples: tuple[AnyExample, ...]
    rows: int
    row_tokens: int
    tokens: int
    pairs: bool = False

    @property
    def label_tokens(self) -> int:
        """Labels in it: one a row, or one a pair."""
        return self.rows // 2 if self.pairs else self.rows


@dataclass(frozen=True)
class LabelMicroBatcher:
    """How labeled rows go through a model.

    Attributes:
        tokens_per_pass: the most tokens at once, padding included, unless one row alone has more.
        device: where batches are put.
        pad_id: what rows are filled up with; it is masked by length, so that any token will do.
        segments: whether ``token_type_ids`` go with pairs; False for a model that takes none.
        encoder: of images. tokens_per_image: what an image counts.
        limit: the most positions that the model has; padding does not go beyond.
    """

    tokens_per_pass: int
    device: str
    pad_id: int = 0
    segments: bool = True
    encoder: ImageEncoder | None = None
    tokens_per_image: int = 1
    limit: int | None = None

    def batches(self, rows: Sequence[AnyExample]) -> Iterator[LabelBatch]:
        """The microbatches of these rows, one after another, each laid out only when its turn comes."""
        images = [row for row in rows if isinstance(row, ImageExample)]
        if images:
            at_once = max(1, self.tokens_per_pass // self.tokens_per_image)
            for part in np.array_split(np.arange(len(images)), -(-len(images) // at_once)):
                yield self._images([images[index] for index in part])
            return
        pairs = sorted((row for row in rows if isinstance(row, RowGroup)), key=_longest)
        for start, stop, longest in self._cuts_of_pairs(pairs):
            flat: list[Any] = [row for pair in pairs[start:stop] for row in pair.rows]
            yield self._texts(flat, longest, pairs=True)
        texts = sorted((row for row in rows if isinstance(row, LabeledExample)), key=len)
        for start, stop, longest in self._cuts(texts):
            yield self._texts(texts[start:stop], longest)

    def shapes(self, rows: Sequence[AnyExample]) -> list[tuple[int, int]]:
        """(rows, length) of each microbatch of :meth:`batches`, without laying any out."""
        images = sum(isinstance(row, ImageExample) for row in rows)
        if images:
            at_once = max(1, self.tokens_per_pass // self.tokens_per_image)
            parts = np.array_split(np.arange(images), -(-images // at_once))
            return [(len(part), self.tokens_per_image) for part in parts]
        pairs = sorted((row for row in rows if isinstance(row, RowGroup)), key=_longest)
        texts = sorted((row for row in rows if isinstance(row, LabeledExample)), key=len)
        return [
            *((2 * (stop - start), longest) for start, stop, longest in self._cuts_of_pairs(pairs)),
            *((stop - start, longest) for start, stop, longest in self._cuts(texts)),
        ]

    def _cuts_of_pairs(self, pairs: Sequence[RowGroup]) -> Iterator[tuple[int, int, int]]:
        """As :meth:`_cuts`, of pairs sorted by the longer text."""
        lengths = [self._padded(_longest(pair)) for pair in pairs]
        cost = microbatch_cost(self.device)
        for start, stop in cut_by_length(lengths, self.tokens_per_pass, cost, [2] * len(pairs)):
            yield start, stop, lengths[stop - 1]

    def _cuts(self, texts: Sequence[LabeledExample]) -> Iterator[tuple[int, int, int]]:
        """Where each microbatch begins and ends among rows sorted by length, and its padded length."""
        lengths = [self._padded(len(row)) for row in texts]
        for start, stop in cut_by_length(lengths, self.tokens_per_pass, microbatch_cost(self.device)):
            yield start, stop, lengths[stop - 1]

    def _padded(self, length: int) -> int:
        whole = -(-length // GRID) * GRID
        return max(length, min(whole, self.limit)) if self.limit is not None else whole

    def _texts(self, rows: Sequence[LabeledExample], longest: int, *, pairs: bool = False) -> LabelBatch:
        tokens, mask = side_by_side([row.tokens for row in rows], longest, self.pad_id)
        segments = np.zeros_like(tokens)
        for place, row in enumerate(rows):
            if row.segments is not None:
                # Virtual tokens that a method prepends belong to the row's first text.
                segments[place, len(row) - len(row.segments) : len(row)] = row.segments
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.segments and any(row.segments is not None for row in rows):
            inputs["token_type_ids"] = segments
        return LabelBatch(
            inputs={
                name: to_device(torch.from_numpy(values), self.device) for name, values in inputs.items()
            },
            targets=self._targets(rows),
            examples=tuple(rows),
            rows=len(rows),
            row_tokens=int(mask.sum()),
            tokens=tokens.size,
            pairs=pairs,
        )

    def _images(self, rows: Sequence[ImageExample]) -> LabelBatch:
        if self.encoder is None:
            raise UserError(
                "images need the model's preprocessor", where="task", hint="task: image-classification"
            )
        return LabelBatch(
            inputs={"pixel_values": to_device(self.encoder.encode(rows), self.device)},
            targets=self._targets(rows),
            examples=tuple(rows),
            rows=len(rows),
            row_tokens=len(rows) * self.tokens_per_image,
            tokens=len(rows) * self.tokens_per_image,
        )

    def _targets(self, rows: Sequence[AnyExample]) -> Tensor:
        labels = [row.label for row in rows]
        dtype = torch.float32 if isinstance(labels[0], float) else torch.int64
        return to_device(torch.tensor(labels, dtype=dtype), self.device)


def _longest(pair: RowGroup) -> int:
    return max(map(len, pair.rows))
