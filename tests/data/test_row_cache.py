"""Rows are tokenized once and cached. Changes and damage cause retokenization."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from unittest.mock import Mock

import pytest
from transformers import PreTrainedTokenizerFast

from deltaw.data import row_cache, row_stream, stored_rows
from deltaw.data.row_cache import RowCache
from deltaw.data.row_reader import RunData
from deltaw.data.row_store import DiskRows, MemoryRows
from deltaw.data.stored_rows import ChunkReader, TextReader
from deltaw.settings.data import DataSettings
from tests.caches import invalidate
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
    """Number of tokenized rows per chunk."""
    counts: list[int] = []
    read = ChunkReader.read
    counted = lambda self, rows, indices: counts.append(len(indices)) or read(self, rows, indices)  # noqa: E731
    monkeypatch.setattr(ChunkReader, "read", counted)
    return counts


def prepare_logged(data: Path, tokenizer: PreTrainedTokenizerFast = TOKENIZER, seed: int = 0, **settings: object):
    log_lines: list[str] = []
    config = DataSettings(str(data), **{"cache": True, "eval": 0.2, **settings})  # type: ignore[arg-type]
    return TextReader(config, tokenizer, log=log_lines.append).prepare(seed), log_lines


def content(prepared: RunData) -> list[object]:
    """Return all prepared examples, and the report."""
    rows = [*prepared.train, *prepared.held_out]
    contents = [(e.row, e.tokens.tobytes(), e.is_label.tobytes(), e.prompt_length, e.answer) for e in rows]
    return [*contents, len(prepared.train), prepared.report]


def entries(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.suffix in (".json", ".arrow"))


def test_second_preparation_reads_the_cached_rows(data: Path, folder: Path, tokenized: list[int]) -> None:
    first, _ = prepare_logged(data)
    assert tokenized == [60] and entries(folder) == [".arrow", ".json"]
    second, log_lines = prepare_logged(data)
    assert tokenized == [60] and not log_lines and isinstance(second.train.store, DiskRows)
    assert content(second) == content(first) and len(second.held_out) == 11 and second.report.duplicates == 3
    # Splits and other cache settings do not change the entry.
    for change in ({"eval": 5}, {"seed": 3}, {"duplicates": "keep"}):
        changed, uncached = (prepare_logged(data, **{**change, "cache": cache})[0] for cache in (True, False))  # type: ignore[arg-type]
        assert content(changed) == content(uncached) != content(first)
    assert tokenized == [60] * 4


def test_evaluation_file_is_cached(data: Path, folder: Path, tokenized: list[int]) -> None:
    results = [TextReader(DataSettings("elsewhere.jsonl", cache=True), TOKENIZER).file(str(data)) for _ in range(2)]
    assert tokenized == [60] and results[0][1] == results[1][1]
    assert [[e.row for e in rows] for rows, _ in results] == [list(range(1, 61))] * 2


def test_rows_on_disk_equal_rows_in_memory(data, folder, monkeypatch):
    for settings in ({}, {"group": "film"}, {"rows": 40}, {"duplicates": "keep"}, {"eval": str(data)}):
        small, _ = prepare_logged(data, **{"cache": False, **settings})
        assert isinstance(small.train.store, MemoryRows)
        with monkeypatch.context() as patch:
            patch.setattr(row_cache, "SPILL_BYTES", 0)
            patch.setattr(row_cache, "BATCH_ROWS", 10)
            patch.setattr(row_stream, "MEMORY_BYTES", 0)
            patch.setattr(row_stream, "CHUNK_ROWS", 7)
            large, _ = prepare_logged(data, **{"cache": False, **settings})
            assert isinstance(large.train.store, DiskRows)
        assert content(large) == content(small)
    assert list(folder.iterdir()) == []  # no entry is stored, and temporary files are unnamed


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 900},
        {"labels": "last"},
        {"template": "plain"},
        {"long_rows": "drop"},
        {"columns": {"prompt": "completion", "completion": "prompt"}},
        {"rows": 30, "seed": 1},
        {"group": "film"},
        {"tokenizer": make_tokenizer("<s>" + CHATML)},
        {"tokenizer": make_tokenizer(merges=[("e", "s")])},
        *("transformers", "tokenizers", "datasets", "pyarrow", "jinja2", "data/formats.py", "hub/terminators.py"),
        "data/template_worker.py",
    ],
)
def test_changed_dependency_causes_retokenization(change, data, folder, tokenized, monkeypatch):
    """The parameter is a setting, or a package version or module on which rows depend."""
    prepare_logged(data, **({"rows": 30} if "seed" in change else {}))
    if isinstance(change, str):
        invalidate(monkeypatch, folder / "source", change)
        change = {}
    changed, again = (prepare_logged(data, **change)[0] for _ in range(2))
    assert len(tokenized) == 2 and content(again) == content(changed)


@pytest.mark.parametrize("small", [0, 2**20])
def test_changed_file_is_read_again(small, data, folder, tokenized, monkeypatch):
    monkeypatch.setattr(row_stream, "SMALL_BYTES", small)
    prepare_logged(data)
    before = data.stat()
    data.write_bytes(data.read_bytes().replace(b"question 11", b"question XX"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data.stat().st_size == before.st_size and data.stat().st_mtime_ns == before.st_mtime_ns
    changed, _ = prepare_logged(data)
    assert len(tokenized) == 2
    assert any("question XX" in TOKENIZER.decode(e.tokens) for e in [*changed.train, *changed.held_out])


def test_dated_template_is_rendered_again_each_day(data, folder, tokenized, monkeypatch):
    dated = make_tokenizer("{{ strftime_now('%Y') and '' }}" + CHATML)
    for day, count in ((None, 1), (None, 1), ("2001-01-01", 2)):
        if day:
            monkeypatch.setattr("deltaw.data.templates.todays_date", lambda: "2001-01-01")
        prepare_logged(data, dated)
        assert len(tokenized) == count


def test_small_files_are_cached_only_on_request_or_if_slow(data, folder, tokenized, monkeypatch):
    prepare_logged(data, cache="auto")
    assert not folder.exists()
    for limit, value, stored in (("TINY_BYTES", 0, []), ("LONG_SECONDS", 0.0, [".arrow", ".json"])):
        monkeypatch.setattr(stored_rows, limit, value)
        prepare_logged(data, cache="auto")
        assert entries(folder) == stored
    prepare_logged(data, cache=False)
    assert len(tokenized) == 4
    prepare_logged(data, cache="auto")
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
    ],
)
def test_damaged_entry_is_detected_and_recreated(suffix, change, data, folder, tokenized):
    first, _ = prepare_logged(data)
    (path,) = folder.glob(f"*{suffix}")
    path.write_bytes(change(path.read_bytes()))
    second, log_lines = prepare_logged(data)
    assert len(tokenized) == 2 and "damaged" in log_lines[0] and content(second) == content(first)
    prepare_logged(data)
    assert len(tokenized) == 2


def test_damage_between_samples_is_detected_on_read(data, folder, tokenized, monkeypatch):
    monkeypatch.setattr(row_cache, "sample", lambda file, size, digest: None)
    prepare_logged(data, eval=None)
    (path,) = folder.glob("*.arrow")
    with path.open("r+b") as file:
        file.seek(int(DiskRows(path.open("rb"), "", grouped=False)._value_offsets["tokens"][0]))
        file.write(b"\x07")
    prepared, _ = prepare_logged(data, eval=None)
    assert "damaged" in refusal(list, prepared.train).message
    again, _ = prepare_logged(data, eval=None)
    assert len(tokenized) == 2 and len(list(again.train)) == 57


def start_preparation(data: Path, change=lambda: None) -> tuple[BaseProcess, multiprocessing.SimpleQueue]:
    """Start a forked process that prepares the rows, and return it with the queue of its result."""
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()

    def work() -> None:
        change()
        train = prepare_logged(data)[0].train
        results.put((len(train), train.digest()))

    process = fork.Process(target=work)
    process.start()
    return process, results


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after_write() -> None:
    write = row_cache.RowWriter._write
    row_cache.RowWriter._write = lambda self: kill(write(self))


@pytest.mark.parametrize(
    "change",
    [
        lambda: setattr(row_cache.RowWriter, "_write", kill),  # before anything is written
        lambda: setattr(RowCache, "describe", kill),  # rows are written, their description is not
        kill_after_write,
    ],
)
def test_killed_preparation_leaves_no_valid_entry(change, data, folder, tokenized):
    killed, _ = start_preparation(data, change)
    killed.join(200)
    assert killed.exitcode == -signal.SIGKILL and bool(list(folder.glob(".*.part"))) == (change is kill_after_write)
    prepared, log_lines = prepare_logged(data)
    assert tokenized == [60] and not log_lines and len(prepared.train) + len(prepared.held_out) == 57
    assert entries(folder) == [".arrow", ".json"] and not list(folder.glob(".*.part"))


def test_concurrent_processes_prepare_equal_rows(data: Path, folder: Path) -> None:
    process, results = start_preparation(data)
    other_process, other_results = start_preparation(data)
    first = results.get()
    second = other_results.get()
    process.join(100)
    other_process.join(100)
    assert first == second and first[0] == 46 and entries(folder) == [".arrow", ".json"]


def test_second_process_waits_for_the_first(folder: Path) -> None:
    log_lines: SimpleQueue[str] = SimpleQueue()
    results: list[object] = []

    def second() -> None:
        with RowCache("k", log_lines.put) as cache:
            results.append(cache.find(lambda *args: args))

    thread = threading.Thread(target=second)
    with RowCache("k", lambda line: None) as first:
        thread.start()
        assert "waiting" in log_lines.get(timeout=20) and thread.is_alive()
        assert first.find(lambda *args: args) is None and not results
    thread.join(20)
    assert results == [None]


def test_unwritable_cache_is_an_error_only_on_request(data, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_rows, "TINY_BYTES", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "file"))
    prepared, _ = prepare_logged(data, cache="auto")
    assert len(prepared.train) == 46
    error = refusal(prepare_logged, data)
    assert "cannot store" in error.message and "DELTAW_CACHE" in str(error.hint)


def test_full_disk_raises_if_rows_must_be_spilled(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "SPILL_BYTES", 0)
    monkeypatch.setattr(MemoryRows, "batch", Mock(side_effect=OSError(28, "No space left on device")))
    assert "No space left" in refusal(prepare_logged, data).message
    assert entries(folder) == [] and not list(folder.glob(".*.part"))
