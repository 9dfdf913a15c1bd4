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


def test_the_layers_are_imported_without_the_libraries_of_the_road():
    above = {"transformers", "datasets", "pydantic", "rich", "click"}
    script = f"import sys, deltaw; print(*({above} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
