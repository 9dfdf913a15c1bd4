"""The compiled kernels: optional, one shared object for each instruction set, built by any C++17 compiler.

Everything else stands in pyproject.toml. The objects are plain C libraries that ctypes loads: they belong to
no version of Python or torch, so a wheel is tagged py3-none-<platform>. A variant that the compiler cannot
build is left out with a note; without a compiler deltaw runs on torch's own operations.

A wheel holds every variant. A build into the source tree (an editable install, ``build_ext --inplace``) makes
those that this machine chooses from. What is compiled stays in build/kernels/, and is compiled again only if
the compiler, its flags or a file that it read has changed.

Environment: CXX, CXXFLAGS, LDFLAGS, ARCHFLAGS as usual; DELTAW_VARIANTS="avx2 generic" builds these, ``all``
all, ``native`` those of this machine; DELTAW_EMULATED_TILES=1 builds amx for tests on processors without tiles.
DELTAW_TARGET=windows-x86_64 builds for another platform (TARGETS), if CXX is zig's compiler: ``make wheels``.
"""

from __future__ import annotations

import filecmp
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("src/deltaw/kernels")
SOURCES = KERNELS / "csrc"
# Only the C interface leaves an object: a template of the standard library that two variants have compiled
# with different instructions must never stand in for the other's.
EXPORTS = "{ global: dw_*; local: *; };\n"


def module_of_kernels(name: str):
    """A module of deltaw.kernels that imports nothing else of deltaw, read by its path: nothing is installed yet."""
    spec = importlib.util.spec_from_file_location(f"deltaw_{name}", KERNELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


VARIANTS, PROCESSOR = module_of_kernels("variants"), module_of_kernels("processor")


@dataclass(frozen=True)
class Target:
    """A platform that a wheel is built for on any machine: as zig names it, and as wheels do.

    The oldest glibc and macOS are those that torch's own wheels need.
    """

    zig: str
    tag: str
    system: str = "linux"  # as sys.platform
    ending: str = ".so"

    @property
    def machine(self) -> str:
        return self.zig.partition("-")[0]


TARGETS = {
    "linux-x86_64": Target("x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64"),
    "linux-aarch64": Target("aarch64-linux-gnu.2.28", "manylinux_2_28_aarch64"),
    "macos-aarch64": Target("aarch64-macos.11.0", "macosx_11_0_arm64", "darwin"),
    "windows-x86_64": Target("x86_64-windows-gnu", "win_amd64", "win32", ".dll"),
}
ASKED = os.environ.get("DELTAW_TARGET", "")
if ASKED and ASKED not in TARGETS:
    raise SystemExit(f"DELTAW_TARGET={ASKED}: there is no such target, only {', '.join(TARGETS)}")
TARGET = TARGETS.get(ASKED)
SYSTEM = TARGET.system if TARGET else sys.platform
BUILT = Path("build/kernels", ASKED)
if TARGET:
    VARIANTS.ENDING = TARGET.ending


def words_of(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def compiler() -> list[str] | None:
    """The C++ compiler's command; None where there is none."""
    for command in (words_of("CXX"), ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return [*command, "-target", TARGET.zig] if TARGET else command
    return None


class Refused(Exception):
    """A variant that the compiler does not build."""


class Compiler:
    """Runs the compiler where what it would make is not there yet: made by the same command from the same files."""

    def __init__(self, command: list[str], force: bool) -> None:
        self.command, self.force = command, force
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        self.version = said.stdout
        # As the files are at first: one that changes while it is compiled is compiled again next time.
        self.sources = {str(file): file.read_bytes() for file in SOURCES.iterdir()}

    def make(self, target: Path, arguments: list[str], inputs: Callable[[Path], list[str]]) -> Path:
        """The file ``target``; ``inputs`` names what is read for it, once it is made.

        Raises:
            Refused: the compiler does not make it.
        """
        if self.force or not self.has_made(target, arguments, inputs):
            target.parent.mkdir(parents=True, exist_ok=True)
            record_of(target).unlink(missing_ok=True)
            call([*self.command, *arguments, "-o", str(target)])
            record_of(target).write_text(self.digest(arguments, inputs(target)))
        return target

    def has_made(self, target: Path, arguments: list[str], inputs: Callable[[Path], list[str]]) -> bool:
        try:
            return target.exists() and record_of(target).read_text() == self.digest(arguments, inputs(target))
        except OSError:  # never made, or what was read for it is gone
            return False

    def digest(self, arguments: list[str], inputs: list[str]) -> str:
        found = hashlib.blake2b(repr([self.version, self.command, arguments, inputs]).encode())
        for file in inputs:
            found.update(self.sources.get(file) or Path(file).read_bytes())
        return found.hexdigest()


class BuildVariants(build_ext):
    """Compiles the same sources once for each variant, all of them on as many processors as there are."""

    every_variant = False  # unless DELTAW_VARIANTS says which

    def run(self) -> None:
        wanted = wanted_variants(self.every_variant)
        self.others = [ext for ext in self.extensions if ext.variant not in wanted]
        self.extensions = [ext for ext in self.extensions if ext.variant in wanted]
        if len(wanted) > 1 and not self.every_variant:
            for ext in self.extensions:
                if not ext.variant.rank:  # only compared with here; where it is a processor's best, it is optimized
                    ext.extra_compile_args.append("-O1")
        self.cxx: Compiler | None = None
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + VARIANTS.ENDING

    def build_extensions(self) -> None:
        command = compiler()
        if command is None and TARGET:
            raise SystemExit("no C++ compiler: CXX is to be zig's, as in `make wheels`")
        if command is None:
            self.warn("no C++ compiler: deltaw is installed without its compiled kernels")
            return
        self.cxx = Compiler(command, bool(self.force))
        workers = self.parallel if isinstance(self.parallel, int) and self.parallel > 1 else os.cpu_count()
        # The files that take longest come first, so that no processor is left waiting for one of them.
        sources = sorted(self.extensions[0].sources, key=lambda file: -os.path.getsize(file))
        failed: dict[str, str] = {}
        with ThreadPoolExecutor(workers) as pool:
            both = [(ext, file) for file in sources for ext in self.extensions]
            jobs = {(ext.name, file): pool.submit(self.compile, ext, file, failed) for ext, file in both}
            for ext in self.extensions:
                self.link(ext, [jobs[ext.name, file] for file in ext.sources])

    def compile(self, ext: Extension, source: str, failed: dict[str, str]) -> Path:
        if ext.name in failed:
            raise Refused(failed[ext.name])
        try:
            return self.cxx.make(*object_of(ext, source), files_read)
        except Refused as refusal:
            failed[ext.name] = str(refusal)
            raise

    def link(self, ext: Extension, jobs: list[Future[Path]]) -> None:
        """Make a variant of its objects, or say why it is left out."""
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            objects = [str(job.result()) for job in jobs]
            made = self.cxx.make(*library_of(ext), lambda _: objects)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, target)
            self.announce(f"kernels: built {ext.variant.name}", level=logging.INFO)
        except Refused as refusal:
            if TARGET:
                raise SystemExit(f"kernels: {ext.variant.name} for {ASKED}: {refusal}") from refusal
            self.warn(f"kernels: {ext.variant.name} is left out, since the compiler does not build it: {refusal}")
            target.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """Also removes what would be loaded though it was not made of these sources: variants that this build
        could not make, and those of an earlier one that have not stayed as they were."""
        super().copy_extensions_to_source()
        python = self.get_finalized_command("build_py")
        for ext in [*self.extensions, *self.others]:
            left, made = map(Path, self._get_inplace_equivalent(python, ext))
            if left.exists() and not (made.exists() if ext in self.extensions else self.is_current(ext, left)):
                left.unlink()

    def is_current(self, ext: Extension, left: Path) -> bool:
        """Whether an earlier build made this file of the sources that are here."""
        made, arguments = library_of(ext)
        objects = [object_of(ext, source) for source in ext.sources]
        return (
            self.cxx is not None
            and all(self.cxx.has_made(*built, files_read) for built in objects)
            and self.cxx.has_made(made, arguments, lambda _: [str(file) for file, _ in objects])
            and filecmp.cmp(made, left, shallow=False)
        )


def object_of(ext: Extension, source: str) -> tuple[Path, list[str]]:
    """Where a variant's object of a source lies, and what the compiler is told."""
    built = BUILT / Path(ext.variant.file).stem / (Path(source).stem + ".o")
    return built, [*ext.extra_compile_args, "-MMD", "-c", source]


def library_of(ext: Extension) -> tuple[Path, list[str]]:
    """Where a variant is linked, and what the compiler is told beside its objects."""
    folder = BUILT / Path(ext.variant.file).stem
    objects = [str(object_of(ext, source)[0]) for source in ext.sources]
    return folder / ext.variant.file, ["-shared", *objects, *link_flags()]


def link_flags() -> list[str]:
    own = [*words_of("ARCHFLAGS"), *words_of("LDFLAGS"), *(["-s"] if TARGET else [])]
    if SYSTEM == "win32" or (SYSTEM == "darwin" and TARGET):  # zig's linkers know what the sources mark
        return own
    if SYSTEM == "darwin":
        return ["-Wl,-exported_symbol,_dw_*", *own]
    exports = BUILT / "exports.map"
    if not exports.exists() or exports.read_text() != EXPORTS:
        exports.parent.mkdir(parents=True, exist_ok=True)
        exports.write_text(EXPORTS)
    return [f"-Wl,--version-script={exports}", "-Wl,--no-undefined", *own]


def record_of(made: Path) -> Path:
    """Where a digest of all that a file was made of is kept."""
    return made.with_name(made.name + ".made")


def files_read(built: Path) -> list[str]:
    """What the compiler read for an object, its own library's headers left out."""
    return built.with_suffix(".d").read_text().replace("\\\n", " ").partition(": ")[2].split()


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        raise Refused((errors or done.stderr.splitlines() or ["no reason given"])[0].strip())


class Wheel(bdist_wheel):
    """For one platform, and for every version of Python: the objects do not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", TARGET.tag if TARGET else super().get_tag()[2]

    def run(self) -> None:
        """It may be installed elsewhere, so it has what any processor needs."""
        BuildVariants.every_variant = True
        super().run()
        for *_, made in self.distribution.dist_files:
            built = ", ".join(variant.name for variant in wanted_variants(True))
            print(f"{made}: {os.path.getsize(made) / 1e6:.1f} MB with {built}")


def target_machine() -> str | None:
    """The type of processor that is compiled for, where that is not this machine's."""
    if TARGET:
        return TARGET.machine
    arch = words_of("ARCHFLAGS")
    return arch[arch.index("-arch") + 1] if "-arch" in arch else None


def variants_of_target() -> list:
    """All that can be compiled. No system but Linux is known to let a program use tiles."""
    return [v for v in VARIANTS.for_machine(target_machine()) if SYSTEM == "linux" or "amx_tile" not in v.needs]


def flags_of(variant) -> list[str]:
    """What a compiler is told of a variant; zig has a name of its own for ARM's second version."""
    if not TARGET:
        return list(variant.flags)
    return [flag.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a") for flag in variant.flags]


def wanted_variants(every: bool) -> list:
    """The variants that are built: those that DELTAW_VARIANTS names, else ``every`` one, else this machine's; and
    the one that DELTAW_KERNELS asks for."""
    of = VARIANTS.machine(target_machine())
    named = words_of("DELTAW_VARIANTS") or ["all" if every else "native"]
    named += [word.partition(":")[0] for word in words_of("DELTAW_KERNELS")]
    # What another machine's processor can run is not known here.
    if "all" in named or ("native" in named and of != VARIANTS.machine()):
        return variants_of_target()
    native = VARIANTS.worth_building(PROCESSOR.processor_flags()) if "native" in named else []
    return [v for v in variants_of_target() if v in native or v.name in named]


def extensions() -> list[Extension]:
    """All that can be compiled for the machine; the command chooses from them."""
    common = (SOURCES / "compile_flags.txt").read_text(encoding="utf-8").split()
    files = sorted(map(str, SOURCES.glob("*.cpp")))
    flags = ["-fPIC", *words_of("ARCHFLAGS"), *words_of("CXXFLAGS")]
    found = []
    for variant in variants_of_target():
        for version in dict.fromkeys([variant, variant.emulated()]):
            name = f"deltaw.kernels.{Path(version.file).stem}"
            ext = Extension(name, files, extra_compile_args=[*common, *flags_of(version), *flags], optional=True)
            ext.variant = version
            found.append(ext)
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildVariants, "bdist_wheel": Wheel},
    options={"build": {"build_base": f"build/wheels/{ASKED}"}} if TARGET else {},
)
