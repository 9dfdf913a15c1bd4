"""Files that this process has mapped, as Linux tells."""

from __future__ import annotations

import re
from pathlib import Path


def resident_of(file: Path) -> int:
    """Bytes of a mapped file that are resident."""
    found = 0
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(file) in part:
            found += 1024 * int(re.search(r"Rss:\s+(\d+) kB", part)[1])  # type: ignore[index]
    return found
