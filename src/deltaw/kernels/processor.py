"""What the processor says of itself. Imports neither torch nor anything of deltaw."""

from __future__ import annotations

import platform
from pathlib import Path

_ROOT = Path("/")


def processor_flags(root: Path = _ROOT) -> set[str]:
    """The feature words of the first processor in ``/proc/cpuinfo`` (``flags``, on ARM ``Features``).

    Empty where the system has no such file.
    """
    return set(_first(root, "flags", "Features").split())


def processor_name(root: Path = _ROOT) -> str:
    """The processor's name and stepping, for telling one kind of machine from another."""
    words = [_first(root, key) for key in ("model name", "cpu family", "model", "stepping", "CPU part")]
    return " ".join(filter(None, words)) or platform.processor() or platform.machine()


def _first(root: Path, *keys: str) -> str:
    """The value of the first line of ``/proc/cpuinfo`` with one of these keys; empty where there is none."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""
