"""What this user named to deltaw on this machine: base models, rows, templates. Remembered in the cache.

Folders with adapters name such things too, and folders come from anywhere. The memory lies outside of them,
so nobody puts a name into it by passing a folder on. Only hashes of names are kept. It knows names, not what
they lead to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from deltaw import cache


def remember_named(kind: str, value: object) -> None:
    """Note that the user named ``value`` as a ``kind`` of thing, such as ``model``."""
    known, line = _known(), _line(kind, value)
    # Without a cache that can be written to, the user is asked again.
    with contextlib.suppress(OSError):
        if line in _lines(known):
            return
        known.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(known, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, f"{line}\n".encode())
        finally:
            os.close(handle)


def was_named(kind: str, value: object) -> bool:
    """Whether the user named ``value`` before, in any spelling of a path."""
    return _line(kind, value) in _lines(_known())


def _known() -> Path:
    return cache.root() / "named"


def _lines(file: Path) -> set[str]:
    try:
        return set(file.read_text(encoding="ascii", errors="replace").splitlines())
    except OSError:
        return set()


def _line(kind: str, value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    if isinstance(value, str):
        path = os.path.expanduser(value)
        of_host = path.startswith(("//", "\\\\"))  # asking whether it is there would ask that host
        text = os.path.realpath(path) if not of_host and os.path.exists(path) else value
    return hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()
