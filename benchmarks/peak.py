"""Peak rates of the processor, measured with register-only loops in C (``peak.c``) that are compiled at run time."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deltaw.kernels.processor import processor_flags

# By number type, fastest first: CPU flag, loop function, operations of an iteration with twelve instructions.
LOOPS = {
    "int8": [
        ("avx512_vnni", "int8_vnni512", 12 * 128),
        ("avx_vnni", "int8_vnni256", 12 * 64),
        ("avx2", "int8_pairs256", 12 * 64),
        ("i8mm", "int8_smmla", 12 * 64),
        ("asimddp", "int8_sdot", 12 * 32),
    ],
    "bf16": [("avx512_bf16", "bf16_dot512", 12 * 64), ("bf16", "bf16_bfmmla", 12 * 32)],
    "fp32": [("avx512f", "fp32_fma512", 12 * 32), ("fma", "fp32_fma256", 12 * 16), ("asimd", "fp32_fmla", 12 * 8)],
}
# Units without a loop. If the processor has one, the peak of the type is unknown.
TILES = {"int8": "amx_int8", "bf16": "amx_bf16"}
SECONDS = 0.15


@dataclass(frozen=True)
class Peak:
    """Operations per second of all threads, 0 if unknown, and the source of the value."""

    rate: float
    why: str


def peaks(threads: int) -> dict[str, Peak]:
    """Return the processor's peak for each number type."""
    flags = processor_flags()
    compiler = shutil.which("cc")
    if compiler is None:
        return {kind: Peak(0.0, "not measured, no C compiler") for kind in LOOPS}
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.c")
        process = subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(built)], capture_output=True, text=True
        )
        if process.returncode:
            why = f"peak.c does not compile: {process.stderr.strip().splitlines()[-1][:100]}"
            return {kind: Peak(0.0, why) for kind in LOOPS}
        library = ctypes.CDLL(str(built))
        return {kind: _peak(kind, library, flags, threads) for kind in LOOPS}


def _peak(kind: str, library: ctypes.CDLL, flags: set[str], threads: int) -> Peak:
    if TILES.get(kind) in flags:
        return Peak(0.0, f"the processor has {TILES[kind]}, which is not measured")
    for flag, name, operations in LOOPS[kind]:
        if flag in flags:
            function = getattr(library, name)
            function.argtypes = [ctypes.c_int64]
            rate = max(_rate(function, operations, threads) for _ in range(3))
            return Peak(rate, f"register-only loop {name}")
    return Peak(0.0, "the processor has no such instruction")


def _rate(function: ctypes._CFuncPtr, operations: int, threads: int) -> float:
    """Return the operations per second with a loop on each thread."""
    loops = 100_000
    start = time.perf_counter()
    function(loops)
    loops = max(loops, int(loops * SECONDS / max(1e-6, time.perf_counter() - start)))
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(function, [loops] * threads))
        return threads * loops * operations / (time.perf_counter() - start)
