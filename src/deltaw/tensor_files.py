"""Streaming reader and writer of safetensors files.

The safetensors library maps entire files into memory and copies all tensors before it writes. This module reads
tensors and rows individually and writes tensor by tensor, so that saving and merging need little memory. Output is
deterministic: the same tensors and metadata produce identical bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedWriter, RawIOBase
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from deltaw.atomic_files import atomic_path
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
"""Tensor types by their safetensors names."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "BF16", "F16")
BLOCK = 1 << 22
"""Number of elements per block of rows, 16 MB in fp32."""

_LARGEST_HEADER = 100_000_000  # limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """Tensor in a safetensors file.

    Attributes:
        file: Path of the file.
        name: Name of the tensor in the file.
        code: Type name of the format, for example ``BF16``.
        shape: Shape of the tensor.
        start: Offset of its first byte in the file.
    """

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Torch type.

        Raises:
            UserError: if deltaw does not support the type.
        """
        if self.code not in DTYPES:
            message = f"tensor '{self.name}' is stored as {self.code}"
            raise UserError(message, location=str(self.file), hint="use a base model in bf16, fp16 or fp32")
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
        """Read rows ``start`` to ``stop`` of the first dimension. A scalar has one row."""
        shape = self.shape or (1,)
        row = math.prod(shape[1:]) * self.dtype.itemsize
        buffer = bytearray((stop - start) * row)
        if not buffer:
            return torch.empty((stop - start, *shape[1:]), dtype=self.dtype)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + start * row)
            self._read(file, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=self.dtype).view(stop - start, *shape[1:])

    def load(self) -> Tensor:
        """Read the entire tensor."""
        return self.rows(0, self.shape[0] if self.shape else 1).view(self.shape)

    def chunks(self, chunk_size: int) -> Iterator[Tensor]:
        """Yield (n,) chunks of at most ``chunk_size`` elements. The buffer is reused, so each chunk invalidates the
        previous one.
        """
        buffer = bytearray(min(chunk_size, self.numel) * self.dtype.itemsize)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(0, self.numel, chunk_size):
                count = min(chunk_size, self.numel - start)
                self._read(file, memoryview(buffer)[: count * self.dtype.itemsize])
                yield torch.frombuffer(buffer, dtype=self.dtype, count=count)

    def _read(self, file: RawIOBase, view: memoryview) -> None:
        """Fill a buffer from the file's current position."""
        filled = 0
        while filled < len(view):
            count = file.readinto(view[filled:])
            if not count:
                message = f"the weights are truncated in tensor '{self.name}'"
                raise UserError(message, location=str(self.file), hint="download or copy the model again")
            filled += count


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of rows with about :data:`BLOCK` elements."""
    count = shape[0] if shape else 1
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file, ordered by offset.

    Raises:
        UserError: if the file is damaged or truncated.
    """
    try:
        return _header(path)[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"the weights are damaged: {error}"
        raise UserError(message, location=str(path), hint="download or copy the model again") from error


def _header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a file, ordered by offset, and its metadata.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: if the file is damaged, truncated or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError("its header is truncated")
        try:
            header = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
    metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
    tensors = []
    for name, entry in header.items():
        start, end = (int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(n) for n in entry["shape"])
        tensor = StoredTensor(path, name, str(entry["dtype"]), shape, 8 + length + start)
        is_supported = tensor.code in DTYPES
        if not 0 <= start <= end <= size - 8 - length or (is_supported and tensor.bytes != end - start):
            raise ValueError(f"the header has invalid offsets for tensor '{name}'")
        tensors.append(tensor)
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda item: item.start)}, metadata


class TensorFile(Mapping[str, Tensor]):
    """Mapping of a file's tensors, which are read on access.

    Attributes:
        metadata: Metadata of the file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OSError: if the file is damaged or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self._stored, self.metadata = _header(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].load()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor's rows in blocks of about :data:`BLOCK` elements."""
        stored = self._stored[name]
        for start, stop in row_blocks(stored.shape):
            yield stored.rows(start, stop)

    def meta_tensor(self, name: str) -> Tensor:
        """Return a tensor of the same type and shape on the device "meta"."""
        stored = self._stored[name]
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True)
class TensorEntry:
    """Name, type and shape of a tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writable(Protocol):
    """Binary output stream."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def has_values(tensor: Tensor) -> bool:
    """False on the meta device and under torch's FakeTensorMode, whose tensors have no values."""
    return not (tensor.is_meta or type(tensor).__name__ == "FakeTensor")


class TensorWriter:
    """Writes a safetensors file from blocks of rows, in the order of ``entries``.

    Args:
        file: Output stream at position 0.
        entries: Tensors to write. Wider types must come first, so that each tensor is aligned to its type.
        metadata: Metadata of the file. Keys are sorted.

    Raises:
        ValueError: if the entries are not sorted by type width, or if the data does not match their sizes.
    """

    def __init__(self, file: Writable, entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> None:
        sizes = [entry.dtype.itemsize for entry in entries]
        if sizes != sorted(sizes, reverse=True):
            raise ValueError("wider types must come first")
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for entry in entries:
            start, end = end, end + entry.bytes
            code = CODES[entry.dtype]
            header[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._left, self._file = end, file
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, rows: Tensor) -> None:
        """Write the next rows. They must have the type of their entry."""
        if not has_values(rows):
            assert isinstance(self._file, BufferedWriter)
            self._left -= rows.nbytes
            self._file.seek(rows.nbytes, os.SEEK_CUR)
            return
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._left -= len(data)
        self._file.write(data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._left:
            raise ValueError(f"{self._left} bytes of the tensors were not written")


def write_tensors(file: Writable, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a complete safetensors file. Tensors are copied only if they are not contiguous CPU tensors."""
    entries = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.name))
    with TensorWriter(file, entries, metadata) as writer:
        for entry in entries:
            writer.write(tensors[entry.name])


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Atomically write a safetensors file. In a dry run, tensors that have no values are holes, which read as zeros.

    Raises:
        UserError: if the folder is not writable.
        OSError: if the disk is full.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write_tensors(file, tensors, metadata)
        file.truncate()  # the last tensor may be a hole
