"""Fixtures and helpers of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

from deltaw.kernels import loader
from deltaw.kernels.arithmetic import Arithmetic, default_arithmetic, supported_arithmetics

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float64: 1e-12}

# Without compiled kernels, such tests would compare the reference implementations with themselves.
compiled_only = pytest.mark.skipif(loader.library() is None, reason=loader.unavailable_reason() or "")


def arithmetic_modes() -> list[Arithmetic]:
    """Return the settings of the current process first, then every usable variant with each of its multiply
    implementations.
    """
    modes = [current := loader.arithmetic()]
    names = [variant.name for variant in loader.usable_variants()]
    if current.kernels not in names:  # no kernels, or a library that only these tests build
        names = [] if current.kernels is None else [current.kernels]
    for name in names:
        library = loader.open_variant(name).library
        default = default_arithmetic(name, library)
        bf16_modes = supported_arithmetics(library, "bf16")
        int8_modes = supported_arithmetics(library, "int8")
        for index in range(max(len(bf16_modes), len(int8_modes))):
            bf16 = bf16_modes[min(index, len(bf16_modes) - 1)]
            int8 = int8_modes[min(index, len(int8_modes) - 1)]
            modes.append(replace(default, bf16=bf16, int8=int8))
    return list(dict.fromkeys(modes))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a module's tests according to its ``VARIANTS``.

    ``none`` runs them once, ``each`` with each variant, ``all`` with each variant and multiply implementation. By
    default the tests run with the current variant and with AVX2, and for ``all`` with each multiply implementation of
    the current variant. The remaining combinations take minutes and are marked slow.
    """
    selection = getattr(metafunc.module, "VARIANTS", "each")
    if "arithmetic" not in metafunc.fixturenames or selection == "none":
        return
    current = arithmetic_modes()[0]
    params = []
    for mode in arithmetic_modes():
        quick = mode == current or mode.kernels == "avx2" or (selection == "all" and mode.kernels == current.kernels)
        params.append(pytest.param(mode, id=f"{mode.kernels}-{mode.bf16}", marks=() if quick else pytest.mark.slow))
    metafunc.parametrize("arithmetic", params, indirect=True)


@pytest.fixture(autouse=True)
def arithmetic(request: pytest.FixtureRequest):
    """Run a test with one multiply implementation, then restore the arithmetic and the thread count."""
    mode = getattr(request, "param", None)
    before = torch.get_num_threads()
    with loader.temporary_arithmetic(mode):
        yield mode
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "reference"])
def kernels(request: pytest.FixtureRequest, arithmetic: Arithmetic | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the compiled kernels and with the reference implementations."""
    if request.param == "reference":
        if arithmetic not in (None, arithmetic_modes()[0]):
            pytest.skip("the reference implementations have no variants")
        monkeypatch.setattr(loader, "library", lambda: None)
    elif loader.library() is None:
        pytest.skip(loader.unavailable_reason() or "no compiled kernels")
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def examples(*strategies: SearchStrategy, count: int = 25) -> Callable[[Callable], Callable]:
    """Run a test with ``count`` generated examples."""

    def decorate(test: Callable) -> Callable:
        return settings(max_examples=count, deadline=None)(given(*strategies)(test))

    return decorate


def same_bits(first: Iterable[torch.Tensor], *others: Iterable[torch.Tensor]) -> bool:
    """Return True if all groups of tensors are bit-identical."""
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@torch.no_grad()
def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative error in the Euclidean norm."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def assert_close(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that the relative error is within the tolerance of ``dtype``."""
    assert ours.shape == exact.shape
    assert relative_error(ours, exact) < TOLERANCE[dtype], f"off by {relative_error(ours, exact):.1e}"
