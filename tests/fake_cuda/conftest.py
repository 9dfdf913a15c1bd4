"""Skips the tests of this folder unless the fake device is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_cuda import device

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not device.is_installed and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="requires the fake CUDA device: make test-cuda"))
