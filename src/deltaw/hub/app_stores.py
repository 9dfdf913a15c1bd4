"""Models in the local stores of Ollama and LM Studio.

``ollama:NAME[:TAG]`` and ``lmstudio:NAME`` refer to a GGUF file that the program has downloaded. The file is used in
place and never copied. Files of a store are not trusted: names, manifests and digests are validated, and links that
leave the store are rejected.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deltaw.cache.results import file_digest
from deltaw.errors import UserError, did_you_mean
from deltaw.progress import track_progress
from deltaw.untrusted_paths import AllowedFolders

OLLAMA, LM_STUDIO = SCHEMES = ("ollama:", "lmstudio:")
_TITLES = {OLLAMA: "Ollama", LM_STUDIO: "LM Studio"}

# Part of a model name in Ollama. It contains no "..".
_PART = r"\w(?:[\w-]|\.(?!\.)){0,127}"
_OLLAMA_NAME = re.compile(rf"(?:(?:({_PART}(?::\d{{1,5}})?)/)?({_PART})/)?({_PART})(?::({_PART}))?", re.ASCII)
_DEFAULTS = ("registry.ollama.ai", "library", "", "latest")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LAYER = "application/vnd.ollama.image."
_MAX_MANIFEST_BYTES = 1 << 20
# File of a model that is split into several files.
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class StoredModel:
    """Model in the store of Ollama or LM Studio.

    Attributes:
        reference: Model reference, for example ``ollama:llama3.2:1b``.
        name: Name in the program, for example ``llama3.2:1b``.
        path: GGUF file in the store.
        digest: ``sha256:`` and the SHA-256 of the file. :func:`list_stored_models` leaves it empty for LM Studio, which
            does not record it.
        is_in_ollama: True if the program is Ollama.
    """

    reference: str
    name: str
    path: Path
    digest: str
    is_in_ollama: bool

    @property
    def short_name(self) -> str:
        """Name for files and folders, for example ``llama3.2-1b``."""
        return self.name.rpartition("/")[2].removesuffix(".gguf").replace(":", "-")


def is_store_reference(reference: str) -> bool:
    """Return True if ``reference`` refers to a store, even if it is malformed."""
    return reference.startswith(SCHEMES)


def lm_studio_folder() -> Path:
    """Return the default folder of LM Studio's models."""
    return Path.home() / ".lmstudio" / "models"


def find_stored_model(reference: str) -> StoredModel:
    """Return the model of a store reference. Its file is complete and has the recorded digest.

    Raises:
        UserError: if the name is malformed or unknown, the store or the file is damaged, the file is outside of the
            store, or the model is not a single GGUF file.
    """
    scheme, _, name = reference.partition(":")
    scheme += ":"
    if ".." in name or "\\" in name or name.startswith("/"):
        hint = f"use the name that {_TITLES[scheme]} lists"
        raise UserError(f"'{name}' is not a model name", location=reference, hint=hint)
    try:
        is_ollama = scheme == OLLAMA
        model = _find_in_ollama(name) if is_ollama else _find_in_lm_studio(name, _lm_studio_files())
        with track_progress(f"checking {model.name}"):
            digest = f"sha256:{file_digest(model.path)}"
    except OSError as error:
        message = f"the store of {_TITLES[scheme]} cannot be read: {error.strerror or error}"
        hint = f"check the permissions of its files for '{name}'"
        raise UserError(message, location=str(error.filename or _store(scheme)), hint=hint) from error
    if model.digest not in ("", digest):
        message = f"the file of '{model.name}' is damaged: its SHA-256 is not the one that Ollama recorded"
        raise UserError(message, location=str(model.path), hint=_pull_hint(model.name))
    return replace(model, digest=digest)


def list_stored_models() -> list[StoredModel]:
    """Return the usable models of both stores, without verifying digests."""
    return [*_ollama_models(), *_lm_studio_models()]


def _store(scheme: str) -> Path:
    if scheme == LM_STUDIO:
        return lm_studio_folder()
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


def _pull_hint(name: str) -> str:
    return f"download it again: ollama pull {name}"


def _unknown_error(scheme: str, name: str) -> UserError:
    """Return the error for a model that is not in the store."""
    store = _store(scheme)
    title = _TITLES[scheme]
    if not os.path.isdir(store):
        hint = f"download '{name}' with {title}"
        if scheme == OLLAMA:
            hint = f"set OLLAMA_MODELS to Ollama's folder of models, or download the model: ollama pull {name}"
        raise UserError(f"{title} has no folder of models here", location=str(store), hint=hint)
    references = [model.reference for model in list_stored_models() if model.reference.startswith(scheme)]
    hint = did_you_mean(f"{scheme}{name}", references)
    return UserError(f"{title} has no model '{name}'", location=str(store), hint=hint)


def _contained(path: Path, scheme: str, name: str) -> Path:
    """Return ``path`` with links resolved. Reject links that leave the store."""
    resolved = AllowedFolders((Path(os.path.realpath(_store(scheme))),)).find(path)
    if resolved is None:
        message = f"a file of '{name}' is a link that leaves the store, and is not followed"
        raise UserError(message, location=str(path), hint="replace the link by the file")
    return resolved


def _gguf_file(path: Path, scheme: str, name: str) -> Path:
    """Return the file of a model with links resolved.

    Raises:
        UserError: if it is missing, is no GGUF file or is outside of the store.
    """
    resolved = _contained(path, scheme, name)
    if not os.path.isfile(resolved):
        hint = _pull_hint(name) if scheme == OLLAMA else f"download '{name}' again"
        raise UserError(f"the file of '{name}' is missing", location=str(path), hint=hint)
    with resolved.open("rb") as file:
        if file.read(4) != b"GGUF":
            hint = f"use another model than '{name}', or the safetensors weights of its publisher"
            raise UserError(f"the file of '{name}' is not a GGUF file", location=str(path), hint=hint)
    return resolved


def _find_in_ollama(name: str) -> StoredModel:
    match = _OLLAMA_NAME.fullmatch(name)
    if match is None:
        hint = "use NAME[:TAG], for example ollama:llama3.2:1b, or hf.co/OWNER/NAME:TAG"
        raise UserError(f"'{name}' is not a model name", location=f"{OLLAMA}{name}", hint=hint)
    parts = [part or default for part, default in zip(match.groups(), _DEFAULTS, strict=True)]
    manifest = _store(OLLAMA).joinpath("manifests", *parts)
    if not os.path.lexists(manifest):
        raise _unknown_error(OLLAMA, name)
    return _ollama_model(manifest)


def _ollama_name(manifest: Path) -> str:
    """Return the shortest name of the model of a manifest that Ollama accepts."""
    registry, namespace, model, tag = manifest.parts[-4:]
    name = model if tag == _DEFAULTS[3] else f"{model}:{tag}"
    if registry != _DEFAULTS[0]:
        return f"{registry}/{namespace}/{name}"
    return name if namespace == _DEFAULTS[1] else f"{namespace}/{name}"


def _ollama_models() -> Iterator[StoredModel]:
    for manifest in sorted((_store(OLLAMA) / "manifests").glob("*/*/*/*")):
        with contextlib.suppress(UserError, OSError):
            if _OLLAMA_NAME.fullmatch(_ollama_name(manifest)):
                yield _ollama_model(manifest, suggest_base=False)


def _ollama_model(manifest: Path, *, suggest_base: bool = True) -> StoredModel:
    """Return the model of a manifest.

    Args:
        manifest: Path of the manifest.
        suggest_base: Search the store for the base model of a model with an adapter, to name it in the error.

    Raises:
        UserError: if the manifest or the file is not valid.
    """
    name = _ollama_name(manifest)
    layers = _read_layers(manifest, name)
    models = layers.get("model", [])
    if "adapter" in layers:
        hint = f"use the base model of '{name}'"
        listed = _ollama_models() if suggest_base and models else ()
        bases = [model.reference for model in listed if model.digest == models[0].get("digest")]
        hint += f": {' or '.join(bases)}" if bases else ""
        raise UserError(f"'{name}' is a base model with an adapter", location=str(manifest), hint=hint)
    if len(models) != 1:
        problem = f"consists of {len(models)} files"
        if not models:
            problem = "is stored as safetensors tensors" if "tensor" in layers else "has no weights on this machine"
        hint = f"use a model of one GGUF file instead of '{name}', or the hub id of its publisher"
        raise UserError(f"'{name}' {problem}", location=str(manifest), hint=hint)
    digest = models[0].get("digest")
    size = models[0].get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not isinstance(size, int):
        message = f"the manifest of '{name}' contains no valid digest and size of the model"
        raise UserError(message, location=str(manifest), hint=_pull_hint(name))
    path = _gguf_file(_store(OLLAMA) / "blobs" / digest.replace(":", "-"), OLLAMA, name)
    if path.stat().st_size != size:
        message = f"the file of '{name}' is incomplete: {path.stat().st_size:,} of {size:,} bytes"
        raise UserError(message, location=str(path), hint=_pull_hint(name))
    return StoredModel(f"{OLLAMA}{name}", name, path, digest, is_in_ollama=True)


def _read_layers(manifest: Path, name: str) -> dict[str, list[dict[str, object]]]:
    """Return the layers of a manifest by kind, for example ``model`` or ``template``.

    Raises:
        UserError: if the manifest is not valid.
    """
    resolved = _contained(manifest, OLLAMA, name)
    content = b""
    if os.path.isfile(resolved):  # not a pipe
        with resolved.open("rb") as file:
            content = file.read(_MAX_MANIFEST_BYTES + 1)
    try:
        value = json.loads(content) if len(content) <= _MAX_MANIFEST_BYTES else None
    except (ValueError, RecursionError):
        value = None
    layers = value.get("layers") if isinstance(value, dict) else None
    kinds: dict[str, list[dict[str, object]]] = {}
    for layer in layers if isinstance(layers, list) else [None]:
        kind = layer.get("mediaType") if isinstance(layer, dict) else None
        if not isinstance(layer, dict) or not isinstance(kind, str):
            raise UserError(f"the manifest of '{name}' is not valid", location=str(manifest), hint=_pull_hint(name))
        kinds.setdefault(kind.removeprefix(_LAYER), []).append(layer)
    return kinds


def _lm_studio_files() -> dict[str, Path]:
    """Return the models of LM Studio's folder by ``publisher/name/file.gguf``."""
    folder = lm_studio_folder()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob("*/*/*.gguf"))}
    return {name: path for name, path in files.items() if not path.name.lower().startswith("mmproj")}


def _lm_studio_models() -> Iterator[StoredModel]:
    files = _lm_studio_files()
    for name in files:
        folder = name.rpartition("/")[0]
        is_single = sum(other.startswith(f"{folder}/") for other in files) == 1
        with contextlib.suppress(UserError, OSError):
            yield _find_in_lm_studio(folder if is_single else name, files)


def _find_in_lm_studio(name: str, files: Mapping[str, Path]) -> StoredModel:
    """Return the only model with this name among ``files``: of one file, of a folder, or of a publisher's folder.

    Raises:
        UserError: if there is no such model, or there are several.
    """
    folders = {file: file.rpartition("/")[0] for file in files}
    names = {file: (file, folder, folder.rpartition("/")[2]) for file, folder in folders.items()}
    matches = {file: path for file, path in files.items() if name in names[file]}
    if not matches:
        raise _unknown_error(LM_STUDIO, name)
    complete = [file for file in matches if not _SPLIT.search(file)]
    if not complete:
        hint = f"use a model of one file instead of '{name}', or the hub id of its publisher"
        location = str(next(iter(matches.values())))
        raise UserError(f"'{name}' is split into several files", location=location, hint=hint)
    if len(complete) > 1:
        hint = f"choose one: {', '.join(f'{LM_STUDIO}{file}' for file in complete[:8])}"
        message = f"LM Studio has {len(complete)} models '{name}'"
        raise UserError(message, location=str(lm_studio_folder()), hint=hint)
    path = _gguf_file(matches[complete[0]], LM_STUDIO, name)
    return StoredModel(f"{LM_STUDIO}{name}", name, path, "", is_in_ollama=False)
