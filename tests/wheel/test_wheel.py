"""A wheel built from the sdist runs where there is no compiler, with each variant that the processor
allows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from deltaw.kernels import variants
from deltaw.kernels.processor import processor_flags
from tests.wheel.contents import faults_of

ROOT = Path(__file__).parents[2]
COMPILER = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree"),
]


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    words, given = [str(part) for part in command], {**os.environ, **environment}
    done = subprocess.run(words, cwd=cwd, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Made of a copy, since a build leaves files beside its sources."""
    tree = tmp_path_factory.mktemp("tree") / "deltaw"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    made = tmp_path_factory.mktemp("sdist")
    program = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", program, made, cwd=tree)
    (file,) = made.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("wheel")
    # Sources as any compiler must take them; what it makes need not be fast here.
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", made, sdist, cwd=made, CXXFLAGS="-O1")
    (file,) = made.iterdir()
    return file


def test_an_sdist_holds_all_that_is_compiled(sdist):
    with tarfile.open(sdist) as archive:
        held = {Path(name).name for name in archive.getnames() if "/csrc/" in name}
    assert held == {file.name for file in (ROOT / "src/deltaw/kernels/csrc").iterdir()}


def test_a_wheel_is_for_one_platform_and_every_python(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.removesuffix(".whl").split("-")[2:5] == ["py3", "none", platform]
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        described = archive.read(next(file for file in files if file.endswith("/WHEEL"))).decode()
    assert f"Tag: py3-none-{platform}" in described and "Root-Is-Purelib: false" in described
    objects = {Path(file).name for file in files if file.endswith(".so")}
    assert objects == {variant.file for variant in variants.for_machine()}
    if sys.platform == "linux":  # glibc is the machine's own here
        assert [fault for fault in faults_of(wheel) if "needs glibc" not in fault] == []


def test_a_wheel_runs_without_a_compiler(wheel, tmp_path):
    """In a Python of its own, which finds torch where this one has it, and deltaw in the wheel alone."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    (site / "torch.pth").write_text(sysconfig.get_path("platlib") + "\n")
    (tmp_path / "bin").mkdir()
    clean = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": "", "DELTAW_KERNELS": "", "DELTAW_NATIVE": "1"}
    where = run(python, "-c", "import deltaw; print(deltaw.__file__)", cwd=tmp_path, **clean)
    assert Path(where.strip()).is_relative_to(site)
    said = run(python, ROOT / "tests/wheel/check.py", cwd=tmp_path, **clean)
    allowed = [variant.name for variant in variants.allowed(processor_flags())]
    assert list(dict.fromkeys(line.partition(":")[0] for line in said.splitlines())) == allowed


@pytest.fixture(scope="module")
def cross_compiler() -> list[str]:
    """zig's, of this Python or of an earlier ``make wheels``."""
    for python in (sys.executable, str(ROOT / "build/zig/bin/python")):
        asked = [python, "-m", "ziglang", "version"]
        if Path(python).exists() and subprocess.run(asked, capture_output=True, check=False).returncode == 0:
            return [python, "-m", "ziglang", "c++"]
    pytest.skip("there is no ziglang here (make wheels installs it)")


@pytest.mark.parametrize("target", ["linux-x86_64", "linux-aarch64", "windows-x86_64"])
def test_a_wheel_of_the_cross_compiler_holds_objects_of_its_platform(sdist, cross_compiler, target, tmp_path):
    """That need no newer glibc than its tag says. One variant stands for all, which take minutes."""
    settings = {"DELTAW_TARGET": target, "DELTAW_VARIANTS": "generic", "CXXFLAGS": "-O1"}
    compiler = {"CXX": " ".join(cross_compiler), "ZIG_GLOBAL_CACHE_DIR": str(ROOT / "build/zig-cache")}
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    run(sys.executable, "setup.py", "--quiet", "bdist_wheel", cwd=tree, **settings, **compiler)
    (wheel,) = (tree / "dist").iterdir()
    assert faults_of(wheel, {"generic"}) == []
    missing = faults_of(wheel)
    assert len(missing) >= 3 and all(fault.endswith(" is missing") for fault in missing)
