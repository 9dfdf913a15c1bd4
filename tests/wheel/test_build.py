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

ROOT = Path(__file__).parents[2]
COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec cat version
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
        (self.folder / "calls").write_text("")
        given = {**os.environ, "CXX": str(self.folder / "c++"), "DELTAW_VARIANTS": wanted or "", **environment}
        program = [sys.executable, "setup.py", "--quiet", *(command or ("build_ext", "--inplace"))]
        subprocess.run(program, cwd=self.folder, env=given, check=True)
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
