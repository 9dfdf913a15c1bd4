"""Check that code and prose use the terms of the field.

Rates of everyday words in docstrings, comments and identifiers stay near those of PEFT, TRL and FastAPI, each class
name occurs once, and no docstring describes itself instead of the code.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.test_structure import tree_of

ROOT = Path(__file__).parent.parent
# Everyday words that replace a term or a subject: "what a step makes" instead of "the loss of a step".
WORDS = set(
    re.findall(
        r"\w+",
        """alone among anew apart ask asked asks begin begins begun beside came come comes ended few gives goes held
        hold holds how kept keeps knows lie lies made makes many most nobody none nothing others own person said say
        says stand stands stay stays take taken takes tell tells told turn turned went what whatever where whole
        whose""",
    )
)
PHRASES = re.findall(
    r"\w+ \w+",
    """and what, are no, asked for, goes on, how far, is no, is told, none for, none where, of what, so far, so many,
    what a, what is, what it, what the, where a, where it, where the, where there, where they, with what""",
)
PARTS = set(
    re.findall(
        r"\w+",
        """anew apart ask asked came come few found given goes held here how kept known left look made many meant most
        none nothing one own place places said say seen shown stands take taken tell there those told took wanted what
        where whole written""",
    )
)
# Folder: highest numbers of such words and phrases in 10,000 words, and of such parts in 10,000 parts of identifiers.
LIMITS = {"src/deltaw": (120, 20, 60), "tests": (140, 20, 90)}
SELF_REFERENCE = re.compile(r"(?:In )?[Tt]h(?:is|e following) (?:module|file|class|function|method|test|docstring)\b")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module."""
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and (text := ast.get_docstring(node)):
            yield text


def comments(source: str) -> list[str]:
    """Return the comments of a module, without tokenizing it, which takes seconds for all modules."""
    return re.findall(r"(?m)(?:^ *|  )# (.*)$", source)


def bound_names(tree: ast.AST) -> set[str]:
    """Return the names that a module defines: functions, classes, parameters and variables."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def rates(modules: Iterable[tuple[str, ast.AST]]) -> tuple[float, float, float]:
    """Return words and phrases per 10,000 words of prose, and parts per 10,000 parts of identifiers."""
    words: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for source, tree in modules:
        for text in (*docstrings(tree), *comments(source)):
            found = re.findall(r"[a-z]+(?:'[a-z]+)?", re.sub(r"``[^`]*``|`[^`]*`", " ", text.lower()))
            words.update(found)
            pairs.update(map(" ".join, itertools.pairwise(found)))
        for name in bound_names(tree):
            parts.update(part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))
    prose = max(1, words.total())
    identifiers = max(1, parts.total())
    return (
        1e4 * sum(words[word] for word in WORDS) / prose,
        1e4 * sum(pairs[phrase] for phrase in PHRASES) / prose,
        1e4 * sum(parts[part] for part in PARTS) / identifiers,
    )


@pytest.mark.parametrize("folder", LIMITS)
def test_everyday_words_do_not_replace_terms(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 100
    measured = rates((file.read_text(encoding="utf-8"), tree_of(file)) for file in files)
    assert all(rate <= limit for rate, limit in zip(measured, LIMITS[folder], strict=True)), measured


def test_rates_count_words_phrases_and_parts_of_identifiers() -> None:
    source = '"""What a text."""\n\n# Told and kept\ndef told_text(kept, width):\n    one = width\n'
    words, phrases, parts = rates([(source, ast.parse(source))])
    assert (round(words), round(phrases), round(parts)) == (5000, 1667, 6000)


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
