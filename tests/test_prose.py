"""A paragraph of a page is one line, so a line that only continues the previous one is a broken wrap."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Lines of a page that are not prose: headings, tables, quotes, HTML, list entries, indented code.
OTHER = re.compile(r"\s*([#|<>!]|[-*] |\d+\. )|    ")


def broken_paragraphs(page: str) -> list[int]:
    """Return the numbers of Markdown lines that continue the previous line."""
    numbers = []
    continued = False
    code = False
    for number, line in enumerate(page.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        code ^= fence
        prose = bool(line.strip()) and not code and not fence and not OTHER.match(line)
        if prose and continued:
            numbers.append(number)
        continued = prose or (bool(re.match(r"\s*([-*] |\d+\. )", line)) and not code)
    return numbers


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_page_paragraphs_are_single_lines(page: Path) -> None:
    broken = broken_paragraphs(page.read_text(encoding="utf-8"))
    assert not broken, f"lines {broken} continue the line above"


def test_broken_wraps_are_detected_without_false_positives() -> None:
    page = "# Page\nText.\n\n- an entry\n- another,\n  continued\n\n| a |\n| b |\n\n    code\n    code\n\nwrapped\ntext"
    assert broken_paragraphs(page) == [6, 15]
    assert broken_paragraphs("```bash\ndeltaw train\ndeltaw eval\n```\nText.\n") == []
