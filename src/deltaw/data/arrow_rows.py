"""The rows of Parquet and Arrow files, and of tables in memory, some at a time.

How much memory a row takes is computed from its columns before any of its values become objects, since one
value may stand in many rows. It knows single files; not references or what columns mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.arrow_bounds import BATCH_ROWS, check_group, decoded_sizes
from deltaw.data.bad_rows import MAX_ROW_BYTES, TOO_LONG, too_long
from deltaw.data.row_files import OnBad, reading
from deltaw.data.rows import Row
from deltaw.errors import UserError

if TYPE_CHECKING:
    import pyarrow

# Rows that are made into objects at once take about so many bytes, unless one alone takes more.
_PART_BYTES = 2**20
# Elements of lists whose sizes are computed at once.
_ELEMENTS = 2**22
# What an element of a list counts beside its value: a list of nulls takes memory too, as objects.
_ELEMENT_BYTES = 8


@contextlib.contextmanager
def reading_arrow(name: str, kind: str) -> Iterator[None]:
    """While open, what a damaged file raises becomes a UserError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, LookupError, ArithmeticError) as error:
        # Besides Arrow's own: text that is not UTF-8, headers that point outside, times beyond Python's.
        hint = "copy the file again, and check that its suffix matches its content"
        shown = "Parquet file" if kind == "parquet" else "Arrow file"
        raise UserError(f"the {shown} cannot be read: {error}", where=name, hint=hint) from error


class ArrowRows:
    """The rows of a Parquet or Arrow file.

    Args:
        name: of the file, for messages. kind: "parquet" or "arrow".
        max_bytes: the most bytes that a row may have.

    Attributes:
        columns: their names. rows: how many rows there are; None where only reading the file tells.
    """

    def __init__(self, path: Path, name: str, kind: str, *, max_bytes: int = MAX_ROW_BYTES) -> None:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet

        self._path, self._name, self._kind, self._most = path, name, kind, max_bytes
        self.rows: int | None = None
        with reading(name), reading_arrow(name, kind):
            if kind == "parquet":
                self._parquet = pyarrow.parquet.ParquetFile(path)
                self.columns = list(self._parquet.schema_arrow.names)
                self.rows = self._parquet.metadata.num_rows
                return
            file = pyarrow.memory_map(str(path))
            # What a file has more than a stream, an index at its end, is not needed to read all of it.
            self._stream = file.read_buffer()
            if self._stream.slice(0, 6).to_pybytes() == b"ARROW1":
                self._stream = self._stream.slice(8)
            self.columns = list(pyarrow.ipc.open_stream(self._stream).schema.names)

    def read(self, on_bad: OnBad | None = None) -> Iterator[tuple[int, Row, int]]:
        """Number, row and bytes of each row.

        Raises:
            UserError: the file cannot be read, decoding it takes memory out of all proportion, or a row is
                too long and there is no ``on_bad`` to be told of it.
        """
        begin = 1
        with reading(self._name), reading_arrow(self._name, self._kind):
            for batch in self._batches():

                def made(start: int, stop: int, batch: pyarrow.RecordBatch = batch) -> list[Row]:
                    return batch.slice(start, stop - start).to_pylist()

                yield from rows_of(batch, made, begin, self._name, on_bad, max_bytes=self._most)
                begin += batch.num_rows

    def _batches(self) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow.ipc
        import pyarrow.parquet

        if self._kind == "parquet":
            with self._path.open("rb") as file:
                for number in range(self._parquet.num_row_groups):
                    group = check_group(self._parquet, number, file, self._name)
                    parquet = pyarrow.parquet.ParquetFile(
                        self._path,
                        metadata=self._parquet.metadata,
                        read_dictionary=list(group.dictionaries),
                        pre_buffer=False,
                    )
                    yield from parquet.iter_batches(group.rows, row_groups=[number])
            return
        messages = pyarrow.ipc.MessageReader.open_stream(self._stream)
        checked = decoded_sizes(messages, self._name)
        stream = pyarrow.ipc.open_stream(self._stream)
        while next(checked, self) is not self:
            batch = stream.read_next_batch()
            batch.validate(full=True)  # offsets and text are used as they are
            yield batch


def rows_of(
    batch: pyarrow.RecordBatch,
    made: Callable[[int, int], list[Row]],
    begin: int,
    name: str,
    on_bad: OnBad | None,
    *,
    max_bytes: int,
) -> Iterator[tuple[int, Row, int]]:
    """Number, row and bytes of each row of a batch.

    Args:
        made: the rows from a place up to another, as objects. begin: the number of the first.
        name, on_bad, max_bytes: as in :class:`ArrowRows`.
    """
    for start in range(0, batch.num_rows, BATCH_ROWS):
        piece = batch.slice(start, BATCH_ROWS)
        sizes = np.zeros(piece.num_rows, np.int64)
        for place, column in enumerate(piece.columns):
            sizes += _sizes(column, f"{name}, column '{piece.schema.names[place]}'", max_bytes)
        ends = np.cumsum(sizes)
        first = 0
        while first < len(sizes):
            most = int(ends[first] - sizes[first]) + _PART_BYTES
            stop = max(first + 1, int(np.searchsorted(ends, most, side="right")))
            alone = stop == first + 1 and sizes[first] > max_bytes
            rows = [{}] if alone else made(start + first, start + stop)
            for place, row in enumerate(rows, start=first):
                number, size = begin + start + place, int(sizes[place])
                if size <= max_bytes:
                    yield number, row, size
                    continue
                error = too_long(f"row {number}", max_bytes, where=f"{name}, row {number}", size=size)
                if on_bad is None:
                    raise error
                on_bad(error, TOO_LONG, f"<{size:,} bytes>")
            first = stop


def _sizes(array: pyarrow.Array, where: str, max_bytes: int) -> np.ndarray:
    """int64 (rows,): the bytes that each value takes for itself, however it is shared in the column. Of lists
    of more elements than ``max_bytes`` allows, a lower bound."""
    import pyarrow
    import pyarrow.compute
    from pyarrow import types

    kind = array.type
    width = _width(kind)
    if width is not None:
        return np.full(len(array), width, np.int64)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _sizes(array.storage, where, max_bytes)
    if types.is_dictionary(kind):
        once = _sizes(array.dictionary, where, max_bytes)
        places = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return once[places] if len(once) else np.zeros(len(array), np.int64)
    if types.is_struct(kind):
        return sum(
            (_sizes(part, where, max_bytes) for part in array.flatten()), np.zeros(len(array), np.int64)
        )
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)  # the length comes first
        return views[array.offset : array.offset + len(array), 0].astype(np.int64)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        return _list_sizes(array, array.offsets.to_numpy(), where, max_bytes)
    if types.is_fixed_size_list(kind):
        offsets = np.arange(array.offset, array.offset + len(array) + 1, dtype=np.int64) * kind.list_size
        return _list_sizes(array, offsets, where, max_bytes)
    try:
        lengths = pyarrow.compute.binary_length(array).fill_null(0)
    except pyarrow.ArrowNotImplementedError:
        raise UserError(
            f"a column of the type {kind} cannot be read", where=where, hint="leave the column out"
        ) from None
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _list_sizes(array: Any, offsets: np.ndarray, where: str, max_bytes: int) -> np.ndarray:
    """The sizes of lists whose elements are those of ``array.values`` between their ``offsets``."""
    counts = np.diff(offsets).astype(np.int64)
    width = _width(array.values.type)
    if width is not None:
        return counts * (width + _ELEMENT_BYTES)
    if len(counts) > 1 and offsets[-1] - offsets[0] > _ELEMENTS:
        half = len(counts) // 2
        return np.concatenate(
            [_list_sizes(array, part, where, max_bytes) for part in (offsets[: half + 1], offsets[half:])]
        )
    if len(counts) == 1 and counts[0] * _ELEMENT_BYTES > max_bytes:
        return counts * _ELEMENT_BYTES
    values = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    ends = np.concatenate([[0], np.cumsum(_sizes(values, where, max_bytes) + _ELEMENT_BYTES)])
    return np.diff(ends[offsets - offsets[0]])


def _width(kind: pyarrow.DataType) -> int | None:
    """The bytes of each value of a type; None where values differ."""
    from pyarrow import types

    if types.is_null(kind):
        return 0
    if types.is_dictionary(kind):
        return None
    if types.is_fixed_size_list(kind):
        width = _width(kind.value_type)
        return None if width is None else kind.list_size * (width + _ELEMENT_BYTES)
    if types.is_struct(kind):
        widths = [_width(field.type) for field in kind]
        return None if None in widths else sum(width for width in widths if width is not None)
    try:
        return -(-kind.bit_width // 8)
    except ValueError:
        return None
