"""What a build from source compiles, shown by a compiler that writes down what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deltaw.kernels import variants
from deltaw.kernels.processor import processor_flags
from tests.wheel.contents import faults_of

ROOT = Path(__file__).parents[2]
COMPILER = """#!/bin/sh
case "$*" in *--version) exec cat version;; esac
echo "$*" >> said
while [ $# -gt 0 ]; do
    case $1 in -o) made=$2;; -c) source=$2;; esac
    shift
done
echo "$made" >> calls
cat /proc/sys/kernel/random/uuid > "$made"
[ -n "$source" ] || exit 0
headers=$(sed -n 's|^#include "\\(.*\\)"|src/deltaw/kernels/csrc/\\1|p' "$source" | tr '\\n' ' ')
echo "$made: $source $headers" > "${made%.o}.d"
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

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree"),
    pytest.mark.skipif(sys.platform != "linux", reason="the compiler is a script for Linux"),
]


class Tree:
    """A copy of what is compiled, and builds into it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kernels = folder, folder / "src/deltaw/kernels"
        self.csrc = self.kernels / "csrc"
        shutil.copytree(variants.LIST.parent, self.csrc)
        for name in ("setup.py", "src/deltaw/kernels/variants.py", "src/deltaw/kernels/processor.py"):
            shutil.copy(ROOT / name, folder / name)
        for name, text in (("pyproject.toml", PROJECT), ("version", "1"), ("c++", COMPILER)):
            (folder / name).write_text(text)
        (folder / "c++").chmod(0o755)

    def build(self, wanted: str | None = None, *command: str, **environment: str) -> list[str]:
        """What was compiled and linked, as ``variant/file``."""
        for name in ("calls", "said"):
            (self.folder / name).write_text("")
        given = {**os.environ, "CXX": str(self.folder / "c++"), "DELTAW_VARIANTS": wanted or "", **environment}
        program = [sys.executable, "setup.py", "--quiet", *(command or ("build_ext", "--inplace"))]
        subprocess.run(program, cwd=self.folder, env=given, check=True, capture_output=True, text=True)
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


def test_a_build_in_place_makes_what_this_machine_chooses_from(tree):
    tree.build()
    assert tree.built() == {v.file for v in variants.worth_building(processor_flags())}


def test_a_wheel_holds_every_variant(tree):
    tree.build(None, "bdist_wheel")
    made = {file.name for file in (tree.folder / "build").glob("lib*/deltaw/kernels/*.so")}
    assert made == {v.file for v in variants.for_machine()}


def test_only_what_changed_is_compiled_again(tree):
    sources = sorted(file.stem for file in tree.csrc.glob("*.cpp"))
    library = "generic/_native_generic.so"
    everything = sorted([library, *(f"generic/{name}.o" for name in sources)])
    assert tree.build("generic") == everything
    for file in tree.csrc.iterdir():
        file.touch()
    (tree.kernels / "_native_generic.so").unlink()
    assert tree.build("generic") == [] and tree.built() == {"_native_generic.so"}

    tree.change("add.cpp")
    assert tree.build("generic") == [library, "generic/add.o"]
    tree.change("scratch.h")
    assert {library, "generic/scratch.o"} <= set(tree.build("generic")) < set(everything)

    assert tree.build("generic", CXXFLAGS="-g") == everything
    (tree.folder / "version").write_text("2")
    assert tree.build("generic", CXXFLAGS="-g") == everything


def test_variants_of_an_earlier_build_stay_while_they_are_up_to_date(tree):
    one, other = (v.name for v in variants.for_machine()[-2:])
    tree.build(one)
    tree.build(other)
    assert tree.built() == {f"_native_{one}.so", f"_native_{other}.so"}
    tree.change("add.cpp")
    tree.build(other)
    assert tree.built() == {f"_native_{other}.so"}


@pytest.mark.parametrize(
    ("target", "zig", "tag", "flags"),
    [
        ("windows-x86_64", "x86_64-windows-gnu", "win_amd64", "-mavx512bf16 "),
        ("macos-aarch64", "aarch64-macos.11.0", "macosx_11_0_arm64", "-mcpu=generic+v8_2a+dotprod+bf16+i8mm "),
        ("linux-x86_64", "x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64", "-mamx-tile "),
        ("linux-aarch64", "aarch64-linux-gnu.2.28", "manylinux_2_28_aarch64", "-mcpu=generic+v8_2a+dotprod "),
    ],
)
def test_a_wheel_for_another_platform_is_asked_of_the_compiler(tree, target, zig, tag, flags):
    """It is named for the platform, and holds no file of this one that lies in the source tree."""
    (tree.kernels / "_native_generic.so").write_text("of an earlier build in place")
    when = {"DELTAW_TARGET": target, "SOURCE_DATE_EPOCH": "1700000000"}
    tree.build(None, "bdist_wheel", **when)
    said = (tree.folder / "said").read_text()
    assert all(line.startswith(f"-target {zig} ") for line in said.splitlines()) and flags in said
    assert "-march=" not in said and ("--version-script" in said) == target.startswith("linux")
    (wheel,) = (tree.folder / "dist").iterdir()
    assert wheel.name == f"deltaw-1-py3-none-{tag}.whl"
    # The compiler of this test makes no objects; which there are, and nothing else, is as it should be.
    of_format = "is unknown, not", "does not export the kernels"
    faults = [fault for fault in faults_of(wheel) if not any(words in fault for words in of_format)]
    assert faults == ["the list of variants is missing"]  # as this test's own project says

    first = wheel.read_bytes()
    wheel.unlink()
    assert tree.build(None, "bdist_wheel", **when) == [] and wheel.read_bytes() == first


def test_a_target_that_is_none_and_a_variant_that_is_refused_make_no_wheel(tree):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        tree.build(None, "bdist_wheel", DELTAW_TARGET="windows-arm")
    assert "there is no such target, only linux-x86_64" in failed.value.stderr
    (tree.folder / "c++").write_text("#!/bin/sh\necho 'error: no such instruction' >&2; exit 1\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        tree.build(None, "bdist_wheel", DELTAW_TARGET="windows-x86_64")
    assert "for windows-x86_64: error: no such instruction" in failed.value.stderr
    assert not (tree.folder / "dist").exists()
