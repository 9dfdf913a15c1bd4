"""CPU name, feature flags and cache size. Imports neither torch nor other modules of deltaw."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

_ROOT = Path("/")
# sysctl names on macOS and the corresponding feature flags of /proc/cpuinfo on ARM.
_MAC_FLAGS = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
}
# Library that runs on any CPU and reads features with CPUID. Windows has no names for most of them.
_GENERIC_LIBRARY = Path(__file__).with_name("_native_generic.dll")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def processor_flags(root: Path = _ROOT) -> set[str]:
    """Return the feature flags of the first CPU in ``/proc/cpuinfo`` (``flags``, on ARM ``Features``).

    On ARM Macs the flags are translated from ``sysctl``. On Windows the generic kernels read them from the CPU. Empty
    on other systems.
    """
    if _is_mac(root):
        return {flag for name, flag in _MAC_FLAGS.items() if _sysctl(name) == "1"}
    if sys.platform == "win32" and root == _ROOT:
        return library_flags(_GENERIC_LIBRARY)
    return set(_cpuinfo_value(root, "flags", "Features").split())


def library_flags(file: Path) -> set[str]:
    """Return the x86 features that the CPU and the operating system support, as reported by the library ``file``.

    Empty if the library cannot be loaded.
    """
    buffer = ctypes.create_string_buffer(1024)
    try:
        read_flags = ctypes.CDLL(os.fspath(file)).dw_processor_flags
    except (OSError, AttributeError):
        return set()
    read_flags.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    read_flags(buffer, len(buffer) - 1)
    return set(buffer.value.decode("ascii").split())


def processor_name(root: Path = _ROOT) -> str:
    """Return the CPU's name and stepping, which identify a type of machine."""
    if _is_mac(root):
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    words = [_cpuinfo_value(root, key) for key in ("model name", "cpu family", "model", "stepping", "CPU part")]
    return " ".join(filter(None, words)) or platform.processor() or platform.machine()


def second_level_cache(root: Path = _ROOT) -> int | None:
    """Return the size of one core's second-level cache in bytes, or None if it is unknown."""
    if _is_mac(root):
        shared = _sysctl("hw.perflevel0.l2cachesize") or _sysctl("hw.l2cachesize")
        cores = _sysctl("hw.perflevel0.cpusperl2") or "1"
        return int(shared) // max(1, int(cores)) if shared.isdigit() and cores.isdigit() else None
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(index / "level") != "2" or _read(index / "type") not in ("Unified", "Data"):
            continue
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size"))
        if size and int(size[1]):
            return int(size[1]) * _UNITS[size[2]]
    return None


def _is_mac(root: Path) -> bool:
    """True on macOS, unless a test passes another root folder."""
    return sys.platform == "darwin" and root == _ROOT


@functools.cache
def _sysctl(name: str) -> str:
    """Return a value of macOS's kernel, or an empty string if it is missing."""
    command = ["sysctl", "-n", name]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()


def _cpuinfo_value(root: Path, *keys: str) -> str:
    """Return the first value in ``/proc/cpuinfo`` with one of these keys, or an empty string."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    """Return the stripped text of a file in /proc or /sys, or an empty string if it is missing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
