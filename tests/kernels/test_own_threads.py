"""The kernels with threads of their own, as on Windows and macOS: the sources are compiled once more."""

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
from deltaw.kernels.linear import Product, linear
from tests.kernels import with_library

VARIANTS = "none"

ROOT = Path(__file__).parents[2]
SUITE = ("test_linear.py", "test_attention.py", "test_rows.py", "test_decode.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all tests run on such threads"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy, since what is compiled is kept beside the sources."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "src/deltaw/kernels", tree / "src/deltaw/kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "setup.py", tree / "setup.py")
    settings = {"DELTAW_VARIANTS": "generic", "CXXFLAGS": "-O1 -DDW_OWN_THREADS"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "built"]
    subprocess.run(command, cwd=tree, env={**os.environ, **settings}, check=True)
    return tree / "built/deltaw/kernels" / variants.for_machine()[-1].file


def test_the_kernels_tests_pass(library: Path):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "tests.kernels.with_library", *(here / name for name in SUITE)]
    given = {**os.environ, with_library.VARIABLE: str(library)}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


def test_threads_of_python_and_a_child_process_have_teams(library: Path):
    """As many threads as torch has; without them there would be no more threads of the process than before."""
    x = torch.randn(1500, 64, generator=torch.Generator().manual_seed(1))
    of, before = Product(x[:48]), torch.get_num_threads()
    with loader.computing():
        loader.adopt(with_library.opened(library))
        torch.set_num_threads(1)
        expected, _ = linear(x, of)
        alone = len(os.listdir("/proc/self/task"))
        try:
            torch.set_num_threads(3)
            assert torch.equal(linear(x, of)[0], expected)
            assert len(os.listdir("/proc/self/task")) >= alone + 2
            found: list[bool] = []
            callers = [threading.Thread(target=lambda: found.append(same_often(x, of, expected))) for _ in range(3)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            assert found == [True] * 3
            child = os.fork()
            if child == 0:  # torch's own library has no threads there that it could wait for
                same = linear(x, of)[0].numpy().tobytes() == expected.numpy().tobytes()
                os._exit(0 if same and len(os.listdir("/proc/self/task")) == 3 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert same_often(x, of, expected)
        finally:
            torch.set_num_threads(before)


def same_often(x: torch.Tensor, of: Product, expected: torch.Tensor) -> bool:
    torch.set_num_threads(3)  # of this thread
    return all(torch.equal(linear(x, of)[0], expected) for _ in range(20))
