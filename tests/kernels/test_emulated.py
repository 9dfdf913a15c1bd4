"""C++ kernel tests of ARM variants, run in an emulator (``make kernels-arm``)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deltaw.kernels import variants

VARIANTS = "none"

ROOT = Path(__file__).parents[2]
TOOLS = ("make", "aarch64-linux-gnu-g++", "qemu-aarch64")
ARM = [v.name for v in variants.all_variants() if v.machine == "aarch64"]


def make_kernels_arm(variant: str, *settings: str) -> str:
    """Run ``make kernels-arm`` for one variant and return its output."""
    command = ["make", "kernels-arm", f"ARM_VARIANTS={variant}", f"PYTHON={sys.executable}", *settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("variant", ARM)
def test_arm_variant_passes_kernel_tests(variant):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    results = re.findall(r"(\d) threads?: (\d+) checks, (\d+) failed", make_kernels_arm(variant))
    assert [(int(threads), failed) for threads, _, failed in results] == [(1, "0"), (2, "0"), (3, "0")]
    assert all(int(checks) > 1000 for _, checks, _ in results)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_missing_emulator_is_reported_as_skipped():
    output = make_kernels_arm("neon", "ARM_CXX=true", "ARM_RUN=no-such-emulator -cpu max")
    assert "skipped: there is no no-such-emulator here" in output
