"""Checks for folders from untrusted sources: links that leave the folder.

A link out of a model or adapter folder could make deltaw read any file of this machine, so it is rejected. The cache
layout of the Hugging Face hub, with links to files of the same model, is recognized and allowed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import UserError

# Subfolders that transformers reads with a tokenizer.
_READ_INSIDE = ("additional_chat_templates",)
# Environment variable with the allowed folders of a process, in JSON.
_VARIABLE = "DELTAW_ALLOWED_FOLDERS"


@dataclass(frozen=True)
class AllowedFolders:
    """Folders whose files may be read for an agent, a web page, or rows from another machine.

    Attributes:
        folders: Folders, with links resolved.
        allow_hidden: Allow files and subfolders whose names start with a dot.
    """

    folders: tuple[Path, ...]
    allow_hidden: bool = True

    @staticmethod
    def of_process() -> AllowedFolders | None:
        """Return the folders in the environment (:meth:`environment`), or None if this process may read all files."""
        text = os.environ.get(_VARIABLE)
        if text is None:
            return None
        values = json.loads(text)
        return AllowedFolders(tuple(map(Path, values["folders"])), allow_hidden=values["allow_hidden"])

    def environment(self) -> dict[str, str]:
        """Return the environment variable that restricts a process and its children to these folders."""
        values = {"folders": [str(folder) for folder in self.folders], "allow_hidden": self.allow_hidden}
        return {_VARIABLE: json.dumps(values)}

    def find(self, path: str | Path) -> Path | None:
        """Return an absolute path with links resolved, or None if it is not allowed.

        ``..`` is resolved before links, and paths to other hosts are rejected. The result therefore does not depend on
        files outside of the folders.
        """
        if is_remote_path(str(path)):
            return None
        try:
            resolved = Path(os.path.realpath(os.path.normpath(path)))
        except (OSError, ValueError):  # for example a NUL
            return None
        for folder in self.folders:
            if resolved.is_relative_to(folder):
                is_hidden = any(part.startswith(".") for part in resolved.relative_to(folder).parts)
                return None if is_hidden and not self.allow_hidden else resolved
        return None


def require_contained(folder: Path, *, recursive: bool = False, only: Iterable[Path] | None = None) -> None:
    """Raise an error if ``folder`` contains links to paths outside of it.

    Args:
        folder: Folder to check. It may itself be a link. A missing folder passes.
        recursive: Check all subfolders, not only the files that are loaded.
        only: Check only these paths.

    Raises:
        UserError: if a link leaves the folder.
    """
    paths = _everything(folder) if recursive else _files(folder)
    for path in paths if only is None else only:
        if path.is_symlink() and not _leads_into(path, _roots(folder)):
            message = f"'{path.relative_to(folder)}' is a link that leads out of the folder, and is not followed"
            hint = "if you created the link, replace it by a copy of the file; otherwise do not use this folder"
            raise UserError(message, location=str(folder), hint=hint)


def read_contained(folder: Path, name: str, max_bytes: int) -> bytes | None:
    """Return the first ``max_bytes`` bytes of a file in ``folder``, or None if it cannot be read.

    Raises:
        UserError: if the file is a link that leaves the folder.
    """
    path = folder / name
    require_contained(folder, only=[path])
    try:
        with path.open("rb") as file:
            return file.read(max_bytes)
    except OSError:
        return None


def is_inside(folder: Path, name: str) -> bool:
    """Return True if ``name``, a path from a file in ``folder``, is inside the folder. The path need not exist."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        return False
    return _leads_into(folder / name, _roots(folder))


def is_remote_path(path: str) -> bool:
    """Return True if a path may name another host. On Windows, checking its existence would contact that host."""
    return path.startswith(("//", "\\\\", "/\\", "\\/"))


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files that are loaded from a folder, including those of subfolders that transformers reads."""
    for path in _entries(folder):
        if path.name in _READ_INSIDE:
            yield path
            yield from _entries(path)
        elif not path.is_dir():
            yield path


def _everything(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _roots(folder: Path) -> list[Path]:
    """Return the allowed targets of links in a folder.

    These are the folder itself and, for a hub cache (``models--owner--name/snapshots/revision``), the ``blobs`` folder
    of the same model.
    """
    resolved = folder.resolve()
    caches = (parent.parent for parent in resolved.parents if parent.name == "snapshots")
    return [resolved, *(cache / "blobs" for cache in caches if cache.name.startswith(("models--", "datasets--")))]


def _leads_into(path: Path, roots: list[Path]) -> bool:
    try:
        target = path.resolve(strict=False)
    except (OSError, RuntimeError):  # a link to itself
        return False
    return any(target.is_relative_to(root) for root in roots)
