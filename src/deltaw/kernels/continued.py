"""Tokens of several sequences whose recurrent layers continue saved states, as in decoding.

All states of a sequence are stored in one row of fp32 numbers. Each call of a recurrent layer uses the next part of the
row. Every forward pass calls the layers in the same order, so a layer always gets the same part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.layout import Layout
from deltaw.kernels.recurrence import continue_recurrence
from deltaw.kernels.short_convolution import continue_convolution

# Each state starts at a multiple of this many numbers (a cache line).
ALIGNMENT = 16


class ContinuedRows:
    """Tokens of one forward pass that continue sequences.

    Args:
        lengths: Number of tokens of each sequence, at least 1.
        slots: Index in ``states`` of each sequence.
        states: (slots, state_size) fp32 states, which a forward pass updates. A new sequence starts with zeros. None to
            start all sequences, for example to measure ``state_size``.

    Attributes:
        length: Number of tokens T.
        state_size: Size of a row in numbers, as far as the calls have used it.
    """

    def __init__(self, lengths: Sequence[int], slots: Sequence[int], states: Tensor | None) -> None:
        self._layout = Layout.of_lengths(lengths)
        self._slots = np.asarray(slots, dtype=np.int64)
        self._indices = torch.from_numpy(self._slots)
        self._states = states
        self.length = self._layout.length
        self.state_size = 0

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool = False) -> Tensor:
        """Return :func:`deltaw.kernels.short_convolution.packed_convolution` of x (T, channels)."""
        states = self._next_states((weight.shape[1] - 1) * weight.shape[0])
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
        states = self._next_states(value.shape[1] * value.shape[2] * key.shape[2])
        return continue_recurrence(
            query,
            key,
            value,
            decay,
            rate,
            self._layout,
            states,
            self._slots,
            scaling=scaling,
            unit_vectors=unit_vectors,
        )

    def _next_states(self, count: int) -> Tensor:
        """Return the states (slots, count) for the next call of a layer."""
        start = self.state_size
        self.state_size += -(-count // ALIGNMENT) * ALIGNMENT
        if self._states is None:
            return torch.zeros(int(self._slots.max()) + 1, count)
        return self._states[:, start : start + count]
