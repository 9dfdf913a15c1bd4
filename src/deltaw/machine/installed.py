"""Which packages are installed beside deltaw, and whether their versions are those that it asks for.

The ranges come from deltaw's own metadata, so they are written down once, in ``pyproject.toml``. Nothing is
imported, and no index is asked.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from deltaw.machine.choices import lines_of


@dataclass(frozen=True)
class Package:
    """A package that deltaw asks for.

    Attributes:
        wanted: the range of versions, as in ``>=2.6,<3``; empty for any.
        installed: the version that is there; None where it is not.
        extra: the extra that asks for it; None where deltaw cannot do without.
    """

    name: str
    wanted: str
    installed: str | None
    extra: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the version that is there is one of those asked for."""
        if self.installed is None:
            return False
        try:
            return Requirement(f"{self.name}{self.wanted}").specifier.contains(self.installed, prereleases=True)
        except (InvalidRequirement, InvalidVersion):
            return True  # a version that cannot be read is not known to be wrong

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "wanted": self.wanted or None, "fits": self.fits}


def version_of(name: str) -> str | None:
    """The installed version of a package; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(requirements: list[str] | None = None) -> list[Package]:
    """What deltaw asks for, each once; extras for developers are left out.

    Args:
        requirements: as in a package's metadata; None for deltaw's own, which are not known where deltaw is
            not installed: the list is empty then.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("deltaw") or []
        except importlib.metadata.PackageNotFoundError:
            return []
    found: dict[str, Package] = {}
    for text in requirements:
        try:
            read = Requirement(text)
        except InvalidRequirement:
            continue
        _, named, rest = str(read.marker or "").partition('extra == "')
        extra = rest.partition('"')[0] if named else None
        if extra == "dev" or (extra is None and read.marker is not None and not read.marker.evaluate()):
            continue
        package = Package(read.name, str(read.specifier), version_of(read.name), extra)
        if read.name not in found or found[read.name].extra is not None:
            found[read.name] = package
    return list(found.values())


_LIBRARY = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*)$")


def openmp_libraries(root: Path = Path("/")) -> list[str]:
    """The names of the OpenMP libraries that this process has loaded, in alphabetical order; a second one brings a
    second pool of threads. Empty where the system does not say."""
    found = (_LIBRARY.search(line.rstrip()) for line in lines_of(root / "proc/self/maps"))
    return sorted({match[1] for match in found if match})
