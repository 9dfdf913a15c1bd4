"""Compile the fake device into ``build/fake_cuda``. The result is reused until its sources or torch change."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "fake_cuda"


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
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    link = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC"]
    return [*compiler, *include, str(HERE / "device.cpp"), "-o", str(output), *link]
