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


def test_tasks_and_layers_are_imported_alone_and_no_module_hides_a_public_name():
    above = {"transformers", "datasets", "pydantic", "rich", "click"}
    script = (
        "import importlib, importlib.util, pkgutil, sys, types\n"
        "sys.modules['deltaw'] = importlib.util.module_from_spec(importlib.util.find_spec('deltaw'))\n"
        "import deltaw.tasks\n"  # without the names of the package itself
        "print(*({'torch', 'pydantic'} & set(sys.modules)), end='')\n"
        "del sys.modules['deltaw']\n"
        "import deltaw, deltaw.lora\n"
        f"print(*({above} & set(sys.modules)), end='')\n"
        "for found in pkgutil.iter_modules(deltaw.lora.__path__, 'deltaw.lora.'):\n"
        "    importlib.import_module(found.name)\n"
        "for package in (deltaw, deltaw.lora):\n"
        "    for name in package.__all__:\n"
        "        if isinstance(getattr(package, name), types.ModuleType):\n"
        "            print(package.__name__, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ""
