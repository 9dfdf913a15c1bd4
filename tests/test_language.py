"""Each class name occurs once, the glossary matches the code, and no docstring describes itself instead of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.test_structure import tree_of

ROOT = Path(__file__).parent.parent
SELF_REFERENCE = re.compile(r"(?:In )?[Tt]h(?:is|e following) (?:module|file|class|function|method|test|docstring)\b")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module."""
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and (text := ast.get_docstring(node)):
            yield text


def test_class_names_occur_once() -> None:
    names: dict[str, list[str]] = {}
    for file in sorted((ROOT / "src" / "deltaw").rglob("*.py")):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    repeated = {name: files for name, files in names.items() if len(files) > 1}
    assert len(names) > 300 and not repeated


def test_docstrings_do_not_refer_to_themselves() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {text.splitlines()[0]}"
        for folder in ("src/deltaw", "tests", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for text in docstrings(tree_of(file))
        if SELF_REFERENCE.match(text)
    ]
    assert not found, "\n".join(found)
    assert SELF_REFERENCE.match("This module contains losses.") and not SELF_REFERENCE.match("Losses of this module.")


def test_glossary_names_exist_in_their_modules() -> None:
    page = (ROOT / "docs" / "development" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| ((?:`[^`]+`(?:, )?)+) \| ((?:`[^`]+\.py`(?:, )?)+) \|$", page, re.MULTILINE)
    assert len(rows) > 80
    for names, modules in rows:
        files = [ROOT / "src" / "deltaw" / name for name in re.findall("`([^`]+)`", modules)]
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(\w+)", names):
            assert re.search(rf"^class {name}\b", source, re.MULTILINE), name
