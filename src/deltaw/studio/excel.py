"""Conversion of Excel files to JSON Lines."""

from __future__ import annotations

from pathlib import Path

from deltaw.studio.workspace import Workspace


def convert(workspace: Workspace, file: Path) -> Path:
    """Return a file unchanged, or a JSON Lines file with the rows of an Excel file's first sheet."""
    return file
