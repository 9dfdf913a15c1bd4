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
    quickly = {".gz": {"compresslevel": 1}, ".bz2": {"compresslevel": 1}, ".xz": {"preset": 0}}
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, io.open)
    with opened(path, "wb", **quickly.get(path.suffix, {})) as file:  # type: ignore[operator]
        for block in blocks:
            file.write(block)


def _text(before: bytes, block: bytes, after: bytes) -> Callable[[Path], None]:
    """A file of text with many times the same block."""
    return lambda path: _packed(path, _blocks(before, block, LARGE // 2**20, after))


def write_parquet(path: Path, table: pyarrow.Table, **more: object) -> None:
    pyarrow.parquet.write_table(table, path, **{"compression": "zstd", "write_statistics": False, **more})


def _long_text(path: Path) -> None:
    write_parquet(path, pyarrow.table({"text": ["b", "a" * LARGE]}), use_dictionary=False)


def _long_entry(path: Path) -> None:
    write_parquet(path, pyarrow.table({"text": _repeated(9, LARGE)}))


def _repeated(count: int, length: int) -> pyarrow.Array:
    """``count`` times one text, which is there once."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), ["a" * length])


def _repeated_text(path: Path) -> None:
    write_parquet(path, pyarrow.table({"text": _repeated(4000, 2**21)}))


def _in_one_list(values: pyarrow.Array, empty: int = 2000) -> pyarrow.Array:
    """Rows of empty lists, and one list that has all values."""
    offsets = pyarrow.array([0] * (empty + 1) + [len(values)], pyarrow.int32())
    return pyarrow.ListArray.from_arrays(offsets, values)


def _long_list(path: Path) -> None:
    zeros = pyarrow.nulls(LARGE // 8, pyarrow.int64()).fill_null(0)
    write_parquet(path, pyarrow.table({"text": _in_one_list(zeros)}))


def _list_of_one_text(path: Path) -> None:
    write_parquet(path, pyarrow.table({"text": _in_one_list(_repeated(4000, 2**18))}))


def _common_beginnings(path: Path) -> None:
    """Each value is the one before, and nothing more (DELTA_BYTE_ARRAY)."""
    table = pyarrow.table({"text": ["a" * 2**19] * 400})
    write_parquet(path, table, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})


def write_arrow(
    path: Path, table: pyarrow.Table, compression: str | None = None, form: str = "file", **more: object
) -> None:
    new = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
    with new(str(path), table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_table(table, **more)


def _arrow_text(path: Path) -> None:
    write_arrow(path, pyarrow.table({"text": ["b", "a" * LARGE]}), "zstd")


def _arrow_repeated(path: Path) -> None:
    write_arrow(path, pyarrow.table({"text": _repeated(4000, 2**21)}))


def _arrow_views(path: Path) -> None:
    """Views of one text, by many rows."""
    once = pyarrow.array(["a" * 2**20], pyarrow.string_view())
    views, text = once.buffers()[1:]
    many = pyarrow.py_buffer(views.to_pybytes() * 500)
    array = pyarrow.Array.from_buffers(pyarrow.string_view(), 500, [None, many, text])
    write_arrow(path, pyarrow.table({"text": array}))


def _arrow_nulls(path: Path) -> None:
    write_arrow(path, pyarrow.table({"text": _in_one_list(pyarrow.nulls(LARGE // 8))}))


def _arrow_lists(path: Path) -> None:
    write_arrow(path, pyarrow.table({"text": _in_one_list(_repeated(4000, 2**18))}))


def _wide_window(path: Path) -> None:
    """A text of a few bytes whose header asks for 1.5 GiB."""
    small = lzma.compress(b'{"text": "b"}\n', filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}])
    # The size of the window is a byte of the block's header (4 KiB: 0; 1.5 GiB: 37), which has a checksum.
    head = bytearray(small[12:24])
    head[head.index(b"\x21\x01") + 2] = 37
    head[8:12] = zlib.crc32(bytes(head[:8])).to_bytes(4, "little")
    path.write_bytes(small[:12] + bytes(head) + small[24:])


_LINE = _text(b'{"text": "b"}\n{"text": "', _BLOCK, b'"}\n{"text": "c"}\n')
_OBJECTS = _text(b'{"text": [', b"{}," * 2**18, b"{}]}\n")
HOSTILE: dict[str, Callable[[Path], None]] = {
    **{f"line.jsonl{packed}": _LINE for packed in ("", ".gz", ".bz2", ".xz", ".zst")},
    "objects.jsonl.gz": _OBJECTS,
    "list.json.gz": _text(b'[{"text": "b"}, {"text": "', _BLOCK, b'"}]'),
    "objects.json.zst": _OBJECTS,
    "cell.csv.gz": _text(b"text\nb\n", _BLOCK, b"\nc\n"),
    "cells.csv.gz": _text(b"text\nb\n", b"," * 2**20, b"\nc\n"),
    "quoted.csv.gz": _text(b"text\nb\n", b'"a\n",' * 2**17, b"c\n"),
    "quote.csv.gz": _text(b'text\nb\n"', b"a row\n" * 2**18, b""),
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
