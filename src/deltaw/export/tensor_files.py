"""Tensors in safetensors files, read and written a block of rows at a time.

The safetensors library maps a file or builds one from tensors that are all in memory. A merge must hold less
than a file, so headers are read here, rows are read where they lie, and a file is written tensor by tensor.

It knows the file format and nothing of models: an 8-byte length, a header in JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.training.checkpoint_files import CODES, DTYPES

FLOATS = ("F64", "F32", "BF16", "F16")
BLOCK = 1 << 22
"""Elements of a block of rows: 16 MB in fp32."""

_LARGEST_HEADER = 100_000_000  # the library's own bound


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: where it is. name: what it is called there.
        code: its type, as the format writes it (``BF16``).
        shape: its sizes. start: of its first byte in the file.
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
            UserError: of a kind that is not computed with here.
        """
        if self.code not in DTYPES:
            raise UserError(
                f"tensor '{self.name}' is stored as {self.code}",
                where=str(self.file),
                hint="give the base model in bf16, fp16 or fp32",
            )
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
            view = memoryview(buffer)
            done = 0
            while done < len(buffer):
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(
                        f"the weights end before tensor '{self.name}' does",
                        where=str(self.file),
                        hint="fetch or copy the model again",
                    )
                done += count
        return torch.frombuffer(buffer, dtype=self.dtype).view(stop - start, *shape[1:])

    def whole(self) -> Tensor:
        """All of it."""
        return self.rows(0, self.row_count).view(self.shape)

    def sample(self, places: Sequence[int]) -> Tensor:
        """(k,) the elements at these flat positions."""
        flat = StoredTensor(self.file, self.name, self.code, (self.numel,), self.start)
        return torch.cat([flat.rows(place, place + 1) for place in places])

    @property
    def row_count(self) -> int:
        return self.shape[0] if self.shape else 1


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
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = []
        for name, entry in header.items():
            begin, end = (int(place) for place in entry["data_offsets"])
            shape = tuple(int(n) for n in entry["shape"])
            tensor = StoredTensor(path, name, str(entry["dtype"]), shape, 8 + length + begin)
            known = tensor.code in DTYPES
            if not 0 <= begin <= end <= size - 8 - length or (known and tensor.bytes != end - begin):
                raise ValueError(f"tensor '{name}' does not lie in the file as its header says")
            found.append(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the weights are damaged: {error}", where=str(path), hint="fetch or copy the model again"
        ) from error
    return {tensor.name: tensor for tensor in sorted(found, key=lambda one: one.start)}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes a safetensors file from blocks of rows, in the order of ``entries``.

    Args:
        path: of the file; it is made anew.
        entries: what it will hold; wider types first, so that each tensor lies aligned to its type.
        metadata: the file's own.

    Raises:
        ValueError: the types are not in order, or other bytes were written than announced.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        sizes = [entry.dtype.itemsize for entry in entries]
        if sizes != sorted(sizes, reverse=True):
            raise ValueError("wider types must come first")
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for entry in entries:
            begin, end = end, end + entry.bytes
            code = CODES[entry.dtype]
            header[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._left = end
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, rows: Tensor) -> None:
        """The next rows, in the type that was announced."""
        data = rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._left -= len(data)
        self._file.write(data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{self._left} bytes were announced and not written")
