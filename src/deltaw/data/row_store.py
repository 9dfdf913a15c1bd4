"""Examples in memory or in an Arrow file, and views of them.

The record batches of the file contain tokens, label spans and answers. Rows are read at their offsets instead of
through a memory map, so that resident memory does not grow with the number of rows read. Each row is verified with its
hash.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, overload

import numpy as np

from deltaw.data.example import ConcatSequence, Example, rows_of
from deltaw.data.row_selection import KEY_BYTES, as_keys
from deltaw.errors import UserError

if TYPE_CHECKING:
    import pyarrow

# Version of the file format, part of the cache key.
FORMAT = 1
# Token ids below this limit are marked in a byte array to find the used ones. Vocabularies are smaller.
MARKED_TOKENS = 2**22


class RowView(Sequence[Example]):
    """Examples of a store in a given order, loaded on access.

    Args:
        store: Store of the examples.
        indices: (n,) indices into the store. They may repeat.
    """

    def __init__(self, store: RowStore, indices: np.ndarray) -> None:
        self.store = store
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> RowView: ...

    def __getitem__(self, index: int | slice) -> Example | RowView:
        if isinstance(index, slice):
            return RowView(self.store, self.indices[index])
        return self.store.example(int(self.indices[index]))

    def __iter__(self) -> Iterator[Example]:
        for index in self.indices:
            yield self.store.example(int(index))

    def select(self, indices: np.ndarray) -> RowView:
        """Return a view of the examples at ``indices``."""
        return RowView(self.store, self.indices[indices])

    @property
    def lengths(self) -> np.ndarray:
        """Return (n,) numbers of tokens."""
        return self.store.lengths()[self.indices]

    @property
    def label_counts(self) -> np.ndarray:
        """Return (n,) numbers of labels."""
        return self.store.label_counts()[self.indices]

    def used_tokens(self) -> np.ndarray:
        """Return distinct token ids in ascending order: those of the entire store, a superset of the view's."""
        return self.store.used_tokens()

    def digest(self) -> bytes:
        """Return a hash of all tokens and labels without reading them."""
        return hashlib.blake2b(self.store.keys()[self.indices].tobytes(), digest_size=16).digest()


def key_of(example: Example) -> bytes:
    """Return a hash of the tokens and labels. Duplicates have equal keys."""
    digest = hashlib.blake2b(example.tokens.tobytes(), digest_size=KEY_BYTES)
    digest.update(np.packbits(example.is_label).tobytes())
    return digest.digest()


def row_keys(rows: Sequence[Any]) -> np.ndarray:
    """Return (n,) uint64, equal for rows with the same tokens and labels in any file. Stored rows are not read."""
    if isinstance(rows, RowView):
        return rows.store.keys()[rows.indices, 0]
    keys = []
    for item in rows:
        parts = [key_of(row) if isinstance(row, Example) else _key_of_fields(row) for row in rows_of(item)]
        keys.append(parts[0] if len(parts) == 1 else hashlib.blake2b(b"".join(parts), digest_size=KEY_BYTES).digest())
    return as_keys(keys)[:, 0]


def digest_of_rows(rows: Sequence[Any]) -> str:
    """Return a hash of everything in the rows that affects training, in order. Stored rows are not read."""
    if isinstance(rows, RowView | ConcatSequence):
        return rows.digest().hex()
    digest = hashlib.blake2b(digest_size=16)
    for item in rows:
        if getattr(item, "scores", None) is not None:
            digest.update(_key_of_fields(item))
        for row in rows_of(item):
            # The same hash as of stored rows, so that the digest does not depend on the storage.
            digest.update(key_of(row) if isinstance(row, Example) else _key_of_fields(row))
            desired = getattr(row, "desired", None)
            if desired is not None:
                digest.update(bytes([int(desired)]))
            teacher_prompt = getattr(row, "teacher_prompt", None)
            if teacher_prompt is not None:
                digest.update(teacher_prompt.tobytes())
    return digest.hexdigest()


def _key_of_fields(row: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    kind: Any = type(row)
    for name in _hashed_fields(kind):
        value = getattr(row, name)
        data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


@functools.cache
def _hashed_fields(kind: Any) -> tuple[str, ...]:
    """Return the fields of a row class that affect training, without row numbers, files, and the rows of a group."""
    names = (field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()
    # An image has a digest, and a text has tokens.
    return tuple(name for name in names if name not in ("row", "rows", "file_rows", "image", "text"))


class MemoryRows:
    """Examples in memory, with arrays of properties for splitting and counting."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self._ordinals: list[int] = []
        self._keys: list[bytes] = []
        self._groups: list[bytes] = []

    def add(self, examples: Sequence[Example], ordinals: Sequence[int], groups: Sequence[bytes]) -> None:
        """Add examples. ``groups`` is empty without ``data.group``."""
        self.examples += examples
        self._ordinals += ordinals
        self._keys += map(key_of, examples)
        self._groups += groups

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int) -> Example:
        """Return the example at ``index``."""
        return self.examples[index]

    def lengths(self) -> np.ndarray:
        """Return (n,) numbers of tokens."""
        return np.fromiter(map(len, self.examples), np.int64, len(self.examples))

    def label_counts(self) -> np.ndarray:
        """Return (n,) numbers of labels."""
        return np.fromiter((e.label_count for e in self.examples), np.int64, len(self.examples))

    def keys(self) -> np.ndarray:
        """Return (n, 2) uint64 keys, equal for examples with the same tokens and labels."""
        return as_keys(self._keys)

    def groups(self) -> np.ndarray | None:
        """Return (n, 2) uint64 group digests (:func:`deltaw.data.row_selection.group_digest`), or None without
        ``data.group``.
        """
        return as_keys(self._groups) if self._groups else None

    def ordinals(self) -> np.ndarray:
        """Return (n,) the source row of each example, counted from 0 over all sources."""
        return np.asarray(self._ordinals, np.int64)

    def used_tokens(self) -> np.ndarray:
        """Return the distinct token ids in ascending order."""
        return np.unique(np.concatenate([e.tokens for e in self.examples]))

    def batch(self) -> pyarrow.RecordBatch:
        """Return all examples as an Arrow record batch."""
        import pyarrow

        examples = self.examples
        lengths = self.lengths()
        stops = np.cumsum(lengths)
        # The mask has a gap after each row, so that its changes are the boundaries of label spans.
        mask = np.zeros(int(lengths.sum()) + len(examples) + 1, np.int8)
        starts = stops - lengths + np.arange(1, len(examples) + 1)
        for example, start in zip(examples, starts.tolist(), strict=True):
            mask[start : start + len(example)] = example.is_label
        edges = np.flatnonzero(np.diff(mask)) + 1
        owner = np.searchsorted(starts, edges, side="right") - 1
        spans = edges - starts[owner]
        texts = [(example.answer or "").encode("utf-8", "surrogatepass") for example in examples]
        columns = {
            "row": [example.row for example in examples],
            "ordinal": self.ordinals(),
            "prompt_length": [example.prompt_length for example in examples],
            "has_answer": np.array([example.answer is not None for example in examples], np.int8),
            "label_count": self.label_counts(),
            "key": self._keys,
            "group": self._groups or [bytes(KEY_BYTES)] * len(examples),
            "tokens": _lists(np.concatenate([e.tokens for e in examples]).astype(np.int32), lengths),
            "label_spans": _lists(spans.astype(np.int32), np.bincount(owner, minlength=len(examples))),
            "answer": _lists(np.frombuffer(b"".join(texts), np.uint8), np.fromiter(map(len, texts), np.int64)),
        }
        return pyarrow.RecordBatch.from_pydict(columns, schema=schema())


def schema() -> pyarrow.Schema:
    """Return the Arrow schema of a row file."""
    import pyarrow as pa

    fixed = {name: pa.binary(KEY_BYTES) if d.kind == "V" else pa.from_numpy_dtype(d) for name, d in _FIXED.items()}
    return pa.schema(fixed | {name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in _LISTS.items()})


def _lists(values: np.ndarray, lengths: np.ndarray) -> pyarrow.Array:
    import pyarrow

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))


# Columns with one value per row, and columns with a list per row.
_KEY = np.dtype((np.void, KEY_BYTES))
_FIXED: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("row", "ordinal", "prompt_length"), np.dtype(np.int64)),
    "has_answer": np.dtype(np.int8),
    "label_count": np.dtype(np.int64),
    **dict.fromkeys(("key", "group"), _KEY),
}
_LISTS: dict[str, np.dtype[Any]] = {"tokens": np.dtype("i4"), "label_spans": np.dtype("i4"), "answer": np.dtype("u1")}


class DamagedRowsError(Exception):
    """A row file does not have the expected content."""


class DiskRows:
    """Examples in an Arrow file, with the interface of :class:`MemoryRows`.

    Reading is thread-safe.

    Args:
        file: File opened for reading, which is closed together with this object.
        name: Name of the file, for messages.
        grouped: True if rows have groups.
        on_damage: Called if a row is damaged.

    Raises:
        DamagedRowsError: if the file is incomplete or is not a row file.
    """

    def __init__(
        self, file: IO[bytes], name: str, *, grouped: bool, on_damage: Callable[[], object] = lambda: None
    ) -> None:
        self._file = file
        self._name = name
        self._grouped = grouped
        self._on_damage = on_damage
        self._lock = threading.Lock()
        self._size = os.fstat(file.fileno()).st_size
        # Per column, the file offset of the values in each batch, and of the list offsets in each batch.
        self._value_offsets: dict[str, np.ndarray] = {}
        self._list_offsets: dict[str, np.ndarray] = {}
        try:
            counts, starts = self._locate_columns()
        except (ValueError, OSError, KeyError, TypeError, IndexError, OverflowError) as error:
            raise DamagedRowsError(str(error)) from error
        self._batch_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._token_starts = starts

    def _locate_columns(self) -> tuple[list[int], np.ndarray]:
        """Return the number of rows of each batch, and the start of each row's tokens, counted over all batches.

        The file is mapped temporarily, because Arrow exposes buffers by address, from which the file offset follows.
        """
        import pyarrow
        import pyarrow.ipc

        mapped = pyarrow.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        reader = pyarrow.ipc.open_file(mapped)
        if reader.schema != schema():
            raise ValueError("other columns")
        counts: list[int] = []
        value_offsets: dict[str, list[int]] = {name: [] for name in (*_FIXED, *_LISTS)}
        list_offsets: dict[str, list[int]] = {name: [] for name in _LISTS}
        lengths = [np.zeros(1, np.int64)]
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            counts.append(batch.num_rows)
            for name in _FIXED:
                value_offsets[name].append(batch.column(name).buffers()[1].address - mapped.address)
            for name in _LISTS:
                buffers = batch.column(name).buffers()
                list_offsets[name].append(buffers[1].address - mapped.address)
                value_offsets[name].append(buffers[3].address - mapped.address if buffers[3] else 0)
            offsets = np.frombuffer(batch.column("tokens").buffers()[1], np.int32, batch.num_rows + 1)
            lengths.append(np.diff(offsets))
        self._value_offsets = {name: np.asarray(positions, np.int64) for name, positions in value_offsets.items()}
        self._list_offsets = {name: np.asarray(positions, np.int64) for name, positions in list_offsets.items()}
        return counts, np.cumsum(np.concatenate(lengths), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._batch_starts[-1])

    def lengths(self) -> np.ndarray:
        return np.diff(self._token_starts)

    def label_counts(self) -> np.ndarray:
        return self._column("label_count")

    def keys(self) -> np.ndarray:
        return self._column("key").view(np.uint64).reshape(-1, 2)

    def groups(self) -> np.ndarray | None:
        return self._column("group").view(np.uint64).reshape(-1, 2) if self._grouped else None

    def ordinals(self) -> np.ndarray:
        return self._column("ordinal")

    def used_tokens(self) -> np.ndarray:
        is_used = np.zeros(0, bool)
        large_tokens = np.zeros(0, np.int64)
        for batch in range(len(self._batch_starts) - 1):
            first, last = self._token_starts[self._batch_starts[batch : batch + 2]]
            tokens = self._read("tokens", batch, 0, int(last - first))
            if tokens.max(initial=-1) >= MARKED_TOKENS:
                large_tokens = np.union1d(large_tokens, tokens[tokens >= MARKED_TOKENS])
                tokens = tokens[tokens < MARKED_TOKENS]
            size = int(tokens.max(initial=-1)) + 1
            if size > len(is_used):
                is_used = np.concatenate([is_used, np.zeros(size - len(is_used), bool)])
            is_used[tokens] = True
        return np.concatenate([np.flatnonzero(is_used), large_tokens])

    def example(self, index: int) -> Example:
        """Return the example at ``index``.

        Raises:
            UserError: if the file was damaged after it was written.
        """
        batch = int(np.searchsorted(self._batch_starts, index, side="right")) - 1
        position = index - int(self._batch_starts[batch])
        token_start = int(self._token_starts[index] - self._token_starts[self._batch_starts[batch]])
        count = int(self._token_starts[index + 1] - self._token_starts[index])
        tokens = self._read("tokens", batch, token_start, count).copy()
        is_label = np.zeros(len(tokens), bool)
        for start, stop in self._list("label_spans", batch, position).reshape(-1, 2).tolist():
            is_label[start:stop] = True
        answer = None
        if self._read("has_answer", batch, position, 1)[0]:
            answer = self._list("answer", batch, position).tobytes().decode("utf-8", "surrogatepass")
        row, prompt_length = (int(self._read(name, batch, position, 1)[0]) for name in ("row", "prompt_length"))
        example = Example(row, tokens, is_label, prompt_length, answer)
        if key_of(example) != self._read("key", batch, position, 1).tobytes():
            raise self._damaged()
        return example

    def _damaged(self) -> UserError:
        self._on_damage()
        hint = "start again: the tokens will be created again from the rows"
        return UserError("the stored tokens of a row are damaged", location=self._name, hint=hint)

    def _list(self, name: str, batch: int, position: int) -> np.ndarray:
        data = self._bytes(int(self._list_offsets[name][batch]) + 4 * position, 8)
        start, stop = np.frombuffer(data, np.int32).tolist()
        return self._read(name, batch, start, stop - start)

    def _read(self, name: str, batch: int, position: int, count: int) -> np.ndarray:
        dtype = _LISTS.get(name) or _FIXED[name]
        offset = int(self._value_offsets[name][batch]) + position * dtype.itemsize
        return np.frombuffer(self._bytes(offset, count * dtype.itemsize), dtype)

    def _column(self, name: str) -> np.ndarray:
        values = np.empty(len(self), _FIXED[name])
        for batch, (start, stop) in enumerate(zip(self._batch_starts[:-1], self._batch_starts[1:], strict=True)):
            values[start:stop] = self._read(name, batch, 0, int(stop - start))
        return values

    def _bytes(self, offset: int, count: int) -> bytes:
        if count < 0 or offset < 0:
            raise self._damaged()
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), count, offset)
        else:
            with self._lock:
                self._file.seek(offset)
                data = self._file.read(count)
        if len(data) != count:
            raise self._damaged()
        return data


RowStore = MemoryRows | DiskRows
