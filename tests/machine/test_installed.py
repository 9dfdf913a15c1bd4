"""Versions of installed packages against what deltaw asks for."""

from __future__ import annotations

import importlib.metadata

import pytest

from deltaw.machine import installed
from deltaw.machine.installed import packages


@pytest.fixture(autouse=True)
def _versions(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.6.0+cpu", "optuna": "3.1", "rich": "14.0rc1"}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(installed.importlib.metadata, "version", version)


def test_ranges_extras_and_what_is_missing() -> None:
    extras = ['optuna>=4; extra == "tune"', 'pytest>=8; extra == "dev"', 'pywin32; sys_platform == "no-such-system"']
    asked = ["torch<3,>=2.6", "rich>=13", "gguf>=0.17", *extras]
    expected = {"torch": (True, "2.6.0+cpu", None), "rich": (True, "14.0rc1", None), "gguf": (False, None, None)}
    expected["optuna"] = (False, "3.1", "tune")
    assert {p.name: (p.fits, p.installed, p.extra) for p in packages(asked)} == expected
    (found,) = packages([extras[0], "optuna>=3"])  # what every copy needs counts more than an extra
    assert found.extra is None and found.fits


def test_requirements_come_from_the_packages_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed.importlib.metadata, "requires", lambda name: [f"{name}-part>=1"])
    assert [p.name for p in packages()] == ["deltaw-part"]

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed.importlib.metadata, "requires", absent)
    assert packages() == []
