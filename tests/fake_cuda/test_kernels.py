"""Inductor compiles each row function to few GPU kernels, which other numbers of rows reuse."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.fake_cuda.launches import KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_row_functions_compile_to_few_kernels(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "tests.fake_cuda.compiled_rows", str(capability)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    for name, (first, second) in json.loads(process.stdout.splitlines()[-1]).items():
        assert 1 <= len(first) <= KERNELS[name.partition(":")[0]], (name, first)
        assert second == [], name
