"""Tokens of several sequences whose recurrent layers continue states, as in decoding.

The states of a sequence are one row of fp32 numbers. A forward pass calls the recurrent layers in a fixed order, so a
layer's state is identified by its call: each call uses the next numbers of the row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.layout import Layout
from deltaw.kernels.recurrence import continue_recurrence
from deltaw.kernels.short_convolution import continue_convolution

# States start at multiples of a cache line.
ALIGNMENT = 16


class ContinuedRows:
    """Tokens of one forward pass that continue sequences.

    Args:
        lengths: Number of tokens of each sequence, at least 1.
        slots: Row of ``states`` of each sequence.
        states: (slots, numbers) fp32 states, which a forward pass updates. Zeros are the state before a sequence. None
            to start all sequences, and to count the numbers.

    Attributes:
        length: Number of tokens T.
        numbers: Numbers per row that the calls so far have used.
    """

    def __init__(self, lengths: Sequence[int], slots: Sequence[int], states: Tensor | None) -> None:
        self._layout = Layout.of_lengths(lengths)
        self._slots = np.asarray(slots, dtype=np.int64)
        self._indices = torch.from_numpy(self._slots)
        self._states = states
        self.length = self._layout.length
        self.numbers = 0

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool = False) -> Tensor:
        """Return :func:`deltaw.kernels.short_convolution.packed_convolution` of x (T, channels)."""
        states = self._next((weight.shape[1] - 1) * weight.shape[0])
        return continue_convolution(x, weight, bias, self._layout, states, self._indices, silu=silu)

    def recurrence(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        rate: Tensor | None,
        *,
        scaling: float = 1.0,
        unit_vectors: bool = False,
    ) -> Tensor:
        """Return :func:`deltaw.kernels.recurrence.packed_recurrence` of T tokens."""
        states = self._next(value.shape[1] * value.shape[2] * key.shape[2])
        rows = self._layout, states, self._slots
        return continue_recurrence(query, key, value, decay, rate, *rows, scaling=scaling, unit_vectors=unit_vectors)

    def _next(self, count: int) -> Tensor:
        """Return the states (slots, count) of the next call."""
        start = self.numbers
        self.numbers += -(-count // ALIGNMENT) * ALIGNMENT
        if self._states is None:
            return torch.zeros(int(self._slots.max()) + 1, count)
        return self._states[:, start : start + count]
