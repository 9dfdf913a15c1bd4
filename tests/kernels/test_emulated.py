"""The kernels of processors that are not at hand: their tests in C++ under an emulator (``kernels-arm``)."""

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
ARM = [v.name for v in variants.every_variant() if v.machine == "aarch64"]


def made(variant: str, *settings: str) -> str:
    """What ``make kernels-arm`` of one variant prints."""
    command = ["make", "kernels-arm", f"ARM_VARIANTS={variant}", f"PYTHON={sys.executable}", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("variant", ARM)
def test_a_variant_for_arm_passes_the_kernels_tests(variant):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"there is no {missing[0]} here")
    found = re.findall(r"(\d) threads?: (\d+) checks, (\d+) failed", made(variant))
    assert [(int(threads), failed) for threads, _, failed in found] == [(1, "0"), (2, "0"), (3, "0")]
    assert all(int(checks) > 1000 for _, checks, _ in found)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_without_an_emulator_the_tests_for_arm_say_that_they_are_skipped():
    printed = made("neon", "ARM_CXX=true", "ARM_RUN=no-such-emulator -cpu max")
    assert "skipped: there is no no-such-emulator here" in printed
