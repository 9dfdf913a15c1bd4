"""Pytest plugin that installs the fake device: ``pytest -p tests.fake_cuda.plugin``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_cuda.device import install

install()


@pytest.fixture(scope="session", autouse=True)
def _no_compiled_attention() -> Iterator[None]:
    """Do not try to compile FlexAttention, which the fake device cannot run."""
    from deltaw.kernels import attention

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(attention, "DEVICES", ())
        yield
