"""What tests of kernels share."""

from __future__ import annotations

import pytest
import torch

from deltaw.kernels import loader

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float64: 1e-12}

# For tests that compare the compiled kernels with their reference implementations: without the kernels they
# would compare the references with themselves.
compiled_only = pytest.mark.skipif(loader.library() is None, reason=loader.why_not() or "")


@pytest.fixture(params=["compiled", "reference"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and without them."""
    if request.param == "reference":
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


def close(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Near in the norm, as far as numbers of ``dtype`` can be."""
    assert ours.shape == exact.shape
    error = (ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
    assert error < TOLERANCE[dtype], f"off by {error:.1e}"
