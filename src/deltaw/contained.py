"""Folders from someone else: refuses links that lead out of them, and remembers what the user named.

A link that leads out of a folder with a model or an adapter would have another file of this machine read in its
place, so it is refused. The cache of a model hub, whose folders hold links to files of the same model, is recognized
by its layout. This module knows paths and names, not what the files are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from deltaw import cache
from deltaw.errors import UserError

# A folder of templates next to a tokenizer, whose files transformers reads.
_READ_INSIDE = ("additional_chat_templates",)


def require_contained(folder: Path, *, all_of_it: bool = False, among: Iterable[Path] | None = None) -> None:
    """Refuse links in ``folder`` that lead out of it.

    Args:
        folder: may itself be reached by a link; a missing folder has no links.
        all_of_it: check everything below it, not only its files.
        among: check only these paths.

    Raises:
        UserError: there is such a link.
    """
    paths = _everything(folder) if all_of_it else _files(folder)
    for path in paths if among is None else among:
        if path.is_symlink() and not _leads_into(path, _roots(folder)):
            what = f"'{path.relative_to(folder)}' is a link that leads out of the folder, and is not followed"
            hint = "if it is yours, copy the file in its place; if the folder came from somewhere else, do not use it"
            raise UserError(what, where=str(folder), hint=hint)


def lies_in(folder: Path, name: str) -> bool:
    """Whether ``name``, given by a file in ``folder``, is a path inside the folder; the file need not exist."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        return False
    return _leads_into(folder / name, _roots(folder))


def of_host(path: str) -> bool:
    """Whether a path may be another host's: on Windows, checking whether it exists would contact that host."""
    return path.startswith(("//", "\\\\", "/\\", "\\/"))


def _files(folder: Path) -> Iterator[Path]:
    """The files that are read from a folder, including those of the subfolders that transformers reads."""
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
    """Where links of a folder may lead: into the folder, and for a hub's ``models--owner--name/snapshots/revision``
    into the ``blobs`` of the same model."""
    own = folder.resolve()
    in_hub = (parent.parent for parent in own.parents if parent.name == "snapshots")
    return [own, *(place / "blobs" for place in in_hub if place.name.startswith(("models--", "datasets--")))]


def _leads_into(path: Path, roots: list[Path]) -> bool:
    try:
        end = path.resolve(strict=False)
    except (OSError, RuntimeError):  # a link to itself
        return False
    return any(end.is_relative_to(root) for root in roots)


# What this user named to deltaw on this machine: base models, rows, templates
#
# Folders with adapters name such things too, and come from anywhere. The record is in the cache, outside of the
# folders, so a folder cannot add a name to it. Only hashes of names are kept.


def remember_named(kind: str, value: object) -> None:
    """Note that the user named ``value`` as a ``kind`` of thing, such as ``model``."""
    known, line = _known(), _line(kind, value)
    # If the cache cannot be written to, the user is asked again.
    with contextlib.suppress(OSError):
        if line in _lines(known):
            return
        known.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(known, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb", buffering=0) as file:
            file.write(f"{line}\n".encode())


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
        text = os.path.realpath(path) if not of_host(path) and os.path.exists(path) else value
    return hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()
