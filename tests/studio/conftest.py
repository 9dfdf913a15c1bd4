"""Fixtures of the studio's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def client(tmp_path: Path):
    """Client of a studio in an empty folder, see :class:`tests.studio.client.StudioClient`."""
    from tests.studio.client import connect

    return connect(tmp_path / "studio")
