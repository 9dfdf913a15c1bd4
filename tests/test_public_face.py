"""Every public name of ``deltaw`` exists, and importing the package requires only torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import deltaw


def test_every_public_name_exists():
    for name in deltaw.__all__:
        assert getattr(deltaw, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        deltaw.no_such_name  # noqa: B018


def test_light_imports_and_no_module_shadows_a_public_name():
    heavy = {"transformers", "datasets", "pydantic", "rich", "click"}
    script = (
        "import importlib, importlib.util, pkgutil, sys, types\n"
        "sys.modules['deltaw'] = importlib.util.module_from_spec(importlib.util.find_spec('deltaw'))\n"
        "import deltaw.settings.task_registry\n"  # without the names of the package itself
        "print(*({'torch', 'pydantic'} & set(sys.modules)), end='')\n"
        "del sys.modules['deltaw']\n"
        "import deltaw, deltaw.lora\n"
        f"print(*({heavy} & set(sys.modules)), end='')\n"
        "for found in pkgutil.iter_modules(deltaw.lora.__path__, 'deltaw.lora.'):\n"
        "    importlib.import_module(found.name)\n"
        "for package in (deltaw, deltaw.lora):\n"
        "    for name in package.__all__:\n"
        "        if isinstance(getattr(package, name), types.ModuleType):\n"
        "            print(package.__name__, name)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == ""
