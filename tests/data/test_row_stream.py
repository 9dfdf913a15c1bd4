"""Rows read in chunks are the rows of the file, and a file that changes on the way is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from deltaw.data import row_stream
from deltaw.data.row_stream import content_identity
from deltaw.data.sources import open_source, read_rows
from deltaw.errors import UserError

ROWS = [{"prompt": f"question {n}", "completion": "x" * n} for n in range(23)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five rows, none of them kept from the first reading."""
    monkeypatch.setattr(row_stream, "CHUNK_ROWS", 5)
    monkeypatch.setattr(row_stream, "KEPT_BYTES", 0)


def lines(rows: object = ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()  # type: ignore[attr-defined]


def written(folder: Path, name: str) -> str:
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=4)
    elif name.endswith(".arrow"):
        pyarrow.feather.write_feather(pyarrow.Table.from_pylist(ROWS), path, chunksize=7, compression="uncompressed")
    elif ".csv" in name:
        path.write_text("prompt,completion\n" + "".join(f'"{r["prompt"]}",{r["completion"]}\n' for r in ROWS))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    else:
        path.write_bytes(lines())
    return str(path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.parquet", "r.arrow"])
def test_chunks_are_the_rows_of_the_file(name: str, tmp_path: Path, small_chunks: None) -> None:
    reference = written(tmp_path, name)
    stream = open_source(reference)
    stream.scan()
    chunks = list(stream.chunks())
    whole = read_rows(reference)
    assert [row for chunk in chunks for row in chunk] == list(whole)
    assert (stream.rows, stream.columns) == (len(whole), whole.columns)
    assert max(len(chunk) for chunk in chunks) == 5
    assert chunks[1].place(2) == whole.place(7)


def test_rows_of_a_small_file_are_read_once(tmp_path: Path) -> None:
    reference = written(tmp_path, "r.jsonl")
    stream = open_source(reference)
    stream.scan()
    Path(reference).write_bytes(b"nonsense" + bytes(len(lines()) - 8))
    kept = stream.chunks()
    assert list(next(kept)) == [(n, row) for n, row in enumerate(ROWS, start=1)]
    with pytest.raises(UserError, match="changed while it was read"):
        next(kept)


def test_long_rows_make_short_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_stream, "KEPT_BYTES", 0)
    monkeypatch.setattr(row_stream, "CHUNK_BYTES", 1000)
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines([{"text": "x" * 600}] * 5))
    stream = open_source(str(path))
    stream.scan()
    assert [len(chunk) for chunk in stream.chunks()] == [2, 2, 1]


def test_a_folder_is_read_file_by_file(tmp_path: Path, small_chunks: None) -> None:
    for name, text in (("b.jsonl", "2"), ("a.jsonl", "1"), ("in/c.jsonl", "3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines([{"text": text}, {"text": text, text: 0}]))
    stream = open_source(str(tmp_path))
    stream.scan()
    assert stream.columns == ["text", "1", "2", "3"]
    chunks = list(stream.chunks())
    assert [[row["text"] for _, row in chunk] for chunk in chunks] == [["1", "1"], ["2", "2"], ["3", "3"]]
    assert [chunk.place(1) for chunk in chunks] == [
        f"{tmp_path}/{name}, row 2" for name in ("a.jsonl", "b.jsonl", "in/c.jsonl")
    ]


def test_errors_show_in_the_first_reading(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines() + b"{broken\n")
    with pytest.raises(UserError) as refused:
        open_source(str(path)).scan()
    assert refused.value.where == f"{path}, line 24"
    path.write_bytes(b"\n")
    with pytest.raises(UserError, match="empty"):
        open_source(str(path)).scan()


@pytest.mark.parametrize("kept", [0, 2**20])
def test_lines_that_cannot_be_read_are_passed_over_and_told_once(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(row_stream, "KEPT_BYTES", kept)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{bad\n[1]\n{"text": "\xe9"}\n{"text": "b"}\n')
    told: list[tuple[str, str | None, object]] = []
    stream = open_source(str(path), lambda error, row: told.append((error.reason, error.where, row)))
    stream.scan()
    assert [row for chunk in stream.chunks() for row in chunk] == [(1, {"text": "a"}), (5, {"text": "b"})]
    assert (stream.rows, stream.bad) == (2, 3)
    assert [(reason, where) for reason, where, _ in told] == [
        ("not JSON", f"{path}, line 2"),
        ("not a JSON object", f"{path}, line 3"),
        ("not UTF-8", f"{path}, line 4"),
    ]
    assert told[0][2] == "{bad\n"


def test_a_file_of_bad_lines_alone_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("{bad\nworse\n")
    with pytest.raises(UserError) as refused:
        open_source(str(path), lambda error, row: None).scan()
    assert "no row can be read" in refused.value.what
    assert refused.value.where == f"{path}, line 1"


# Files that change


def test_a_file_that_changes_between_the_readings_is_noticed(tmp_path: Path, small_chunks: None) -> None:
    path = Path(written(tmp_path, "r.jsonl"))
    stream = open_source(str(path))
    stream.scan()
    path.write_bytes(lines([*ROWS, {"prompt": "new", "completion": "row"}]))
    with pytest.raises(UserError) as refused:
        list(stream.chunks())
    assert "the file changed while it was read" in refused.value.what
    assert refused.value.where == str(path)


@pytest.mark.parametrize("at", [0, 2])
def test_a_file_that_disappears_is_said(at: int, tmp_path: Path, small_chunks: None) -> None:
    path = Path(written(tmp_path, "r.jsonl"))
    stream = open_source(str(path))
    stream.scan()
    chunks = stream.chunks()
    for _ in range(at):
        next(chunks)
    path.unlink()
    with pytest.raises(UserError) as refused:
        list(chunks)
    assert refused.value.where == str(path)
    assert "disappeared" in refused.value.what or "cannot be read: No such file" in refused.value.what


# What tells contents apart


def test_content_counts_and_not_the_name_of_a_small_file(tmp_path: Path) -> None:
    for name, text in (("a", "same"), ("b", "same"), ("c", "othr")):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (1, 1))
    a, b, c = (content_identity(tmp_path / name) for name in "abc")
    assert a == b != c


def test_a_large_file_that_was_written_to_is_another_even_with_its_old_time(tmp_path, monkeypatch):
    monkeypatch.setattr(row_stream, "SMALL_BYTES", 0)
    path = tmp_path / "large"
    path.write_bytes(bytes(8 * 2**20))
    os.utime(path, (1, 1))
    before = content_identity(path)
    assert content_identity(path) == before
    with path.open("r+b") as file:  # between the parts that are hashed
        file.seek(100_000)
        file.write(b"x")
    os.utime(path, (1, 1))
    assert content_identity(path) != before


def test_rows_of_a_hub_come_in_chunks(monkeypatch: pytest.MonkeyPatch, small_chunks: None) -> None:
    found = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda identity, split: found)
    stream = open_source("owner/name")
    stream.scan()
    chunks = list(stream.chunks())
    assert [row for chunk in chunks for row in chunk] == list(enumerate(ROWS, start=1))
    assert len(chunks) == 5 and chunks[0].fills_nulls
