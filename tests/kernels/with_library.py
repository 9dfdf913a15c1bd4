"""A plugin of pytest: the tests run with the kernels of one shared object, whatever variant it stands for.

Its path is in ``DELTAW_TEST_LIBRARY``.
"""

from __future__ import annotations

import os
from pathlib import Path

from deltaw.kernels import loader
from deltaw.kernels.processor import second_level_cache
from deltaw.kernels.variants import Variant

VARIABLE = "DELTAW_TEST_LIBRARY"


def opened(path: Path) -> loader.Opened:
    """The kernels at ``path``, ready to be called."""
    library = loader.load(path)
    assert library.dw_ready() == 0
    threads = loader.openmp_functions()
    if threads is not None:
        library.dw_threads(*threads)
    library.dw_set_cache(second_level_cache() or 1 << 20)
    return loader.Opened(Variant(path.stem, path.stem, 0, "any", (), ()), library, None)


def pytest_configure() -> None:
    loader._Process.using = opened(Path(os.environ[VARIABLE]))
    loader._Process.why_not, loader._Process.settled = None, True
