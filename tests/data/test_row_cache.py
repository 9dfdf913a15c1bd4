"""Rows are tokenized once: kept, found again, made anew when anything changed, and never believed half."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from unittest.mock import Mock

import pytest
from transformers import PreTrainedTokenizerFast

from deltaw.data import DataSettings, RunData, prepare, prepare_file, row_stream, stored_rows
from deltaw.data.chunk import ChunkReader
from deltaw.data.row_store import DiskRows, MemoryRows
from deltaw.data.stored_rows import RowCache
from tests.caches import other
from tests.conftest import write_rows
from tests.data.conftest import CHATML, make_tokenizer, refusal

TOKENIZER = make_tokenizer()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = ({"prompt": f"question {n % 57}", "completion": f"answer {n % 57}", "film": n % 9} for n in range(60))
    return write_rows(tmp_path / "d.jsonl", rows)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were tokenized, chunk by chunk."""
    counts: list[int] = []
    read = ChunkReader.read
    monkeypatch.setattr(
        ChunkReader, "read", lambda self, rows, indices: counts.append(len(indices)) or read(self, rows, indices)
    )
    return counts


def reading(data: Path, tokenizer: PreTrainedTokenizerFast = TOKENIZER, seed: int = 0, **settings: object):
    said: list[str] = []
    chosen = DataSettings(str(data), **{"cache": True, "eval": 0.2, **settings})  # type: ignore[arg-type]
    return prepare(chosen, tokenizer, seed=seed, say=said.append), said


def content(prepared: RunData) -> list[object]:
    """All that is trained and evaluated on, and what is told of it."""
    rows = [*prepared.train, *prepared.held_out]
    told = [(e.row, e.tokens.tobytes(), e.is_label.tobytes(), e.prompt_length, e.answer) for e in rows]
    return [*told, len(prepared.train), prepared.report]


def entries(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.suffix in (".json", ".arrow"))


def test_a_second_preparation_reads_what_the_first_wrote(data: Path, folder: Path, tokenized: list[int]) -> None:
    first, _ = reading(data)
    assert tokenized == [60] and entries(folder) == [".arrow", ".json"]
    second, said = reading(data)
    assert tokenized == [60] and not said and isinstance(second.train.store, DiskRows)
    assert content(second) == content(first)
    assert len(second.held_out) == 11 and second.report.duplicates == 3
    # What does not matter: another split, or asking for the cache in another way.
    for change in ({"eval": 5}, {"seed": 3}, {"duplicates": "keep"}):
        changed, anew = (reading(data, **{**change, "cache": cache})[0] for cache in (True, False))  # type: ignore[arg-type]
        assert content(changed) == content(anew) != content(first)
    assert tokenized == [60] * 4


def test_an_evaluation_file_is_kept_too(data: Path, folder: Path, tokenized: list[int]) -> None:
    found = [prepare_file(str(data), DataSettings("elsewhere.jsonl", cache=True), TOKENIZER) for _ in range(2)]
    assert tokenized == [60] and found[0][1] == found[1][1]
    assert [[e.row for e in rows] for rows, _ in found] == [list(range(1, 61))] * 2


def test_many_rows_are_trained_on_from_the_disk_alike(data, folder, monkeypatch):
    for settings in ({}, {"group": "film"}, {"rows": 40}, {"duplicates": "keep"}, {"eval": str(data)}):
        small, _ = reading(data, **{"cache": False, **settings})
        assert isinstance(small.train.store, MemoryRows)
        with monkeypatch.context() as patch:
            patch.setattr(stored_rows, "SPILL_BYTES", 0)
            patch.setattr(stored_rows, "BATCH_ROWS", 10)
            patch.setattr(row_stream, "KEPT_BYTES", 0)
            patch.setattr(row_stream, "CHUNK_ROWS", 7)
            large, _ = reading(data, **{"cache": False, **settings})
            assert isinstance(large.train.store, DiskRows)
        assert content(large) == content(small)
    assert list(folder.iterdir()) == []  # nothing is kept, and temporary files have no name


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 900},
        {"labels": "last"},
        {"template": "plain"},
        {"long_rows": "drop"},
        {"columns": {"prompt": "completion", "completion": "prompt"}},
        {"rows": 30},
        {"rows": 30, "seed": 1},
        {"group": "film"},
        {"tokenizer": make_tokenizer("<s>" + CHATML)},
        {"tokenizer": make_tokenizer(merges=[("e", "s")])},
        {"tokenizer": make_tokenizer(eos="</s>")},
        *("transformers", "tokenizers", "datasets", "pyarrow", "jinja2", "data/formats.py", "hub/terminators.py"),
    ],
)
def test_rows_are_tokenized_anew_when_anything_changed(change, data, folder, tokenized, monkeypatch):
    """A setting, or the version or code that makes them."""
    reading(data, **({"rows": 30} if "seed" in change else {}))
    if isinstance(change, str):
        other(monkeypatch, folder / "source", change)
        change = {}
    changed, again = (reading(data, **change)[0] for _ in range(2))
    assert len(tokenized) == 2 and content(again) == content(changed)


@pytest.mark.parametrize("small", [0, 2**20])
def test_a_file_that_changed_is_read_anew(small, data, folder, tokenized, monkeypatch):
    monkeypatch.setattr(row_stream, "SMALL_BYTES", small)
    reading(data)
    before = data.stat()
    data.write_bytes(data.read_bytes().replace(b"question 11", b"question XX"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data.stat().st_size == before.st_size and data.stat().st_mtime_ns == before.st_mtime_ns
    changed, _ = reading(data)
    assert len(tokenized) == 2
    assert any("question XX" in TOKENIZER.decode(e.tokens) for e in [*changed.train, *changed.held_out])


def test_a_template_that_shows_the_date_is_rendered_anew_each_day(data, folder, tokenized, monkeypatch):
    dated = make_tokenizer("{{ strftime_now('%Y') and '' }}" + CHATML)
    for day, count in ((None, 1), (None, 1), ("2001-01-01", 2)):
        if day:
            monkeypatch.setattr("deltaw.data.templates.todays_date", lambda: "2001-01-01")
        reading(data, dated)
        assert len(tokenized) == count


def test_small_files_are_kept_only_where_asked_or_slow(data, folder, tokenized, monkeypatch):
    reading(data, cache="auto")
    assert not folder.exists()
    for limit, value, kept in (("TINY_BYTES", 0, []), ("LONG_SECONDS", 0.0, [".arrow", ".json"])):
        monkeypatch.setattr(stored_rows, limit, value)
        reading(data, cache="auto")
        assert entries(folder) == kept
    reading(data, cache=False)
    assert len(tokenized) == 4
    reading(data, cache="auto")
    assert len(tokenized) == 4


# Damage and kills


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        (".arrow", lambda b: b[:-100]),
        (".arrow", lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:]),
        (".arrow", lambda b: b""),
        (".json", lambda b: b[: len(b) // 2]),
        (".json", lambda b: b"[]"),
        (".json", lambda b: b.replace(b'"rows": 60', b'"rows": 61')),
        (".json", lambda b: b.replace(b'"ends"', b'"sdne"')),
    ],
)
def test_a_damaged_entry_is_noticed_and_made_anew(suffix, change, data, folder, tokenized):
    first, _ = reading(data)
    (path,) = folder.glob(f"*{suffix}")
    path.write_bytes(change(path.read_bytes()))
    second, said = reading(data)
    assert len(tokenized) == 2 and "damaged" in said[0]
    assert content(second) == content(first)
    reading(data)
    assert len(tokenized) == 2


def test_damage_between_the_samples_is_noticed_when_the_row_is_read(data, folder, tokenized, monkeypatch):
    monkeypatch.setattr(stored_rows, "sample", lambda file, size, digest: None)
    reading(data, eval=None)
    (path,) = folder.glob("*.arrow")
    with path.open("r+b") as file:
        file.seek(int(DiskRows(path.open("rb"), "", grouped=False)._places["tokens"][0]))
        file.write(b"\x07")
    prepared, _ = reading(data, eval=None)
    assert "damaged" in refusal(list, prepared.train).what
    again, _ = reading(data, eval=None)
    assert len(tokenized) == 2 and len(list(again.train)) == 57


def started(data: Path, change: Callable[[], object] = lambda: None) -> tuple[BaseProcess, multiprocessing.SimpleQueue]:
    """A forked process that prepares the rows, and what it comes to."""
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()

    def work() -> None:
        change()
        train = reading(data)[0].train
        told.put((len(train), train.digest()))

    process = fork.Process(target=work)
    process.start()
    return process, told


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written() -> None:
    write = stored_rows.RowWriter._write
    stored_rows.RowWriter._write = lambda self: kill(write(self))


@pytest.mark.parametrize(
    "change",
    [
        lambda: setattr(stored_rows.RowWriter, "_write", kill),  # before anything is written
        lambda: setattr(RowCache, "describe", kill),  # the rows are there, their description is not
        half_written,
    ],
)
def test_a_killed_preparation_leaves_nothing_that_is_believed(change, data, folder, tokenized):
    killed, _ = started(data, change)
    killed.join(200)
    assert killed.exitcode == -signal.SIGKILL
    assert bool(list(folder.glob(".*.part"))) == (change is half_written)
    prepared, said = reading(data)
    assert tokenized == [60] and not said
    assert len(prepared.train) + len(prepared.held_out) == 57
    assert entries(folder) == [".arrow", ".json"] and not list(folder.glob(".*.part"))


def test_two_processes_at_once_come_to_the_same(data: Path, folder: Path) -> None:
    (one, told), (other, also_told) = started(data), started(data)
    first, second = told.get(), also_told.get()
    one.join(100)
    other.join(100)
    assert first == second and first[0] == 46
    assert entries(folder) == [".arrow", ".json"]


def test_who_comes_second_waits_and_reads_what_the_first_wrote(folder: Path) -> None:
    said: SimpleQueue[str] = SimpleQueue()
    found: list[object] = []

    def second() -> None:
        with RowCache("k", said.put) as cache:
            found.append(cache.find(lambda *told: told))

    thread = threading.Thread(target=second)
    with RowCache("k", lambda line: None) as first:
        thread.start()
        assert "waiting" in said.get(timeout=20) and thread.is_alive()
        assert first.find(lambda *told: told) is None and not found
    thread.join(20)
    assert found == [None]


def test_a_folder_that_cannot_be_written_costs_no_run_unless_asked_for(data, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_rows, "TINY_BYTES", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "file"))
    prepared, _ = reading(data, cache="auto")
    assert len(prepared.train) == 46
    refused = refusal(reading, data)
    assert "cannot be kept" in refused.what and "DELTAW_CACHE" in str(refused.hint)


def test_a_full_disk_is_said_where_rows_need_it(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "SPILL_BYTES", 0)

    monkeypatch.setattr(MemoryRows, "batch", Mock(side_effect=OSError(28, "No space left on device")))
    assert "No space left" in refusal(reading, data).what
    assert entries(folder) == [] and not list(folder.glob(".*.part"))
