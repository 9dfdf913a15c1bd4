"""Rows of a padded batch, or of a batch without padding in which positions restart, packed into one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.packing import MicroBatch, pack
from deltaw.kernels import loader
from deltaw.runtime.packed import first_position

# Types of rotary positions whose frequencies change if a batch is longer than the original model's rows.
_ROPE_TYPES_BY_LENGTH = ("dynamic", "longrope")


class NotPackable(Exception):
    """A call has rows that cannot be packed. The message is the reason."""


@dataclass(frozen=True)
class PositionRules:
    """Positions of tokens in a model.

    Attributes:
        is_rotary: True if only differences of positions have an effect.
        first: Position of a row's first token.
        padding_id: Token id that has no position, or None. RoBERTa and related models count the other tokens.
        length_limit: Number of columns from which the frequencies of rotary positions depend on the number, or None.
    """

    is_rotary: bool
    first: int
    padding_id: int | None
    length_limit: int | None

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> PositionRules:
        """Return the rules of a model."""
        is_rotary = any("rotary" in name for name, _ in backbone.named_modules())
        first = first_position(backbone)
        return cls(is_rotary, first, first - 1 if first else None, _length_limit(backbone))


def _length_limit(backbone: PreTrainedModel) -> int | None:
    config = backbone.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = []
    for options in (parameters, *(value for value in parameters.values() if isinstance(value, Mapping))):
        if options.get("rope_type") in _ROPE_TYPES_BY_LENGTH:
            original = options.get("original_max_position_embeddings") or config.max_position_embeddings
            limits.append(min(int(original), int(config.max_position_embeddings)))
    return min(limits, default=None)


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
        flat = values
        if self.has_padding:
            flat = values.new_zeros(rows * columns, *values.shape[1:]).index_copy(0, self.cells, values)
        return flat.view(rows, columns, *values.shape[1:])

    @property
    def has_padding(self) -> bool:
        """True if cells of the call contain no token."""
        return len(self.cells) < self.shape[0] * self.shape[1]

    def padding(self) -> Tensor:
        """Return (rows, columns) bool, True at padding."""
        rows, columns = self.shape
        return torch.ones(rows * columns, dtype=torch.bool).index_fill(0, self.cells, False).view(rows, columns)

    def index_of_cells(self) -> np.ndarray:
        """Return (rows, columns) the index in the packed row of each token, -1 at padding."""
        table = np.full(self.shape[0] * self.shape[1], -1)
        table[self.cells.numpy()] = self.indices.numpy()
        return table.reshape(self.shape)


def pack_call(positions: PositionRules, inputs: Mapping[str, Any], *, share: bool) -> PackedCall:
    """Pack the rows of a call.

    Args:
        positions: Rules of the backbone.
        inputs: Arguments of the call: ``input_ids`` (rows, columns), and optionally ``attention_mask``,
            ``position_ids`` and ``token_type_ids`` of the same shape.
        share: True if rows may share prefixes.

    Raises:
        NotPackable: if the rows have gaps or unusual positions.
    """
    tokens = inputs["input_ids"]
    ids = tokens.numpy()
    mask = inputs.get("attention_mask")
    table = _broadcast(inputs.get("position_ids"), ids.shape, "position_ids")
    segments = _broadcast(inputs.get("token_type_ids"), ids.shape, "token_type_ids")
    spans = _spans_without_padding(ids, table) if mask is None else spans_of_mask(mask.numpy() != 0)
    last_position = ids.shape[1] - 1 if table is None else int(table.max())
    if positions.length_limit is not None and last_position + 1 >= positions.length_limit:
        raise NotPackable("rotary positions that depend on the length of the batch")
    if table is None:
        _check_counted_positions(positions, ids, spans)
    else:
        _check_given_positions(positions, table, spans)
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
        # Prefixes are compared by their token ids only.
        share=share and (segments is None or not segments.any()),
        fill=loader.library() is None,
        first_position=positions.first,
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


def _broadcast(values: Tensor | None, shape: tuple[int, ...], name: str) -> np.ndarray | None:
    if values is None:
        return None
    if values.dim() > 2 or values.shape[-1] != shape[1]:
        raise NotPackable(f"{name} of another shape than input_ids")
    return np.broadcast_to(values.numpy(), shape)


def _check_counted_positions(positions: PositionRules, ids: np.ndarray, spans: list[tuple[int, int, int]]) -> None:
    """Check that the position of a token may be counted from the start of its row.

    Without positions, transformers counts them from the first column. With padding on the left, this is the same only
    for rotary positions.
    """
    if positions.is_rotary:
        return
    if any(start for _, start, _ in spans):
        raise NotPackable("a model with absolute positions and rows that are padded on the left")
    if any((ids[row, start:stop] == positions.padding_id).any() for row, start, stop in spans):
        raise NotPackable("padding tokens that the attention mask does not hide")


def _check_given_positions(positions: PositionRules, table: np.ndarray, spans: list[tuple[int, int, int]]) -> None:
    for row, start, stop in spans:
        if np.any(np.diff(table[row, start:stop]) != 1):
            raise NotPackable("the positions of a row are not consecutive")
        if not positions.is_rotary and table[row, start] != positions.first:
            raise NotPackable("the positions of a row start at another number")
