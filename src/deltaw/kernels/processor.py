"""What the processor says of itself. Imports neither torch nor anything of deltaw."""

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
# The words of an ARM processor in /proc/cpuinfo, by the names that macOS has for the same.
_MAC_FLAGS = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
}
# The kernels that any processor runs, which ask it by instructions: Windows has no words for most of its features.
_ASKING = Path(__file__).with_name("_native_generic.dll")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def processor_flags(root: Path = _ROOT) -> set[str]:
    """The feature words of the first processor in ``/proc/cpuinfo`` (``flags``, on ARM ``Features``).

    On a Mac with an ARM processor the same words, translated from what ``sysctl`` says; on Windows those that the
    generic kernels find. Empty elsewhere.
    """
    if _is_mac(root):
        return {flag for name, flag in _MAC_FLAGS.items() if _sysctl(name) == "1"}
    if sys.platform == "win32" and root == _ROOT:
        return words_of_library(_ASKING)
    return set(_first(root, "flags", "Features").split())


def words_of_library(file: Path) -> set[str]:
    """What the kernels in ``file`` find that an x86 processor and the system offer; empty if they cannot be loaded."""
    found = ctypes.create_string_buffer(1024)
    try:
        ask = ctypes.CDLL(os.fspath(file)).dw_processor_words
    except (OSError, AttributeError):
        return set()
    ask.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    ask(found, len(found) - 1)
    return set(found.value.decode("ascii").split())


def processor_name(root: Path = _ROOT) -> str:
    """The processor's name and stepping, for telling one kind of machine from another."""
    if _is_mac(root):
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    words = [_first(root, key) for key in ("model name", "cpu family", "model", "stepping", "CPU part")]
    return " ".join(filter(None, words)) or platform.processor() or platform.machine()


def second_level_cache(root: Path = _ROOT) -> int | None:
    """Bytes of the second-level cache that one core computes from; None where the system does not say."""
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
    """Whether the machine at hand is a Mac, and not one that a test describes in a folder."""
    return sys.platform == "darwin" and root == _ROOT


@functools.cache
def _sysctl(name: str) -> str:
    """A value of macOS's kernel; empty where there is none."""
    command = ["sysctl", "-n", name]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()


def _first(root: Path, *keys: str) -> str:
    """The value of the first line of ``/proc/cpuinfo`` with one of these keys; empty where there is none."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    """A small kernel file's text; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
