"""Every public name of ``deltaw`` exists, and importing the package requires only torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import deltaw
import deltaw.lora


def test_every_public_name_exists():
    for name in deltaw.__all__:
        assert getattr(deltaw, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        deltaw.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", [deltaw, deltaw.lora])
def test_no_module_shadows_a_public_name(package):
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules and not modules & set(package.__all__)


def test_light_imports():
    heavy = {"transformers", "datasets", "pydantic", "rich", "click"}
    script = (
        "import importlib.util, sys\n"
        "sys.modules['deltaw'] = importlib.util.module_from_spec(importlib.util.find_spec('deltaw'))\n"
        "import deltaw.settings.task_registry\n"  # without the names of the package itself
        "print(*({'torch', 'pydantic'} & set(sys.modules)), end='')\n"
        "del sys.modules['deltaw']\n"
        "import deltaw, deltaw.lora\n"
        f"print(*({heavy} & set(sys.modules)), end='')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == ""
