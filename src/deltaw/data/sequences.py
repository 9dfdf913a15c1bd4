"""Concatenated and indexed views of row sequences that may be too large to copy.

Plain lists are supported as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class ConcatSequence(Sequence[Any]):
    """Concatenation of sequences without copying them."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = list(parts)
        self._stops = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return select_rows(self, np.arange(len(self))[index])
        position = range(len(self))[index]
        part = int(np.searchsorted(self._stops, position, side="right"))
        return self._parts[part][position - int(self._stops[part]) + len(self._parts[part])]

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            yield from part

    @property
    def lengths(self) -> np.ndarray:
        """Return (n,) row lengths."""
        return np.concatenate([lengths_of(part) for part in self._parts])

    def used_tokens(self) -> np.ndarray:
        """Return distinct token ids in ascending order: a superset of those in the rows."""
        return np.unique(np.concatenate([used_tokens(part) for part in self._parts]))

    def digest(self) -> bytes:
        """Return a hash of the rows' content."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts:
            digest.update(part.digest() if hasattr(part, "digest") else repr(len(part)).encode())
        return digest.digest()


class IndexedSequence(Sequence[Any]):
    """View of the rows of a sequence at given indices."""

    def __init__(self, rows: Sequence[Any], indices: np.ndarray) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return IndexedSequence(self._rows, self._indices[index])
        return self._rows[int(self._indices[index])]

    @property
    def lengths(self) -> np.ndarray:
        """Return (n,) row lengths."""
        return lengths_of(self._rows)[self._indices]


def concat_rows(*parts: Sequence[Any]) -> Sequence[Any]:
    """Concatenate row sequences: lists into a list, other sequences into a view."""
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in part]
    return ConcatSequence([part for part in parts if len(part)] or parts[:1])


def select_rows(rows: Sequence[Any], indices: np.ndarray) -> Sequence[Any]:
    """Return the rows at ``indices``: a list for a list, a view for other sequences."""
    if isinstance(rows, list):
        return [rows[index] for index in indices.tolist()]
    return rows.select(indices) if hasattr(rows, "select") else IndexedSequence(rows, indices)


def lengths_of(rows: Sequence[Any]) -> np.ndarray:
    """Return (n,) row lengths without loading stored rows."""
    lengths = getattr(rows, "lengths", None)
    return np.fromiter(map(len, rows), np.int64, len(rows)) if lengths is None else lengths


def used_tokens(rows: Sequence[Any]) -> np.ndarray:
    """Return the distinct tokens of rows and of the rows of groups, in ascending order."""
    if hasattr(rows, "used_tokens"):
        return rows.used_tokens()
    tokens = [row.tokens for group in rows for row in getattr(group, "rows", (group,)) if hasattr(row, "tokens")]
    return np.unique(np.concatenate(tokens)) if tokens else np.zeros(0, np.int32)
