"""`deltaw doctor --self-test`: check this installation against references and stored values, and report the result.

It needs no network and takes about a minute. The report is text that can be pasted into an issue.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from deltaw.kernels import loader
from deltaw.kernels.processor import processor_flags, processor_name
from deltaw.machine import container_limits
from deltaw.machine.choices import physical_cores, usable_processors
from deltaw.progress import LogFunction, ignore_line
from deltaw.selftest.check import Check
from deltaw.selftest.kernel_checks import check_builds, check_results, check_threads
from deltaw.selftest.training_checks import check_training
from deltaw.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
# Features of processors that affect the results of kernels.
_FEATURES = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "i8mm",
    "bf16",
    "sve",
)


@dataclass(frozen=True)
class SelfTest:
    """Result of a self-test.

    Attributes:
        checks: Checks in order.
        machine: Lines that describe the machine.
        seconds: Duration.
    """

    checks: list[Check] = field(default_factory=list)
    machine: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(check.problem is None for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        entries = [{"name": c.name, "passed": c.problem is None, "what": c.problem or c.note} for c in self.checks]
        return {"passed": self.passed, "checks": entries, "machine": self.machine, "seconds": self.seconds}

    def as_text(self) -> str:
        """Return the report."""
        lines = [f"{'ok  ' if c.problem is None else 'FAIL'}  {c.name}: {c.problem or c.note}" for c in self.checks]
        verdict = "PASS" if self.passed else "FAIL: " + ", ".join(c.name for c in self.checks if c.problem is not None)
        return "\n".join([*lines, "", *self.machine, f"duration: {self.seconds:.0f} s", verdict])


def run_self_test(log: LogFunction = ignore_line) -> SelfTest:
    """Run all checks.

    Args:
        log: Receives progress lines.
    """
    start = time.monotonic()
    checks: list[Check] = []

    def add(name: str, results: Callable[[], Iterable[Check]]) -> None:
        log(name)
        try:
            checks.extend(results())
        except Exception as error:  # a failing part must not hide the others
            checks.append(Check(name, f"{type(error).__name__}: {error}"))

    threads = expected_threads()
    add("builds of the kernels", check_builds)
    add("threads", lambda: check_threads(threads))
    add("results of the kernels", lambda: check_results(threads))
    with tempfile.TemporaryDirectory(prefix="deltaw-self-test-") as folder:
        add("training", lambda: check_training(Path(folder), log))
    return SelfTest(checks, machine_lines(threads), time.monotonic() - start)


def expected_threads(root: Path = Path("/")) -> int:
    """Return the number of threads that runs use by default on this machine: its cores, up to its CPU quota."""
    cores = physical_cores(usable_processors(), root)
    quota = container_limits.processor_quota(root)
    return cores if quota is None else min(cores, max(1, int(quota)))


def machine_lines(threads: int) -> list[str]:
    """Return lines with processor, system, kernels and versions."""
    supported = processor_flags()
    features = " ".join(name for name in _FEATURES if name in supported) or "features unknown"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return [
        f"processor: {processor_name()} ({features}), {threads} threads",
        f"system: {platform.system()} {platform.release()} {platform.machine()}",
        f"kernels: {loader.variant() or 'none'}{''.join(f'; {note}' for note in loader.notes())}",
        f"versions: deltaw {__version__}, Python {platform.python_version()}, {versions}",
        f"torch: {torch.__config__.show().splitlines()[1].strip(' -')}",
    ]
