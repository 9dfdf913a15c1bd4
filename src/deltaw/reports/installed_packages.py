"""Installed packages and OpenMP libraries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from deltaw.machine.container_limits import read_lines


@dataclass(frozen=True)
class Package:
    """A package that deltaw depends on.

    Attributes:
        name: Name of the distribution.
        wanted: Required version range, for example ``>=2.6,<3``. Empty if any version is accepted.
        installed: Installed version, or None if the package is not installed.
        extra: Extra that requires the package, or None if it is mandatory.
    """

    name: str
    wanted: str
    installed: str | None
    extra: str | None = None

    @property
    def fits(self) -> bool:
        """True if the installed version is in the required range."""
        if self.installed is None:
            return False
        try:
            return Requirement(f"{self.name}{self.wanted}").specifier.contains(self.installed, prereleases=True)
        except (InvalidRequirement, InvalidVersion):
            return True  # a version that cannot be parsed is not reported as wrong

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "wanted": self.wanted or None, "fits": self.fits}


def version_of(name: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(requirements: list[str] | None = None) -> list[Package]:
    """Return the dependencies of deltaw, each once, without those of the ``dev`` extra.

    Args:
        requirements: Requirement strings in the format of package metadata. None reads deltaw's metadata, and the
            result is empty if deltaw is not installed.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("deltaw") or []
        except importlib.metadata.PackageNotFoundError:
            return []
    by_name: dict[str, Package] = {}
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        _, separator, rest = str(requirement.marker or "").partition('extra == "')
        extra = rest.partition('"')[0] if separator else None
        if extra == "dev" or (extra is None and requirement.marker is not None and not requirement.marker.evaluate()):
            continue
        package = Package(requirement.name, str(requirement.specifier), version_of(requirement.name), extra)
        if requirement.name not in by_name or by_name[requirement.name].extra is not None:
            by_name[requirement.name] = package
    return list(by_name.values())


_LIBRARY = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*)$")


def openmp_libraries(root: Path = Path("/")) -> list[str]:
    """Return the sorted file names of the OpenMP libraries loaded in this process.

    More than one library means more than one thread pool. The list is empty if the system has no ``/proc/self/maps``.
    """
    matches = (_LIBRARY.search(line.rstrip()) for line in read_lines(root / "proc/self/maps"))
    return sorted({match[1] for match in matches if match})
