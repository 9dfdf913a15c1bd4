"""Tests of builds from source, with a fake compiler that records its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deltaw.kernels import variants
from deltaw.kernels.processor import processor_flags
from tests.wheel.contents import wheel_errors

ROOT = Path(__file__).parents[2]
COMPILER = """#!/bin/sh
case "$*" in *--version) exec cat version;; esac
echo "$*" >> arguments
while [ $# -gt 0 ]; do
    case $1 in -o) output=$2;; -c) source=$2;; esac
    shift
done
echo "$output" >> calls
cat /proc/sys/kernel/random/uuid > "$output"
[ -n "$source" ] || exit 0
headers=$(sed -n 's|^#include "\\(.*\\)"|src/deltaw/kernels/csrc/\\1|p' "$source" | tr '\\n' ' ')
echo "$output: $source $headers" > "${output%.o}.d"
"""

PROJECT = """
[project]
name = "deltaw"
version = "1"
[tool.setuptools]
package-dir = {"" = "src"}
packages = ["deltaw", "deltaw.kernels"]
include-package-data = false
"""

slow = pytest.mark.slow
pytestmark = [pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree")]
pytestmark += [pytest.mark.skipif(sys.platform != "linux", reason="the compiler is a script for Linux")]


class Tree:
    """Copy of the files that a build needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernels = folder / "src/deltaw/kernels"
        self.csrc = self.kernels / "csrc"
        shutil.copytree(variants.LIST.parent, self.csrc)
        for name in ("setup.py", "src/deltaw/kernels/variants.py", "src/deltaw/kernels/processor.py"):
            shutil.copy(ROOT / name, folder / name)
        for name, text in (("pyproject.toml", PROJECT), ("version", "1"), ("c++", COMPILER)):
            (folder / name).write_text(text)
        (folder / "c++").chmod(0o755)

    def build(self, variant_names: str | None = None, *command: str, **environment: str) -> list[str]:
        """Build and return the compiled and linked files as ``variant/file``."""
        for name in ("calls", "arguments"):
            (self.folder / name).write_text("")
        full_environment = {**os.environ, "CXX": str(self.folder / "c++"), "DELTAW_VARIANTS": variant_names or ""}
        full_environment |= environment
        program = [sys.executable, "setup.py", "--quiet", *(command or ("build_ext", "--inplace"))]
        subprocess.run(program, cwd=self.folder, env=full_environment, check=True, capture_output=True, text=True)
        calls = (self.folder / "calls").read_text().split()
        return sorted(call.removeprefix("build/kernels/_native_") for call in calls)

    def change(self, name: str) -> None:
        with (self.csrc / name).open("a") as file:
            file.write("// changed\n")

    def built(self) -> set[str]:
        return {file.name for file in self.kernels.glob("*.so")}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_inplace_build_compiles_variants_of_this_cpu(tree):
    tree.build()
    assert tree.built() == {v.file for v in variants.variants_to_build(processor_flags())}


def test_wheel_contains_every_variant(tree):
    tree.build(None, "bdist_wheel")
    libraries = {file.name for file in (tree.folder / "build").glob("lib*/deltaw/kernels/*.so")}
    assert libraries == {v.file for v in variants.for_machine()}


def test_rebuild_compiles_only_changed_sources(tree):
    """Each change also recompiles abi.cpp, which contains the digest of the sources."""
    sources = sorted(file.stem for file in tree.csrc.glob("*.cpp"))
    library = "generic/_native_generic.so"
    everything = sorted([library, *(f"generic/{name}.o" for name in sources)])
    assert tree.build("generic") == everything
    for file in tree.csrc.iterdir():
        file.touch()
    (tree.kernels / "_native_generic.so").unlink()
    assert tree.build("generic") == [] and tree.built() == {"_native_generic.so"}

    tree.change("add.cpp")
    assert tree.build("generic") == [library, "generic/abi.o", "generic/add.o"]
    tree.change("scratch.h")
    assert {library, "generic/abi.o", "generic/scratch.o"} <= set(tree.build("generic")) < set(everything)

    assert tree.build("generic", CXXFLAGS="-g") == everything
    (tree.folder / "version").write_text("2")
    assert tree.build("generic", CXXFLAGS="-g") == everything


def test_earlier_variants_remain_while_up_to_date(tree):
    first, second = (v.name for v in variants.for_machine()[-2:])
    tree.build(first)
    tree.build(second)
    assert tree.built() == {f"_native_{first}.so", f"_native_{second}.so"}
    tree.change("add.cpp")
    tree.build(second)
    assert tree.built() == {f"_native_{second}.so"}


CROSS_BUILDS = [
    ("windows-x86_64", "x86_64-windows-gnu", "win_amd64", "-mavx512bf16 "),
    pytest.param(
        "linux-aarch64", "aarch64-linux-gnu.2.28", "manylinux_2_28_aarch64", "-mcpu=generic+v8_2a+dotprod ", marks=slow
    ),
    pytest.param("linux-x86_64", "x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64", "-mamx-tile ", marks=slow),
    pytest.param("macos-aarch64", "aarch64-macos.11.0", "macosx_11_0_arm64", "+dotprod+bf16+i8mm ", marks=slow),
]


@pytest.mark.parametrize(("target", "zig", "tag", "flags"), CROSS_BUILDS)
def test_cross_build_passes_target_and_tags_wheel(tree, target, zig, tag, flags):
    """The wheel has the platform's tag and contains no object file of an earlier build."""
    (tree.kernels / "_native_generic.so").write_text("from an earlier in-place build")
    environment = {"DELTAW_TARGET": target, "SOURCE_DATE_EPOCH": "1700000000"}
    tree.build(None, "bdist_wheel", **environment)
    arguments = (tree.folder / "arguments").read_text()
    assert all(line.startswith(f"-target {zig} ") for line in arguments.splitlines()) and flags in arguments
    assert "-march=" not in arguments and ("--version-script" in arguments) == target.startswith("linux")
    (wheel,) = (tree.folder / "dist").iterdir()
    assert wheel.name == f"deltaw-1-py3-none-{tag}.whl"
    # The fake compiler writes no real object files, so errors about their format are ignored.
    format_errors = "is unknown, not", "does not export the kernels"
    errors = [error for error in wheel_errors(wheel) if not any(words in error for words in format_errors)]
    assert errors == ["the list of variants is missing"]  # PROJECT excludes package data

    first = wheel.read_bytes()
    wheel.unlink()
    assert tree.build(None, "bdist_wheel", **environment) == [] and wheel.read_bytes() == first


def test_unknown_target_or_compiler_error_produces_no_wheel(tree):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        tree.build(None, "bdist_wheel", DELTAW_TARGET="windows-arm")
    assert "unknown target, use one of linux-x86_64" in failed.value.stderr
    (tree.folder / "c++").write_text("#!/bin/sh\necho 'error: no such instruction' >&2; exit 1\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        tree.build(None, "bdist_wheel", DELTAW_TARGET="windows-x86_64")
    assert "for windows-x86_64: error: no such instruction" in failed.value.stderr
    assert not (tree.folder / "dist").exists()
