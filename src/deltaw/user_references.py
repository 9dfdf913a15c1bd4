"""Record of the references that the user passed to deltaw on this machine: base models, rows, templates.

Untrusted adapter folders contain such references, too. The record is in the cache, outside of any adapter folder, so
that a folder cannot add to it. Only hashes are stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from deltaw.cache import keys
from deltaw.untrusted_paths import is_remote_path


def record_reference(kind: str, value: object) -> None:
    """Record that the user passed ``value`` as a ``kind``, such as ``model``."""
    record, line = _record_path(), _line(kind, value)
    # If the cache is not writable, the user has to confirm again.
    with contextlib.suppress(OSError):
        if line in _lines(record):
            return
        record.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb", buffering=0) as file:
            file.write(f"{line}\n".encode())


def was_referenced(kind: str, value: object) -> bool:
    """Return True if the user passed ``value`` before, in any spelling of its path."""
    return _line(kind, value) in _lines(_record_path())


def _record_path() -> Path:
    return keys.root() / "named"


def _lines(file: Path) -> set[str]:
    try:
        return set(file.read_text(encoding="ascii", errors="replace").splitlines())
    except OSError:
        return set()


def _line(kind: str, value: object) -> str:
    resolved = _resolved(value)
    text = resolved if isinstance(resolved, str) else json.dumps(resolved, sort_keys=True, default=str)
    return hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()


def _resolved(value: object) -> object:
    """Return a reference with absolute paths of existing files, also in lists, sections and ``FILE.py:NAME``.

    The same relative path is another reference in another working directory.
    """
    if isinstance(value, Mapping):
        return {key: _resolved(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(item) for item in value]
    if not isinstance(value, str):
        return value
    stem, is_code, name = value.partition(".py:")
    path = os.path.expanduser(f"{stem}.py" if is_code else value)
    if is_remote_path(path) or not os.path.exists(path):
        return value
    return os.path.realpath(path) + (f":{name}" if is_code else "")
