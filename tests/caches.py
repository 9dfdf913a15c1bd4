"""What makes the entries of a cache, changed: another version of a package, another text of a module."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from deltaw import cache


def other_version(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package say that it has another version."""
    own = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == package else own(name))


def other_text(monkeypatch: pytest.MonkeyPatch, copy: Path, module: str) -> None:
    """Let the cache take its modules' text from a ``copy`` of the source in which one of them is changed.

    Args:
        module: its file, below the package.
    """
    shutil.copytree(cache.SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    with (copy / module).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    monkeypatch.setattr(cache, "SOURCE", copy)


def other(monkeypatch: pytest.MonkeyPatch, copy: Path, made_by: str) -> None:
    """Another text of a module (``….py``), or another version of a package."""
    if made_by.endswith(".py"):
        other_text(monkeypatch, copy, made_by)
    else:
        other_version(monkeypatch, made_by)
