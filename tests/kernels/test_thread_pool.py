"""Tests of the kernels' thread pool, used on Windows and macOS. The sources are recompiled for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from deltaw.kernels import loader, variants
from deltaw.kernels.linear import LinearProduct, linear
from tests.kernels import with_library

VARIANTS = "none"

ROOT = Path(__file__).parents[2]
SUITE = ("test_linear.py", "test_attention.py", "test_rows.py", "test_decode.py")

pytestmark = [pytest.mark.slow]
pytestmark += [pytest.mark.skipif(sys.platform != "linux", reason="on other systems all tests use the thread pool")]
pytestmark += [pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, because object files are written next to the sources."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "src/deltaw/kernels", tree / "src/deltaw/kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "setup.py", tree / "setup.py")
    settings = {"DELTAW_VARIANTS": "generic", "CXXFLAGS": "-O1 -DDW_OWN_THREADS"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "built"]
    subprocess.run(command, cwd=tree, env={**os.environ, **settings}, check=True)
    return tree / "built/deltaw/kernels" / variants.for_machine()[-1].file


def test_kernel_tests_pass(library: Path):
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "tests.kernels.with_library", *(folder / name for name in SUITE)]
    environment = {**os.environ, with_library.VARIABLE: str(library)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-3000:]


def test_python_threads_and_forked_process_have_thread_pools(library: Path):
    """The thread count of the process shows that the pools are used."""
    x = torch.randn(1500, 64, generator=torch.Generator().manual_seed(1))
    product = LinearProduct(x[:48])
    before = torch.get_num_threads()
    with loader.temporary_arithmetic():
        loader.activate(with_library.load_kernels(library))
        torch.set_num_threads(1)
        expected, _ = linear(x, product)
        initial_threads = len(os.listdir("/proc/self/task"))
        try:
            torch.set_num_threads(3)
            assert torch.equal(linear(x, product)[0], expected)
            assert len(os.listdir("/proc/self/task")) >= initial_threads + 2
            results: list[bool] = []
            callers = [
                threading.Thread(target=lambda: results.append(repeats_exactly(x, product, expected))) for _ in range(3)
            ]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            assert results == [True] * 3
            child = os.fork()
            if child == 0:  # torch's OpenMP library has no threads in a forked process
                same = linear(x, product)[0].numpy().tobytes() == expected.numpy().tobytes()
                os._exit(0 if same and len(os.listdir("/proc/self/task")) == 3 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert repeats_exactly(x, product, expected)
        finally:
            torch.set_num_threads(before)


def repeats_exactly(x: torch.Tensor, product: LinearProduct, expected: torch.Tensor) -> bool:
    torch.set_num_threads(3)  # applies to this thread only
    return all(torch.equal(linear(x, product)[0], expected) for _ in range(20))
