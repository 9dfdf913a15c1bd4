"""Permissions of an agent or a web page: folders, and settings without code.

Paths must be in folders that the user allows, after resolving links. Models and rows from other sources need permission
too. Code from a model is never run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import UserError
from deltaw.hub.app_stores import SCHEMES
from deltaw.settings.config import RunConfig
from deltaw.settings.fields import TextSource, without_file_lookup
from deltaw.settings.local_names import replace_names
from deltaw.settings.model_parts import parse_parts
from deltaw.untrusted_paths import AllowedFolders

# Maximum bytes of a settings file.
MAX_FILE_BYTES = 2**20
# Reference of a model or rows other than a path: a package, a model of another program, or a hub id.
_SCHEMES = ("pypi:", *SCHEMES)
_REMOTE_REFERENCE = re.compile(
    rf"(?:{'|'.join(_SCHEMES)})\S+|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:[/@:][\w.@:/-]+)?"
)


def require_plain_text(text: str) -> str:
    """Reject text with a NUL or an unpaired surrogate."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("contains a NUL or half of a surrogate pair")
    return text


class FolderPermissions:
    """Paths and references that an agent or a web page may use.

    Args:
        folders: Allowed folders. Relative paths are resolved in the first.
        allow_remote: Allow models and rows from packages and from a hub, and models of Ollama and LM Studio.
        allow_hidden: Allow files and subfolders whose names start with a dot.

    Raises:
        UserError: if a folder does not exist.
    """

    def __init__(self, folders: Sequence[Path], allow_remote: bool, *, allow_hidden: bool = True) -> None:
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise UserError("no such folder", location=f"--allow {missing[0]}", hint="create it first")
        self.folders = [folder.resolve() for folder in folders]
        self.allow_remote = allow_remote
        self._allowed = AllowedFolders(tuple(self.folders), allow_hidden)

    def environment(self) -> dict[str, str]:
        """Return environment variables that restrict a process, because rows may refer to files, too."""
        return self._allowed.environment()

    def path(self, text: str, location: str) -> str:
        """Return the real path of a text. The path need not exist.

        Paths with ".." are rejected, because in the settings of a run they would be resolved from another folder.

        Raises:
            UserError: if the path is outside the allowed folders after resolving links.
        """
        try:
            require_plain_text(text)
            expanded = Path(os.path.expanduser(text))
        except (ValueError, RuntimeError) as error:  # for example a user that does not exist
            raise UserError("this is not a path", location=location, hint="specify a file or a folder") from error
        resolved = self._allowed.find(self.folders[0] / expanded)
        if ".." in expanded.parts or resolved is None:
            hint = f"allowed: {', '.join(map(str, self.folders))}"
            raise UserError(f"'{text[:200]}' is outside of the folders that are allowed", location=location, hint=hint)
        return str(resolved)

    def reference(self, text: object, location: str) -> str:
        """Return a model or rows: the real path, or the reference if it is remote.

        Raises:
            UserError: if it is not allowed.
        """
        if not isinstance(text, str):
            raise UserError("this is not a text", location=location)
        if (parts := parse_parts(text)) is not None:
            return parts.replace_references(lambda part: self.reference(part, location)).reference
        path = self.folders[0] / text.replace("\0", "")
        # A path that leads out of the folders is not a hub id, whether or not its file exists.
        is_local = not text.startswith(_SCHEMES) and (os.path.lexists(path) or self._allowed.find(path) is None)
        if is_local or ".." in re.split("[/:@]", text) or not _REMOTE_REFERENCE.fullmatch(text):
            return self.path(text, location)
        if not self.allow_remote:
            hint = "specify a path, or start the server with --allow-models"
            raise UserError(f"'{text[:200]}' is not a local path", location=location, hint=hint)
        return text

    def config(self, file: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return validated settings with real paths.

        Raises:
            UserError: if the settings are invalid or contain something that is not allowed.
        """
        path = None if file is None else Path(self.path(file, "file"))
        if path is not None:
            require_small_file(path, "file")
        with without_file_lookup():
            values: dict[str, Any] = RunConfig.read(path, overrides).model_dump(mode="json")
        for key in ("trust_remote_code", "track", "force"):
            if values[key]:
                raise UserError("this is not allowed here", location=key, hint=f"remove {key}")
        config = RunConfig.read(values)
        name = str(config.section_name)
        section = config.section
        references = config.external_references()
        for key in getattr(section, "code_keys", ()):
            location = f"{name}.{key}"
            if location in references:
                code = str(references[location])[:200]
                message = f"functions that read files or run code are not allowed here: {code}"
                raise UserError(message, location=location, hint="use rewards that compare texts, such as exact")
        checks = {"path": self.path, "reference": self.reference}  # code and addresses are rejected above
        values = replace_names(values, RunConfig, lambda v, kind, key: checks[kind](v, key) if kind in checks else v)
        # Read texts now, because the agent could replace their files later.
        for key, value in RunConfig.read(values).section or ():
            if isinstance(value, TextSource) and value.file is not None:
                require_small_file(Path(value.file), f"{name}.{key}")
                values[name][key] = {"text": value.read(f"{name}.{key}")}
        return values

    def run_arguments(self, text: str) -> list[str]:
        """Return the command-line arguments that open a run, an adapter or a model.

        Raises:
            UserError: if the run refers to something that is not allowed.
        """
        from deltaw.methods.trust import is_adapter, read_folder

        reference = self.reference(text, "run")
        folder = Path(reference)
        if folder.is_absolute() and not folder.exists():
            raise UserError(
                f"no such run or model: '{text[:200]}'", location="run", hint="call the tool 'runs' to list them"
            )
        if not (folder.is_absolute() and is_adapter(folder)):
            return [reference]
        adapter = read_folder(folder, trust_remote_code=False)
        if adapter.run is not None:
            self.config(None, adapter.run.model_dump(mode="json"))
        base = self.reference(adapter.base_name(None), "the base model of the run")
        # The precision of a run applies only if --model is not given, so it is passed explicitly.
        precision = "auto" if adapter.run is None else adapter.run.precision
        return [reference, f"--model={base}", f"--precision={precision}"]


def require_small_file(path: Path, location: str) -> None:
    """Raise a UserError if a path is not a file, or if the file is too large to read."""
    if not (path.is_file() and path.stat().st_size <= MAX_FILE_BYTES):
        raise UserError("no such file, or it is too large", location=location, hint="specify another file")
