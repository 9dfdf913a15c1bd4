"""The package layout described in docs/architecture.md, checked on the source text.

Imports between packages run downward, modules have no circular imports, and `training` and `runs` do not print.
`lora` and `kernels` are independent of the other packages. Code outside of `tasks` names no task. Imports inside
functions, under TYPE_CHECKING and as strings ("package.module:Name") count too.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from deltaw.settings import task_registry

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "deltaw"

# From bottom to top. A package may import earlier packages only, including imports for the type checker.
ORDER = (
    *("errors", "version", "platforms", "child_process", "worker_process", "atomic_files", "progress", "cache"),
    *("untrusted_paths", "user_references", "tensor_files", "settings", "kernels", "lora", "machine"),
    *("hub", "runtime", "methods", "data", "memory", "decoding", "training", "acceleration"),
    *("inference", "tasks"),
    *("runs", "experiments", "export", "serving", "evaluation", "reports", "studio"),
    *("selftest", "cli"),
    *("", "__main__"),  # the public face
)
LEVEL = {package: level for level, package in enumerate(ORDER)}
FOUNDATION = {"torch", "safetensors", "numpy"}
# Names of entry-point groups, which are also names of packages.
ENTRY_POINT_GROUPS = {
    "deltaw.methods": "deltaw.settings.method_registry",
    "deltaw.tasks": "deltaw.settings.task_registry",
}
# Strings that are equal to the name of a task but have another meaning.
OTHER_MEANINGS = {
    ("inference/predicting.py", "embedding"),  # end of the name of a column
    ("hub/sentence_layout.py", "sequence-classification"),  # value in a file of sentence-transformers
    ("serving/http/encoders.py", "embedding"),  # keys and values of the OpenAI API
}
# Imports of a task's modules by other packages.
TASK_IMPORTS = {("deltaw.serving.encoders", "deltaw.tasks.classification.task")}


class Import(NamedTuple):
    """An import: the importing module, the imported module, and the line."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}: imports {self.target}"


@functools.cache
def tree_of(file: Path) -> ast.Module:
    """Return the syntax tree of a file (cached)."""
    return ast.parse(file.read_text(encoding="utf-8"))


def strings_of(file: Path) -> list[tuple[str, int]]:
    """Return the strings of a file that are not docstrings, with their lines."""
    nodes = list(ast.walk(tree_of(file)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node.value, node.lineno) for node in constants if id(node) not in docstrings]


def _module_name(file: Path, source: Path) -> str:
    parts = file.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package_of(module: str) -> str:
    """Return the entry of ORDER for a deltaw module. Empty for ``deltaw`` itself."""
    return module.split(".")[1] if "." in module else ""


def imports_of(file: Path, source: Path, modules: set[str]) -> list[Import]:
    """Return all imports of a file. ``from package import name`` targets ``package.name`` if that is a module.

    Strings outside of docstrings that name a module, or an attribute of a module, are imports too.
    """
    module = _module_name(file, source)
    imports: list[Import] = []
    for text, line in strings_of(file):
        target = text.partition(":")[0]
        contains_module = f"{module}.".startswith(f"{target}.")
        if target in modules and not contains_module and ENTRY_POINT_GROUPS.get(target) != module:
            imports.append(Import(module, target, line))
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                within = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
                parent = within[: len(within) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            targets = [inner if (inner := f"{base}.{alias.name}") in modules else base for alias in node.names]
        else:
            continue
        imports += [Import(module, target, node.lineno) for target in dict.fromkeys(targets)]
    return imports


@functools.cache
def all_imports(source: Path) -> tuple[set[str], list[Import]]:
    """Return the modules below a source folder, and all their imports."""
    files = sorted(source.rglob("*.py"))
    modules = {_module_name(file, source) for file in files}
    return modules, [import_ for file in files for import_ in imports_of(file, source, modules)]


def find_cycle(imports: list[Import]) -> list[str]:
    """Return the modules of a circular import, or an empty list."""
    graph: dict[str, set[str]] = {}
    for i in _internal(imports):
        graph.setdefault(i.module, set()).add(i.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    """All imports of deltaw's modules."""
    return all_imports(SOURCE)[1]


def _internal(imports: list[Import]) -> list[Import]:
    return [i for i in imports if i.target == "deltaw" or i.target.startswith("deltaw.")]


def upward(imports: list[Import]) -> list[str]:
    """Return imports from packages that are later in the order."""
    levels = {i: (LEVEL[_package_of(i.module)], LEVEL[_package_of(i.target)]) for i in _internal(imports)}
    return [str(i) for i, (importer, imported) in levels.items() if imported > importer]


def test_every_package_has_a_level(imports: list[Import]) -> None:
    modules, _ = all_imports(SOURCE)
    assert {_package_of(module) for module in modules} <= set(LEVEL)
    assert {_package_of(i.target) for i in _internal(imports)} <= set(LEVEL)


def test_imports_run_downward_without_cycles(imports: list[Import]) -> None:
    assert upward(imports) == []
    assert find_cycle(imports) == []


def test_training_does_not_print(imports: list[Import]) -> None:
    printers = re.compile(r"(rich|click|deltaw\.reports)(\.|$)")
    checked = [i for i in imports if _package_of(i.module) in ("training", "runs")]
    assert [str(i) for i in checked if printers.match(i.target)] == []
    files = [file for package in ("training", "runs") for file in (PACKAGE / package).rglob("*.py")]
    calls = [(file, node.func) for file in files for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    assert [f"{file}, line {f.lineno}" for file, f in calls if getattr(f, "id", "") == "print"] == []


def task_modules_imported(imports: list[Import]) -> list[str]:
    """Return imports of the modules of tasks by other packages."""
    from_outside = [i for i in imports if i.target.startswith("deltaw.tasks.") and _package_of(i.module) != "tasks"]
    return [str(i) for i in from_outside if (i.module, i.target) not in TASK_IMPORTS]


def test_only_task_packages_know_the_tasks(imports: list[Import]) -> None:
    files = [file for file in PACKAGE.rglob("*.py") if "tasks" not in file.relative_to(PACKAGE).parts]
    strings = [(str(file.relative_to(PACKAGE)), text) for file in files for text, _ in strings_of(file)]
    names = {*task_registry.names()}
    assert [pair for pair in strings if pair[1] in names and pair not in OTHER_MEANINGS] == []
    assert task_modules_imported(imports) == []


@pytest.mark.parametrize("package", ["kernels", "lora"])
def test_foundation_imports_only_torch_safetensors_and_numpy(package: str, imports: list[Import]) -> None:
    below = (
        "errors",
        "platforms",
        "untrusted_paths",
        "user_references",
        "atomic_files",
        "tensor_files",
        "kernels",
        package,
    )
    allowed = {f"deltaw.{name}" for name in below} | FOUNDATION | sys.stdlib_module_names
    lines = [str(i) for i in imports if _package_of(i.module) == package]
    allowed.add("deltaw.settings.dataclass_fields")  # requires only the standard library
    bare = {str(i): i.target.split(".")[: 2 if i.target.startswith("deltaw.") else 1] for i in imports}
    full = {str(i): i.target for i in imports}
    assert [line for line in lines if not {".".join(bare[line]), full[line]} & allowed] == []


def test_structure_checks_detect_violations(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "lora/__init__.py": "from .layers import Layer",
        "lora/layers.py": "def make():\n    from deltaw.runs.fit import fit\n    return fit",
        "runs/__init__.py": "",
        "runs/fit.py": "from deltaw.runs import loop",
        "runs/loop.py": "import typing\nif typing.TYPE_CHECKING:\n    from . import fit",
        "tasks/__init__.py": "ENTRIES = ['deltaw.tasks.toy:Toy', 'deltaw.cli']",
        "tasks/toy.py": '"""deltaw.runs.fit"""',
        "cli/__init__.py": "from deltaw.tasks.toy import Toy",
    }
    for name, text in files.items():
        file = tmp_path / "deltaw" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    _, imports = all_imports(tmp_path)
    assert upward(imports) == [
        "deltaw.lora.layers, line 2: imports deltaw.runs.fit",
        "deltaw.tasks, line 1: imports deltaw.cli",
    ]
    assert ("deltaw.tasks", "deltaw.tasks.toy", 1) in imports
    assert task_modules_imported(imports) == ["deltaw.cli, line 1: imports deltaw.tasks.toy"]
    assert set(find_cycle(imports)) == {"deltaw.runs.fit", "deltaw.runs.loop"}
    assert ("deltaw.lora", "deltaw.lora.layers", 1) in imports


def test_developer_pages_name_existing_files() -> None:
    pages = [ROOT / "docs" / name for name in ("architecture.md", "development.md", "development/decisions.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    mentioned = set(re.findall(r"`((?:\w+/)*[\w*]+\.(?:py|cpp|h))`", text))
    folders = set(re.findall(r"`((?:\w+/)+\w*)`", text))
    assert len(mentioned) > 20 and len(folders) > 3
    roots = [ROOT, PACKAGE]
    missing = [n for n in sorted(mentioned | folders) if not any(list(root.glob(n)) for root in roots)]
    assert not missing, "\n".join(missing)


def test_architecture_page_describes_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {
        m.removeprefix("deltaw.") for m in all_imports(SOURCE)[0] if (PACKAGE / m[7:].replace(".", "/")).is_dir()
    }
    packages -= {"", "deltaw"}
    assert len(packages) > 10
    missing = [package for package in sorted(packages) if f"| `{package}` |" not in page]
    assert not missing, "\n".join(missing)
