"""Tensors in safetensors files, read and written a piece at a time.

The safetensors library maps a file, whose pages then count as memory of the process, and writes one from
copies of all its tensors. A training run that saves has no memory to spare for either, and a merge holds less
than a file. So this module reads headers, reads tensors and rows from their places, and writes a file tensor by
tensor. The same tensors and metadata give the same file to the byte.

It knows the file format and no models: an 8-byte length, a header in JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from deltaw.durable import replacing
from deltaw.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors by their names in the format."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "BF16", "F16")
BLOCK = 1 << 22
"""Elements of a block of rows: 16 MB in fp32."""

_LARGEST_HEADER = 100_000_000  # the library's own bound


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: the file.
        name: its name in the file.
        code: its type, as the format writes it (``BF16``).
        shape: its sizes.
        start: the position of its first byte in the file.
    """

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Its type.

        Raises:
            UserError: deltaw does not compute with this type.
        """
        if self.code not in DTYPES:
            what = f"tensor '{self.name}' is stored as {self.code}"
            raise UserError(what, where=str(self.file), hint="give the base model in bf16, fp16 or fp32")
        return DTYPES[self.code]

    @property
    def is_float(self) -> bool:
        return self.code in FLOATS

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the first dimension, as stored; a scalar has one row."""
        shape = self.shape or (1,)
        row = math.prod(shape[1:]) * self.dtype.itemsize
        buffer = bytearray((stop - start) * row)
        if not buffer:
            return torch.empty((stop - start, *shape[1:]), dtype=self.dtype)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + start * row)
            self._read(file, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=self.dtype).view(stop - start, *shape[1:])

    def whole(self) -> Tensor:
        """All of it."""
        return self.rows(0, self.shape[0] if self.shape else 1).view(self.shape)

    def pieces(self, numbers: int) -> Iterator[Tensor]:
        """(n,) all of its numbers in order, ``numbers`` at a time; the next piece overwrites the last."""
        buffer = bytearray(min(numbers, self.numel) * self.dtype.itemsize)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(0, self.numel, numbers):
                count = min(numbers, self.numel - start)
                self._read(file, memoryview(buffer)[: count * self.dtype.itemsize])
                yield torch.frombuffer(buffer, dtype=self.dtype, count=count)

    def _read(self, file: RawIOBase, view: memoryview) -> None:
        """Fill a buffer from a file's current position."""
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                what = f"the weights end before tensor '{self.name}' does"
                raise UserError(what, where=str(self.file), hint="fetch or copy the model again")
            done += count


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows in blocks of about :data:`BLOCK` elements."""
    count = shape[0] if shape else 1
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        UserError: the file is damaged or cut off.
    """
    try:
        return _header(path)[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the weights are damaged: {error}"
        raise UserError(what, where=str(path), hint="fetch or copy the model again") from error


def _header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its metadata.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: the file is damaged, cut off or has another format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError("its header is cut off")
        header = json.loads(file.read(length))
    metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
    found = []
    for name, entry in header.items():
        begin, end = (int(place) for place in entry["data_offsets"])
        shape = tuple(int(n) for n in entry["shape"])
        tensor = StoredTensor(path, name, str(entry["dtype"]), shape, 8 + length + begin)
        known = tensor.code in DTYPES
        if not 0 <= begin <= end <= size - 8 - length or (known and tensor.bytes != end - begin):
            raise ValueError(f"tensor '{name}' does not lie in the file as its header says")
        found.append(tensor)
    return {tensor.name: tensor for tensor in sorted(found, key=lambda one: one.start)}, metadata


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file, each read into its own memory on request.

    Attributes:
        metadata: the file's own.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OSError: the file has another format or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._stored, self.metadata = _header(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].whole()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor's rows, in blocks of about :data:`BLOCK` elements."""
        stored = self._stored[name]
        for start, stop in row_blocks(stored.shape):
            yield stored.rows(start, stop)

    def described(self, name: str) -> Tensor:
        """A tensor of the same type and shape on the device "meta"."""
        stored = self._stored[name]
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writable(Protocol):
    """What a file's bytes are written to."""

    def write(self, data: bytes | memoryview, /) -> object: ...


class TensorWriter:
    """Writes a safetensors file from blocks of rows, in the order of ``entries``.

    Args:
        file: at its beginning.
        entries: what it will hold; wider types first, so that each tensor lies aligned to its type.
        metadata: the file's own, written in the order of its keys.

    Raises:
        ValueError: the types are not in order, or other bytes were written than announced.
    """

    def __init__(self, file: Writable, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        sizes = [entry.dtype.itemsize for entry in entries]
        if sizes != sorted(sizes, reverse=True):
            raise ValueError("wider types must come first")
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for entry in entries:
            begin, end = end, end + entry.bytes
            code = CODES[entry.dtype]
            header[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._left, self._file = end, file
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, rows: Tensor) -> None:
        """The next rows, in the type that was announced."""
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._left -= len(data)
        self._file.write(data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._left:
            raise ValueError(f"{self._left} bytes were announced and not written")


def write_tensors(file: Writable, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A whole safetensors file. A tensor that is not contiguous on the CPU is copied while it is written; the
    others are not copied."""
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.name))
    with TensorWriter(file, entries, metadata) as writer:
        for entry in entries:
            writer.write(tensors[entry.name])


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A new safetensors file, written completely or not at all.

    Raises:
        UserError: the folder cannot be written to.
        OSError: the disk is full.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        write_tensors(file, tensors, metadata)
