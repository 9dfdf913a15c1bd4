"""Paragraphs are wrapped as a person would wrap them: renames across many files leave lines behind that are not.

A paragraph of a page is one line, so a line that only continues the one above is a broken wrap. In a docstring or a
comment, a line is one that ends in the middle of a sentence although the next words would have fit by far.
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
PACKAGE = ROOT / "src" / "deltaw"
SCRIPTS = [*PACKAGE.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
EARLY = 80  # a line ends too early if the next word would have ended before this column
WORDS = 5  # a line of fewer words may be an entry of a list, a formula or a name
COMMANDS = ("python", "deltaw")

# What is not prose on a page: headings, tables, quotes, HTML, list entries, indented code.
OTHER = re.compile(r"\s*([#|<>!]|[-*] |\d+\. )|    ")


def broken_paragraphs(page: str) -> list[int]:
    """Numbers of the lines of a Markdown page that continue the line above."""
    found, continued, code = [], False, False
    for number, line in enumerate(page.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        code ^= fence
        prose = bool(line.strip()) and not code and not fence and not OTHER.match(line)
        if prose and continued:
            found.append(number)
        continued = prose or (bool(re.match(r"\s*([-*] |\d+\. )", line)) and not code)
    return found


def prose_lines(source: str) -> dict[int, str]:
    """The lines of docstrings and comments of a Python file, by their numbers."""
    lines = source.splitlines()
    found: dict[int, str] = {}
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node):
            numbers = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
            found |= {number: lines[number - 1].replace('"""', "") for number in numbers}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            found[token.start[0]] = token.line.replace("#", " ", 1)
    return found


def early_ends(source: str) -> list[int]:
    """Numbers of the lines of prose that end too early."""
    lines, found = prose_lines(source), []
    for number, line in sorted(lines.items()):
        following = lines.get(number + 1, "")
        words, follows = line.split(), following.split()
        indents = {len(text) - len(text.lstrip()) for text in (line, following)}
        if min(len(words), len(follows)) < WORDS or len(indents) > 1 or words[0] in COMMANDS or "  " in line.strip():
            continue
        open_ended = re.search(r"[a-z,]$", words[-1]) and follows[0][0].islower()
        if open_ended and len(line.rstrip()) + 1 + len(follows[0]) <= EARLY:
            found.append(number)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_paragraph_of_a_page_is_one_line(page: Path) -> None:
    found = broken_paragraphs(page.read_text(encoding="utf-8"))
    assert not found, f"lines {found} continue the line above"


def test_lines_of_docstrings_and_comments_do_not_end_early() -> None:
    assert len(SCRIPTS) > 40
    found = {file.name: early_ends(file.read_text(encoding="utf-8")) for file in SCRIPTS}
    assert not any(found.values()), {name: lines for name, lines in found.items() if lines}


def test_broken_wraps_are_found_and_nothing_else() -> None:
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
