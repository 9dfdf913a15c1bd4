"""Pytest plugin that runs the tests with the kernels of the shared library at ``DELTAW_TEST_LIBRARY``."""

from __future__ import annotations

import os
from pathlib import Path

from deltaw.kernels import loader
from deltaw.kernels.variants import Variant

VARIABLE = "DELTAW_TEST_LIBRARY"


def load_kernels(path: Path) -> loader.LoadedVariant:
    """Load the kernels at ``path``."""
    return loader.open_file(path, Variant(path.stem, path.stem, 0, "any", (), ()))


def pytest_configure() -> None:
    loader.activate(load_kernels(Path(os.environ[VARIABLE])))
