"""What tests of kernels share."""

from __future__ import annotations

import pytest
import torch

from deltaw.kernels import loader as native

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float64: 1e-12}


@pytest.fixture
def compiled() -> None:
    """Skip where the compiled kernels are not there; every test beside it runs on torch's operations."""
    if native.library() is None:
        pytest.skip(native.why_not() or "no compiled kernels")


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
