"""Changes that invalidate cache entries: a new package version or a modified module."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from deltaw.cache import keys


def fake_version(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Report version 0.0 for a package."""
    real_version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == package else real_version(name))


def modify_source(monkeypatch: pytest.MonkeyPatch, copy: Path, module: str) -> None:
    """Point the cache at a copy of the source in which one module is modified.

    Args:
        copy: Folder for the copy.
        module: Path of the module, relative to the package.
    """
    shutil.copytree(keys.SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    with (copy / module).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    monkeypatch.setattr(keys, "SOURCE", copy)


def invalidate(monkeypatch: pytest.MonkeyPatch, copy: Path, dependency: str) -> None:
    """Modify a module (a name that ends in ``.py``), or change the version of a package."""
    if dependency.endswith(".py"):
        modify_source(monkeypatch, copy, dependency)
    else:
        fake_version(monkeypatch, dependency)
