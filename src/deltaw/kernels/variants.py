"""Variants of the compiled kernels: one per instruction set, with compiler flags and CPU requirements.

The list is ``csrc/variants.txt``. The loader, ``setup.py`` and the Makefile (``python -m deltaw.kernels.variants``)
read it. ``setup.py`` loads this module before deltaw is installed, so module-level imports are limited to the standard
library.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).parent
LIST = FOLDER / "csrc" / "variants.txt"
# Environment variables that force a variant and disable all of them, and the name for no compiled kernels.
VARIABLE = "DELTAW_KERNELS"
OFF = "DELTAW_NATIVE"
NONE = "none"
# Environment variable that passes measured rates to child processes; see deltaw.machine.kernel_choice.
MEASURED = "DELTAW_MEASURED"
# Environment variables that disable an approximation if they are 0, for benchmarks. See arithmetic.py.
APPROXIMATION_SWITCHES = {
    "int8_gradients": "DELTAW_ROUGH_GRADIENTS",
    "int8_logits": "DELTAW_ROUGH_LOGITS",
    "summed_classes": "DELTAW_ROUGH_HEAD",
}
# If this variable is 1, the variant `amx` is built under another name with arrays in place of AMX tiles. It is
# slow, and lets tests run it on CPUs without AMX.
EMULATED_TILES = "DELTAW_EMULATED_TILES"
ANY = "auto"
# File name suffix of the libraries. setup.py changes it when it cross-compiles.
LIBRARY_SUFFIX = ".dll" if sys.platform == "win32" else ".so"
# Arithmetics of matrix products: dot product instructions of the stored type, weights widened to fp32, AMX tiles, and
# torch's operators. See arithmetic.py.
ARITHMETICS = ("dot", "wide", "tiles", "torch")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Variant:
    """Kernels compiled for one instruction set.

    Attributes:
        name: Name of the variant.
        family: Variants of one family include each other. The highest rank of a family is its best.
        rank: Preference without measurements. Higher is better.
        machine: Machine type as returned by :func:`machine`, or ``any``.
        needs: Flags that :func:`deltaw.kernels.processor.processor_flags` must contain.
        flags: Compiler flags in addition to ``compile_flags.txt``.
    """

    name: str
    family: str
    rank: int
    machine: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def file(self) -> str:
        """File name of the shared library. It is independent of the Python version."""
        emulated = "_emulated" if "-DDW_AMX_EMULATED" in self.flags else ""
        return f"_native_{self.name}{emulated}{LIBRARY_SUFFIX}"

    def emulated(self) -> Variant:
        """Return a variant that emulates AMX tiles with arrays. Variants without tiles are returned unchanged."""
        needs = tuple(word for word in self.needs if not word.startswith("amx_"))
        if needs == self.needs:
            return self
        flags = tuple(flag for flag in self.flags if not flag.startswith("-mamx-"))
        return replace(self, needs=needs, flags=(*flags, "-DDW_AMX_EMULATED"))

    def lacking(self, flags: Iterable[str], machine_type: str | None = None) -> list[str]:
        """Return the requirements that a CPU with ``flags`` does not meet. Empty if it can run this variant."""
        machine_type = machine_type or machine()
        if self.machine not in ("any", machine_type):
            return [f"the machine type {self.machine} (this is {machine_type})"]
        return [word for word in self.needs if word not in set(flags)]


def source_digest() -> str | None:
    """Return a digest of the kernels' sources, or None in an installation without sources."""
    files = sorted(file for file in LIST.parent.iterdir() if file.suffix in (".cpp", ".h", ".txt"))
    if not any(file.suffix == ".cpp" for file in files):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def machine(name: str | None = None) -> str:
    """Return the machine type under one name on every system: x86_64, aarch64, or Python's name."""
    name = (name or platform.machine()).lower()
    return _MACHINES.get(name, name)


def all_variants(file: Path = LIST) -> list[Variant]:
    """Return all variants in the order of the list.

    Raises:
        ValueError: if a line of the list does not have six columns.
    """
    variants = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        columns = [column.strip() for column in line.split("|")]
        if len(columns) != 6:
            raise ValueError(f"{file.name}: a variant has six columns, not {len(columns)}: {line}")
        name, family, rank, machine_type, needs, flags = columns
        variant = Variant(name, family, int(rank), machine_type, tuple(needs.split()), tuple(flags.split()))
        variants.append(variant.emulated() if os.environ.get(EMULATED_TILES) == "1" else variant)
    return variants


def for_machine(name: str | None = None) -> list[Variant]:
    """Return the variants that can be compiled for a machine type, best first, ``generic`` last."""
    machine_type = machine(name)
    return sorted((v for v in all_variants() if v.machine in ("any", machine_type)), key=lambda v: -v.rank)


def allowed(flags: Iterable[str], machine_type: str | None = None) -> list[Variant]:
    """Return the variants that a CPU with ``flags`` can run, best first."""
    available = set(flags)
    return [v for v in for_machine(machine_type) if not v.lacking(available, machine(machine_type))]


def best_of_each_family(variants: Iterable[Variant]) -> list[Variant]:
    """Return the variants that are worth measuring: the best of each family, or ``generic`` if it is the only one.

    Args:
        variants: Variants, best first.
    """
    best: dict[str, Variant] = {}
    for variant in variants:
        best.setdefault(variant.family, variant)
    return [variant for variant in best.values() if variant.family != "generic"] or list(best.values())


def variants_to_build(flags: Iterable[str], machine_type: str | None = None) -> list[Variant]:
    """Return the variants that a CPU with ``flags`` chooses from, plus ``generic``.

    ``generic`` still runs if the files are moved to another machine.
    """
    *others, generic = allowed(flags, machine_type)
    return list(dict.fromkeys([*best_of_each_family([*others, generic]), generic]))


@dataclass(frozen=True)
class KernelOverrides:
    """Kernels and arithmetic forced by the user. None leaves a choice to measurement.

    Attributes:
        kernels: Name of a variant, or ``none``.
        arithmetic: Arithmetic of products; see :mod:`deltaw.kernels.arithmetic`.
        source: The environment variable with its value.
    """

    kernels: str | None = None
    arithmetic: str | None = None
    source: str = ""


def kernel_overrides(environment: Mapping[str, str] | None = None) -> KernelOverrides:
    """Parse the environment variables ``DELTAW_KERNELS`` and ``DELTAW_NATIVE``.

    The CPU's support is not checked; see :func:`check_overrides`.

    Raises:
        UserError: if a name is unknown or the variables contradict each other.
    """
    from deltaw.errors import UserError, did_you_mean

    environment = os.environ if environment is None else environment
    value = environment.get(VARIABLE, "").strip()
    is_disabled = environment.get(OFF, "1").strip() == "0"
    if not value:
        return KernelOverrides(NONE, None, f"{OFF}=0") if is_disabled else KernelOverrides()
    source = f"{VARIABLE}={value}"
    name, _, arithmetic = value.partition(":")
    names = [v.name for v in all_variants()]
    runnable = [v.name for v in for_machine()]
    if name not in (*names, ANY, NONE, "torch"):
        raise UserError(f"unknown kernels '{name}'", location=source, hint=did_you_mean(name, [*runnable, NONE]))
    if arithmetic and arithmetic not in ARITHMETICS:
        message = f"unknown arithmetic '{arithmetic}'"
        raise UserError(message, location=source, hint=did_you_mean(arithmetic, ARITHMETICS))
    switched_off = name in (NONE, "torch")
    if switched_off and arithmetic not in ("", "torch"):
        hint = f"name a variant, such as {runnable[0]}:{arithmetic}, or remove ':{arithmetic}'"
        raise UserError(f"arithmetic '{arithmetic}' requires compiled kernels", location=source, hint=hint)
    if is_disabled and not switched_off:
        hint = f"unset one of {VARIABLE} and {OFF}"
        raise UserError(f"{source} and {OFF}=0 contradict each other", location=VARIABLE, hint=hint)
    return KernelOverrides(NONE if switched_off else None if name == ANY else name, arithmetic or None, source)


def require_variant(name: str, flags: Iterable[str], machine_type: str | None = None) -> Variant:
    """Return the variant ``name`` if it was built and a CPU with ``flags`` can run it. A source checkout builds it now.

    Raises:
        UserError: if the variant is unknown or cannot run here. The hint lists variants that can.
    """
    from deltaw.errors import UserError, did_you_mean

    flags = set(flags)
    if (variant := next((v for v in all_variants() if v.name == name), None)) is None:
        hint = did_you_mean(name, [v.name for v in for_machine(machine_type)])
        raise UserError(f"unknown kernels '{name}'", location=VARIABLE, hint=hint)
    available = [v.name for v in allowed(flags, machine_type) if file_of(v).is_file()]
    hint = f"this machine runs {', '.join(available)}" if available else "no kernels for this machine were built"
    if missing := variant.lacking(flags, machine_type):
        message = f"kernels '{name}' need CPU features that are missing here: {', '.join(missing)}"
        raise UserError(message, location=VARIABLE, hint=hint)
    if not file_of(variant).is_file() and not _build_in_checkout(variant):
        build = f"to build them: DELTAW_VARIANTS={name} pip install -e . in a checkout"
        raise UserError(f"kernels '{name}' were not built", location=VARIABLE, hint=f"{hint}; {build}")
    return variant


def _build_in_checkout(variant: Variant) -> bool:
    """Build a variant that this checkout has not built. Returns True if its library exists afterwards."""
    checkout = FOLDER.parent.parent.parent
    if not (checkout / "setup.py").is_file() or (checkout / "src/deltaw/kernels").resolve() != FOLDER.resolve():
        return False
    print(f"deltaw: compiling the kernels {variant.name} for {VARIABLE}", file=sys.stderr, flush=True)
    # The list of variants serves as the lock file.
    with LIST.open(encoding="utf-8") as lock, contextlib.suppress(OSError):
        with contextlib.suppress(ImportError):  # fcntl is not available on Windows
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        if not file_of(variant).is_file():
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            environment = {**os.environ, VARIABLE: variant.name}
            subprocess.run(command, cwd=checkout, env=environment, capture_output=True, check=False)
    return file_of(variant).is_file()


def is_approximation_enabled(approximation: str) -> bool:
    """True unless the environment disables an approximation (a name from APPROXIMATIONS in ``arithmetic.py``)."""
    return os.environ.get(APPROXIMATION_SWITCHES[approximation]) != "0"


def check_overrides() -> None:
    """Check that this machine can run the kernels forced by the user.

    Raises:
        UserError: if it cannot.
    """
    from deltaw.kernels.processor import processor_flags

    forced = kernel_overrides().kernels
    if forced is not None and forced != NONE:
        require_variant(forced, processor_flags())


def file_of(variant: Variant) -> Path:
    """Return the path of a variant's shared library. It exists only if the variant was built."""
    return FOLDER / variant.file


def main(arguments: list[str] | None = None) -> None:
    """Print the best variant for this CPU, all that it can run, all of a machine type, or the flags of a variant."""
    from deltaw.kernels.processor import processor_flags

    parser = argparse.ArgumentParser(prog="python -m deltaw.kernels.variants", description=main.__doc__)
    parser.add_argument("query", choices=["best", "allowed", "all", "flags"])
    parser.add_argument("name", nargs="?", choices=[v.name for v in all_variants()])
    parser.add_argument("--machine", help="machine type for `all` (default: this machine)")
    options = parser.parse_args(arguments)
    if options.query == "flags":
        if options.name is None:
            parser.error("flags needs the name of a variant")
        print(*next(v.flags for v in all_variants() if v.name == options.name))
        return
    if options.query == "all":
        print(*[v.name for v in for_machine(options.machine)])
        return
    runnable = allowed(processor_flags())
    print(*[v.name for v in (runnable[:1] if options.query == "best" else runnable)])


if __name__ == "__main__":
    main()
