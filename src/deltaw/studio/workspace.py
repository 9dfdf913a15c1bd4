"""Folder of a studio: rows, runs and exports. Paths from the page stay inside of it. Drafts and jobs are elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import TypeAdapter

from deltaw import platforms
from deltaw.atomic_files import write_text
from deltaw.cache import keys
from deltaw.data.row_files import kind_of
from deltaw.errors import UserError
from deltaw.runs.folder import is_run, mapping
from deltaw.runs.permissions import FolderPermissions
from deltaw.settings.config import merge_settings

SPREADSHEETS = (".xlsx", ".xls", ".ods")
RUNS = "runs"
EXPORTS = "exports"
# Free bytes that an upload must leave on the disk, and the default limit of an upload.
MIN_FREE_BYTES = 10**9
MAX_UPLOAD_BYTES = 512 * 10**6
# Depth of the search for data files, and maximum number of files offered.
MAX_DEPTH = 2
MAX_FILES = 200
# Length of the name of an upload. File systems allow 255 bytes, of which a number and a suffix need some.
MAX_NAME_BYTES = 200
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff]')
_IDENTITY = re.compile(r"[0-9a-f]{12}")

T = TypeVar("T")


def unused_path(path: Path, used: Collection[Path] = ()) -> Path:
    """Return a path, with a number appended to its name if it exists or is in ``used``."""
    stem, dot, suffixes = path.name.partition(".")
    names = itertools.chain([path.name], (f"{stem}-{number}{dot}{suffixes}" for number in itertools.count(2)))
    return next(new for name in names if not os.path.lexists(new := path.with_name(name)) and new not in used)


def move_to_unused(source: Path, path: Path) -> Path:
    """Move a file to an unused path, as returned by :func:`unused_path`. Simultaneous calls choose distinct paths."""
    while True:
        target = unused_path(path)
        with contextlib.suppress(FileExistsError):
            target.open("xb").close()
            try:
                platforms.rename_path(source, target)
            except BaseException:
                target.unlink(missing_ok=True)
                raise
            return target


def is_data_file(path: Path) -> bool:
    """Return True if the suffix is that of a supported file with rows."""
    return bool(kind_of(path)) or path.suffix.lower() in SPREADSHEETS


def load_fields(kind: type[T], file: Path, **values: object) -> T:
    """Create a dataclass from a JSON file and validate the types of its fields.

    Args:
        kind: Class of the result.
        file: JSON file.
        values: Fields that are not in the file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=str)  # NaN is not a number here
        return TypeAdapter(kind).validate_python({**content, **values})
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


class TooLargeError(UserError):
    """An upload is larger than allowed."""


@dataclass
class Draft:
    """Settings of a training that has not started.

    Attributes:
        path: File of the draft.
        settings: Settings that differ from the defaults, nested. Paths are relative to the studio's folder.
        preview: Result of reading the rows, or None.
        changed: Time of the last change in seconds since the epoch.
        name: Name of the file that the user chose, relative to the studio's folder.
        note: Description of the conversion of that file, or ''.
        sheet: Sheet of the spreadsheet that the rows are from, or ''.
        sheets: Sheets of the spreadsheet.
    """

    path: Path
    settings: dict[str, Any]
    preview: dict[str, Any] | None = None
    changed: float = 0.0
    name: str = ""
    note: str = ""
    sheet: str = ""
    sheets: Sequence[str] = ()

    @property
    def identity(self) -> str:
        return self.path.stem

    @property
    def rows(self) -> str:
        """Reference of the training rows."""
        return str(mapping(self.settings.get("data")).get("train", ""))

    def set(self, key: str, value: object) -> None:
        """Set a setting by its dotted key. None removes it."""
        section, _, leaf = key.rpartition(".")
        if value is not None:
            self.settings = merge_settings(self.settings, {section: {leaf: value}} if section else {leaf: value})
        else:
            (self.settings.get(section, {}) if section else self.settings).pop(leaf, None)

    def save(self) -> None:
        """Write the draft to its file."""
        self.changed = time.time()
        values = {key: value for key, value in vars(self).items() if key != "path"}
        write_text(self.path, json.dumps(values))


class Workspace:
    """Folder of a studio.

    Args:
        folder: The folder. It is created if it does not exist.
        max_upload: Maximum size of an uploaded file in bytes.

    Attributes:
        state: Folder of jobs, drafts, session and lock. It is in the cache, because a folder of another person could
            contain commands to run.
    """

    def __init__(self, folder: Path, max_upload: int = MAX_UPLOAD_BYTES) -> None:
        self.max_upload = max_upload
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.folder = folder.resolve(strict=True)
            name = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:32]
            self.state = keys.root().resolve() / "studio" / name
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.state.chmod(0o700)
            (self.state / "drafts").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use this folder: {error.strerror or error}", location=str(folder)) from error
        self.permissions = FolderPermissions([self.folder], allow_remote=True, allow_hidden=False)
        self._damaged: set[Path] = set()

    def partial_file(self) -> Path:
        """Return an unused path in the folder for an incomplete file. It is hidden."""
        return self.folder / f".studio-{secrets.token_hex(8)}.part"

    def remove_partial_files(self) -> None:
        """Remove incomplete files and redirect pages of a studio that was killed."""
        for partial in self.folder.glob(".studio-*.*"):
            with contextlib.suppress(OSError):
                partial.unlink()

    def path(self, text: str, *, location: str = "path") -> Path:
        """Return the existing file or folder with this relative path, with links resolved.

        Raises:
            UserError: if it does not exist, is hidden, is not a regular file or a folder, or is outside of the folder.
        """
        hint = f"choose a file or folder inside of {self.folder}"
        try:
            path = (self.folder / text).resolve(strict=True)
            parts = (*Path(text).parts, *path.relative_to(self.folder).parts)  # ValueError if it is outside
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"'{text[:200]}' does not exist", location=location, hint=hint) from error
        is_allowed = path.is_file() or path.is_dir()  # no pipes and devices
        if not parts or not is_allowed or Path(text).is_absolute() or any(part.startswith(".") for part in parts):
            raise UserError(f"'{text[:200]}' is not allowed here", location=location, hint=hint)
        return path

    def relative(self, path: str | Path) -> str:
        """Return a path relative to the folder, with slashes. Other texts are returned unchanged."""
        try:
            return Path(path).relative_to(self.folder).as_posix()
        except ValueError:
            return str(path)

    def shorten(self, error: UserError) -> UserError:
        """Return the error with paths relative to the folder."""
        texts = [text or "" for text in (error.message, error.location, error.hint)]
        message, location, hint = (text.replace(f"{self.folder}{os.sep}", "") for text in texts)
        return UserError(message, location=location or None, hint=hint or None)

    def data_files(self) -> list[Path]:
        """Return the files that may contain rows, the last changed first."""

        def walk(folder: Path, depth: int) -> Iterator[Path]:
            for entry in folder.iterdir():
                if (
                    entry.name.startswith(".")
                    or entry.is_symlink()
                    or entry in (self.folder / RUNS, self.folder / EXPORTS)
                ):
                    continue
                if entry.is_dir() and depth and not is_run(entry) and not (entry / "config.json").is_file():
                    yield from walk(entry, depth - 1)
                elif entry.is_file() and is_data_file(entry):
                    yield entry

        return sorted(walk(self.folder, MAX_DEPTH), key=lambda file: file.stat().st_mtime, reverse=True)[:MAX_FILES]

    async def save_upload(self, name: str, body: AsyncIterator[bytes], size: int | None) -> Path:
        """Store an uploaded file under its name, with a number appended if that exists.

        Args:
            name: Name of the file.
            body: Its content.
            size: Announced size in bytes, or None.

        Raises:
            UserError: if the name or the size is not allowed.
        """
        name = PurePosixPath(name.replace("\\", "/")).name
        path = self.folder / name
        is_short = len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES
        if not is_short:
            hint = "rename the file"
            raise UserError(f"the name of the file is too long: '{name[:40]}…'", location="upload", hint=hint)
        if forbidden := _FORBIDDEN.search(name):
            message = f"the name '{name}' contains {forbidden[0]!r}, which not every system allows"
            raise UserError(message, location="upload", hint="rename the file")
        if name.startswith(".") or not is_data_file(path):
            hint = "use a table (.csv, .tsv, .xlsx, .xls, .ods, .parquet) or JSON lines (.jsonl)"
            raise UserError(f"'{name[:200]}' is not a file with rows", location="upload", hint=hint)
        platforms.reject_reserved_names(name)
        partial = self.partial_file()
        written = 0
        self._check_size(size or 0, size or 0)
        try:
            with partial.open("xb") as file:
                async for chunk in body:
                    written += len(chunk)
                    self._check_size(written, len(chunk))
                    file.write(chunk)
            path = move_to_unused(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _check_size(self, size: int, needed: int) -> None:
        """Reject an upload above the limit, or one that would fill the disk."""
        if size > self.max_upload:
            message = f"the file is larger than {self.max_upload / 1e6:,.0f} MB"
            raise TooLargeError(message, location="upload", hint=f"copy it to {self.folder} and choose it here")
        if shutil.disk_usage(self.folder).free - needed < MIN_FREE_BYTES:
            raise UserError("the disk is almost full", location="upload", hint="delete files that you do not need")

    def create_draft(self, file: Path, original: Path | None = None, **values: Any) -> Draft:
        """Create a draft for a file with rows.

        Args:
            file: File with the rows.
            original: File that it was converted from, or None.
            values: Attributes of the draft that describe the conversion.
        """
        path = self.state / "drafts" / f"{secrets.token_hex(6)}.json"
        draft = Draft(path, {"data": {"train": self.relative(file)}}, name=self.relative(original or file), **values)
        draft.save()
        return draft

    def drafts(self) -> list[Draft]:
        """Return all readable drafts, the last changed first."""
        drafts = []
        for path in (self.state / "drafts").glob("*.json"):
            with contextlib.suppress(UserError):
                drafts.append(self.draft(path.stem))
        return sorted(drafts, key=lambda draft: draft.changed, reverse=True)

    def draft(self, identity: str) -> Draft:
        """Return a draft.

        Raises:
            UserError: if it does not exist.
        """
        path = self.state / "drafts" / f"{identity}.json"
        try:
            if _IDENTITY.fullmatch(identity):
                draft = load_fields(Draft, path, path=path)
                draft.changed = min(max(0.0, draft.changed), time.time())
                known = {"model": str | None, "task": str | None, "data": dict}
                if not all(isinstance(draft.settings.get(key), kind) for key, kind in known.items()):
                    raise ValueError("a setting is not a text")
                return draft
        except OSError:
            pass
        except ValueError:
            self.report_damage(path)
        raise UserError("this draft does not exist", hint="go to the start page and choose a file")

    def report_damage(self, path: Path) -> None:
        """Print a note once for each skipped file."""
        if path not in self._damaged:
            self._damaged.add(path)
            print(f"note: skipped {path}: it is damaged or from another version of deltaw", file=sys.stderr)

    def config(self, draft: Draft) -> dict[str, Any]:
        """Return the complete settings of a draft with absolute paths.

        Raises:
            UserError: if a setting is invalid or not allowed.
        """
        return self.permissions.config(None, draft.settings)
