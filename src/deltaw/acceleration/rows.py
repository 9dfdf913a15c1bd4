"""Rows of a padded batch, or of a batch without padding in which positions restart, packed into one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.packing import MicroBatch, pack
from deltaw.kernels import loader
from deltaw.runtime.packed import first_position


class NotPackable(Exception):
    """A call has rows that cannot be packed. The message is the reason."""


@dataclass(frozen=True, eq=False)
class _Row:
    """Tokens of a row, with the attributes that :func:`deltaw.data.packing.pack` reads."""

    tokens: np.ndarray
    segments: np.ndarray | None
    is_label: np.ndarray

    active_from: ClassVar[None] = None

    @property
    def shareable_length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class PackedCall:
    """Rows of a call in a packed row.

    Attributes:
        batch: The packed row.
        shape: Numbers of rows and columns of the call.
        cells: (n,) flattened index in the call of each token.
        indices: (n,) index in the packed row of the same tokens.
    """

    batch: MicroBatch
    shape: tuple[int, int]
    cells: Tensor
    indices: Tensor

    def unpack(self, packed: Tensor) -> Tensor:
        """Return values (1, T, …) of the packed row in the shape of the call, with zeros at padding."""
        values = packed[0].index_select(0, self.indices)
        rows, columns = self.shape
        if len(self.cells) == rows * columns:
            flat = values
        else:
            flat = values.new_zeros(rows * columns, *values.shape[1:]).index_copy(0, self.cells, values)
        return flat.view(rows, columns, *values.shape[1:])

    def token_mask(self) -> Tensor:
        """Return (rows, columns) fp32, 1 for tokens and 0 for padding."""
        rows, columns = self.shape
        return torch.zeros(rows * columns).index_fill(0, self.cells, 1.0).view(rows, columns)

    def index_of_cells(self) -> np.ndarray:
        """Return (rows, columns) the index in the packed row of each token, -1 at padding."""
        table = np.full(self.shape[0] * self.shape[1], -1)
        table[self.cells.numpy()] = self.indices.numpy()
        return table.reshape(self.shape)


def pack_call(model: nn.Module, inputs: Mapping[str, Any], *, share: bool) -> PackedCall:
    """Pack the rows of a call.

    Args:
        model: Backbone of transformers.
        inputs: Arguments of the call: ``input_ids`` (rows, columns), and optionally ``attention_mask``,
            ``position_ids`` and ``token_type_ids`` of the same shape.
        share: True if rows may share prefixes.

    Raises:
        NotPackable: if the rows have gaps or unusual positions.
    """
    tokens = inputs["input_ids"]
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.numel() == 0:
        raise NotPackable("the call has no input_ids of two dimensions")
    ids = tokens.numpy()
    mask = inputs.get("attention_mask")
    positions = inputs.get("position_ids")
    if mask is not None and mask.shape != tokens.shape:
        raise NotPackable("the attention mask is not a mask of padding")
    table = None if positions is None else np.broadcast_to(positions.numpy(), ids.shape)
    spans = _spans_without_padding(ids, table) if mask is None else spans_of_mask(mask.numpy() != 0)
    if table is None:
        _check_positions(model, spans)
    elif any(np.any(np.diff(table[row, start:stop]) != 1) for row, start, stop in spans):
        raise NotPackable("the positions of a row are not consecutive")
    kinds = inputs.get("token_type_ids")
    segments = None if kinds is None else np.broadcast_to(kinds.numpy(), ids.shape)
    rows = [
        _Row(
            ids[row, start:stop].astype(np.int32),
            None if segments is None else segments[row, start:stop],
            np.zeros(stop - start, bool),
        )
        for row, start, stop in spans
    ]
    batch = pack(
        rows,
        share=share,
        fill=loader.library() is None,
        first_position=first_position(model),
        segments=segments is not None,
    )
    columns = ids.shape[1]
    cells = [np.arange(row * columns + start, row * columns + stop) for row, start, stop in spans]
    indices = [member.indices for member in batch.members]
    return PackedCall(
        batch, tuple(ids.shape), torch.from_numpy(np.concatenate(cells)), torch.from_numpy(np.concatenate(indices))
    )


def spans_of_mask(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (row, start, stop) of the tokens of each row."""
    spans = []
    for row, visible in enumerate(mask):
        columns = np.flatnonzero(visible)
        if not len(columns):
            raise NotPackable("a row has no tokens")
        start = int(columns[0])
        stop = int(columns[-1]) + 1
        if stop - start != len(columns):
            raise NotPackable("the attention mask has gaps")
        spans.append((row, start, stop))
    return spans


def _spans_without_padding(ids: np.ndarray, positions: np.ndarray | None) -> list[tuple[int, int, int]]:
    """Return one span per row, or per part of a row in which positions restart at 0."""
    spans = []
    for row in range(len(ids)):
        starts = [0] if positions is None else sorted({0, *np.flatnonzero(positions[row] == 0).tolist()})
        spans += [(row, start, stop) for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
    return spans


def _check_positions(model: nn.Module, spans: list[tuple[int, int, int]]) -> None:
    """Check that the position of a token may be counted from the start of its row.

    Without positions, transformers counts them from the first column. With padding on the left, this is the same only
    for rotary positions.
    """
    is_rotary = any("rotary" in name for name, _ in model.named_modules())
    if not is_rotary and any(start for _, start, _ in spans):
        raise NotPackable("a model with absolute positions and rows that are padded on the left")
