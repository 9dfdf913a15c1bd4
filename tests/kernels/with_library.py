"""A plugin of pytest: the tests run with the kernels of one shared object, whatever variant it stands for.

Its path is in ``DELTAW_TEST_LIBRARY``.
"""

from __future__ import annotations

import os
from pathlib import Path

from deltaw.kernels import loader
from deltaw.kernels.variants import Variant

VARIABLE = "DELTAW_TEST_LIBRARY"


def opened(path: Path) -> loader.Opened:
    """The kernels at ``path``, ready to be called."""
    return loader.open_file(path, Variant(path.stem, path.stem, 0, "any", (), ()))


def pytest_configure() -> None:
    loader.adopt(opened(Path(os.environ[VARIABLE])))
