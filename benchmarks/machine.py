"""Description of the machine that each benchmark prints with its results: processor, flags, threads and versions.

The description is necessary because the fastest arithmetic differs between processors by more than the compared
programs differ.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from deltaw.kernels.processor import processor_flags, processor_name
from deltaw.machine.choices import physical_cores, usable_processors

# CPU flags that affect the speed of matrix products, for x86 and then for ARM.
FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
# Environment variables that affect the instructions used.
VARIABLES = (
    "DELTAW_KERNELS",
    "DELTAW_NATIVE",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "OMP_NUM_THREADS",
)
PACKAGES = ("deltaw", "torch", "transformers", "peft", "trl")


def machine_lines(threads: int | None = None) -> list[str]:
    """Return the machine and the versions as lines."""
    import torch

    supported = processor_flags()
    flags = " ".join(flag for flag in FLAGS if flag in supported) or "flags unknown"
    cores = physical_cores(usable_processors(), Path("/"))
    count = torch.get_num_threads() if threads is None else threads
    lines = [
        f"processor: {processor_name()} ({platform.machine()}, {platform.system()}); {flags}; "
        f"{cores} core{'s' if cores != 1 else ''}, {count} thread{'s' if count != 1 else ''}",
        f"versions: Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
    ]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        lines.append(f"card: {torch.cuda.get_device_name(0)}, compute capability {major}.{minor}")
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return [*lines, f"environment: {' '.join(variables)}"] if variables else lines


def print_machine(threads: int | None = None) -> None:
    """Print an empty line and :func:`machine_lines`."""
    print("", *machine_lines(threads), sep="\n", flush=True)


def kernels_text() -> str:
    """Return the kernel variant in use and the loader's notes."""
    from deltaw.kernels import loader

    return "; ".join([f"kernels {loader.variant() or 'none'}", *loader.notes()])


def _version(package: str) -> str | None:
    if package == "deltaw":  # may be imported from sources without being installed
        from deltaw.version import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
