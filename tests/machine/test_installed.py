"""Installed package versions are compared with the requirements of deltaw."""

from __future__ import annotations

import importlib.metadata

import pytest

from deltaw.reports import doctor as installed
from deltaw.reports.installed_packages import packages


@pytest.fixture(autouse=True)
def _versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.6.0+cpu", "optuna": "3.1", "rich": "14.0rc1"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(installed.importlib.metadata, "version", version)


def test_version_ranges_extras_and_missing_packages() -> None:
    extras = ['optuna>=4; extra == "tune"', 'pytest>=8; extra == "dev"', 'pywin32; sys_platform == "no-such-system"']
    requirements = ["torch<3,>=2.6", "rich>=13", "gguf>=0.17", *extras]
    expected = {"torch": (True, "2.6.0+cpu", None), "rich": (True, "14.0rc1", None), "gguf": (False, None, None)}
    expected["optuna"] = (False, "3.1", "tune")
    assert {p.name: (p.fits, p.installed, p.extra) for p in packages(requirements)} == expected
    (package,) = packages([extras[0], "optuna>=3"])  # a base requirement takes precedence over an extra
    assert package.extra is None and package.fits


def test_requirements_come_from_package_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed.importlib.metadata, "requires", lambda name: [f"{name}-part>=1"])
    assert [p.name for p in packages()] == ["deltaw-part"]

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed.importlib.metadata, "requires", absent)
    assert packages() == []
