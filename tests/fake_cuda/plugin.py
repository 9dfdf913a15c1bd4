"""Pytest plugin that installs the fake device: ``pytest -p tests.fake_cuda.plugin``.

With a CUDA build of torch, it does nothing: tests that require the fake device are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_cuda import device
from tests.fake_cuda.build import is_cpu_build

if is_cpu_build():
    device.install()


@pytest.fixture(scope="session", autouse=True)
def _no_compiled_attention() -> Iterator[None]:
    """Do not try to compile attention and row functions, which the fake device cannot run."""
    if not device.is_installed:
        yield
        return
    from deltaw.kernels import compiled, gpu_attention

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (compiled, gpu_attention):
            monkeypatch.setattr(module, "DEVICES", ())
        yield
