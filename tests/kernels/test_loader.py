"""The compiled kernels are built where they can be, and used only where they are the ones that are called."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltaw.errors import UserError
from deltaw.kernels import loader, structs, variants
from deltaw.kernels.linear import Product, linear
from tests.kernels.conftest import compiled_only

VARIANTS = "none"

COMPILER = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)


@pytest.fixture
def afresh(monkeypatch):
    """A process that has not looked for kernels yet, and whose user asks for nothing."""
    monkeypatch.delenv(variants.VARIABLE, raising=False)
    monkeypatch.delenv(variants.OFF, raising=False)
    monkeypatch.setattr(loader._Process, "opened", {})
    with loader.computing():
        loader.compute_with(None)
        yield


def again(monkeypatch):
    """Let the process look for kernels once more."""
    monkeypatch.setattr(loader._Process, "opened", {})
    monkeypatch.setattr(loader._Process, "settled", False)


@pytest.mark.skipif(os.environ.get("DELTAW_NATIVE") == "0", reason="compiled kernels are switched off")
@pytest.mark.skipif(not loader.platform_is_served(), reason="the kernels are not for this system")
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_the_extension_is_built_where_a_compiler_is():
    """Without it nearly all tests of kernels are skipped, and the others try torch's operations alone."""
    assert loader.usable(), (
        f"{COMPILER} is here, and no compiled kernels are: look for the compiler's error in "
        "`python setup.py build_ext --inplace`, or set DELTAW_NATIVE=0 to test without them"
    )


@compiled_only
def test_the_best_variant_that_was_built_is_used_unless_one_is_forced(afresh, monkeypatch):
    assert loader.variant() == loader.usable()[0].name and loader.why_not() is None
    for usable in loader.usable():
        monkeypatch.setattr(loader._Process, "settled", False)
        monkeypatch.setenv(variants.VARIABLE, usable.name)
        assert loader.variant() == usable.name


@pytest.mark.parametrize(
    ("variable", "value"), [(variants.VARIABLE, "none"), (variants.VARIABLE, "torch"), (variants.OFF, "0")]
)
def test_kernels_are_switched_off(afresh, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert loader.library() is None and not loader.serves(torch.ones(2))
    assert loader.variant() is None and f"{variable}={value}" in str(loader.why_not())


def test_a_forced_variant_that_cannot_run_is_refused(afresh, monkeypatch):
    """It is never replaced by another: neither one that the processor lacks nor one that was not built."""
    foreign = next(v for v in variants.every_variant() if v.machine not in ("any", variants.machine()))
    monkeypatch.setenv(variants.VARIABLE, foreign.name)
    with pytest.raises(UserError, match=f"'{foreign.name}' need what this processor lacks"):
        loader.library()
    monkeypatch.setenv(variants.VARIABLE, "generic")
    monkeypatch.setattr(variants, "FOLDER", Path("nowhere"))
    with pytest.raises(UserError, match="'generic' were not built") as refused:
        loader.library()
    assert "DELTAW_VARIANTS=generic pip install -e ." in str(refused.value.hint)


@compiled_only
def test_a_variant_of_another_abi_is_not_used_and_refused_where_it_is_forced(afresh, monkeypatch):
    name = loader.usable()[0].name
    again(monkeypatch)
    monkeypatch.setattr(loader, "ABI", loader.ABI + 1)
    assert loader.library() is None
    why = str(loader.why_not())
    assert f"ABI {loader.ABI - 1}, not {loader.ABI}" in why and "rebuild" in why
    again(monkeypatch)
    monkeypatch.setenv(variants.VARIABLE, name)
    with pytest.raises(UserError, match="cannot be loaded: they were built from other sources"):
        loader.library()


@compiled_only
@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="no nm to list symbols with")
def test_variants_have_only_the_c_interface_in_common():
    """A function of C++'s library that two of them have compiled could otherwise stand in for the other's."""
    for variant in loader.usable():
        listed = subprocess.check_output(["nm", "--dynamic", "--defined-only", variants.file_of(variant)], text=True)
        names = [line.split()[-1] for line in listed.splitlines()]
        assert "dw_linear" in names and all(name.startswith("dw_") for name in names), names
    opened = [loader.open_variant(variant.name).library for variant in loader.usable()]
    assert len({library._handle for library in opened}) == len(opened)


@pytest.mark.skipif(ctypes.util.find_library("m") is None, reason="no library to try")
def test_a_library_without_an_abi_is_not_used():
    with pytest.raises(RuntimeError, match="ABI 0"):
        loader.load(Path(str(ctypes.util.find_library("m"))))


@compiled_only
def test_a_struct_that_is_laid_out_otherwise_is_named(afresh, monkeypatch):
    class RowNorm(ctypes.Structure):
        _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_float), ("bias", ctypes.c_void_p)]

    assert structs.differing(loader.kernels()) is None
    monkeypatch.setattr(structs, "MIRRORED", (structs.Layer, RowNorm, structs.BlockParts))
    assert structs.differing(loader.kernels()) == "RowNorm"
    again(monkeypatch)
    assert loader.library() is None and "RowNorm" in str(loader.why_not())


@compiled_only
def test_no_openmp_library_is_said(afresh, monkeypatch):
    assert loader.threads_note() is None, "torch's OpenMP library is known"
    monkeypatch.setattr(loader, "openmp_functions", lambda: None)
    monkeypatch.setattr(loader._Process, "opened", {})
    loader.compute_with(None)
    assert loader.library() is not None and "one thread" in str(loader.threads_note())


@pytest.mark.skipif(sys.platform != "linux", reason="compared with what is handed over on Linux")
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_only_the_number_of_threads_is_handed_over(monkeypatch, system, tmp_path):
    """And it is the one that torch works with, asked anew in each call."""
    if system == "win32":  # where the library lies beside torch's; this one has it from there
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib/libiomp5md.dll").symlink_to(Path(torch.__file__).parent / "lib/libtorch_cpu.so")
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sys, "platform", system)
    handed = loader.openmp_functions()
    monkeypatch.undo()
    assert handed is not None and handed[:3] == [None] * 3
    ask, before = ctypes.CFUNCTYPE(ctypes.c_int)(handed[3].value), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert ask() == threads
    finally:
        torch.set_num_threads(before)


def test_torch_without_its_library_on_windows_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sys, "platform", "win32")
    assert loader.openmp_functions() is None


@compiled_only
def test_a_file_that_cannot_be_loaded_is_the_reason(afresh, monkeypatch, tmp_path):
    """As on another system, for which a file of the right name was built."""
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    for variant in variants.for_machine():
        (tmp_path / variant.file).write_bytes(b"MZ" + bytes(100))
    assert loader.library() is None and "compiled kernels cannot be loaded: " in str(loader.why_not())


@compiled_only
def test_memory_that_is_not_there_is_an_error_and_no_crash(threads):
    """In the calling thread, and in those of a team."""
    zero = torch.zeros(1, dtype=torch.long)  # a number, or a target
    at = zero.data_ptr()
    with pytest.raises(MemoryError, match="dw_class_gradient"):
        loader.kernels().dw_class_gradient(1, 4, 2**40, at, at, None, None, None, None)
    with pytest.raises(MemoryError, match="dw_factors_backward"):
        loader.kernels().dw_factors_backward(0, 1, 1, 1, 2**40, at, None, at, None, 1.0, None, None)


@compiled_only
def test_scratch_memory_is_given_back(threads):
    kernels, x = loader.kernels(), torch.ones(300, 64, dtype=torch.bfloat16)
    of = Product(x[:64])
    before, _ = linear(x, of)
    linear(x, of)  # begins with one piece of the whole size
    assert kernels.dw_scratch_held(0) > 0
    torch.set_num_threads(2)  # the largest team of these tests; each thread gives back its own
    loader.release_scratch()
    assert kernels.dw_scratch_held(0) == 0
    assert torch.equal(linear(x, of)[0], before)
