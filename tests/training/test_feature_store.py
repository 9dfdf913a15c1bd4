"""Features on disk: found again, locked while used, and making room for one another."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import numpy as np
import pytest
import torch

from deltaw.errors import UserError
from deltaw.training.features import store as feature_store
from deltaw.training.features.store import DESCRIPTION, MemoryStore, Shape, open_store
from tests import processes

SHAPE = Shape.of(rows=4, units=10, width=3, dtype=torch.float32)


def fill(store, rows=(0, 1, 2, 3)):
    store.write(np.array(rows), np.arange(10), torch.ones(10, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_was_written_is_there_bit_by_bit_when_opened_again(dtype, tmp_path):
    shape = Shape.of(4, 10, 3, dtype)
    values = torch.randn(10, 3, dtype=torch.float64).to(dtype)
    for store in (open_store("a", shape, folder=tmp_path), MemoryStore(shape)):
        assert not store.done.any()
        store.write(np.array([1, 2]), np.arange(10), values)
        assert torch.equal(store.read(np.array([7, 0])), values[[7, 0]])
        store.close()
    with contextlib.closing(open_store("a", shape, folder=tmp_path)) as again:
        assert again.done.tolist() == [False, True, True, False]
        assert torch.equal(again.read(np.arange(10)), values)


def test_a_store_in_use_is_left_to_its_user_and_another_shape_begins_anew(tmp_path):
    first = open_store("a", SHAPE, folder=tmp_path)
    fill(first)
    second = open_store("a", SHAPE, folder=tmp_path)
    assert first.folder != second.folder
    first.close()
    second.close()
    with contextlib.closing(open_store("a", Shape.of(4, 10, 5, torch.float32), folder=tmp_path)) as other:
        assert not other.done.any()


def test_the_longest_unused_store_makes_room_and_one_in_use_never_does(tmp_path):
    kept = open_store("kept", SHAPE, folder=tmp_path)
    for n, name in enumerate(["old", "older"]):
        with contextlib.closing(open_store(name, SHAPE, folder=tmp_path)) as store:
            os.utime(store.folder / DESCRIPTION, (1000 - n, 1000 - n))
    os.utime(kept.folder / DESCRIPTION, (1, 1))
    size = sum(file.stat().st_size for file in kept.folder.iterdir())
    new = open_store("new", SHAPE, folder=tmp_path, limit=2 * size + SHAPE.bytes)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"kept", "old", "new"}
    with pytest.raises(UserError, match="other runs"):
        open_store("more", SHAPE, folder=tmp_path, limit=2 * size)
    new.close()
    kept.close()


def test_what_has_no_room_is_refused_with_its_size(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="would take 1 KB"):
        open_store("a", SHAPE, folder=tmp_path, limit=100)
    monkeypatch.setattr(feature_store, "LEFT_FREE_BYTES", 2**60)
    with pytest.raises(UserError, match="to spare"):
        open_store("a", SHAPE, folder=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept"):
        open_store("a", SHAPE, folder=tmp_path / "file")


def test_a_killed_process_leaves_its_marked_rows_and_no_lock(tmp_path):
    code = (
        "import sys, time, pathlib, numpy as np, torch\n"
        "from deltaw.training.features.store import Shape, open_store\n"
        "store = open_store('a', Shape.of(4, 10, 3, torch.float32), folder=pathlib.Path(sys.argv[1]))\n"
        "store.write(np.array([0, 2]), np.arange(10), torch.ones(10, 3))\n"
        "store.mark()\n"
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


def test_marks_are_brought_to_the_disk_from_time_to_time(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SECONDS_BETWEEN_MARKS", 0.0)
    with contextlib.closing(open_store("a", SHAPE, folder=tmp_path)) as store:
        time.sleep(0.001)
        fill(store, rows=(1,))
        assert (store.folder / feature_store.DONE).read_bytes() == b"\0\1\0\0"
