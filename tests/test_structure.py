"""The package layout that docs/architecture.md describes, checked on the source text.

Imports run downward between packages and never in a circle between modules, `training` and `runs` do not print,
`lora` and `kernels` stay free of the rest, and files and functions stay short. Imports inside functions
and those for the type checker count like those at the top of a file; nothing is imported or run.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "deltaw"

# From the bottom to the top. A package may import those before it; imports for the type checker count.
ORDER = (
    *("errors", "version", "private_names", "durable", "registry", "working", "cache", "contained"),
    *("tensor_files", "tasks", "kernels", "lora", "machine", "hub", "runtime", "data", "memory", "methods"),
    *("settings", "schema", "training", "runs", "export", "serving", "experiments", "reports", "cli"),
    *("", "__main__"),  # the public face
)
LEVEL = {package: level for level, package in enumerate(ORDER)}
FOUNDATION = {"torch", "safetensors", "numpy"}
LONGEST_FILE = 900
LONGEST_FUNCTION = 80


@dataclass(frozen=True)
class Import:
    """One import statement's target, as written in a module.

    Attributes:
        module: name of the importing module, such as ``deltaw.lora.layers``.
        target: name of the imported module.
        line: line number in the importing file.
    """

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}: imports {self.target}"


def _module_name(file: Path, source: Path) -> str:
    parts = file.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package_of(module: str) -> str:
    """The part of a deltaw module's name that ORDER lists; empty for ``deltaw`` itself."""
    return module.split(".")[1] if "." in module else ""


def imports_of(file: Path, source: Path, modules: set[str]) -> list[Import]:
    """All imports of a file. ``from package import name`` targets ``package.name`` where that is a module."""
    module = _module_name(file, source)
    found: list[Import] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                within = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
                kept = within[: len(within) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            targets = [inner if (inner := f"{base}.{alias.name}") in modules else base for alias in node.names]
        found += [Import(module, target, node.lineno) for target in dict.fromkeys(targets)]
    return found


def all_imports(source: Path) -> tuple[set[str], list[Import]]:
    """The modules below a source folder, and everything that they import."""
    files = sorted(source.rglob("*.py"))
    modules = {_module_name(file, source) for file in files}
    return modules, [found for file in files for found in imports_of(file, source, modules)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import one another (strongly connected components, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph.get(module, ()):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            place = stack.index(module)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1 or module in graph.get(module, ()):
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return sorted(found)


@pytest.fixture(scope="module")
def program() -> tuple[set[str], list[Import]]:
    """The modules of deltaw and everything that they import."""
    return all_imports(SOURCE)


@pytest.fixture(scope="module")
def modules(program: tuple[set[str], list[Import]]) -> set[str]:
    return program[0]


@pytest.fixture(scope="module")
def imports(program: tuple[set[str], list[Import]]) -> list[Import]:
    return program[1]


def _own(imports: list[Import]) -> list[Import]:
    return [i for i in imports if i.target == "deltaw" or i.target.startswith("deltaw.")]


def upward(imports: list[Import]) -> list[str]:
    """Imports from a package that comes later in the order."""
    return [
        str(i)
        for i in _own(imports)
        if LEVEL[_package_of(i.target)] > LEVEL[_package_of(i.module)]
        and not (_package_of(i.target) == "" and _package_of(i.module) == "__main__")
    ]


def test_every_package_has_a_level(modules: set[str], imports: list[Import]) -> None:
    assert {_package_of(module) for module in modules} <= set(LEVEL)
    assert {_package_of(i.target) for i in _own(imports)} <= set(LEVEL)


def test_imports_between_packages_run_downward(imports: list[Import]) -> None:
    found = upward(imports)
    assert not found, "\n".join(found)


def test_modules_do_not_import_one_another_in_a_circle(imports: list[Import]) -> None:
    graph: dict[str, set[str]] = {}
    for i in _own(imports):
        graph.setdefault(i.module, set()).add(i.target)
    found = circles(graph)
    assert not found, "\n".join(", ".join(group) for group in found)


def test_training_does_not_print(imports: list[Import]) -> None:
    printers = ("rich", "click", "deltaw.reports")
    found = [
        str(i)
        for i in imports
        if _package_of(i.module) in ("training", "runs")
        and any(i.target == name or i.target.startswith(f"{name}.") for name in printers)
    ]
    for file in sorted(f for package in ("training", "runs") for f in (PACKAGE / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{file.relative_to(SOURCE)}, line {node.lineno}: calls print")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", ["kernels", "lora"])
def test_the_foundation_needs_torch_safetensors_and_numpy_alone(package: str, imports: list[Import]) -> None:
    below = ("errors", "private_names", "contained", "durable", "named", "tensor_files", "kernels", package)
    own = {f"deltaw.{name}" for name in below}

    def allowed(target: str) -> bool:
        if target.split(".")[0] == "deltaw":
            return ".".join(target.split(".")[:2]) in own
        return target.split(".")[0] in FOUNDATION | sys.stdlib_module_names

    found = [str(i) for i in imports if _package_of(i.module) == package and not allowed(i.target)]
    assert not found, "\n".join(found)


def test_files_are_short() -> None:
    files = [file for kind in ("py", "cpp", "h") for file in PACKAGE.rglob(f"*.{kind}")]
    lengths = {str(f.relative_to(SOURCE)): f.read_text(encoding="utf-8").count("\n") for f in files}
    assert lengths
    found = [f"{name}: {n} lines" for name, n in sorted(lengths.items()) if n > LONGEST_FILE]
    assert not found, "\n".join(found)


def test_functions_fit_a_screen() -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found.append(f"{file.relative_to(SOURCE)}, line {node.lineno}: {node.name}, {lines} lines")
    assert not found, "\n".join(found)


def _written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "deltaw" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    source = _written(
        tmp_path,
        {
            "__init__.py": "",
            "lora/__init__.py": "from .layers import Layer",
            "lora/layers.py": "def make():\n    from deltaw.runs.fit import fit\n    return fit",
            "training/__init__.py": "",
            "runs/__init__.py": "",
            "runs/fit.py": "from deltaw.runs import loop",
            "runs/loop.py": "import typing\n\ndef run():\n    from . import fit",
            "training/typed.py": "import typing\nif typing.TYPE_CHECKING:\n    from . import user",
            "training/user.py": "from deltaw.training.typed import x",
        },
    )
    _, imports = all_imports(source)
    assert upward(imports) == ["deltaw.lora.layers, line 2: imports deltaw.runs.fit"]
    graph: dict[str, set[str]] = {}
    for i in _own(imports):
        graph.setdefault(i.module, set()).add(i.target)
    typed = ["deltaw.training.typed", "deltaw.training.user"]
    assert circles(graph) == [["deltaw.runs.fit", "deltaw.runs.loop"], typed]
    assert "deltaw.lora.layers" in graph["deltaw.lora"]


def test_the_pages_for_developers_name_files_that_exist() -> None:
    pages = [ROOT / "docs" / name for name in ("architecture.md", "development.md", "development/decisions.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"`((?:\w+/)*[\w*]+\.(?:py|cpp|h))`", text))
    folders = set(re.findall(r"`((?:\w+/)+\w*)`", text))
    assert len(named) > 20 and len(folders) > 3
    places = [ROOT, PACKAGE]
    missing = [n for n in sorted(named | folders) if not any(list(place.glob(n)) for place in places)]
    assert not missing, "\n".join(missing)


def test_the_architecture_page_describes_every_package(modules: set[str]) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {m.removeprefix("deltaw.") for m in modules if (PACKAGE / m[7:].replace(".", "/")).is_dir()}
    packages -= {"", "deltaw"}
    assert len(packages) > 10
    missing = [package for package in sorted(packages) if f"| `{package}` |" not in page]
    assert not missing, "\n".join(missing)
