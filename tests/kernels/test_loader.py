"""The compiled kernels are built where they can be, and used only where they are the ones that are called."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
from pathlib import Path

import pytest
import torch

from deltaw.kernels import loader, structs
from tests.kernels.conftest import compiled_only

COMPILER = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)


@pytest.mark.skipif(os.environ.get("DELTAW_NATIVE") == "0", reason="compiled kernels are switched off")
@pytest.mark.skipif(not loader.platform_is_served(), reason="the kernels are for Linux on x86-64")
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_the_extension_is_built_where_a_compiler_is():
    """Without it nearly all tests of kernels are skipped, and the others try torch's operations alone."""
    path = loader._extension()
    assert path is not None, (
        f"{COMPILER} is here, and the compiled kernels are not: look for the compiler's error in "
        "`python setup.py build_ext --inplace`, or set DELTAW_NATIVE=0 to test without them"
    )
    loader.load(path)


@compiled_only
def test_a_library_of_another_abi_is_not_used(monkeypatch):
    monkeypatch.setattr(loader, "ABI", loader.ABI + 1)
    library, why, _ = loader._found.__wrapped__()
    assert library is None
    assert f"ABI {loader.ABI - 1}, not {loader.ABI}" in why and "rebuild" in why


@pytest.mark.skipif(ctypes.util.find_library("m") is None, reason="no library to try")
def test_a_library_without_an_abi_is_not_used():
    with pytest.raises(RuntimeError, match="ABI 0"):
        loader.load(Path(str(ctypes.util.find_library("m"))))


@compiled_only
def test_a_struct_that_is_laid_out_otherwise_is_named(monkeypatch):
    class RowNorm(ctypes.Structure):
        _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_float), ("bias", ctypes.c_void_p)]

    assert structs.differing(loader.kernels()) is None
    monkeypatch.setattr(structs, "MIRRORED", (structs.Layer, RowNorm, structs.BlockParts))
    assert structs.differing(loader.kernels()) == "RowNorm"
    library, why, _ = loader._found.__wrapped__()
    assert library is None and "RowNorm" in why


@compiled_only
def test_no_openmp_library_is_said(monkeypatch):
    assert loader.threads_note() is None, "torch's OpenMP library is known"
    monkeypatch.setattr(loader, "openmp_functions", lambda: None)
    library, why, note = loader._found.__wrapped__()
    assert library is not None and why is None and "one thread" in note


@compiled_only
def test_memory_that_is_not_there_is_an_error_and_no_crash(threads):
    """In the calling thread, and in those of a team."""
    number, target = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with pytest.raises(MemoryError, match="dw_class_gradient"):
        loader.kernels().dw_class_gradient(
            1, 4, 2**40, number.data_ptr(), target.data_ptr(), None, None, None, None
        )
    with pytest.raises(MemoryError, match="dw_linear"):
        loader.kernels().dw_linear(
            0, 1, 2**40, 4096, number.data_ptr(), 0, None, 1, None, None, None, 0, None, None, 0, 1.0,
            None, None, None, 0, None, None,
        )  # fmt: skip


@compiled_only
def test_scratch_memory_is_given_back(threads):
    from deltaw.kernels.linear import linear

    kernels = loader.kernels()
    x, weight = torch.ones(40, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    before, _ = linear(x, weight)
    assert kernels.dw_scratch_held(0) > 0
    torch.set_num_threads(2)  # the largest team of these tests; each thread gives back its own
    loader.release_scratch()
    assert kernels.dw_scratch_held(0) == 0
    assert torch.equal(linear(x, weight)[0], before)
