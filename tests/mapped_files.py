"""Memory-mapped files of this process, read from ``/proc``."""

from __future__ import annotations

import re
from pathlib import Path


def resident_bytes(file: Path) -> int:
    """Return the number of resident bytes of a mapped file."""
    total = 0
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(file) in part:
            total += 1024 * int(re.search(r"Rss:\s+(\d+) kB", part)[1])  # type: ignore[index]
    return total
