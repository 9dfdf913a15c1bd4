"""Chunks contain the rows of the file, and changes during reading are detected."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from deltaw.data import row_stream
from deltaw.data.row_stream import RowStream, content_identity
from deltaw.data.sources import open_source, read_rows
from tests.data.conftest import refusal

ROWS = [{"prompt": f"question {n}", "completion": "x" * n} for n in range(23)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five rows, without rows cached from the first reading."""
    monkeypatch.setattr(row_stream, "CHUNK_ROWS", 5)
    monkeypatch.setattr(row_stream, "MEMORY_BYTES", 0)


def lines(rows: object = ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()  # type: ignore[attr-defined]


def write_sample(folder: Path, name: str) -> str:
    path = folder / name
    table = pyarrow.Table.from_pylist(ROWS)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=4)
    elif name.endswith(".arrow"):
        pyarrow.feather.write_feather(table, path, chunksize=7, compression="uncompressed")
    elif ".csv" in name:
        path.write_text("prompt,completion\n" + "".join(f'"{r["prompt"]}",{r["completion"]}\n' for r in ROWS))
    else:
        path.write_bytes(json.dumps(ROWS).encode() if name.endswith(".json") else lines())
    return str(path)


def scan_source(reference: object, on_bad: Callable[..., None] | None = None) -> RowStream:
    stream = open_source(str(reference), on_bad)
    stream.scan()
    return stream


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.parquet", "r.arrow"])
def test_chunks_contain_the_rows_of_the_file(name: str, tmp_path: Path, small_chunks: None) -> None:
    stream = scan_source(write_sample(tmp_path, name))
    chunks = list(stream.chunks())
    expected = read_rows(str(tmp_path / name))
    assert [row for chunk in chunks for row in chunk] == list(expected)
    assert (stream.rows, stream.columns) == (len(expected), expected.columns)
    assert max(len(chunk) for chunk in chunks) == 5 and chunks[1].row_location(2) == expected.row_location(7)


def test_small_file_is_read_once(tmp_path: Path) -> None:
    reference = write_sample(tmp_path, "r.jsonl")
    chunks = scan_source(reference).chunks()
    Path(reference).write_bytes(b"nonsense" + bytes(len(lines()) - 8))
    assert list(next(chunks)) == list(enumerate(ROWS, start=1))
    assert "changed while it was read" in refusal(next, chunks).message


def test_long_rows_shorten_chunks(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_stream, "MEMORY_BYTES", 0)
    monkeypatch.setattr(row_stream, "CHUNK_BYTES", 1000)
    stream = scan_source(write([{"text": "x" * 600}] * 5))
    assert [len(chunk) for chunk in stream.chunks()] == [2, 2, 1]


def test_folder_is_read_file_by_file(tmp_path: Path, write, small_chunks: None) -> None:
    for name, text in (("b.jsonl", "2"), ("a.jsonl", "1"), ("in/c.jsonl", "3")):
        write([{"text": text}, {"text": text, text: 0}], name)
    stream = scan_source(tmp_path)
    assert stream.columns == ["text", "1", "2", "3"]
    chunks = list(stream.chunks())
    assert [[row["text"] for _, row in chunk] for chunk in chunks] == [["1", "1"], ["2", "2"], ["3", "3"]]
    names = ("a.jsonl", "b.jsonl", "in/c.jsonl")
    assert [chunk.row_location(1) for chunk in chunks] == [f"{tmp_path}/{name}, row 2" for name in names]


def test_errors_are_raised_by_scan_and_all_bad_lines_are_an_error(write) -> None:
    path = write(lines() + b"{broken\n")
    assert refusal(open_source(path).scan).location == f"{path}, line 24"
    error = refusal(scan_source, write("{bad\nworse\n"), lambda bad_row, row: None)
    assert "no row can be read" in error.message and error.location == f"{path}, line 1"


@pytest.mark.parametrize("memory_bytes", [0, 2**20])
def test_unreadable_lines_are_skipped_and_reported_once(memory_bytes, write, monkeypatch):
    monkeypatch.setattr(row_stream, "MEMORY_BYTES", memory_bytes)
    path = write(b'{"text": "a"}\n{bad\n[1]\n{"text": "\xe9"}\n{"text": "b"}\n')
    reported: list[tuple[str, str | None, object]] = []
    stream = scan_source(path, lambda error, row: reported.append((error.reason, error.location, row)))
    assert [row for chunk in stream.chunks() for row in chunk] == [(1, {"text": "a"}), (5, {"text": "b"})]
    assert (stream.rows, stream.bad) == (2, 3)
    reasons = ("not JSON", "not a JSON object", "not UTF-8")
    assert [reason for reason, *_ in reported] == list(reasons)
    assert [location for _, location, _ in reported] == [f"{path}, line {n}" for n in (2, 3, 4)]
    assert reported[0][2] == "{bad\n"


# Files that change


def test_file_change_between_readings_is_detected(tmp_path: Path, small_chunks: None) -> None:
    path = Path(write_sample(tmp_path, "r.jsonl"))
    chunks = scan_source(path).chunks()
    path.write_bytes(lines([*ROWS, {"prompt": "new", "completion": "row"}]))
    error = refusal(list, chunks)
    assert "the file changed while it was read" in error.message and error.location == str(path)


@pytest.mark.parametrize("at", [0, 2])
def test_deleted_file_is_reported(at: int, tmp_path: Path, small_chunks: None) -> None:
    path = Path(write_sample(tmp_path, "r.jsonl"))
    chunks = scan_source(path).chunks()
    for _ in range(at):
        next(chunks)
    path.unlink()
    error = refusal(list, chunks)
    assert error.location == str(path)
    assert "disappeared" in error.message or "cannot be read: No such file" in error.message


# Content identity


def test_content_identity_ignores_name_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("a", "same"), ("b", "same"), ("c", "othr")):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (1, 1))
    a, b, c = (content_identity(tmp_path / name) for name in "abc")
    assert a == b != c
    monkeypatch.setattr(row_stream, "SMALL_BYTES", 0)
    path = tmp_path / "large"
    path.write_bytes(bytes(8 * 2**20))
    os.utime(path, (1, 1))
    before = content_identity(path)
    assert content_identity(path) == before
    with path.open("r+b") as file:  # between the hashed parts
        file.seek(100_000)
        file.write(b"x")
    os.utime(path, (1, 1))
    assert content_identity(path) != before


def test_hub_rows_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch, small_chunks: None) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda identity, split: datasets.Dataset.from_list(ROWS))
    chunks = list(scan_source("owner/name").chunks())
    assert [row for chunk in chunks for row in chunk] == list(enumerate(ROWS, start=1))
    assert len(chunks) == 5 and chunks[0].fills_nulls


def test_unreadable_rows_can_be_included_in_order(tmp_path):
    from deltaw.data.row_stream import UnreadableRow

    file = tmp_path / "d.jsonl"
    file.write_text('no\n{"a": 1}\n\n[2]\n{"a": 3}\nend\n')
    stream = open_source(str(file), lambda error, row: None)
    stream.scan()
    rows_read = [pair for rows in stream.chunks(unreadable=True) for pair in rows]
    rows_read = [(number, isinstance(row, UnreadableRow)) for number, row in rows_read]
    assert rows_read == [(1, True), (2, False), (4, True), (5, False), (6, True)]
    assert [number for rows in stream.chunks() for number, _ in rows] == [2, 5]
