"""Files that are small on the disk and become large in memory, by the way in which they do."""

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
    """Write compressed, without the text ever being in memory."""
    if path.suffix == ".zst":
        with path.open("wb") as raw, pyarrow.CompressedOutputStream(raw, "zstd") as file:
            for block in blocks:
                file.write(block)
        return
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, io.open)
    with opened(path, "wb") as file:  # type: ignore[operator]
        for block in blocks:
            file.write(block)


def _line(path: Path) -> None:
    _packed(path, _blocks(b'{"text": "b"}\n{"text": "', _BLOCK, LARGE // 2**20, b'"}\n{"text": "c"}\n'))


def _objects(path: Path) -> None:
    _packed(path, _blocks(b'{"text": [', b"{}," * 2**18, LARGE // 2**20, b"{}]}\n"))


def _list(path: Path) -> None:
    _packed(path, _blocks(b'[{"text": "b"}, {"text": "', _BLOCK, LARGE // 2**20, b'"}]'))


def _cell(path: Path) -> None:
    _packed(path, _blocks(b"text\nb\n", _BLOCK, LARGE // 2**20, b"\nc\n"))


def _cells(path: Path) -> None:
    _packed(path, _blocks(b"text\nb\n", b"," * 2**20, LARGE // 2**20, b"\nc\n"))


def _quoted_lines(path: Path) -> None:
    _packed(path, _blocks(b"text\nb\n", b'"a\n",' * 2**17, LARGE // 2**20, b"c\n"))


def _open_quote(path: Path) -> None:
    _packed(path, _blocks(b'text\nb\n"', b"a row\n" * 2**18, LARGE // 2**20, b""))


def _parquet(path: Path, table: pyarrow.Table, **more: object) -> None:
    pyarrow.parquet.write_table(table, path, compression="zstd", write_statistics=False, **more)


def _long_text(path: Path) -> None:
    _parquet(path, pyarrow.table({"text": ["b", "a" * LARGE]}), use_dictionary=False)


def _long_entry(path: Path) -> None:
    _parquet(path, pyarrow.table({"text": _repeated(9, LARGE)}))


def _repeated(count: int, length: int) -> pyarrow.Array:
    """``count`` times one text, which is there once."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), ["a" * length])


def _repeated_text(path: Path) -> None:
    _parquet(path, pyarrow.table({"text": _repeated(4000, 2**21)}))


def _in_one_list(values: pyarrow.Array, empty: int = 2000) -> pyarrow.Array:
    """Rows of empty lists, and one list that has all values."""
    offsets = pyarrow.array([0] * (empty + 1) + [len(values)], pyarrow.int32())
    return pyarrow.ListArray.from_arrays(offsets, values)


def _long_list(path: Path) -> None:
    zeros = pyarrow.nulls(LARGE // 8, pyarrow.int64()).fill_null(0)
    _parquet(path, pyarrow.table({"text": _in_one_list(zeros)}))


def _list_of_one_text(path: Path) -> None:
    _parquet(path, pyarrow.table({"text": _in_one_list(_repeated(4000, 2**18))}))


def _common_beginnings(path: Path) -> None:
    """Each value is the one before, and nothing more (DELTA_BYTE_ARRAY)."""
    table = pyarrow.table({"text": ["a" * 2**19] * 400})
    _parquet(path, table, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})


def _arrow(path: Path, table: pyarrow.Table, compression: str | None = None) -> None:
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_file(str(path), table.schema, options=options) as file:
        file.write_table(table)


def _arrow_text(path: Path) -> None:
    _arrow(path, pyarrow.table({"text": ["b", "a" * LARGE]}), "zstd")


def _arrow_repeated(path: Path) -> None:
    _arrow(path, pyarrow.table({"text": _repeated(4000, 2**21)}))


def _arrow_views(path: Path) -> None:
    """Views of one text, by many rows."""
    once = pyarrow.array(["a" * 2**20], pyarrow.string_view())
    views, text = once.buffers()[1:]
    many = pyarrow.py_buffer(views.to_pybytes() * 500)
    array = pyarrow.Array.from_buffers(pyarrow.string_view(), 500, [None, many, text])
    _arrow(path, pyarrow.table({"text": array}))


def _arrow_nulls(path: Path) -> None:
    _arrow(path, pyarrow.table({"text": _in_one_list(pyarrow.nulls(LARGE // 8))}))


def _arrow_lists(path: Path) -> None:
    _arrow(path, pyarrow.table({"text": _in_one_list(_repeated(4000, 2**18))}))


def _wide_window(path: Path) -> None:
    """A text of a few bytes whose header asks for 1.5 GiB."""
    small = lzma.compress(b'{"text": "b"}\n', filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}])
    # The size of the window is a byte of the block's header (4 KiB: 0; 1.5 GiB: 37), which has a checksum.
    head = bytearray(small[12:24])
    head[head.index(b"\x21\x01") + 2] = 37
    head[8:12] = zlib.crc32(bytes(head[:8])).to_bytes(4, "little")
    path.write_bytes(small[:12] + bytes(head) + small[24:])


HOSTILE: dict[str, Callable[[Path], None]] = {
    "line.jsonl": _line,
    "line.jsonl.gz": _line,
    "line.jsonl.bz2": _line,
    "line.jsonl.xz": _line,
    "line.jsonl.zst": _line,
    "objects.jsonl.gz": _objects,
    "list.json.gz": _list,
    "objects.json.zst": _objects,
    "cell.csv.gz": _cell,
    "cells.csv.gz": _cells,
    "quoted.csv.gz": _quoted_lines,
    "quote.csv.gz": _open_quote,
    "window.jsonl.xz": _wide_window,
    "text.parquet": _long_text,
    "entry.parquet": _long_entry,
    "repeated.parquet": _repeated_text,
    "list.parquet": _long_list,
    "texts.parquet": _list_of_one_text,
    "beginnings.parquet": _common_beginnings,
    "text.arrow": _arrow_text,
    "repeated.arrow": _arrow_repeated,
    "views.arrow": _arrow_views,
    "nulls.arrow": _arrow_nulls,
    "lists.arrow": _arrow_lists,
}
