"""Models on this machine, and sizes and licenses of models, without loading them."""

from __future__ import annotations

import contextlib
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.hub.app_stores import is_store_reference, list_stored_models
from deltaw.hub.folders import config_folder, find_cached, resolve, resolve_hub_id
from deltaw.hub.hub_errors import fetch_error

UNKNOWN = "unknown"
# Depth of the model search, and bytes of a file that are searched for metadata and for a chat template.
MAX_DEPTH = 2
HEAD_BYTES = 2**18
MAX_HEADER_BYTES = 2**24
# Uses of models: write text, read text, read images.
WRITES = "writes text"
READS = "reads text"
IMAGES = "reads images"
_PACKAGE = re.compile(r"(?im)^(?:License-Expression|License): *(\S.*)$|^Classifier: License :: (?:.* :: )?(.+)$")
_GENERATES = re.compile("ForCausalLM|LMHeadModel|ForConditionalGeneration.*vision_config", re.DOTALL)
_HALF = re.compile(r'dtype": *"b?float16')


@dataclass(frozen=True)
class ModelInfo:
    """Model that can be trained.

    Attributes:
        reference: Value of the setting ``model``.
        name: Short display name.
        kind: ``folder``, ``gguf``, ``hub`` or ``package``.
        bytes: Size of its files, or None if it is unknown.
        license: Name of the license, or ``unknown``.
        is_local: True if the model is on this machine.
        use: ``WRITES``, ``READS`` or ``IMAGES``, or '' if unknown.
        about: Description for the user: size, use and languages.
    """

    reference: str
    name: str
    kind: str
    bytes: int | None
    license: str
    is_local: bool = True
    use: str = ""
    about: str = ""


def list_local_models(folder: Path) -> list[ModelInfo]:
    """Return the models below a folder, in the hub's cache, in the cache of packages, and in other programs."""
    found = [*_below(folder, folder, MAX_DEPTH), *_hub_models(), *_package_models(), *_stored_models()]
    return list({model.reference: model for model in found}.values())


def describe_model(reference: str) -> ModelInfo:
    """Return a model by its reference. If it is not on this machine, the hub is asked.

    Raises:
        UserError: if it does not exist, or the hub cannot be reached.
    """
    if packages.is_package_reference(reference):
        package = packages.parse(reference)
        if not packages.is_available(reference):
            return ModelInfo(reference, package.name, "package", None, UNKNOWN, is_local=False)
        path = resolve(reference).path
        return replace(_model(reference, package.name, "package", path), license=_package_license(package.name, path))
    if is_store_reference(reference):
        source = resolve(reference)
        return _model(reference, source.name, "gguf", source.path)
    hub = resolve_hub_id(reference)
    if hub is None:
        path = resolve(reference).path
        return _model(reference, path.name, "gguf" if path.is_file() else "folder", path)
    if (cached := find_cached(reference)) is not None:
        path = config_folder(cached, "", False)
        return _model(reference, hub.name, "hub", path)
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(str(hub.location), revision=hub.revision, files_metadata=True, timeout=10)
    except Exception as error:  # the client does not convert errors of its transport
        raise fetch_error(error, reference, revision=hub.revision) from error
    files = [file for file in info.siblings or () if file.rfilename.endswith(".safetensors")]
    name = UNKNOWN if info.card_data is None else info.card_data.get("license") or UNKNOWN
    size = sum(file.size or 0 for file in files) or None
    return ModelInfo(reference, hub.name, "hub", size, str(name), is_local=False)


def _below(folder: Path, root: Path, depth: int) -> Iterator[ModelInfo]:
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            is_hidden = path.name.startswith(".") or path.is_symlink()
            if is_hidden or not (path.is_dir() or path.suffix.lower() == ".gguf"):
                continue
            if path.is_file() or _has_model(path):
                kind = "gguf" if path.is_file() else "folder"
                reference = path.relative_to(root).as_posix()
                yield _model(reference, path.name, kind, path)
            elif depth and not (path / "run.yaml").is_file():
                yield from _below(path, root, depth - 1)


def _hub_models() -> Iterator[ModelInfo]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    with contextlib.suppress(CacheNotFound, OSError, ValueError):
        for repository in sorted(
            scan_cache_dir(constants.HF_HUB_CACHE).repos, key=lambda repository: repository.repo_id
        ):
            newest = max(repository.revisions, key=lambda revision: revision.last_modified, default=None)
            if repository.repo_type == "model" and newest is not None and _has_model(newest.snapshot_path):
                name = repository.repo_id.rpartition("/")[2]
                path = newest.snapshot_path
                yield _model(repository.repo_id, name, "hub", path)


def _package_models() -> Iterator[ModelInfo]:
    for mark in sorted(packages.cache_folder().glob("*/.complete/*")):
        name, _, version = mark.parent.parent.name.rpartition("-")
        member = "" if mark.name == "all" else "/" + urllib.parse.unquote(mark.name)
        with contextlib.suppress(UserError, OSError):  # the package contains something else
            yield describe_model(f"{packages.SCHEME}{name}=={version}{member}")


def _stored_models() -> Iterator[ModelInfo]:
    for model in list_stored_models():
        yield _model(model.reference, model.short_name, "gguf", model.path)


def _has_model(path: Path) -> bool:
    """Return True for a folder with a model that is not an adapter."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _size(path: Path) -> int:
    """Return the size of a model's weights."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files)


def _model(reference: str, name: str, kind: str, path: Path) -> ModelInfo:
    """Describe a model on this machine from the metadata in its files."""
    if path.is_file():
        use = READS if "bert" in _stated(path, "architecture") else WRITES
        size = _stated(path, "size_label")
        is_tuned = b"tokenizer.chat_template" in _read(path, MAX_HEADER_BYTES)
    else:
        config = _head(path / "config.json")
        use = WRITES if _GENERATES.search(config) else READS if '"vocab_size"' in config else IMAGES
        is_tuned = (path / "chat_template.jinja").is_file() or "chat_template" in _head(path / "tokenizer_config.json")
        millions = _size(path) / (2e6 if _HALF.search(config) else 4e6)
        size = f"{millions / 1e3:,.1f} billion" if millions >= 1e3 else f"{max(1, millions):,.0f} million"
        size = "" if "quantization_config" in config else f"about {size}"
    tuned = ("base: continues texts", "instruct: tuned to answer")[is_tuned] if use == WRITES else ""
    languages = ", ".join(re.findall(r"\w[\w-]*", _stated(path, "language")))[:80]
    parts = (size and f"{size} parameters", use, tuned, languages and f"language: {languages}")
    return ModelInfo(reference, name, kind, _size(path), _license(path), use=use, about=", ".join(filter(None, parts)))


def _stated(path: Path, key: str) -> str:
    """Return a value that a .gguf file or a model card states, or ''."""
    if path.is_file():
        content = _read(path)
        match = re.search(rf"general\.{key}\x08\0\0\0(.{{8}})".encode(), content, re.DOTALL)
        return content[match.end() :][: int.from_bytes(match[1], "little")].decode("utf-8", "replace") if match else ""
    card = _head(path / "README.md").removeprefix("---\n").partition("\n---")[0]
    line = re.search(rf"(?m)^{key}: *((?:.|\n *- )+)", card)
    return line[1].strip().strip("'\"") if line else ""


def _license(path: Path) -> str:
    """Return the license that a .gguf file, a model card or a file LICENSE states."""
    stated = _stated(path, "license") or _head(path / "LICENSE").strip().partition("\n")[0]
    return stated[:80] or UNKNOWN


def _head(file: Path) -> str:
    return _read(file).decode("utf-8", "replace").replace("\r\n", "\n")


def _read(file: Path, limit: int = HEAD_BYTES) -> bytes:
    if not file.is_file():  # also not a pipe, which would block
        return b""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        return opened.read(limit)
    return b""


def _package_license(name: str, path: Path) -> str:
    """Return the license of a model in a package: that of the model, or that of the package."""
    stated = _license(path)
    folders = [*path.parents] if stated == UNKNOWN else []
    pattern = f"{name.replace('-', '?')}-*.dist-info/METADATA"
    files = (file for folder in folders[:4] for file in folder.glob(pattern))
    match = next((match for file in files if (match := _PACKAGE.search(_head(file)))), None)
    return (match[1] or match[2]).strip()[:80] if match else stated
