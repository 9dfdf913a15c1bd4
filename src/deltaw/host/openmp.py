"""Which OpenMP libraries this process has loaded: a second one brings a second pool of threads."""

from __future__ import annotations

import re
from pathlib import Path

_LIBRARY = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*)$")


def openmp_libraries(root: Path = Path("/")) -> list[str]:
    """The files' names, in alphabetical order; empty where the system does not say."""
    try:
        maps = (root / "proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = (_LIBRARY.search(line.rstrip()) for line in maps.splitlines())
    return sorted({match[1] for match in found if match})
