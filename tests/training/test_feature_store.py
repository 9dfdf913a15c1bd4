"""Feature stores on disk: reuse, locks, and eviction."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import numpy as np
import pytest
import torch

from deltaw.training.features import store as feature_store
from deltaw.training.features.store import DESCRIPTION, MemoryStore, Shape, open_store
from tests import processes
from tests.conftest import refusal

SHAPE = Shape.of(rows=4, units=10, width=3, dtype=torch.float32)


def fill(store, rows=(0, 1, 2, 3)):
    store.write(np.array(rows), np.arange(10), torch.ones(10, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reopened_store_returns_identical_values(dtype, tmp_path):
    shape = Shape.of(4, 10, 3, dtype)
    values = torch.randn(10, 3, dtype=torch.float64).to(dtype)
    for store in (open_store("a", shape, folder=tmp_path), MemoryStore(shape)):
        assert not store.done.any()
        store.write(np.array([1, 2]), np.arange(10), values)
        assert torch.equal(store.read(np.array([7, 0])), values[[7, 0]])
        store.close()
    with contextlib.closing(open_store("a", shape, folder=tmp_path)) as reopened:
        assert reopened.done.tolist() == [False, True, True, False]
        assert torch.equal(reopened.read(np.arange(10)), values)


def test_store_in_use_is_not_shared_and_shapes_do_not_mix(tmp_path):
    first = open_store("a", SHAPE, folder=tmp_path)
    fill(first)
    second = open_store("a", SHAPE, folder=tmp_path)
    assert first.folder != second.folder
    first.close()
    second.close()
    with contextlib.closing(open_store("a", Shape.of(4, 10, 5, torch.float32), folder=tmp_path)) as other:
        assert not other.done.any()


def test_least_recently_used_store_is_evicted_unless_in_use(tmp_path):
    in_use = open_store("kept", SHAPE, folder=tmp_path)
    for n, name in enumerate(["old", "older"]):
        with contextlib.closing(open_store(name, SHAPE, folder=tmp_path)) as store:
            os.utime(store.folder / DESCRIPTION, (1000 - n, 1000 - n))
    os.utime(in_use.folder / DESCRIPTION, (1, 1))
    size = sum(file.stat().st_size for file in in_use.folder.iterdir())
    new = open_store("new", SHAPE, folder=tmp_path, limit=2 * size + SHAPE.bytes)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"kept", "old", "new"}
    refusal(open_store, "more", SHAPE, folder=tmp_path, limit=2 * size, match="other runs")
    new.close()
    in_use.close()


def test_store_without_space_is_rejected_with_its_size(tmp_path, monkeypatch):
    refusal(open_store, "a", SHAPE, folder=tmp_path, limit=100, match="would take 1 KB")
    monkeypatch.setattr(feature_store, "MIN_FREE_BYTES", 2**60)
    refusal(open_store, "a", SHAPE, folder=tmp_path, match="free on the disk")
    (tmp_path / "file").write_text("")
    refusal(open_store, "a", SHAPE, folder=tmp_path / "file", match="cannot be stored")


@pytest.mark.slow
def test_killed_process_leaves_flushed_rows_without_lock(tmp_path):
    code = (
        "import sys, time, pathlib, numpy as np, torch\n"
        "from deltaw.training.features.store import Shape, open_store\n"
        "store = open_store('a', Shape.of(4, 10, 3, torch.float32), folder=pathlib.Path(sys.argv[1]))\n"
        "store.write(np.array([0, 2]), np.arange(10), torch.ones(10, 3))\n"
        "store.flush()\n"
        "store.write(np.array([3]), np.arange(10), torch.ones(10, 3))\n"
        "pathlib.Path(sys.argv[1], 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    process = processes.start("-c", code, tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (tmp_path / "ready").unlink()
    with contextlib.closing(open_store("a", SHAPE, folder=tmp_path)) as store:
        assert store.folder.name == "a" and store.done.tolist() == [True, False, True, False]
        assert (store.read(np.arange(10)) == 1).all()


def test_row_marks_are_flushed_periodically(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SECONDS_BETWEEN_MARKS", 0.0)
    with contextlib.closing(open_store("a", SHAPE, folder=tmp_path)) as store:
        time.sleep(0.001)
        fill(store, rows=(1,))
        assert (store.folder / feature_store.DONE).read_bytes() == b"\0\1\0\0"
