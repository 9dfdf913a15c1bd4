"""Each page of the documentation site occurs once in the navigation, which has five groups."""

from __future__ import annotations

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML")
ROOT = Path(__file__).parents[1]
# Pages from another folder of the repository.
OUTSIDE = {"index.md", "changelog.md"}
GROUPS = ["Getting started", "How-to", "Reference", "Explanation", "For contributors"]


def test_every_page_is_in_the_navigation_once():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert [name for group in nav for name in group] == GROUPS
    listed = [page for group in nav for pages in group.values() for entry in pages for page in entry.values()]
    existing = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} | OUTSIDE
    if not (ROOT / "docs/goals").is_dir():
        listed = [page for page in listed if not page.startswith("goals/")]
    assert len(listed) == len(set(listed)) and set(listed) == existing
