"""Paragraphs are wrapped properly. Renames across files can leave badly wrapped lines.

A paragraph of a page is one line, so a line that only continues the previous one is a broken wrap. A line of a
docstring or comment is too short if it breaks inside a sentence although the next word would fit easily.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [
    file for folder in ("src", "tests", "benchmarks", "examples") for file in sorted((ROOT / folder).rglob("*.py"))
]
EARLY = 80  # a line is too short if the next word would end before this column
WORDS = 5  # shorter lines may be list entries, formulas or names
COMMANDS = ("python", "deltaw")

# Lines of a page that are not prose: headings, tables, quotes, HTML, list entries, indented code.
OTHER = re.compile(r"\s*([#|<>!]|[-*] |\d+\. )|    ")


def broken_paragraphs(page: str) -> list[int]:
    """Return the numbers of Markdown lines that continue the previous line."""
    numbers, continued, code = [], False, False
    for number, line in enumerate(page.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        code ^= fence
        prose = bool(line.strip()) and not code and not fence and not OTHER.match(line)
        if prose and continued:
            numbers.append(number)
        continued = prose or (bool(re.match(r"\s*([-*] |\d+\. )", line)) and not code)
    return numbers


def prose_lines(source: str) -> dict[int, str]:
    """Return the lines of docstrings and comments of a Python file, by line number."""
    lines = source.splitlines()
    prose: dict[int, str] = {}
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node):
            range_ = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
            prose |= {number: lines[number - 1].replace('"""', "") for number in range_}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            prose[token.start[0]] = token.line.replace("#", " ", 1)
    return prose


def early_ends(source: str) -> list[int]:
    """Return the numbers of prose lines that are too short."""
    lines, early = prose_lines(source), []
    for number, line in sorted(lines.items()):
        following = lines.get(number + 1, "")
        words, follows = line.split(), following.split()
        indents = {len(text) - len(text.lstrip()) for text in (line, following)}
        if min(len(words), len(follows)) < WORDS or len(indents) > 1 or words[0] in COMMANDS or "  " in line.strip():
            continue
        open_ended = re.search(r"[a-z,]$", words[-1]) and follows[0][0].islower()
        if open_ended and len(line.rstrip()) + 1 + len(follows[0]) <= EARLY:
            early.append(number)
    return early


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_page_paragraphs_are_single_lines(page: Path) -> None:
    broken = broken_paragraphs(page.read_text(encoding="utf-8"))
    assert not broken, f"lines {broken} continue the line above"


def test_docstring_and_comment_lines_are_filled() -> None:
    assert len(SCRIPTS) > 40
    broken = {file.name: early_ends(file.read_text(encoding="utf-8")) for file in SCRIPTS}
    assert not any(broken.values()), {name: lines for name, lines in broken.items() if lines}


def test_broken_wraps_are_detected_without_false_positives() -> None:
    page = "# Page\nText.\n\n- an entry\n- another,\n  continued\n\n| a |\n| b |\n\n    code\n    code\n\nwrapped\ntext"
    assert broken_paragraphs(page) == [6, 15]
    assert broken_paragraphs("```bash\ndeltaw train\ndeltaw eval\n```\nText.\n") == []
    source = (
        '"""One line.\n\nA line that ends here though\nthe next words would have fit.\n\n'
        "Words that fill a line up to the column where it is usual to begin another one, as\n"
        'in this case, are left as they are.\n"""\n# A comment that was wrapped\n# too early by a rename.\n\n'
        "# A comment with two sentences.\n# Each of them has a line."
    )
    assert early_ends(source) == [3, 9]
