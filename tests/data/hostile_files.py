"""Files that are small on disk and expand to large sizes in memory, in different ways."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

LARGE = 32 * 2**20
_BLOCK = b"a" * 2**20


def _blocks(before: bytes, block: bytes, count: int, after: bytes) -> Iterator[bytes]:
    yield before
    for _ in range(count):
        yield block
    yield after


def _packed(path: Path, blocks: Iterator[bytes]) -> None:
    """Write a compressed file block by block, to limit memory."""
    if path.suffix == ".zst":
        with path.open("wb") as raw, pyarrow.CompressedOutputStream(raw, "zstd") as file:
            for block in blocks:
                file.write(block)
        return
    fast_options = {".gz": {"compresslevel": 1}, ".bz2": {"compresslevel": 1}, ".xz": {"preset": 0}}
    open_file = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, io.open)
    with open_file(path, "wb", **fast_options.get(path.suffix, {})) as file:  # type: ignore[operator]
        for block in blocks:
            file.write(block)


def _text(before: bytes, block: bytes, after: bytes) -> Callable[[Path], None]:
    """Return a writer of a text file that repeats a block."""
    return lambda path: _packed(path, _blocks(before, block, LARGE // 2**20, after))


def write_parquet(path: Path, table: pyarrow.Table, **more: object) -> None:
    pyarrow.parquet.write_table(table, path, **{"compression": "zstd", "write_statistics": False, **more})


def write_arrow(
    path: Path, table: pyarrow.Table, compression: str | None = None, form: str = "file", **more: object
) -> None:
    new = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
    with new(str(path), table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_table(table, **more)


def _table(make: Callable[[], object], columns: int = 1, **more: object) -> Callable[[Path], None]:
    """Return a writer of a table whose columns are returned by ``make``, in the format of the file extension."""

    def write(path: Path) -> None:
        table = pyarrow.table(dict.fromkeys(["text", *map(str, range(1, columns))], make()))
        (write_parquet if path.suffix == ".parquet" else write_arrow)(path, table, **more)

    return write


def _long_text() -> list[str]:
    return ["b", "a" * LARGE]


def _repeated(count: int = 4000, length: int = 2**21) -> pyarrow.Array:
    """Return one text that is stored once and referenced ``count`` times."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), ["a" * length])


def _in_one_list(values: pyarrow.Array, empty: int = 2000) -> pyarrow.Array:
    """Return rows of empty lists, and one list with all values."""
    offsets = pyarrow.array([0] * (empty + 1) + [len(values)], pyarrow.int32())
    return pyarrow.ListArray.from_arrays(offsets, values)


def _zeros_in_one_list() -> pyarrow.Array:
    return _in_one_list(pyarrow.nulls(LARGE // 8, pyarrow.int64()).fill_null(0))


def _list_of_one_text() -> pyarrow.Array:
    return _in_one_list(_repeated(length=2**18))


def _views() -> pyarrow.Array:
    """Return many views of one text."""
    views, text = pyarrow.array(["a" * 2**20], pyarrow.string_view()).buffers()[1:]
    repeated_views = pyarrow.py_buffer(views.to_pybytes() * 500)
    return pyarrow.Array.from_buffers(pyarrow.string_view(), 500, [None, repeated_views, text])


def _wide_window(path: Path) -> None:
    """Write a text of a few bytes whose header requests a window of 1.5 GiB."""
    small = lzma.compress(b'{"text": "b"}\n', filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}])
    # The window size is a byte of the block header (4 KiB: 0; 1.5 GiB: 37). The header has a checksum.
    head = bytearray(small[12:24])
    head[head.index(b"\x21\x01") + 2] = 37
    head[8:12] = zlib.crc32(bytes(head[:8])).to_bytes(4, "little")
    path.write_bytes(small[:12] + bytes(head) + small[24:])


_LINE = _text(b'{"text": "b"}\n{"text": "', _BLOCK, b'"}\n{"text": "c"}\n')
_OBJECTS = _text(b'{"text": [', b"{}," * 2**18, b"{}]}\n")
_SECOND = "row 2 has more than"
_TOO_LARGE = "bytes of the file become more than 268,435,456 in memory"
_PREFIX_ENCODING = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
# Maps each file name to its writer, the expected message or number of rows, and the expected location.
HOSTILE: dict[str, tuple[Callable[[Path], None], str | int, str]] = {
    **{
        f"line.jsonl{packed}": (_LINE, "line 2 has more than the 1,048,576 bytes", "line 2 (from byte 14")
        for packed in ("", ".gz", ".bz2", ".xz", ".zst")
    },
    "objects.jsonl.gz": (_OBJECTS, "line 1 has more than", "line 1 (from byte 0"),
    "list.json.gz": (_text(b'[{"text": "b"}, {"text": "', _BLOCK, b'"}]'), _SECOND, "row 2"),
    "objects.json.zst": (_OBJECTS, "the file is not a list of objects", "objects.json.zst"),
    "cell.csv.gz": (_text(b"text\nb\n", _BLOCK, b"\nc\n"), _SECOND, "row 2 (lines 3 to 3)"),
    "cells.csv.gz": (_text(b"text\nb\n", b"," * 2**20, b"\nc\n"), _SECOND, "row 2 (lines 3 to 3)"),
    "quoted.csv.gz": (_text(b"text\nb\n", b'"a\n",' * 2**17, b"c\n"), _SECOND, "row 2 (lines 3 to"),
    "quote.csv.gz": (_text(b'text\nb\n"', b"a row\n" * 2**18, b""), _SECOND, "row 2 (lines 3 to"),
    "window.jsonl.xz": (_wide_window, "Memory usage limit exceeded", "window.jsonl.xz"),
    "text.parquet": (_table(_long_text, use_dictionary=False), "row 2 has 33,554,432 bytes", "row 2"),
    "entry.parquet": (_table(lambda: _repeated(9, LARGE)), "row 1 has 33,554,432 bytes", "row 1"),
    "repeated.parquet": (_table(_repeated), "row 1 has 2,097,152 bytes", "row 1"),
    "list.parquet": (_table(_zeros_in_one_list), "row 2001 has", "row 2001"),
    "texts.parquet": (_table(_list_of_one_text), "row 2001 has", "row 2001"),
    # Each value is stored as equal to the previous one.
    "beginnings.parquet": (_table(lambda: ["a" * 2**19] * 400, **_PREFIX_ENCODING), 400, ""),
    "lists.parquet": (_table(_zeros_in_one_list, 25, use_dictionary=False), _TOO_LARGE, "group 1 of rows"),
    "text.arrow": (_table(_long_text, compression="zstd"), "row 2 has 33,554,432 bytes", "row 2"),
    "repeated.arrow": (_table(_repeated), "row 1 has 2,097,152 bytes", "row 1"),
    "views.arrow": (_table(_views), 500, ""),
    "nulls.arrow": (_table(lambda: _in_one_list(pyarrow.nulls(LARGE // 8))), "row 2001 has", "row 2001"),
    "texts.arrow": (_table(_long_text, 20, compression="zstd"), _TOO_LARGE, "message 1"),
    "lists.arrow": (_table(_list_of_one_text), "row 2001 has", "row 2001"),
}
