"""Decompression with limits of memory and expanded size."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, Any

from deltaw.data.file_signatures import BEGINNING_BYTES, check_content
from deltaw.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

# Memory limit of .xz decompression. The strongest preset needs 65 MiB, a malicious file up to 4 GiB.
_XZ_BYTES = 256 * 2**20
BLOCK_BYTES = 2**16
# A compressed file may expand to MIN_EXPANDED_BYTES, or to MAX_EXPANSION times its size.
MIN_EXPANDED_BYTES = 32 * 2**20
MAX_EXPANSION = 256


class DecompressedFile:
    """Open file, decompressed on the fly.

    Attributes:
        file: Decompressed content.
    """

    def __init__(self, path: Path) -> None:
        self._raw: IO[bytes] = path.open("rb")
        try:
            self.file: IO[bytes] = _decompressed(self._raw, path.suffix.lower())
            if self.file is not self._raw:
                self.file = io.BufferedReader(_Bounded(self.file, path), 2**18)
            file: Any = self.file  # all decompressors have peek()
            check_content(file.peek(BEGINNING_BYTES)[:BEGINNING_BYTES], path)
        except BaseException:
            self._raw.close()
            raise

    @property
    def position(self) -> int:
        """Return the number of bytes of the compressed file that were read so far."""
        return 0 if self._raw.closed else self._raw.tell()

    def __enter__(self) -> DecompressedFile:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # damage was reported already
            self.file.close()
        self._raw.close()


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    opened: Any = raw
    if suffix == ".gz":
        opened = gzip.GzipFile(fileobj=raw)
    elif suffix == ".bz2":
        opened = bz2.BZ2File(raw)
    elif suffix == ".xz":
        opened = _Xz(raw)
    elif suffix == ".zst":
        import pyarrow

        # Arrow includes a decompressor, so that no further package is needed.
        opened = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return opened


class _Bounded(io.RawIOBase):
    """Decompressed content of a file, which must not expand out of proportion to its size."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self._path = path
        self._remaining = max(MIN_EXPANDED_BYTES, MAX_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._file.readinto(buffer))
        self._remaining -= count
        if self._remaining < 0:
            message = f"the file expands to more than {MAX_EXPANSION} times its size"
            raise UserError(message, location=str(self._path), hint="if it is correct, decompress it first")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Xz(io.RawIOBase):
    """Decompressed content of an .xz file, with a memory limit that lzma.LZMAFile lacks."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._stream: lzma.LZMADecompressor | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._stream is None or self._stream.eof:  # concatenated streams, padded with zeros
                data = b"" if self._stream is None else self._stream.unused_data.lstrip(b"\0")
                while not data:
                    block = self._raw.read(BLOCK_BYTES)
                    if not block:
                        return 0
                    data = block if self._stream is None else block.lstrip(b"\0")
                self._stream = lzma.LZMADecompressor(memlimit=_XZ_BYTES)
            elif self._stream.needs_input:
                data = self._raw.read(BLOCK_BYTES)
                if not data:
                    raise EOFError("it is truncated")
            decompressed = self._stream.decompress(data, len(buffer))
            if decompressed:
                buffer[: len(decompressed)] = decompressed
                return len(decompressed)
