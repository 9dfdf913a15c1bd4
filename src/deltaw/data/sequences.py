"""Rows in sequences that may be too long to be made at once: joined, picked, and their lengths.

Plain lists are treated alike. It knows that a row has a length; not where rows are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Joined(Sequence[Any]):
    """Sequences one after another, none of them copied."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return picked(self, np.arange(len(self))[index])
        place = range(len(self))[index]
        part = int(np.searchsorted(self._ends, place, side="right"))
        return self._parts[part][place - int(self._ends[part]) + len(self._parts[part])]

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            yield from part

    @property
    def lengths(self) -> np.ndarray:
        """(n,) the length of each row."""
        return np.concatenate([lengths_of(part) for part in self._parts])

    def used_tokens(self) -> np.ndarray:
        """Different tokens, ascending: all that occur in the rows, and perhaps others."""
        return np.unique(np.concatenate([used_tokens(part) for part in self._parts]))

    def digest(self) -> bytes:
        """A hash of the rows' content."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts:
            digest.update(part.digest() if hasattr(part, "digest") else repr(len(part)).encode())
        return digest.digest()


class Picked(Sequence[Any]):
    """Rows of a sequence at given indices."""

    def __init__(self, rows: Sequence[Any], indices: np.ndarray) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return Picked(self._rows, self._indices[index])
        return self._rows[int(self._indices[index])]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) the length of each row."""
        return lengths_of(self._rows)[self._indices]


def joined(*parts: Sequence[Any]) -> Sequence[Any]:
    """The parts one after another: a list of lists' rows, a view of others."""
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in part]
    return Joined([part for part in parts if len(part)] or parts[:1])


def picked(rows: Sequence[Any], indices: np.ndarray) -> Sequence[Any]:
    """The rows at these indices: a list of a list's rows, a view of others."""
    if isinstance(rows, list):
        return [rows[index] for index in indices.tolist()]
    return rows.picked(indices) if hasattr(rows, "picked") else Picked(rows, indices)


def lengths_of(rows: Sequence[Any]) -> np.ndarray:
    """(n,) the length of each row, of rows that are stored without making one."""
    known = getattr(rows, "lengths", None)
    return np.fromiter(map(len, rows), np.int64, len(rows)) if known is None else known


def used_tokens(rows: Sequence[Any]) -> np.ndarray:
    """Return the distinct tokens of rows and of the rows of groups, in ascending order."""
    if hasattr(rows, "used_tokens"):
        return rows.used_tokens()
    found = [row.tokens for group in rows for row in getattr(group, "rows", (group,)) if hasattr(row, "tokens")]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int32)
