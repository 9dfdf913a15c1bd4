"""Small results that are kept in the cache folder, by a hash of all that they depend on.

Losing one costs the time to work it out again: a folder that cannot be written to, or a file that is damaged,
is as if nothing had been remembered. Knows JSON and files; not what is remembered.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from deltaw.durable import write_text
from deltaw.errors import UserError
from deltaw.hub import packages

# The most results of one kind; the oldest go first.
KEPT = 500


def recall(kind: str, key: object) -> object | None:
    """What was remembered for ``key``, a value that JSON can hold; None where nothing was."""
    try:
        kept = json.loads(_file(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept.get("value") if isinstance(kept, dict) and kept.get("key") == _text(key) else None


def remember(kind: str, key: object, value: object) -> None:
    """Keep ``value``, which JSON can hold, for ``key``."""
    file = _file(kind, key)
    try:
        write_text(file, json.dumps({"key": _text(key), "value": value}))
        others = sorted(file.parent.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for old in others[:-KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, UserError):
        return  # a cache that cannot be written to is no fault of the run


def stamp(kind: str, key: object) -> str | None:
    """A hash of what is remembered for ``key``, for telling whether it changed; None where nothing is."""
    value = recall(kind, key)
    return None if value is None else hashlib.blake2b(_text(value).encode(), digest_size=16).hexdigest()


def _text(key: object) -> str:
    return json.dumps(key, sort_keys=True)


def _file(kind: str, key: object) -> Path:
    digest = hashlib.blake2b(_text(key).encode(), digest_size=16).hexdigest()
    return packages.cache_folder().parent / "remembered" / kind / f"{digest}.json"
