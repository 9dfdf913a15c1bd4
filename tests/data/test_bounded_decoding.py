"""Files are decoded in pieces, so memory stays proportional to the rows that are used."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from deltaw.child_process import minimal_environment
from deltaw.data import arrow_rows
from deltaw.data.sources import open_source, read_rows
from deltaw.errors import UserError
from tests.data.conftest import refusal
from tests.data.hostile_files import HOSTILE, write_arrow, write_parquet


@pytest.mark.parametrize("name", ["text.parquet", "list.parquet", "beginnings.parquet", "text.arrow"])
def test_high_expansion_ratio_is_rejected(name, tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_rows, "MIN_DECODED_BYTES", 2**20)
    HOSTILE[name][0](tmp_path / name)
    error = refusal(open_source(str(tmp_path / name), lambda *args: None).scan)
    assert "bytes of the file become" in error.message
    assert "group 1 of rows" in str(error.location) or "message 1" in str(error.location)


@functools.cache
def _table() -> pyarrow.Table:
    """Return a table with every kind of column, with nulls, empty lists and repeated values."""
    pick = random.Random(0)
    count = 250
    rows = [
        {
            "text": pick.choice([None, "", "é" * pick.randrange(200), str(pick.random())]),
            "code": pick.choice(["a", "bb", None]),
            "number": pick.choice([None, 1, 2**60]),
            "messages": [
                {"role": pick.choice(["user", "tool"]), "content": "x" * pick.randrange(2000), "n": None}
                for _ in range(pick.randrange(4))
            ],
            "image": {"bytes": bytes(pick.randrange(3000)), "path": None},
            "pixels": [[pick.randrange(256) for _ in range(4)] for _ in range(pick.randrange(3))],
            "names": pick.choice([None, [], ["a", "b" * 90]]),
            "nothing": None,
        }
        for _ in range(count)
    ]
    text = pyarrow.string()
    more = {
        "pairs": pyarrow.array([[("k", "v" * n)] for n in range(count)], pyarrow.map_(text, text)),
        "fixed": pyarrow.array([["a", "b" * n] for n in range(count)], pyarrow.list_(text, 2)),
        "views": pyarrow.array([None if n % 3 == 0 else "v" * n for n in range(count)], pyarrow.string_view()),
        "packed": pyarrow.array(["p" * (n % 5) for n in range(count)]).dictionary_encode(),
    }
    table = pyarrow.Table.from_pylist(rows)
    return pyarrow.table({**{name: table[name] for name in table.column_names}, **more})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_page_version": "2.0", "compression": "zstd", "row_group_size": 100},
        {"use_dictionary": False, "compression": "gzip", "data_page_size": 1000},
        {"compression": "none", "dictionary_pagesize_limit": 1000, "write_batch_size": 16},
        {"compression": "lz4", "use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"compression": "brotli", "write_page_index": True, "store_schema": False},
    ],
)
@pytest.mark.parametrize("batch_rows", [1024, 1])
def test_parquet_variants_return_all_rows(options, batch_rows, tmp_path, monkeypatch):
    """In batches of one row, text is read as dictionaries."""
    monkeypatch.setattr(arrow_rows, "_ATTEMPTS", (batch_rows,))
    table = _table().slice(37, 110)
    path = tmp_path / "d.parquet"
    if options.get("column_encoding"):
        table = table.drop_columns(["packed"])
    pyarrow.parquet.write_table(table, path, **options)
    assert [row for _, row in read_rows(str(path))] == table.to_pylist()


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.each_value
def test_arrow_variants_return_all_rows(form: str, compression: str | None, tmp_path: Path) -> None:
    table = _table()
    path = tmp_path / "d.arrow"
    write_arrow(path, table, compression, form, max_chunksize=100)
    assert [row for _, row in read_rows(str(path))] == table.to_pylist()


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_damaged_files_raise_user_error_or_are_read(write: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / f"d.{write.__name__.removeprefix('write_')}"
    write(path, _table().slice(0, 40), compression="zstd")
    content = path.read_bytes()
    pick = random.Random(0)
    rejected = 0
    for _ in range(16):  # each starts a process
        offset = pick.randrange(len(content))
        path.write_bytes(content[:offset] + bytes([pick.randrange(256)]) + content[offset + 1 :])
        try:
            read_rows(str(path))
        except UserError:
            rejected += 1
    assert rejected > 3


def test_batch_that_exceeds_the_limit_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the group that precede the batch are not repeated."""
    monkeypatch.setattr(arrow_rows, "MIN_DECODED_BYTES", 16 * 2**20)
    monkeypatch.setattr(arrow_rows, "MAX_EXPANSION", 1)
    texts = [*map(str, range(1500)), *["a" * 2**19] * 100, *map(str, range(1500))]
    write_parquet(tmp_path / "d.parquet", pyarrow.table({"text": texts}), row_group_size=2000)
    assert [row["text"] for _, row in read_rows(str(tmp_path / "d.parquet"))] == texts


@pytest.fixture
def started(tmp_path: Path) -> tuple[Generator[Any, None, None], psutil.Process]:
    """A reader after the first row of a file with several batches, and the process that decodes the file."""
    path = tmp_path / "d.parquet"
    write_parquet(path, pyarrow.table({"text": ["a" * 1000] * 5000}))
    before = set(psutil.Process().children())
    rows = arrow_rows.read_arrow(path, "d.parquet", "parquet", None)
    next(rows)
    (decoder,) = set(psutil.Process().children()) - before
    return rows, decoder


def test_decoder_has_no_secrets(started: tuple[Generator[Any, None, None], psutil.Process]) -> None:
    assert started[1].environ().keys() <= {*minimal_environment(), "LC_CTYPE"}
    started[0].close()


def test_killed_decoder_raises_user_error(started: tuple[Generator[Any, None, None], psutil.Process]) -> None:
    rows, decoder = started
    decoder.kill()
    error = refusal(list, rows)
    assert "exited with status" in error.message and error.location == "d.parquet" and error.hint


def test_closed_reader_stops_its_decoder(started: tuple[Generator[Any, None, None], psutil.Process]) -> None:
    rows, decoder = started
    rows.close()
    assert not decoder.is_running()
