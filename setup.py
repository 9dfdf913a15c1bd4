"""The compiled kernels: optional, one shared object for each instruction set, built by any C++17 compiler.

Everything else stands in pyproject.toml. The objects are plain C libraries that ctypes loads: they belong to
no version of Python or torch, so a wheel is tagged py3-none-<platform>. A variant that the compiler cannot
build is left out with a note; without a compiler deltaw runs on torch's own operations.

Environment: CXX, CXXFLAGS, LDFLAGS, ARCHFLAGS as usual; DELTAW_VARIANTS="avx2 generic" builds only those;
DELTAW_EMULATED_TILES=1 builds amx for tests on processors without tiles.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("src/deltaw/kernels")
SOURCES = KERNELS / "csrc"
# Only the C interface leaves an object: a template of the standard library that two variants have compiled
# with different instructions must never stand in for the other's.
EXPORTS = "{ global: dw_*; local: *; };\n"


def variants_module():
    """deltaw.kernels.variants, read by its path: nothing is installed yet."""
    spec = importlib.util.spec_from_file_location("deltaw_variants", KERNELS / "variants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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


class BuildVariants(build_ext):
    """Compiles the same sources once for each variant, all of them on as many processors as there are."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        self.command = compiler()
        if self.command is None:
            self.warn("no C++ compiler: deltaw is installed without its compiled kernels")
            return
        workers = self.parallel if isinstance(self.parallel, int) and self.parallel > 1 else os.cpu_count()
        with ThreadPoolExecutor(workers) as pool:
            variants = [(ext, *self.begin(ext, pool)) for ext in self.extensions]
            for ext, folder, jobs in variants:
                self.end(ext, folder, jobs)

    def begin(self, ext: Extension, pool: ThreadPoolExecutor):
        """Compile a variant's sources into a folder of its own."""
        folder = Path(self.build_temp) / ext.name.rpartition(".")[2]
        folder.mkdir(parents=True, exist_ok=True)
        flags = [*ext.extra_compile_args, "-fPIC", *words_of("ARCHFLAGS"), *words_of("CXXFLAGS")]
        failed: list[str] = []
        return folder, [pool.submit(self.compile, source, folder, flags, failed) for source in ext.sources]

    def compile(self, source: str, folder: Path, flags: list[str], failed: list[str]) -> Path:
        if failed:
            raise Refused(failed[0])
        built = folder / (Path(source).stem + ".o")
        command = [*self.command, *flags, "-MMD", "-c", source, "-o", str(built)]
        said = built.with_suffix(".command")
        if not self.force and up_to_date(built) and said.exists() and said.read_text() == shlex.join(command):
            return built
        said.unlink(missing_ok=True)
        try:
            call(command)
        except Refused as refusal:
            failed.append(str(refusal))
            raise
        said.write_text(shlex.join(command))
        return built

    def end(self, ext: Extension, folder: Path, jobs) -> None:
        """Link a variant, or say why it is left out."""
        target = Path(self.get_ext_fullpath(ext.name))
        name = ext.name.rpartition("_native_")[2]
        try:
            objects = [str(job.result()) for job in jobs]
            target.parent.mkdir(parents=True, exist_ok=True)
            new = folder / target.name
            call([*self.command, "-shared", *objects, "-o", str(new), *self.link_flags(folder)])
            new.replace(target)
            self.announce(f"kernels: built {name}", level=logging.INFO)
        except Refused as refusal:
            self.warn(f"kernels: {name} is left out, since the compiler does not build it: {refusal}")
            target.unlink(missing_ok=True)

    def link_flags(self, folder: Path) -> list[str]:
        own = [*words_of("ARCHFLAGS"), *words_of("LDFLAGS")]
        if sys.platform == "darwin":
            return ["-Wl,-exported_symbol,_dw_*", *own]
        exports = folder / "exports.map"
        exports.write_text(EXPORTS)
        return [f"-Wl,--version-script={exports}", "-Wl,--no-undefined", *own]

    def copy_extensions_to_source(self) -> None:
        """Also removes what an earlier build left and this one did not make: it would be loaded."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            left, made = self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
            if not os.path.exists(made) and os.path.exists(left):
                os.unlink(left)


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        raise Refused((errors or done.stderr.splitlines() or ["no reason given"])[0].strip())


def up_to_date(built: Path) -> bool:
    """Whether an object is newer than all that the compiler read for it."""
    read = built.with_suffix(".d")
    if not built.exists() or not read.exists():
        return False
    files = read.read_text().replace("\\\n", " ").partition(": ")[2].split()
    when = built.stat().st_mtime_ns
    return all(os.path.exists(file) and os.stat(file).st_mtime_ns < when for file in files)


class Wheel(bdist_wheel):
    """For one platform, and for every version of Python: the objects do not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    common = (SOURCES / "compile_flags.txt").read_text(encoding="utf-8").split()
    files = sorted(map(str, SOURCES.glob("*.cpp")))
    read = [*sorted(map(str, SOURCES.glob("*.h"))), *map(str, SOURCES.glob("*.txt")), "setup.py"]
    variants = variants_module()
    wanted = words_of("DELTAW_VARIANTS")
    # A Mac that compiles for the other kind of processor says so here.
    arch = words_of("ARCHFLAGS")
    machine = arch[arch.index("-arch") + 1] if "-arch" in arch else None
    return [
        Extension(
            f"deltaw.kernels.{Path(variant.file).stem}",
            sources=files,
            depends=read,
            extra_compile_args=[*common, *variant.flags],
            optional=True,
        )
        for variant in variants.for_machine(machine)
        if not wanted or variant.name in wanted
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildVariants, "bdist_wheel": Wheel})
