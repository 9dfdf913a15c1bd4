"""Decode a Parquet or Arrow file in a process of limited memory.

A file of a kilobyte can decode to gigabytes through compression, dictionaries or run-length encoding, and its metadata
may contain false sizes. This script therefore exits when Arrow has allocated too much. It writes the record batches to
standard output as an uncompressed Arrow stream. :mod:`deltaw.data.arrow_rows` starts it. It does not import deltaw.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

# Exit status after exceeding the memory limit. Standard error then has the part of the file and the reason.
TOO_LARGE = 3
# Target size of a batch.
_BATCH_BYTES = 64 * 2**20
_SECONDS_BETWEEN_CHECKS = 0.005


class MemoryLimit:
    """Exits the process if Arrow's memory pool allocates too many bytes for the part of the file that is decoded.

    Args:
        min_bytes: Number of bytes that each part may take.
        max_expansion: A part may also take this multiple of its size in the file.
    """

    def __init__(self, min_bytes: int, max_expansion: int) -> None:
        import pyarrow

        self._pool = pyarrow.default_memory_pool()
        self._max_expansion = max_expansion
        self._part = ""
        self._stored = 0
        self._limit = min_bytes
        threading.Thread(target=self._watch, daemon=True).start()

    def start_part(self, part: str, stored: int) -> None:
        """Set the limit for decoding a part of ``stored`` bytes. The limit never decreases, as the peak is compared."""
        self._part, self._stored, self._limit = part, stored, max(self._limit, self._max_expansion * stored)

    def check(self) -> None:
        """Exit if the peak of allocated bytes exceeds the limit."""
        if self._pool.max_memory() > self._limit:
            reason = f"{self._stored:,} bytes of the file become more than {self._limit:,} in memory"
            print(self._part, reason, sep="\n", end="", file=sys.stderr, flush=True)
            os._exit(TOO_LARGE)

    def _watch(self) -> None:
        """Check while the main thread decodes."""
        while True:
            self.check()
            time.sleep(_SECONDS_BETWEEN_CHECKS)


def parquet_batches(
    path: str, first_row: int, batch_rows: int, memory: MemoryLimit
) -> "Iterator[pyarrow.Schema | pyarrow.RecordBatch]":
    """Yield the schema, then batches of at most ``batch_rows`` rows from ``first_row`` on.

    If ``batch_rows`` is 1, columns with dictionaries are read as dictionaries, so that a value repeated in a row is
    stored once.
    """
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    dictionaries = _dictionary_columns(metadata) if batch_rows == 1 else []
    file = pyarrow.parquet.ParquetFile(path, metadata=metadata, read_dictionary=dictionaries, pre_buffer=False)
    yield file.schema_arrow
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if first_row >= group.num_rows > 0:
            first_row -= group.num_rows
            continue
        chunks = [group.column(index) for index in range(group.num_columns)]
        stored = min(sum(chunk.total_compressed_size for chunk in chunks), os.path.getsize(path))
        memory.start_part(f"group {number + 1} of rows", stored)
        # The metadata may be false, but then the memory limit applies.
        decoded = sum(chunk.total_uncompressed_size + 8 * chunk.num_values for chunk in chunks)
        count = _BATCH_BYTES * group.num_rows // max(1, decoded)
        for batch in file.iter_batches(max(1, min(batch_rows, count)), row_groups=[number]):
            skipped = min(first_row, batch.num_rows)
            first_row -= skipped
            yield batch.slice(skipped)


def _dictionary_columns(metadata: "pyarrow.parquet.FileMetaData") -> list[int]:
    """Return the text columns that have dictionaries, except those that Arrow cannot read as dictionaries."""
    columns = []
    for index in range(metadata.num_columns):
        chunks = [metadata.row_group(number).column(index) for number in range(metadata.num_row_groups)]
        is_text = all(chunk.physical_type == "BYTE_ARRAY" for chunk in chunks)
        encodings = " ".join(encoding for chunk in chunks for encoding in chunk.encodings)
        if is_text and "DICTIONARY" in encodings and "DELTA" not in encodings:
            columns.append(index)
    return columns


def arrow_batches(path: str, memory: MemoryLimit) -> "Iterator[pyarrow.Schema | pyarrow.RecordBatch]":
    """Yield the schema, then the batches."""
    import pyarrow.ipc

    buffer = pyarrow.memory_map(path).read_buffer()
    # A file is a stream with an additional index, which is not needed for sequential reading.
    if buffer.slice(0, 6).to_pybytes() == b"ARROW1":
        buffer = buffer.slice(8)
    stream = pyarrow.ipc.open_stream(buffer)
    yield stream.schema
    stored = 0
    for number, message in enumerate(pyarrow.ipc.MessageReader.open_stream(buffer)):
        stored += 0 if message.body is None else message.body.size
        memory.start_part(f"message {number}", stored)
        if message.type == "record batch":
            batch = stream.read_next_batch()
            batch.validate(full=True)  # offsets and text are used as they are
            yield batch


def main() -> None:
    """Decode the file that the first argument describes. The other arguments are the module search path."""
    path, kind, first_row, batch_rows, min_bytes, max_expansion = json.loads(sys.argv[1])
    sys.path[:] = sys.argv[2:]
    sys.modules["numpy"] = None  # type: ignore[assignment]  # optional for pyarrow, and half of the time to start
    import pyarrow.ipc

    memory = MemoryLimit(min_bytes, max_expansion)
    try:
        is_parquet = kind == "parquet"
        batches = parquet_batches(path, first_row, batch_rows, memory) if is_parquet else arrow_batches(path, memory)
        with pyarrow.ipc.new_stream(pyarrow.PythonFile(sys.stdout.buffer, "w"), next(batches)) as stream:
            for batch in batches:
                memory.check()
                stream.write_batch(batch)
    except (pyarrow.ArrowException, ValueError, LookupError, ArithmeticError, OSError) as error:
        memory.check()
        sys.exit(str(error))


if __name__ == "__main__":
    main()
