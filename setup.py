"""The compiled kernels: optional, one shared object for each instruction set, built by any C++17 compiler.

Everything else stands in pyproject.toml. The objects are plain C libraries that ctypes loads: they belong to
no version of Python or torch, so a wheel is tagged py3-none-<platform>. A variant that the compiler cannot
build is left out with a note; without a compiler deltaw runs on torch's own operations.

A wheel holds every variant. A build into the source tree (an editable install, ``build_ext --inplace``) makes
those that this machine chooses from. What is compiled stays in build/kernels/, and is compiled again only if
the compiler, its flags or a file that it read has changed.

Environment: CXX, CXXFLAGS, LDFLAGS, ARCHFLAGS as usual; DELTAW_VARIANTS="avx2 generic" builds these, ``all``
all, ``native`` those of this machine; DELTAW_EMULATED_TILES=1 builds amx for tests on processors without tiles.
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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("src/deltaw/kernels")
SOURCES = KERNELS / "csrc"
BUILT = Path("build/kernels")
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


def words_of(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def compiler() -> list[str] | None:
    """The C++ compiler's command; None where there is none."""
    for command in (words_of("CXX"), ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
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
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        command = compiler()
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
    built = BUILT / ext.variant.file.removesuffix(".so") / (Path(source).stem + ".o")
    return built, [*ext.extra_compile_args, "-MMD", "-c", source]


def library_of(ext: Extension) -> tuple[Path, list[str]]:
    """Where a variant is linked, and what the compiler is told beside its objects."""
    folder = BUILT / ext.variant.file.removesuffix(".so")
    objects = [str(object_of(ext, source)[0]) for source in ext.sources]
    return folder / ext.variant.file, ["-shared", *objects, *link_flags()]


def link_flags() -> list[str]:
    own = [*words_of("ARCHFLAGS"), *words_of("LDFLAGS")]
    if sys.platform == "darwin":
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
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        """It may be installed elsewhere, so it has what any processor needs."""
        BuildVariants.every_variant = True
        super().run()


def target_machine() -> str | None:
    """The type of processor that a Mac compiles for, where that is not its own."""
    arch = words_of("ARCHFLAGS")
    return arch[arch.index("-arch") + 1] if "-arch" in arch else None


def wanted_variants(every: bool) -> list:
    """The variants that are built: those that DELTAW_VARIANTS names, else ``every`` one, else this machine's; and
    the one that DELTAW_KERNELS asks for."""
    of = VARIANTS.machine(target_machine())
    named = words_of("DELTAW_VARIANTS") or ["all" if every else "native"]
    named += [word.partition(":")[0] for word in words_of("DELTAW_KERNELS")]
    # What another machine's processor can run is not known here.
    if "all" in named or ("native" in named and of != VARIANTS.machine()):
        return VARIANTS.for_machine(of)
    native = VARIANTS.worth_building(PROCESSOR.processor_flags()) if "native" in named else []
    return [v for v in VARIANTS.for_machine(of) if v in native or v.name in named]


def extensions() -> list[Extension]:
    """All that can be compiled for the machine; the command chooses from them."""
    common = (SOURCES / "compile_flags.txt").read_text(encoding="utf-8").split()
    files = sorted(map(str, SOURCES.glob("*.cpp")))
    flags = ["-fPIC", *words_of("ARCHFLAGS"), *words_of("CXXFLAGS")]
    found = []
    for variant in VARIANTS.for_machine(target_machine()):
        for version in dict.fromkeys([variant, variant.emulated()]):
            name = f"deltaw.kernels.{Path(version.file).stem}"
            ext = Extension(name, files, extra_compile_args=[*common, *version.flags, *flags], optional=True)
            ext.variant = version
            found.append(ext)
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildVariants, "bdist_wheel": Wheel})
