"""Tests of a wheel built from the sdist: it runs without a compiler, with each variant that the CPU supports."""

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
from tests.wheel.contents import wheel_errors

ROOT = Path(__file__).parents[2]
COMPILER = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")]
pytestmark += [pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree")]


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    arguments = [str(part) for part in command]
    full_environment = {**os.environ, **environment}
    process = subprocess.run(arguments, cwd=cwd, env=full_environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Build the sdist from a copy, since a build writes files next to its sources."""
    tree = tmp_path_factory.mktemp("tree") / "deltaw"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    output = tmp_path_factory.mktemp("sdist")
    program = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", program, output, cwd=tree)
    (file,) = output.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("wheel")
    # -O1 compiles faster, and speed is not measured here.
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", output, sdist, cwd=output, CXXFLAGS="-O1")
    (file,) = output.iterdir()
    return file


def test_sdist_contains_all_kernel_sources(sdist):
    with tarfile.open(sdist) as archive:
        packed = {Path(name).name for name in archive.getnames() if "/csrc/" in name}
    assert packed == {file.name for file in (ROOT / "src/deltaw/kernels/csrc").iterdir()}


def test_wheel_tag_names_one_platform_and_any_python(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.removesuffix(".whl").split("-")[2:5] == ["py3", "none", platform]
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        metadata = archive.read(next(file for file in files if file.endswith("/WHEEL"))).decode()
    assert f"Tag: py3-none-{platform}" in metadata and "Root-Is-Purelib: false" in metadata
    objects = {Path(file).name for file in files if file.endswith(".so")}
    assert objects == {variant.file for variant in variants.for_machine()}
    if sys.platform == "linux":  # a local build links the glibc of this machine
        assert [error for error in wheel_errors(wheel) if "needs glibc" not in error] == []


def test_wheel_runs_without_compiler(wheel, tmp_path):
    """In a virtual environment that uses this Python's torch, and deltaw only from the wheel."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    (site / "torch.pth").write_text(sysconfig.get_path("platlib") + "\n")
    (tmp_path / "bin").mkdir()
    clean = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": "", "DELTAW_KERNELS": "", "DELTAW_NATIVE": "1"}
    location = run(python, "-c", "import deltaw; print(deltaw.__file__)", cwd=tmp_path, **clean)
    assert Path(location.strip()).is_relative_to(site)
    output = run(python, ROOT / "tests/wheel/check.py", cwd=tmp_path, **clean)
    allowed = [variant.name for variant in variants.allowed(processor_flags())]
    assert list(dict.fromkeys(line.partition(":")[0] for line in output.splitlines())) == allowed


@pytest.fixture(scope="module")
def cross_compiler() -> list[str]:
    """Return the command of zig's C++ compiler, from this Python or from ``make wheels``."""
    for python in (sys.executable, str(ROOT / "build/zig/bin/python")):
        command = [python, "-m", "ziglang", "version"]
        if Path(python).exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return [python, "-m", "ziglang", "c++"]
    pytest.skip("ziglang is not installed (make wheels installs it)")


@pytest.mark.parametrize("target", ["linux-x86_64", "linux-aarch64", "windows-x86_64"])
def test_cross_compiled_wheel_contains_only_target_objects(sdist, cross_compiler, target, tmp_path):
    """Also checks the glibc version. Builds one variant, because all of them take minutes."""
    settings = {"DELTAW_TARGET": target, "DELTAW_VARIANTS": "generic", "CXXFLAGS": "-O1"}
    compiler = {"CXX": " ".join(cross_compiler), "ZIG_GLOBAL_CACHE_DIR": str(ROOT / "build/zig-cache")}
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    run(sys.executable, "setup.py", "--quiet", "bdist_wheel", cwd=tree, **settings, **compiler)
    (wheel,) = (tree / "dist").iterdir()
    assert wheel_errors(wheel, {"generic"}) == []
    missing = wheel_errors(wheel)
    assert len(missing) >= 3 and all(error.endswith(" is missing") for error in missing)
