"""Tests of building, loading and selecting compiled kernels."""

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
from deltaw.kernels import loader, variants
from deltaw.kernels.linear import LinearProduct, linear
from tests.kernels.conftest import compiled_only

VARIANTS = "none"

COMPILER = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)


@pytest.fixture
def unloaded(monkeypatch):
    """A process that has not loaded kernels yet and has no overrides."""
    monkeypatch.delenv(variants.VARIABLE, raising=False)
    monkeypatch.delenv(variants.OFF, raising=False)
    monkeypatch.setattr(loader._Process, "loaded", {})
    with loader.temporary_arithmetic():
        loader.use_arithmetic(None)
        yield


def reset_loader(monkeypatch):
    """Make the process look for kernels again."""
    monkeypatch.setattr(loader._Process, "loaded", {})
    monkeypatch.setattr(loader._Process, "is_settled", False)


@pytest.mark.skipif(os.environ.get("DELTAW_NATIVE") == "0", reason="compiled kernels are disabled")
@pytest.mark.skipif(not loader.is_platform_supported(), reason="the kernels do not support this system")
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_extension_is_built_if_a_compiler_exists():
    """Without the extension, nearly all kernel tests are skipped and the others test only torch operations."""
    assert loader.usable_variants(), (
        f"no compiled kernels were built although {COMPILER} exists. Run `python setup.py build_ext --inplace` to see "
        "the compiler's error, or set DELTAW_NATIVE=0 to test without compiled kernels."
    )


@compiled_only
def test_best_built_variant_is_used_unless_forced(unloaded, monkeypatch):
    assert loader.variant() == loader.usable_variants()[0].name and loader.unavailable_reason() is None
    for usable in loader.usable_variants():
        monkeypatch.setattr(loader._Process, "is_settled", False)
        monkeypatch.setenv(variants.VARIABLE, usable.name)
        assert loader.variant() == usable.name


@pytest.mark.parametrize(
    ("variable", "value"), [(variants.VARIABLE, "none"), (variants.VARIABLE, "torch"), (variants.OFF, "0")]
)
def test_kernels_can_be_disabled(unloaded, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert loader.library() is None and not loader.supports(torch.ones(2))
    assert loader.variant() is None and f"{variable}={value}" in str(loader.unavailable_reason())


def test_unusable_forced_variant_raises(unloaded, monkeypatch):
    """A forced variant is never replaced, if the CPU does not support it or if it was not built."""
    foreign = next(v for v in variants.all_variants() if v.machine not in ("any", variants.machine()))
    monkeypatch.setenv(variants.VARIABLE, foreign.name)
    with pytest.raises(UserError, match=f"'{foreign.name}' need CPU features that are missing here"):
        loader.library()
    monkeypatch.setenv(variants.VARIABLE, "generic")
    monkeypatch.setattr(variants, "FOLDER", Path("nowhere"))
    with pytest.raises(UserError, match="'generic' were not built") as error:
        loader.library()
    assert "DELTAW_VARIANTS=generic pip install -e ." in str(error.value.hint)


@compiled_only
def test_variant_with_other_abi_is_unused_and_raises_if_forced(unloaded, monkeypatch):
    name = loader.usable_variants()[0].name
    reset_loader(monkeypatch)
    monkeypatch.setattr(loader, "ABI", loader.ABI + 1)
    assert loader.library() is None
    reason = str(loader.unavailable_reason())
    assert f"ABI {loader.ABI - 1}, not {loader.ABI}" in reason and "rebuild" in reason
    reset_loader(monkeypatch)
    monkeypatch.setenv(variants.VARIABLE, name)
    with pytest.raises(UserError, match="cannot be loaded: the library was built from other sources"):
        loader.library()


@compiled_only
@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="needs nm on Linux to list symbols")
def test_variants_export_only_the_c_interface():
    """Otherwise a C++ library function compiled in two variants could be resolved to the wrong one."""
    for variant in loader.usable_variants():
        symbols = subprocess.check_output(["nm", "--dynamic", "--defined-only", variants.file_of(variant)], text=True)
        names = [line.split()[-1] for line in symbols.splitlines()]
        assert "dw_linear" in names and all(name.startswith("dw_") for name in names), names
    libraries = [loader.open_variant(variant.name).library for variant in loader.usable_variants()]
    assert len({library._handle for library in libraries}) == len(libraries)


@pytest.mark.skipif(ctypes.util.find_library("m") is None, reason="no libm")
def test_library_without_abi_raises():
    with pytest.raises(RuntimeError, match="ABI 0"):
        loader.load(Path(str(ctypes.util.find_library("m"))))


@compiled_only
def test_struct_with_other_layout_is_reported(unloaded, monkeypatch):
    class RowNorm(ctypes.Structure):
        _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_float), ("bias", ctypes.c_void_p)]

    assert loader.mismatched_struct(loader.kernels()) is None
    monkeypatch.setattr(loader, "MIRRORED_STRUCTS", (loader.Layer, RowNorm, loader.BlockParts))
    assert loader.mismatched_struct(loader.kernels()) == "RowNorm"
    reset_loader(monkeypatch)
    assert loader.library() is None and "RowNorm" in str(loader.unavailable_reason())


@compiled_only
def test_missing_openmp_library_is_reported(unloaded, monkeypatch):
    assert loader.threads_note() is None, "torch's OpenMP library was found"
    monkeypatch.setattr(loader, "openmp_functions", lambda: None)
    monkeypatch.setattr(loader._Process, "loaded", {})
    loader.use_arithmetic(None)
    assert loader.library() is not None and "one thread" in str(loader.threads_note())


@pytest.mark.skipif(sys.platform != "linux", reason="compares with the functions passed on Linux")
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_pass_only_the_thread_count(monkeypatch, system, tmp_path):
    """The thread count is torch's current one and is read on each call."""
    if system == "win32":  # the OpenMP library is in torch's lib folder
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib/libiomp5md.dll").symlink_to(Path(torch.__file__).parent / "lib/libtorch_cpu.so")
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sys, "platform", system)
    functions = loader.openmp_functions()
    monkeypatch.undo()
    assert functions is not None and functions[:3] == [None] * 3
    thread_count = ctypes.CFUNCTYPE(ctypes.c_int)(functions[3].value)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert thread_count() == threads
    finally:
        torch.set_num_threads(before)


def test_missing_torch_library_on_windows_returns_none(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sys, "platform", "win32")
    assert loader.openmp_functions() is None


@compiled_only
def test_unloadable_file_is_reported_as_reason(unloaded, monkeypatch, tmp_path):
    """For example a file of the right name that was built for another system."""
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    for variant in variants.for_machine():
        (tmp_path / variant.file).write_bytes(b"MZ" + bytes(100))
    assert loader.library() is None and "compiled kernels cannot be loaded: " in str(loader.unavailable_reason())


@compiled_only
def test_allocation_failure_raises_instead_of_crashing(threads):
    """In the calling thread and in pool threads."""
    zero = torch.zeros(1, dtype=torch.long)  # used as values and as targets
    pointer = zero.data_ptr()
    with pytest.raises(MemoryError, match="dw_class_gradient"):
        loader.kernels().dw_class_gradient(1, 4, 2**40, pointer, pointer, None, None, None, None)
    with pytest.raises(MemoryError, match="dw_factors_backward"):
        loader.kernels().dw_factors_backward(0, 1, 1, 1, 2**40, pointer, None, pointer, None, 1.0, None, None)


@compiled_only
def test_scratch_memory_is_released(threads):
    kernels = loader.kernels()
    x = torch.ones(300, 64, dtype=torch.bfloat16)
    product = LinearProduct(x[:64])
    before, _ = linear(x, product)
    linear(x, product)  # starts with one allocation of the full size
    assert kernels.dw_scratch_bytes(0) > 0
    torch.set_num_threads(2)  # the largest thread count of these tests. Each thread releases its memory.
    loader.release_scratch()
    assert kernels.dw_scratch_bytes(0) == 0
    assert torch.equal(linear(x, product)[0], before)
