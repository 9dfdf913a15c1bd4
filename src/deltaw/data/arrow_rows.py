"""Rows of Parquet and Arrow files and tables, in batches of limited memory.

The memory of a row is computed from its columns before values are converted to objects, because rows may share a stored
value.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.child_process import minimal_environment, start_command
from deltaw.data import arrow_decoder
from deltaw.data.bad_rows import OnBad, too_long_error
from deltaw.data.compressed_files import MAX_EXPANSION
from deltaw.data.row_files import reading
from deltaw.data.rows import Row
from deltaw.errors import UserError
from deltaw.settings.data import MAX_ROW_BYTES

if TYPE_CHECKING:
    import pyarrow

# A row group or record batch may take MIN_DECODED_BYTES of memory, or MAX_EXPANSION times its size in the file.
MIN_DECODED_BYTES = 256 * 2**20
# Maximum number of rows per batch. If a batch exceeds the memory limit, a Parquet file is read row by row from there.
BATCH_ROWS = 1024
_ATTEMPTS = (BATCH_ROWS, 1)
_TOO_LARGE_HINTS = {
    "parquet": "if it is correct, write it again with smaller row groups (row_group_size)",
    "arrow": "if it is correct, write it again in smaller batches or uncompressed",
}
# Approximate size of the rows that are converted to objects at once.
_PART_BYTES = 2**20
# Number of list elements whose sizes are computed at once.
_ELEMENTS = 2**22
# Overhead of a list element, which counts for nulls as well, because they need memory as objects.
_ELEMENT_BYTES = 8
# Overhead of a field of a struct, which becomes an entry of a dictionary.
_FIELD_BYTES = 32


@contextlib.contextmanager
def reading_arrow(name: str, kind: str) -> Iterator[None]:
    """Convert exceptions from damaged files to UserErrors."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, LookupError, ArithmeticError) as error:
        # Other errors are from invalid UTF-8, offsets outside of buffers, and times out of Python's range.
        hint = "copy the file again, and check that its suffix matches its content"
        file_type = "Parquet file" if kind == "parquet" else "Arrow file"
        raise UserError(f"the {file_type} cannot be read: {error}", location=name, hint=hint) from error


def parquet_metadata(path: Path, name: str) -> tuple[list[str], int]:
    """Return column names and number of rows of a Parquet file.

    Args:
        name: File name, for messages.
    """
    import pyarrow.parquet

    with reading(name), reading_arrow(name, "parquet"):
        file = pyarrow.parquet.ParquetFile(path)
        return list(file.schema_arrow.names), file.metadata.num_rows


def read_arrow(
    path: Path, name: str, kind: str, on_bad: OnBad | None, *, max_bytes: int = MAX_ROW_BYTES
) -> Generator[tuple[int, Row, int], None, None]:
    """Yield number, row and size in bytes of each row of a Parquet or Arrow file.

    Args:
        name: File name, for messages.
        kind: "parquet" or "arrow".
        on_bad: Receives rows that are too long. Without it they raise an error.
        max_bytes: Maximum size of a row in bytes.

    Raises:
        UserError: if the file cannot be read or needs memory out of proportion to its size, or if a row is too long.
    """
    first_number = 1
    with reading(name), reading_arrow(name, kind):
        for batch in _batches(path, name, kind):

            def to_rows(start: int, stop: int, batch: pyarrow.RecordBatch = batch) -> list[Row]:
                return batch.slice(start, stop - start).to_pylist()

            yield from rows_of(batch, to_rows, first_number, name, on_bad, max_bytes=max_bytes)
            first_number += batch.num_rows


def _batches(path: Path, name: str, kind: str) -> Iterator[pyarrow.RecordBatch]:
    attempts = _ATTEMPTS if kind == "parquet" else _ATTEMPTS[:1]
    row = 0
    for batch_rows in attempts:
        try:
            for batch in _decode(path, name, kind, row, batch_rows):
                row += batch.num_rows
                yield batch
            return
        except _TooLargeError:
            if batch_rows == attempts[-1]:
                raise


class _TooLargeError(UserError):
    """A part of a file needs memory out of proportion to its size."""


def _decode(path: Path, name: str, kind: str, first_row: int, batch_rows: int) -> Iterator[pyarrow.RecordBatch]:
    """Decode a file in a process of limited memory.

    Args:
        name: File name, for messages.
        first_row: Index of the first row to yield.
        batch_rows: Maximum number of rows per batch of a Parquet file.
    """
    import pyarrow.ipc

    options = json.dumps([str(path), kind, first_row, batch_rows, MIN_DECODED_BYTES, MAX_EXPANSION])
    command = [sys.executable, "-I", "-S", "-X", "utf8", arrow_decoder.__file__, options, *sys.path]
    with (
        tempfile.TemporaryFile() as errors,
        start_command(command, environment=minimal_environment(), stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        output: Any = process.stdout
        try:
            yield from pyarrow.ipc.open_stream(output)
        except (pyarrow.ArrowInvalid, OSError):
            if output.read(1) or process.wait() == 0:  # otherwise, the process exited early
                process.kill()
                raise
        except BaseException:
            process.kill()
            raise
        if status := process.wait():
            errors.seek(0)
            text = errors.read().decode("utf-8", "replace").strip()
            if status == arrow_decoder.TOO_LARGE:
                part, message = text.splitlines()[-2:]  # warnings of the memory allocator may precede them
                raise _TooLargeError(message, location=f"{name}, {part}", hint=_TOO_LARGE_HINTS[kind])
            raise pyarrow.ArrowInvalid(text or f"the process that decodes it exited with status {status}")


def rows_of(
    batch: pyarrow.RecordBatch,
    to_rows: Callable[[int, int], list[Row]],
    first_number: int,
    name: str,
    on_bad: OnBad | None,
    *,
    max_bytes: int,
) -> Iterator[tuple[int, Row, int]]:
    """Yield number, row and size in bytes of each row of a batch.

    Args:
        to_rows: Converts rows from a start to a stop index to objects.
        first_number: Number of the first row.
        name: See :func:`read_arrow`.
        on_bad: See :func:`read_arrow`.
        max_bytes: See :func:`read_arrow`.
    """
    for start in range(0, batch.num_rows, BATCH_ROWS):
        piece = batch.slice(start, BATCH_ROWS)
        sizes = np.zeros(piece.num_rows, np.int64)
        for index, column in enumerate(piece.columns):
            sizes += _sizes(column, f"{name}, column '{piece.schema.names[index]}'", max_bytes)
        cumulative = np.cumsum(sizes)
        first = 0
        while first < len(sizes):
            max_total = int(cumulative[first] - sizes[first]) + _PART_BYTES
            stop = max(first + 1, int(np.searchsorted(cumulative, max_total, side="right")))
            rows = [{}] if stop == first + 1 and sizes[first] > max_bytes else to_rows(start + first, start + stop)
            for index, row in enumerate(rows, start=first):
                number = first_number + start + index
                size = int(sizes[index])
                if size <= max_bytes:
                    yield number, row, size
                    continue
                error = too_long_error(f"row {number}", max_bytes, location=f"{name}, row {number}", size=size)
                if on_bad is None:
                    raise error
                on_bad(error, f"<{size:,} bytes>")
            first = stop


def _sizes(array: pyarrow.Array, location: str, max_bytes: int) -> np.ndarray:
    """Return (rows,) int64 sizes of the values in bytes, as if values were not shared.

    The size is a lower bound for lists that exceed ``max_bytes``.
    """
    import pyarrow
    import pyarrow.compute
    from pyarrow import types

    kind = array.type
    width = _width(kind)
    if width is not None:
        return np.full(len(array), width, np.int64)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _sizes(array.storage, location, max_bytes)
    if types.is_dictionary(kind):
        dictionary_sizes = _sizes(array.dictionary, location, max_bytes)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return dictionary_sizes[indices] if len(dictionary_sizes) else np.zeros(len(array), np.int64)
    if types.is_struct(kind):
        fields = np.full(len(array), _FIELD_BYTES * kind.num_fields, np.int64)
        return sum((_sizes(part, location, max_bytes) for part in array.flatten()), fields)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)  # the length is the first field
        lengths = views[array.offset : array.offset + len(array), 0].astype(np.int64)
        # The lengths of nulls are arbitrary.
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), np.maximum(lengths, 0), 0)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        return _list_sizes(array, array.offsets.to_numpy(), location, max_bytes)
    if types.is_fixed_size_list(kind):
        offsets = np.arange(array.offset, array.offset + len(array) + 1, dtype=np.int64) * kind.list_size
        return _list_sizes(array, offsets, location, max_bytes)
    try:
        lengths = pyarrow.compute.binary_length(array).fill_null(0)
    except pyarrow.ArrowNotImplementedError:
        message = f"a column of the type {kind} cannot be read"
        raise UserError(message, location=location, hint="leave the column out") from None
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _list_sizes(array: Any, offsets: np.ndarray, location: str, max_bytes: int) -> np.ndarray:
    """Return the sizes of lists with elements ``array.values`` between ``offsets``."""
    counts = np.diff(offsets).astype(np.int64)
    width = _width(array.values.type)
    if width is not None:
        return counts * (width + _ELEMENT_BYTES)
    if len(counts) > 1 and offsets[-1] - offsets[0] > _ELEMENTS:
        half = len(counts) // 2
        halves = offsets[: half + 1], offsets[half:]
        return np.concatenate([_list_sizes(array, part, location, max_bytes) for part in halves])
    if len(counts) == 1 and counts[0] * _ELEMENT_BYTES > max_bytes:
        return counts * _ELEMENT_BYTES
    values = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    bounds = np.concatenate([[0], np.cumsum(_sizes(values, location, max_bytes) + _ELEMENT_BYTES)])
    return np.diff(bounds[offsets - offsets[0]])


def _width(kind: pyarrow.DataType) -> int | None:
    """Return the size in bytes of each value of a type, or None if sizes vary."""
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
        return None if None in widths else sum(_FIELD_BYTES + width for width in widths if width is not None)
    try:
        return -(-kind.bit_width // 8)
    except ValueError:
        return None
