"""Errors that nobody foresaw end with one message: a fault of ours, a machine's limit, or a full disk."""

from __future__ import annotations

import errno
import os
from unittest.mock import Mock

import pytest
import torch

from deltaw.reports import inspect as inspected


@pytest.fixture
def fails(call, monkeypatch, finished_run):
    """Call a verb in which something raises."""

    def run(error: Exception, *more: str):
        monkeypatch.setattr(inspected, "inspect_adapter", Mock(side_effect=error))
        return call("inspect", finished_run, *more)

    return run


def test_a_fault_of_ours_says_where_and_what_to_report(fails):
    ended = fails(ZeroDivisionError("division by zero"))
    assert ended.status == 1 and ended.out == ""
    assert "unexpected ZeroDivisionError: division by zero" in ended.err
    assert ".py, line " in ended.err and "deltaw doctor --json" in ended.err
    assert "Traceback" not in ended.err and ended.err.count("error: ") == 1


def test_the_traceback_is_shown_to_who_asks(fails, monkeypatch):
    for variable, flags in (("0", ["--traceback"]), ("1", [])):
        monkeypatch.setenv("DELTAW_TRACEBACK", variable)
        ended = fails(KeyError("x"), *flags)
        assert ended.status == 1 and ended.err.startswith("Traceback") and "unexpected KeyError" in ended.err


def test_what_a_disk_refuses_is_the_users_to_solve(fails, tmp_path):
    for number, word in ((errno.ENOSPC, "free some space"), (errno.EROFS, "may write to")):
        ended = fails(OSError(number, os.strerror(number), str(tmp_path / "file")))
        assert ended.status == 2, ended
        assert os.strerror(number) in ended.err and str(tmp_path / "file") in ended.err and word in ended.err


def test_memory_that_is_not_enough_is_no_fault_of_the_code(fails):
    for error in (
        MemoryError("dw_linear found no memory to work in"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ):
        ended = fails(error)
        assert ended.status == 1
        assert "the memory was not enough" in ended.err and "deltaw plan" in ended.err
        assert "fault of deltaw" not in ended.err
