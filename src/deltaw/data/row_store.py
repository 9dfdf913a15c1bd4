"""Examples in memory or on the disk, and views of some of them in an order.

On the disk they are an Arrow file, whose record batches hold tokens, spans of labels and answers. Its rows
are read one by one from their places in the file rather than through a memory map, so that the memory of a
process does not grow with the rows that it has seen. Each row is compared with its hash when it is read.

It knows examples and one file; not where files are kept, or what rows are trained on.
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

from deltaw.data.example import Example, RowGroup
from deltaw.data.sequences import Joined
from deltaw.data.sources import KEY_BYTES, as_keys
from deltaw.errors import UserError

if TYPE_CHECKING:
    import pyarrow

# Part of a cache's key: another number where the file would mean something else.
FORMAT = 1
# Which tokens occur is marked in a byte for each below this; no vocabulary reaches it. Others are collected.
MARKED_TOKENS = 2**22


class RowView(Sequence[Example]):
    """Examples of a store in an order, made when they are asked for.

    Args:
        store: where they are. places: (n,) of each in the store; one may come several times.
    """

    def __init__(self, store: RowStore, places: np.ndarray) -> None:
        self.store = store
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> RowView: ...

    def __getitem__(self, index: int | slice) -> Example | RowView:
        if isinstance(index, slice):
            return RowView(self.store, self.places[index])
        return self.store.example(int(self.places[index]))

    def __iter__(self) -> Iterator[Example]:
        for place in self.places:
            yield self.store.example(int(place))

    def picked(self, indices: np.ndarray) -> RowView:
        """The examples at these indices."""
        return RowView(self.store, self.places[indices])

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each."""
        return self.store.lengths()[self.places]

    @property
    def label_counts(self) -> np.ndarray:
        """(n,) labels of each."""
        return self.store.label_counts()[self.places]

    def used_tokens(self) -> np.ndarray:
        """Different tokens, ascending: all that occur in them, and perhaps others of the store."""
        return self.store.used_tokens()

    def digest(self) -> bytes:
        """A hash of all their tokens and labels, without reading them."""
        return hashlib.blake2b(self.store.keys()[self.places].tobytes(), digest_size=16).digest()


def key_of(example: Example) -> bytes:
    """Equal for duplicates: rows with the same tokens and labels."""
    digest = hashlib.blake2b(example.tokens.tobytes(), digest_size=KEY_BYTES)
    digest.update(np.packbits(example.is_label).tobytes())
    return digest.digest()


def digest_of_rows(rows: Sequence[Any]) -> str:
    """A hash of what a training sees of rows, in order; stored rows are not read for it."""
    if isinstance(rows, RowView | Joined):
        return rows.digest().hex()
    digest = hashlib.blake2b(digest_size=16)
    for item in rows:
        if getattr(item, "scores", None) is not None:
            digest.update(_key_of_fields(item))
        for row in item.rows if isinstance(item, RowGroup) else (item,):
            # As stored rows do it, so that it does not matter whether rows are stored.
            digest.update(key_of(row) if isinstance(row, Example) else _key_of_fields(row))
            desired = getattr(row, "desired", None)
            if desired is not None:
                digest.update(bytes([int(desired)]))
            taught = getattr(row, "teacher_prompt", None)
            if taught is not None:
                digest.update(taught.tobytes())
    return digest.hexdigest()


def _key_of_fields(row: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    kind: Any = type(row)
    for name in _seen_fields(kind):
        value = getattr(row, name)
        whole = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
        digest.update(len(whole).to_bytes(8, "little") + whole)
    return digest.digest()


@functools.cache
def _seen_fields(kind: Any) -> tuple[str, ...]:
    """The fields of a kind of row that a training sees; not where the row was read, and of a group not its
    rows."""
    names = (field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()
    return tuple(name for name in names if name not in ("row", "rows", "file_rows", "image"))  # an image has a digest


class MemoryRows:
    """Examples in memory by their place, and what splitting and counting need of all of them as arrays."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self._ordinals: list[int] = []
        self._keys: list[bytes] = []
        self._groups: list[bytes] = []

    def add(self, examples: Sequence[Example], ordinals: Sequence[int], groups: Sequence[bytes]) -> None:
        """Add examples; ``groups`` is empty without ``data.group``."""
        self.examples += examples
        self._ordinals += ordinals
        self._keys += map(key_of, examples)
        self._groups += groups

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, place: int) -> Example:
        """The example at ``place``."""
        return self.examples[place]

    def lengths(self) -> np.ndarray:
        """(n,) tokens of each."""
        return np.fromiter(map(len, self.examples), np.int64, len(self.examples))

    def label_counts(self) -> np.ndarray:
        """(n,) labels of each."""
        return np.fromiter((e.label_count for e in self.examples), np.int64, len(self.examples))

    def keys(self) -> np.ndarray:
        """(n, 2) uint64, equal for examples of the same tokens and labels."""
        return as_keys(self._keys)

    def groups(self) -> np.ndarray | None:
        """(n, 2) uint64, see :func:`deltaw.data.sources.group_digest`; None without ``data.group``."""
        return as_keys(self._groups) if self._groups else None

    def ordinals(self) -> np.ndarray:
        """(n,) the row that each comes from, counted from 0 over all sources."""
        return np.asarray(self._ordinals, np.int64)

    def used_tokens(self) -> np.ndarray:
        """The different tokens that occur, ascending."""
        return np.unique(np.concatenate([e.tokens for e in self.examples]))

    def batch(self) -> pyarrow.RecordBatch:
        """All examples as Arrow holds them."""
        import pyarrow

        examples = self.examples
        lengths = self.lengths()
        ends = np.cumsum(lengths)
        # A run of labels begins and ends where the mask, with a gap after each row, changes.
        mask = np.zeros(int(lengths.sum()) + len(examples) + 1, np.int8)
        begins = ends - lengths + np.arange(1, len(examples) + 1)
        for example, begin in zip(examples, begins.tolist(), strict=True):
            mask[begin : begin + len(example)] = example.is_label
        edges = np.flatnonzero(np.diff(mask)) + 1
        owner = np.searchsorted(begins, edges, side="right") - 1
        spans = edges - begins[owner]
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
    """The columns of a file of rows."""
    import pyarrow as pa

    fixed = {name: pa.binary(KEY_BYTES) if d.kind == "V" else pa.from_numpy_dtype(d) for name, d in _FIXED.items()}
    return pa.schema(fixed | {name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in _LISTS.items()})


def _lists(values: np.ndarray, lengths: np.ndarray) -> pyarrow.Array:
    import pyarrow

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))


# Columns of one number or key a row, and of a list of numbers a row.
_KEY = np.dtype((np.void, KEY_BYTES))
_FIXED: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("row", "ordinal", "prompt_length"), np.dtype(np.int64)),
    "has_answer": np.dtype(np.int8),
    "label_count": np.dtype(np.int64),
    **dict.fromkeys(("key", "group"), _KEY),
}
_LISTS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype(np.int32),
    "label_spans": np.dtype(np.int32),
    "answer": np.dtype(np.uint8),
}


class DamagedRowsError(Exception):
    """A file of rows is not what was written."""


class DiskRows:
    """Examples in an Arrow file, with the members of :class:`MemoryRows`.

    Args:
        file: open for reading; it is closed with this object. name: of it, for messages.
        grouped: whether rows have groups.
        on_damage: called when a row turns out to be damaged.

    Raises:
        DamagedRowsError: the file is not one of rows, or not whole.
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
        # By column, the place in the file of each batch's numbers, and of a list's offsets into them.
        self._places: dict[str, np.ndarray] = {}
        self._offsets: dict[str, np.ndarray] = {}
        try:
            counts, starts = self._find_places()
        except (ValueError, OSError, KeyError, TypeError, IndexError, OverflowError) as error:
            raise DamagedRowsError(str(error)) from error
        self._begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._starts = starts

    def _find_places(self) -> tuple[list[int], np.ndarray]:
        """Rows of each batch, and where each row's tokens start, counted over all batches.

        The file is mapped for a moment: Arrow says at which address a buffer is, and so at which place.
        """
        import pyarrow
        import pyarrow.ipc

        whole = pyarrow.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        reader = pyarrow.ipc.open_file(whole)
        if reader.schema != schema():
            raise ValueError("other columns")
        counts: list[int] = []
        found: dict[str, list[int]] = {name: [] for name in (*_FIXED, *_LISTS)}
        of_lists: dict[str, list[int]] = {name: [] for name in _LISTS}
        lengths = [np.zeros(1, np.int64)]
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            counts.append(batch.num_rows)
            for name in _FIXED:
                found[name].append(batch.column(name).buffers()[1].address - whole.address)
            for name in _LISTS:
                buffers = batch.column(name).buffers()
                of_lists[name].append(buffers[1].address - whole.address)
                found[name].append(buffers[3].address - whole.address if buffers[3] else 0)
            offsets = np.frombuffer(batch.column("tokens").buffers()[1], np.int32, batch.num_rows + 1)
            lengths.append(np.diff(offsets))
        self._places = {name: np.asarray(places, np.int64) for name, places in found.items()}
        self._offsets = {name: np.asarray(places, np.int64) for name, places in of_lists.items()}
        return counts, np.cumsum(np.concatenate(lengths), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def lengths(self) -> np.ndarray:
        return np.diff(self._starts)

    def label_counts(self) -> np.ndarray:
        return self._column("label_count")

    def keys(self) -> np.ndarray:
        return self._column("key").view(np.uint64).reshape(-1, 2)

    def groups(self) -> np.ndarray | None:
        return self._column("group").view(np.uint64).reshape(-1, 2) if self._grouped else None

    def ordinals(self) -> np.ndarray:
        return self._column("ordinal")

    def used_tokens(self) -> np.ndarray:
        seen, far = np.zeros(0, bool), np.zeros(0, np.int64)
        for batch in range(len(self._begins) - 1):
            first, last = self._starts[self._begins[batch]], self._starts[self._begins[batch + 1]]
            tokens = self._read("tokens", batch, 0, int(last - first))
            if tokens.max(initial=-1) >= MARKED_TOKENS:
                far = np.union1d(far, tokens[tokens >= MARKED_TOKENS])
                tokens = tokens[tokens < MARKED_TOKENS]
            most = int(tokens.max(initial=-1)) + 1
            if most > len(seen):
                seen = np.concatenate([seen, np.zeros(most - len(seen), bool)])
            seen[tokens] = True
        return np.concatenate([np.flatnonzero(seen), far])

    def example(self, place: int) -> Example:
        """The example at ``place``.

        Raises:
            UserError: the file was damaged since it was written.
        """
        batch = int(np.searchsorted(self._begins, place, side="right")) - 1
        at = place - int(self._begins[batch])
        begin = int(self._starts[place] - self._starts[self._begins[batch]])
        tokens = self._read("tokens", batch, begin, int(self._starts[place + 1] - self._starts[place])).copy()
        is_label = np.zeros(len(tokens), bool)
        for start, stop in self._list("label_spans", batch, at).reshape(-1, 2).tolist():
            is_label[start:stop] = True
        answer = None
        if self._read("has_answer", batch, at, 1)[0]:
            answer = self._list("answer", batch, at).tobytes().decode("utf-8", "surrogatepass")
        example = Example(
            int(self._read("row", batch, at, 1)[0]),
            tokens,
            is_label,
            int(self._read("prompt_length", batch, at, 1)[0]),
            answer,
        )
        if key_of(example) != self._read("key", batch, at, 1).tobytes():
            raise self._damaged()
        return example

    def _damaged(self) -> UserError:
        self._on_damage()
        hint = "start again: they are made anew from the rows"
        return UserError("the stored tokens of a row are damaged", where=self._name, hint=hint)

    def _list(self, name: str, batch: int, at: int) -> np.ndarray:
        start, stop = np.frombuffer(self._bytes(int(self._offsets[name][batch]) + 4 * at, 8), np.int32).tolist()
        return self._read(name, batch, start, stop - start)

    def _read(self, name: str, batch: int, at: int, count: int) -> np.ndarray:
        dtype = _LISTS.get(name) or _FIXED[name]
        place = int(self._places[name][batch]) + at * dtype.itemsize
        return np.frombuffer(self._bytes(place, count * dtype.itemsize), dtype)

    def _column(self, name: str) -> np.ndarray:
        dtype = _FIXED[name]
        values = np.empty(len(self), dtype)
        for batch, (begin, end) in enumerate(zip(self._begins[:-1], self._begins[1:], strict=True)):
            values[begin:end] = self._read(name, batch, 0, int(end - begin))
        return values

    def _bytes(self, place: int, count: int) -> bytes:
        if count < 0 or place < 0:
            raise self._damaged()
        if hasattr(os, "pread"):
            found = os.pread(self._file.fileno(), count, place)
        else:
            with self._lock:
                self._file.seek(place)
                found = self._file.read(count)
        if len(found) != count:
            raise self._damaged()
        return found


RowStore = MemoryRows | DiskRows
