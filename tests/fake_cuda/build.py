"""Compile the fake device into ``build/fake_cuda``. The result is reused until its sources or torch change."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import runpy
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "fake_cuda"


def torch_folder() -> Path:
    """Return the folder of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def is_cpu_build() -> bool:
    """Return True if the installed torch was built without CUDA, as the fake device requires."""
    return runpy.run_path(str(torch_folder() / "version.py"))["cuda"] is None


def build_device() -> Path:
    """Return the path of the compiled library. Torch is not imported."""
    sources = sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    for path in sources:
        digest.update(path.read_bytes())
    library = BUILD / f"device-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run(_command(partial), check=True)
        partial.replace(library)
    return library


def _command(output: Path) -> list[str]:
    torch = torch_folder()
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    link = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC"]
    return [*compiler, *include, str(HERE / "device.cpp"), "-o", str(output), *link]
