"""The documentation site: each page has one place in its navigation, in four groups."""

from __future__ import annotations

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML")
ROOT = Path(__file__).parents[1]
# Pages that stand in another folder of the repository.
OUTSIDE = {"index.md", "changelog.md"}
GROUPS = ["Start", "By goal", "Reference", "Background"]


def test_every_page_is_in_the_navigation_once():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert [name for group in nav for name in group] == GROUPS
    named = [page for group in nav for pages in group.values() for entry in pages for page in entry.values()]
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} | OUTSIDE
    if not (ROOT / "docs/goals").is_dir():
        named = [page for page in named if not page.startswith("goals/")]
    assert len(named) == len(set(named)) and set(named) == there
