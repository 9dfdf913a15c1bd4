"""Unexpected errors exit with one message: a bug, an exhausted resource or a full disk."""

from __future__ import annotations

import errno
import os
from unittest.mock import Mock

import pytest
import torch

from deltaw.reports import inspect as inspected


@pytest.fixture
def call_failing(call, monkeypatch, finished_run):
    """Return a function that calls a command in which ``error`` is raised."""

    def run(error: Exception, *flags: str):
        monkeypatch.setattr(inspected, "inspect_adapter", Mock(side_effect=error))
        return call("inspect", finished_run, *flags)

    return run


def test_unexpected_error_names_location_and_report_command(call_failing):
    result = call_failing(ZeroDivisionError("division by zero"))
    assert result.status == 1 and result.out == ""
    assert "unexpected ZeroDivisionError: division by zero" in result.err
    assert ".py, line " in result.err and "deltaw doctor --json" in result.err
    assert "Traceback" not in result.err and result.err.count("error: ") == 1


def test_traceback_is_shown_on_request(call_failing, monkeypatch):
    for variable, flags in (("0", ["--traceback"]), ("1", [])):
        monkeypatch.setenv("DELTAW_TRACEBACK", variable)
        result = call_failing(KeyError("x"), *flags)
        assert result.status == 1 and result.err.startswith("Traceback") and "unexpected KeyError" in result.err


def test_disk_error_exits_with_2_and_hint(call_failing, tmp_path):
    for number, word in ((errno.ENOSPC, "free some space"), (errno.EROFS, "write permission")):
        result = call_failing(OSError(number, os.strerror(number), str(tmp_path / "file")))
        assert result.status == 2, result
        assert os.strerror(number) in result.err and str(tmp_path / "file") in result.err and word in result.err


def test_out_of_memory_is_not_reported_as_bug(call_failing):
    for error in (
        MemoryError("dw_linear found no memory to work in"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ):
        result = call_failing(error)
        assert result.status == 1
        assert "out of memory" in result.err and "deltaw plan" in result.err
        assert "bug in deltaw" not in result.err
