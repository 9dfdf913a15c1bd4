"""The variants of the compiled kernels: which there are, how each is compiled, and which a processor can run.

The list is ``csrc/variants.txt``. It is read by the loader, by ``setup.py``, and by the Makefile through
``python -m deltaw.kernels.variants``.

Knows names, flags, processors and what the user asks for; nothing of what is loaded. At the top it imports
nothing beyond Python's own library, since ``setup.py`` reads this file before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).parent
LIST = FOLDER / "csrc" / "variants.txt"
# What forces a variant, what switches all of them off, and how that is said.
VARIABLE, OFF, NONE = "DELTAW_KERNELS", "DELTAW_NATIVE", "none"
# What hands measured rates to the processes that a process starts; see deltaw.machine.kernel_choice.
MEASURED = "DELTAW_MEASURED"
# What leaves an approximation out if it is 0, for benchmarks; see APPROXIMATIONS in arithmetic.py.
LEFT_OUT_BY = {
    "int8_gradients": "DELTAW_ROUGH_GRADIENTS",
    "int8_logits": "DELTAW_ROUGH_LOGITS",
    "summed_classes": "DELTAW_ROUGH_HEAD",
}
# If it is 1, arrays stand for the tiles of AMX, so that the variant `amx` can be tested without them, slowly:
# it is built so, by another name, and any processor that has the rest runs it.
EMULATED_TILES = "DELTAW_EMULATED_TILES"
ANY = "auto"
# Of the files' names; setup.py sets the one of another system that it builds for.
ENDING = ".dll" if sys.platform == "win32" else ".so"
# How products can be computed: the instruction set's own product of the stored type; weights widened to fp32
# while they are laid out; tiles; torch's operators.
ARITHMETICS = ("dot", "wide", "tiles", "torch")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Variant:
    """One instruction set that the kernels are compiled for.

    Args:
        family: variants of one family include each other; the highest rank of a family is its best.
        machine: as :func:`machine` names it, or ``any``.
        needs: words that :func:`deltaw.kernels.processor.processor_flags` must contain.
        flags: the compiler's, beside those of ``compile_flags.txt``.
    """

    name: str
    family: str
    rank: int
    machine: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of its shared object, which belongs to no version of Python."""
        emulated = "_emulated" if "-DDW_AMX_EMULATED" in self.flags else ""
        return f"_native_{self.name}{emulated}{ENDING}"

    def emulated(self) -> Variant:
        """The same with arrays for tiles; any other variant as it is."""
        needs = tuple(word for word in self.needs if not word.startswith("amx_"))
        if needs == self.needs:
            return self
        flags = tuple(flag for flag in self.flags if not flag.startswith("-mamx-"))
        return replace(self, needs=needs, flags=(*flags, "-DDW_AMX_EMULATED"))

    def lacking(self, flags: Iterable[str], of_machine: str | None = None) -> list[str]:
        """What a processor with ``flags`` would need beside them; empty where it runs this variant."""
        of_machine = of_machine or machine()
        if self.machine not in ("any", of_machine):
            return [f"the machine type {self.machine} (this is {of_machine})"]
        return [word for word in self.needs if word not in set(flags)]


def machine(name: str | None = None) -> str:
    """The machine's type, by one name on every system: x86_64, aarch64, or what Python says."""
    name = (name or platform.machine()).lower()
    return _MACHINES.get(name, name)


def every_variant(file: Path = LIST) -> list[Variant]:
    """All variants in the order of the list.

    Raises:
        ValueError: a line of the list does not have its six columns.
    """
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        columns = [column.strip() for column in line.split("|")]
        if len(columns) != 6:
            raise ValueError(f"{file.name}: a variant has six columns, not {len(columns)}: {line}")
        name, family, rank, on, needs, flags = columns
        variant = Variant(name, family, int(rank), on, tuple(needs.split()), tuple(flags.split()))
        found.append(variant.emulated() if os.environ.get(EMULATED_TILES) == "1" else variant)
    return found


def for_machine(name: str | None = None) -> list[Variant]:
    """The variants that can be compiled for a type of machine, the best first, ``generic`` last."""
    of = machine(name)
    return sorted((v for v in every_variant() if v.machine in ("any", of)), key=lambda v: -v.rank)


def allowed(flags: Iterable[str], of_machine: str | None = None) -> list[Variant]:
    """The variants that a processor with ``flags`` can run, the best first."""
    has = set(flags)
    return [v for v in for_machine(of_machine) if not v.lacking(has, machine(of_machine))]


def best_of_families(of: Iterable[Variant]) -> list[Variant]:
    """Those that are worth measuring, of variants with the best first: each family's best, and ``generic``
    where there is no other."""
    best: dict[str, Variant] = {}
    for variant in of:
        best.setdefault(variant.family, variant)
    return [variant for variant in best.values() if variant.family != "generic"] or list(best.values())


def worth_building(flags: Iterable[str], of_machine: str | None = None) -> list[Variant]:
    """The variants that a processor with ``flags`` chooses from, and ``generic``, which still runs if the files
    come to another."""
    *others, generic = allowed(flags, of_machine)
    return list(dict.fromkeys([*best_of_families([*others, generic]), generic]))


@dataclass(frozen=True)
class Asked:
    """What the user forces: None where that is left to be measured.

    Args:
        kernels: the name of a variant, or ``none``.
        arithmetic: how products are to be computed; see :mod:`deltaw.kernels.arithmetic`.
        said: the variable and its value, as the user wrote them.
    """

    kernels: str | None = None
    arithmetic: str | None = None
    said: str = ""


def asked(environment: Mapping[str, str] | None = None) -> Asked:
    """What ``DELTAW_KERNELS`` and ``DELTAW_NATIVE`` say. Whether the processor can do it is not looked at.

    Raises:
        UserError: a name that is none, or the two contradict each other.
    """
    from deltaw.errors import UserError, did_you_mean

    environment = os.environ if environment is None else environment
    value, off = environment.get(VARIABLE, "").strip(), environment.get(OFF, "1").strip() == "0"
    if not value:
        return Asked(NONE, None, f"{OFF}=0") if off else Asked()
    said = f"{VARIABLE}={value}"
    name, _, arithmetic = value.partition(":")
    known, here = [v.name for v in every_variant()], [v.name for v in for_machine()]
    if name not in (*known, ANY, NONE, "torch"):
        raise UserError(f"there are no kernels '{name}'", where=said, hint=did_you_mean(name, [*here, NONE]))
    if arithmetic and arithmetic not in ARITHMETICS:
        what = f"there is no arithmetic '{arithmetic}'"
        raise UserError(what, where=said, hint=did_you_mean(arithmetic, ARITHMETICS))
    switched_off = name in (NONE, "torch")
    if switched_off and arithmetic not in ("", "torch"):
        hint = f"name a variant, such as {here[0]}:{arithmetic}, or leave ':{arithmetic}' out"
        raise UserError(f"without compiled kernels there is no arithmetic '{arithmetic}'", where=said, hint=hint)
    if off and not switched_off:
        hint = f"unset one of {VARIABLE} and {OFF}"
        raise UserError(f"{said} and {OFF}=0 contradict each other", where=VARIABLE, hint=hint)
    return Asked(NONE if switched_off else None if name == ANY else name, arithmetic or None, said)


def named(name: str, flags: Iterable[str], of_machine: str | None = None) -> Variant:
    """The variant ``name``, if a processor with ``flags`` runs it and it was built; a checkout builds it now.

    Raises:
        UserError: no such variant, or it cannot run here; the hint names those that can.
    """
    from deltaw.errors import UserError, did_you_mean

    flags = set(flags)
    if (found := next((v for v in every_variant() if v.name == name), None)) is None:
        hint = did_you_mean(name, [v.name for v in for_machine(of_machine)])
        raise UserError(f"there are no kernels '{name}'", where=VARIABLE, hint=hint)
    built = [v.name for v in allowed(flags, of_machine) if file_of(v).is_file()]
    hint = f"this machine runs {', '.join(built)}" if built else "no kernels that run on this machine were built"
    if lacking := found.lacking(flags, of_machine):
        what = f"kernels '{name}' need what this processor lacks: {', '.join(lacking)}"
        raise UserError(what, where=VARIABLE, hint=hint)
    if not file_of(found).is_file() and not _built_in_checkout(found):
        build = f"to build them: DELTAW_VARIANTS={name} pip install -e . in a checkout"
        raise UserError(f"kernels '{name}' were not built", where=VARIABLE, hint=f"{hint}; {build}")
    return found


def _built_in_checkout(variant: Variant) -> bool:
    """Whether a checkout could build a variant that it left out, since the machine would not choose it."""
    checkout = FOLDER.parent.parent.parent
    if not (checkout / "setup.py").is_file() or (checkout / "src/deltaw/kernels").resolve() != FOLDER.resolve():
        return False
    print(f"deltaw: compiling the kernels {variant.name}, which {VARIABLE} asks for", file=sys.stderr, flush=True)
    # The list of variants is read, not written: it is only there to be locked.
    with LIST.open(encoding="utf-8") as lock, contextlib.suppress(OSError):
        with contextlib.suppress(ImportError):  # Windows has no such lock
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        if not file_of(variant).is_file():
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            wanted = {**os.environ, VARIABLE: variant.name}
            subprocess.run(command, cwd=checkout, env=wanted, capture_output=True, check=False)
    return file_of(variant).is_file()


def is_left_in(approximation: str) -> bool:
    """Whether the environment lets a run use one of APPROXIMATIONS (``arithmetic.py``)."""
    return os.environ.get(LEFT_OUT_BY[approximation]) != "0"


def check_asked() -> None:
    """That the machine can do what the user forces.

    Raises:
        UserError: it cannot.
    """
    from deltaw.kernels.processor import processor_flags

    forced = asked().kernels
    if forced is not None and forced != NONE:
        named(forced, processor_flags())


def file_of(variant: Variant) -> Path:
    """Where a variant's shared object lies if it was built."""
    return FOLDER / variant.file


def main(arguments: list[str] | None = None) -> None:
    """For the Makefile: the best variant that this processor runs, each that it runs, all of a type of
    machine, or a variant's flags."""
    from deltaw.kernels.processor import processor_flags

    parser = argparse.ArgumentParser(prog="python -m deltaw.kernels.variants", description=main.__doc__)
    parser.add_argument("what", choices=["best", "allowed", "all", "flags"])
    parser.add_argument("name", nargs="?", choices=[v.name for v in every_variant()])
    parser.add_argument("--machine", help="for `all`: the type of machine; this one's by default")
    asked = parser.parse_args(arguments)
    if asked.what == "flags":
        if asked.name is None:
            parser.error("flags of which variant?")
        print(*next(v.flags for v in every_variant() if v.name == asked.name))
        return
    if asked.what == "all":
        print(*[v.name for v in for_machine(asked.machine)])
        return
    runs = allowed(processor_flags())
    print(*[v.name for v in (runs[:1] if asked.what == "best" else runs)])


if __name__ == "__main__":
    main()
