"""``import deltaw``: every public name exists, and the import needs only torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import deltaw


def test_every_public_name_is_there():
    for name in deltaw.__all__:
        assert getattr(deltaw, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        deltaw.no_such_name  # noqa: B018


def test_no_module_hides_a_public_name_once_everything_is_imported():
    script = (
        "import importlib, pkgutil, types, deltaw, deltaw.lora\n"
        "for found in pkgutil.iter_modules(deltaw.lora.__path__, 'deltaw.lora.'):\n"
        "    importlib.import_module(found.name)\n"
        "for package in (deltaw, deltaw.lora):\n"
        "    for name in package.__all__:\n"
        "        if isinstance(getattr(package, name), types.ModuleType):\n"
        "            print(package.__name__, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_the_layers_are_imported_without_the_libraries_of_a_run():
    above = {"transformers", "datasets", "pydantic", "rich", "click"}
    script = f"import sys, deltaw; print(*({above} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
