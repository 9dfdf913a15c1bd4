"""Small cached results in JSON, and results that depend on the content of files."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from deltaw.atomic_files import write_text
from deltaw.cache.keys import canonical_json, feed_file, hash_text, last_change, root, versions
from deltaw.errors import UserError

# Maximum number of small results per kind. The oldest are removed first.
MAX_ENTRIES = 500
# Digests of files up to this size in bytes are not cached, because a lookup takes as long as hashing.
MIN_CACHED_BYTES = 1 << 22
# Results of files that changed within this many seconds are not cached. File timestamps have a limited resolution, so
# a file could change again without a new timestamp.
MIN_FILE_AGE = 2.0

T = TypeVar("T")


def load_result(kind: str, parts: object, dependencies: Sequence[str] = ()) -> object | None:
    """Return the stored result for ``parts``, or None if it does not exist or was produced by other versions."""
    key_parts = [parts, versions(dependencies)]
    try:
        entry = json.loads(_file(kind, key_parts).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return entry.get("value") if isinstance(entry, dict) and entry.get("key") == canonical_json(key_parts) else None


def store_result(
    kind: str, parts: object, value: object, dependencies: Sequence[str] = (), max_entries: int = MAX_ENTRIES
) -> None:
    """Store a JSON-serializable result. Only the latest ``max_entries`` results of its kind are retained.

    If the folder is not writable, the result is not stored and the next call computes it again.
    """
    key_parts = [parts, versions(dependencies)]
    file = _file(kind, key_parts)
    try:
        write_text(file, json.dumps({"key": canonical_json(key_parts), "value": value}))
        for oldest in sorted(file.parent.glob("*.json"), key=last_change)[:-max_entries]:
            oldest.unlink(missing_ok=True)
    except (OSError, UserError):
        return


def result_digest(kind: str, parts: object, dependencies: Sequence[str] = ()) -> str | None:
    """Return a hash of the stored result for ``parts``, to detect changes, or None if it does not exist."""
    value = load_result(kind, parts, dependencies)
    return None if value is None else hash_text(canonical_json(value))


def _file(kind: str, key_parts: object) -> Path:
    return root() / "remembered" / kind / f"{hash_text(canonical_json(key_parts))}.json"


def file_state(path: Path) -> list[object]:
    """Return values that change if a file changes: real path, size, inode, modification time and status change time.

    Unlike the modification time, the status change time cannot be set back.
    """
    status = path.stat()
    changed = status.st_ctime_ns if os.name == "posix" else 0
    return [os.path.realpath(path), status.st_size, status.st_ino, status.st_mtime_ns, changed]


def compute_for_files(kind: str, files: Sequence[Path], make: Callable[[], T], dependencies: Sequence[str] = ()) -> T:
    """Return the JSON-serializable result of ``make``, which depends only on the content of ``files``.

    The result is cached until a file changes.

    Raises:
        UserError: if a file changes during the call.
    """
    before = [file_state(file) for file in files]
    cached = load_result(kind, before, dependencies)
    if cached is not None:
        return cached  # type: ignore[return-value]
    start_time = time.time()
    result = make()
    require_unchanged(files, before)
    statuses = (file.stat() for file in files)
    latest = max(status.st_ctime if os.name == "posix" else status.st_mtime for status in statuses)
    if start_time - latest > MIN_FILE_AGE:
        store_result(kind, before, result, dependencies)
    return result


def require_unchanged(files: Sequence[Path], before: Sequence[object]) -> None:
    """Raise a UserError if a file changed since :func:`file_state` was called."""
    for file, state in zip(files, before, strict=True):
        if file_state(file) != state:
            hint = "wait until the file is complete, and try again"
            raise UserError("the file changes while it is read", location=str(file), hint=hint)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Digests of large files are cached until the file changes.

    Raises:
        OSError: if the file cannot be read.
    """

    def read() -> str:
        digest = hashlib.sha256()
        feed_file(digest.update, path)
        return digest.hexdigest()

    return compute_for_files("files", [path], read) if path.stat().st_size > MIN_CACHED_BYTES else read()
