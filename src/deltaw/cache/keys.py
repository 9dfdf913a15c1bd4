"""Disk cache of expensive results, keyed by everything that they depend on.

An entry has a kind and a key. The key is a hash of the inputs, of package versions and of the source of deltaw's
modules (:func:`key`), so that an upgrade or an edit invalidates older entries. Small results are JSON
(:func:`load_result`, :func:`store_result`). Large results are files and folders of a :class:`Cache`, which locks its
entries and evicts the least recently used ones. This module does not import torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

# Folder of deltaw's modules.
SOURCE = Path(__file__).parent.parent
_COMPILED = (".so", ".pyd", ".dylib", ".dll")


def root() -> Path:
    """Return the cache folder: ``$DELTAW_CACHE`` or ``~/.cache/deltaw``."""
    configured = os.environ.get("DELTAW_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "deltaw"


def key(kind: str, parts: object, dependencies: Sequence[str] = ()) -> str:
    """Return the key of an entry.

    Args:
        kind: Kind of the entry.
        parts: JSON-serializable inputs of the entry.
        dependencies: Packages and deltaw modules that produce the entry. ``deltaw.data`` includes its submodules.
    """
    return hash_text(canonical_json([kind, parts, versions(dependencies)]))


def versions(dependencies: Sequence[str]) -> dict[str, str]:
    """Return the version of each package, and a hash of the files of each deltaw module."""
    return {name: _state(name) for name in dependencies}


def _state(name: str) -> str:
    if name.partition(".")[0] == "deltaw":
        return _hash_of_module(SOURCE, name)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _hash_of_module(source: Path, name: str) -> str:
    """Return a hash of a module's source, or of all sources and compiled libraries of a package."""
    path = source.joinpath(*name.split(".")[1:])
    files = [path.with_suffix(".py")]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".py", *_COMPILED))
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(source).as_posix()}\0{file.stat().st_size}\0".encode())
        feed_file(digest.update, file)
    return digest.hexdigest()


def canonical_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def feed_file(update: Callable[[memoryview], object], path: Path) -> None:
    """Hash a file in chunks, so that memory use does not depend on its size."""
    buffer = memoryview(bytearray(1 << 17))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            update(buffer[:count])


def last_change(path: Path) -> float:
    """Return the modification time of a file, or 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
