"""The package layout of ``lora``: no circle of imports, wherever they stand, and few dependencies."""

from __future__ import annotations

import ast
import importlib
import sys
import types
from graphlib import TopologicalSorter
from pathlib import Path

import deltaw.lora

_FOLDER = Path(deltaw.lora.__file__).parent
_MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in _FOLDER.glob("*.py")}
_MAY_USE = {"torch", "safetensors", "numpy", *sys.stdlib_module_names}
_BELOW = {"errors", "private_names", "contained", "durable", "named", "tensor_files", "kernels", "lora"}


def _imports(tree: ast.Module) -> set[str]:
    """Full names of all that is imported anywhere in a module, in functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _inside(tree: ast.Module) -> set[str]:
    parts = [name.split(".") for name in _imports(tree)]
    return {p[2] for p in parts if p[:2] == ["deltaw", "lora"] and len(p) > 2 and p[2] in _MODULES}


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: _inside(tree) for name, tree in _MODULES.items() if name != "__init__"}
    assert len(graph) > 15 and "config" in graph["select"]
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("config") < order.index("select") < order.index("files")


def test_nothing_imports_the_package_itself():
    for name, tree in _MODULES.items():
        own = {i for i in _imports(tree) if i.startswith("deltaw.lora.") and i.count(".") == 2}
        assert name == "__init__" or all(i.split(".")[2] in _MODULES for i in own), name


def test_lora_can_be_lifted_out():
    for name, tree in _MODULES.items():
        for imported in _imports(tree):
            first, *rest = imported.split(".")
            allowed = first in _MAY_USE or (first == "deltaw" and (not rest or rest[0] in _BELOW))
            assert allowed, f"{name} imports {imported}"


def test_every_public_name_is_what_it_says_once_all_modules_are_loaded():
    for name in _MODULES:
        if name != "__init__":
            importlib.import_module(f"deltaw.lora.{name}")
    for name in deltaw.lora.__all__:
        assert not isinstance(getattr(deltaw.lora, name), types.ModuleType), name
