"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

from deltaw.kernels import loader
from deltaw.kernels.arithmetic import Arithmetic, default_of, offered

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float64: 1e-12}

# For tests that compare the compiled kernels with their reference implementations: without the kernels they
# would compare the references with themselves.
compiled_only = pytest.mark.skipif(loader.library() is None, reason=loader.why_not() or "")


def ways() -> list[Arithmetic]:
    """Each variant that this machine runs, with each way that it has of multiplying bf16 and int8; the one in
    use first."""
    found = [own := loader.arithmetic()]
    names = [variant.name for variant in loader.usable()]
    if own.kernels not in names:  # none, or one that only these tests know
        names = [] if own.kernels is None else [own.kernels]
    for name in names:
        library = loader.open_variant(name).library
        usual = default_of(name, library)
        of_bf16, of_int8 = offered(library, "bf16"), offered(library, "int8")
        for number in range(max(len(of_bf16), len(of_int8))):
            bf16, int8 = of_bf16[min(number, len(of_bf16) - 1)], of_int8[min(number, len(of_int8) - 1)]
            found.append(replace(usual, bf16=bf16, int8=int8))
    return list(dict.fromkeys(found))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a module's tests by its ``VARIANTS``: ``none``, ``each``, or ``all``, with every way to multiply.

    Quick are the way in use, AVX2 as the first that is quite another in every run, and for ``all`` the other ways
    of the variant in use; the others take minutes together.
    """
    which = getattr(metafunc.module, "VARIANTS", "each")
    if "computing" not in metafunc.fixturenames or which == "none":
        return
    own, made = ways()[0], []
    for way in ways():
        quick = way == own or way.kernels == "avx2" or (which == "all" and way.kernels == own.kernels)
        made.append(pytest.param(way, id=f"{way.kernels}-{way.bf16}", marks=() if quick else pytest.mark.slow))
    metafunc.parametrize("computing", made, indirect=True)


@pytest.fixture(autouse=True)
def computing(request: pytest.FixtureRequest):
    """Runs a test with one way to multiply; afterwards the process computes as before, on as many threads."""
    way, before = getattr(request, "param", None), torch.get_num_threads()
    with loader.computing(way):
        yield way
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "reference"])
def kernels(request: pytest.FixtureRequest, computing: Arithmetic | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and without them."""
    if request.param == "reference":
        if computing not in (None, ways()[0]):
            pytest.skip("the reference implementations have no variants")
        monkeypatch.setattr(loader, "library", lambda: None)
    elif loader.library() is None:
        pytest.skip(loader.why_not() or "no compiled kernels")
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def examples(*strategies: SearchStrategy, count: int = 25) -> Callable[[Callable], Callable]:
    """Runs a test with so many examples of what is drawn."""

    def run(test: Callable) -> Callable:
        return settings(max_examples=count, deadline=None)(given(*strategies)(test))

    return run


def same_bits(one: Iterable[torch.Tensor], *others: Iterable[torch.Tensor]) -> bool:
    """Whether the tensors of each of the others are those of the first, to the bit."""
    return all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


@torch.no_grad()
def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """How far off in the norm, of the norm of what is exact."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def close(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Near in the norm, as far as numbers of ``dtype`` can be."""
    assert ours.shape == exact.shape
    assert off(ours, exact) < TOLERANCE[dtype], f"off by {off(ours, exact):.1e}"
