"""Build of the compiled kernels: one optional shared library per instruction set, with any C++17 compiler.

All other metadata is in pyproject.toml. The libraries are plain C libraries loaded with ctypes and do not depend on the
versions of Python or torch, so a wheel is tagged py3-none-<platform>. A variant that the compiler cannot build is
skipped with a warning. Without a compiler deltaw uses torch's operators.

A wheel contains every variant. A build into the source tree (an editable install, ``build_ext --inplace``) builds the
variants that this machine chooses from. Build results are cached in build/kernels/ and rebuilt only if the compiler,
its flags or an input file changed.

Environment: CXX, CXXFLAGS, LDFLAGS and ARCHFLAGS as usual. DELTAW_VARIANTS="avx2 generic" builds these variants,
``all``
all, ``native`` those for this machine. DELTAW_EMULATED_TILES=1 builds amx for tests on CPUs without tiles.
DELTAW_TARGET=windows-x86_64 builds for another platform (TARGETS) if CXX is zig's compiler; see ``make wheels``.
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
# Libraries export only the C interface. Otherwise the dynamic linker could replace a standard library template in one
# variant by that of another variant, compiled for another instruction set.
EXPORTS = "{ global: dw_*; local: *; };\n"


def load_kernels_module(name: str):
    """Load a module of deltaw.kernels from its path, because deltaw is not installed yet. It must not import from
    deltaw.
    """
    spec = importlib.util.spec_from_file_location(f"deltaw_{name}", KERNELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


VARIANTS, PROCESSOR = load_kernels_module("variants"), load_kernels_module("processor")


@dataclass(frozen=True)
class Target:
    """A platform that wheels can be cross-compiled for.

    The minimum versions of glibc and macOS are those of torch's wheels.

    Attributes:
        zig: zig's target triple.
        tag: Platform tag of the wheel.
        system: Value of sys.platform.
        ending: File name suffix of shared libraries.
    """

    zig: str
    tag: str
    system: str = "linux"
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
TARGET_NAME = os.environ.get("DELTAW_TARGET", "")
if TARGET_NAME and TARGET_NAME not in TARGETS:
    raise SystemExit(f"DELTAW_TARGET={TARGET_NAME}: unknown target, use one of {', '.join(TARGETS)}")
TARGET = TARGETS.get(TARGET_NAME)
SYSTEM = TARGET.system if TARGET else sys.platform
BUILT = Path("build/kernels", TARGET_NAME)
if TARGET:
    VARIANTS.LIBRARY_SUFFIX = TARGET.ending


def environment_words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler, or None if there is no compiler."""
    for command in (environment_words("CXX"), ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return [*command, "-target", TARGET.zig] if TARGET else command
    return None


class CompileError(Exception):
    """Raised if the compiler cannot build a variant."""


class Compiler:
    """Runs the compiler unless the output is up to date: built by the same command from the same files."""

    def __init__(self, command: list[str], force: bool) -> None:
        self.command, self.force = command, force
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        self.version = result.stdout
        # Read before compiling: a file that changes during the build is compiled again next time.
        self.sources = {str(file): file.read_bytes() for file in SOURCES.iterdir()}

    def make(self, target: Path, arguments: list[str], inputs: Callable[[Path], list[str]]) -> Path:
        """Build ``target`` unless it is up to date. ``inputs`` returns the files that were read for it, after it is
        built.

        Raises:
            CompileError: if the compiler fails.
        """
        if self.force or not self.is_up_to_date(target, arguments, inputs):
            target.parent.mkdir(parents=True, exist_ok=True)
            digest_file(target).unlink(missing_ok=True)
            call([*self.command, *arguments, "-o", str(target)])
            digest_file(target).write_text(self.digest(arguments, inputs(target)))
        return target

    def is_up_to_date(self, target: Path, arguments: list[str], inputs: Callable[[Path], list[str]]) -> bool:
        try:
            return target.exists() and digest_file(target).read_text() == self.digest(arguments, inputs(target))
        except OSError:  # not built yet, or an input file was deleted
            return False

    def digest(self, arguments: list[str], inputs: list[str]) -> str:
        digest = hashlib.blake2b(repr([self.version, self.command, arguments, inputs]).encode())
        for file in inputs:
            digest.update(self.sources.get(file) or Path(file).read_bytes())
        return digest.hexdigest()


class BuildVariants(build_ext):
    """Compiles the sources once per variant, in parallel on all CPUs."""

    build_all = False  # default if DELTAW_VARIANTS is not set

    def run(self) -> None:
        selected = selected_variants(self.build_all)
        self.others = [ext for ext in self.extensions if ext.variant not in selected]
        self.extensions = [ext for ext in self.extensions if ext.variant in selected]
        if len(selected) > 1 and not self.build_all:
            for ext in self.extensions:
                if not ext.variant.rank:  # generic serves only for comparison if there are better variants
                    ext.extra_compile_args.append("-O1")
        self.cxx: Compiler | None = None
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + VARIANTS.LIBRARY_SUFFIX

    def build_extensions(self) -> None:
        command = compiler()
        if command is None and TARGET:
            raise SystemExit("no C++ compiler: set CXX to zig's compiler, as in `make wheels`")
        if command is None:
            self.warn("no C++ compiler: deltaw is installed without compiled kernels")
            return
        self.cxx = Compiler(command, bool(self.force))
        workers = self.parallel if isinstance(self.parallel, int) and self.parallel > 1 else os.cpu_count()
        # Start with the largest files, so that no CPU waits for a long compilation at the end.
        sources = sorted(self.extensions[0].sources, key=lambda file: -os.path.getsize(file))
        failed: dict[str, str] = {}
        with ThreadPoolExecutor(workers) as pool:
            pairs = [(ext, file) for file in sources for ext in self.extensions]
            jobs = {(ext.name, file): pool.submit(self.compile, ext, file, failed) for ext, file in pairs}
            for ext in self.extensions:
                self.link(ext, [jobs[ext.name, file] for file in ext.sources])

    def compile(self, ext: Extension, source: str, failed: dict[str, str]) -> Path:
        if ext.name in failed:
            raise CompileError(failed[ext.name])
        try:
            return self.cxx.make(*object_of(ext, source), input_files)
        except CompileError as refusal:
            failed[ext.name] = str(refusal)
            raise

    def link(self, ext: Extension, jobs: list[Future[Path]]) -> None:
        """Link a variant's objects, or warn that the variant is skipped."""
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            objects = [str(job.result()) for job in jobs]
            library = self.cxx.make(*library_of(ext), lambda _: objects)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
            self.announce(f"kernels: built {ext.variant.name}", level=logging.INFO)
        except CompileError as refusal:
            if TARGET:
                raise SystemExit(f"kernels: {ext.variant.name} for {TARGET_NAME}: {refusal}") from refusal
            self.warn(f"kernels: {ext.variant.name} is skipped because the compiler cannot build it: {refusal}")
            target.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """Copy the libraries to the source tree, and remove outdated ones.

        Outdated are variants that this build could not compile, and earlier builds of other variants from different
        sources.
        """
        super().copy_extensions_to_source()
        python = self.get_finalized_command("build_py")
        for ext in [*self.extensions, *self.others]:
            installed, built = map(Path, self._get_inplace_equivalent(python, ext))
            if installed.exists() and not (
                built.exists() if ext in self.extensions else self.is_current(ext, installed)
            ):
                installed.unlink()

    def is_current(self, ext: Extension, installed: Path) -> bool:
        """True if an earlier build created this file from the current sources."""
        library, arguments = library_of(ext)
        objects = [object_of(ext, source) for source in ext.sources]
        return (
            self.cxx is not None
            and all(self.cxx.is_up_to_date(*built, input_files) for built in objects)
            and self.cxx.is_up_to_date(library, arguments, lambda _: [str(file) for file, _ in objects])
            and filecmp.cmp(library, installed, shallow=False)
        )


def object_of(ext: Extension, source: str) -> tuple[Path, list[str]]:
    """Return the path of a source's object file for a variant, and the compiler's arguments."""
    built = BUILT / Path(ext.variant.file).stem / (Path(source).stem + ".o")
    # Only this file contains the digest, so that a change does not recompile the others.
    digest = [f"-DDW_SOURCES={VARIANTS.source_digest()}"] if Path(source).stem == "abi" else []
    return built, [*ext.extra_compile_args, *digest, "-MMD", "-c", source]


def library_of(ext: Extension) -> tuple[Path, list[str]]:
    """Return the path of a variant's library, and the linker's arguments."""
    folder = BUILT / Path(ext.variant.file).stem
    objects = [str(object_of(ext, source)[0]) for source in ext.sources]
    return folder / ext.variant.file, ["-shared", *objects, *link_flags()]


def link_flags() -> list[str]:
    flags = [*environment_words("ARCHFLAGS"), *environment_words("LDFLAGS"), *(["-s"] if TARGET else [])]
    if SYSTEM == "win32" or (
        SYSTEM == "darwin" and TARGET
    ):  # zig's linkers use the visibility attributes in the sources
        return flags
    if SYSTEM == "darwin":
        return ["-Wl,-exported_symbol,_dw_*", *flags]
    exports = BUILT / "exports.map"
    if not exports.exists() or exports.read_text() != EXPORTS:
        exports.parent.mkdir(parents=True, exist_ok=True)
        exports.write_text(EXPORTS)
    return [f"-Wl,--version-script={exports}", "-Wl,--no-undefined", *flags]


def digest_file(built: Path) -> Path:
    """Return the path of the file with the digest of a built file's inputs."""
    return built.with_name(built.name + ".made")


def input_files(built: Path) -> list[str]:
    """Return the files that the compiler read for an object, except system headers."""
    return built.with_suffix(".d").read_text().replace("\\\n", " ").partition(": ")[2].split()


def call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line or "undefined" in line]
        raise CompileError((errors or result.stderr.splitlines() or ["no reason given"])[0].strip())


class Wheel(bdist_wheel):
    """Wheel for one platform and any version of Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", TARGET.tag if TARGET else super().get_tag()[2]

    def run(self) -> None:
        """Build all variants, because a wheel can be installed on other machines."""
        BuildVariants.build_all = True
        super().run()
        for *_, wheel in self.distribution.dist_files:
            built = ", ".join(variant.name for variant in selected_variants(True))
            print(f"{wheel}: {os.path.getsize(wheel) / 1e6:.1f} MB with {built}")


def target_machine() -> str | None:
    """Return the machine type to compile for, or None for this machine's."""
    if TARGET:
        return TARGET.machine
    arch = environment_words("ARCHFLAGS")
    return arch[arch.index("-arch") + 1] if "-arch" in arch else None


def variants_of_target() -> list:
    """Return all variants that can be compiled. AMX tiles are supported on Linux only."""
    return [v for v in VARIANTS.for_machine(target_machine()) if SYSTEM == "linux" or "amx_tile" not in v.needs]


def flags_of(variant) -> list[str]:
    """Return the compiler flags of a variant. zig has a different name for ARMv8.2."""
    if not TARGET:
        return list(variant.flags)
    return [flag.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a") for flag in variant.flags]


def selected_variants(every: bool) -> list:
    """Return the variants to build: those in DELTAW_VARIANTS, else ``every`` one or this machine's, plus that of
    DELTAW_KERNELS.
    """
    machine = VARIANTS.machine(target_machine())
    named = environment_words("DELTAW_VARIANTS") or ["all" if every else "native"]
    named += [word.partition(":")[0] for word in environment_words("DELTAW_KERNELS")]
    # The features of another machine's CPU are unknown.
    if "all" in named or ("native" in named and machine != VARIANTS.machine()):
        return variants_of_target()
    native = VARIANTS.variants_to_build(PROCESSOR.processor_flags()) if "native" in named else []
    return [v for v in variants_of_target() if v in native or v.name in named]


def extensions() -> list[Extension]:
    """Return an extension per variant that can be compiled. The build command selects from them."""
    common = (SOURCES / "compile_flags.txt").read_text(encoding="utf-8").split()
    files = sorted(map(str, SOURCES.glob("*.cpp")))
    flags = ["-fPIC", *environment_words("ARCHFLAGS"), *environment_words("CXXFLAGS")]
    result = []
    for variant in variants_of_target():
        for version in dict.fromkeys([variant, variant.emulated()]):
            name = f"deltaw.kernels.{Path(version.file).stem}"
            ext = Extension(name, files, extra_compile_args=[*common, *flags_of(version), *flags], optional=True)
            ext.variant = version
            result.append(ext)
    return result


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildVariants, "bdist_wheel": Wheel},
    options={"build": {"build_base": f"build/wheels/{TARGET_NAME}"}} if TARGET else {},
)
