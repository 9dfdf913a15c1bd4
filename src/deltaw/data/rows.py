"""Numbered rows of one or several files."""

from __future__ import annotations

import bisect
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from deltaw.hub import packages
from deltaw.untrusted_paths import AllowedFolders

Row = Mapping[str, object]


@dataclass(frozen=True)
class RowFolder:
    """Folder of a file with rows, which may refer to other files.

    Attributes:
        path: Folder of relative paths. None if the rows may not refer to files.
        allowed: Folders that downloaded rows may refer to, or None for files of the user.
    """

    path: Path | None
    allowed: AllowedFolders | None = None

    def find(self, name: str | Path) -> Path | None:
        """Return the path of a file that a row refers to, or None if the row may not refer to it.

        Rows of the user may refer to any file, unless the process reads them for an agent or a web page.

        Args:
            name: Text of the row, which is relative to the folder, or a path of this process.
        """
        if self.path is None:
            return None
        path = self.path / name if isinstance(name, str) else name
        allowed = self.allowed or AllowedFolders.of_process()
        return path if allowed is None else allowed.find(path)


# Folder of rows that may not refer to files.
NO_FOLDER = RowFolder(None)


class NumberedRows(Sequence[tuple[int, Row]]):
    """Sequence of ``(number, row)`` over one or several files.

    Args:
        name: The reference that the rows were read from.
        parts: For each file, its name, the numbers of its rows (from 1, line numbers in JSON Lines) and the rows.
        columns: Names of all columns, in order of first appearance.
        fills_nulls: True if the rows are read from typed columns, which contain null for missing values.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[tuple[str, Sequence[int], Sequence[Row]]],
        columns: Sequence[str] | None = None,
        *,
        fills_nulls: bool = False,
    ) -> None:
        self.name = name
        self.fills_nulls = fills_nulls
        self._parts = list(parts)
        self._starts = [0]
        for _, numbers, _rows in self._parts:
            self._starts.append(self._starts[-1] + len(numbers))
        self.columns = list(columns) if columns is not None else _columns_of(self._parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """Return ``(number, row)`` for an index, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        part, inside = self._find(index % len(self))
        _, numbers, rows = self._parts[part]
        return numbers[inside], rows[inside]

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for _, numbers, rows in self._parts:
            yield from zip(numbers, rows, strict=True)

    def number(self, index: int) -> int:
        """Return the number of the row at ``index``."""
        part, inside = self._find(index)
        return self._parts[part][1][inside]

    def row_location(self, index: int) -> str:
        """Return the location of the row at ``index`` for messages, for example ``"data.jsonl, row 7"``."""
        part, inside = self._find(index)
        name, numbers, _ = self._parts[part]
        return f"{name}, row {numbers[inside]}"

    def tables(self) -> list[Table] | None:
        """Return the files as tables, or None if a file is not a table."""
        tables = [rows for _, _, rows in self._parts if isinstance(rows, Table)]
        return tables if len(tables) == len(self._parts) else None

    def file(self, index: int) -> str:
        """Return the name of the file that contains the row at ``index``."""
        return self._parts[self._find(index)[0]][0]

    def folder(self, index: int) -> RowFolder:
        """Return the folder of that file."""
        return _folder_of(self.file(index))

    @staticmethod
    def concat(name: str, sources: Sequence[NumberedRows]) -> NumberedRows:
        """Concatenate the rows of several sources."""
        columns = dict.fromkeys(column for rows in sources for column in rows.columns)
        fills = any(rows.fills_nulls for rows in sources)
        return NumberedRows(name, [p for rows in sources for p in rows._parts], list(columns), fills_nulls=fills)

    def _find(self, index: int) -> tuple[int, int]:
        part = bisect.bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]


class Table(Sequence[Row]):
    """Rows with the same columns, stored as cells and converted to mappings on access.

    Args:
        header: Column names.
        rows: The cells of each row.
        has_header: True if the file contains the column names.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[str]], has_header: bool = True) -> None:
        self.header = list(header)
        self.has_header = has_header
        self.cells = rows

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return dict(zip(self.header, self.cells[index], strict=True))


@functools.lru_cache(maxsize=64)
def _folder_of(file: str) -> RowFolder:
    if packages.is_package_reference(file):
        package = packages.member(file).parent
        return RowFolder(package, AllowedFolders((package.resolve(),)))
    folder = Path(os.path.expanduser(file)).parent
    if folder.is_dir():
        return RowFolder(folder)
    # Rows of a hub data set of images have absolute paths in these caches.
    caches = [constants.HF_HUB_CACHE, os.environ.get("HF_DATASETS_CACHE", f"{constants.HF_HOME}/datasets")]
    return RowFolder(folder, AllowedFolders(tuple(Path(cache).resolve() for cache in caches)))


def _columns_of(parts: Sequence[tuple[str, Sequence[int], Sequence[Row]]]) -> list[str]:
    columns: dict[str, None] = {}
    for _, _, rows in parts:
        if isinstance(rows, Table):
            columns.update(dict.fromkeys(rows.header if len(rows) else ()))
            continue
        for row in rows:
            if not columns.keys() >= row.keys():
                columns.update(dict.fromkeys(row))
    return list(columns)
