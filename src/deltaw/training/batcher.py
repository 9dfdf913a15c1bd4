"""Interfaces between rows and models: batchers, objectives, feeds, and the reducer that combines processes.

The loop uses data and models only through these classes. Batchers are in ``training/batchers.py``, and feeds with
cached outputs of frozen layers in ``features``.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any


class Batcher(abc.ABC):
    """Splits the rows of an optimizer step into microbatches. The split changes results only by rounding.

    A row or a group of rows has ``label_count``, the number of labels that it adds to the summed loss. A microbatch,
    usually a :class:`deltaw.data.packing.MicroBatch`, is the input of one forward and backward pass. Shared prefixes
    reduce its number of computed tokens, and padding increases it.

    Attributes:
        tokens_per_pass: Maximum number of tokens per microbatch.
        padded: True if rows are padded instead of packed.
        share: True if shared prefixes are computed once.
        independent: True if packed rows share no prefixes because the model attends in both directions.
        step_metrics: Metrics that :meth:`expand` computed for the step.
    """

    tokens_per_pass: int
    padded: bool = True
    share: bool = False
    independent: bool = False
    step_metrics: Mapping[str, float] = MappingProxyType({})

    @abc.abstractmethod
    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield the microbatches of these rows, built lazily."""

    @abc.abstractmethod
    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """Return (rows, length) of each microbatch without building it."""

    def cost_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the rows with the cost that is used to distribute these rows over processes."""
        return rows

    def head_rows(self, rows: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> list[int]:
        """Return the number of rows that a head is applied to in each microbatch, given the :meth:`shapes`."""
        return [count for count, _ in shapes]

    def expand(self, rows: Sequence[Any], step: int) -> tuple[Sequence[Any], bool]:
        """Return the rows to train on in this step, and True if each trained parameter should get a gradient.

        Batchers that generate rows, for example completions of prompts, return new rows
        (:class:`deltaw.training.rollouts.RolloutFeed`).
        """
        return rows, True
