"""Findings of a check of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deltaw.data.class_names import almost_equal_text, merge_setting, similar_text

# Maximum number of row locations in a finding.
MAX_LOCATIONS = 5


Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class DataFinding:
    """One finding of a data check.

    Attributes:
        name: Stable identifier.
        level: "error" if training would fail or be useless, "warning" if results may be worse, "note" otherwise.
        count: Number of affected rows, examples or prompts.
        text: Description.
        hint: Suggested action.
        rows: Locations of the first affected rows.
    """

    name: str
    level: Level
    count: int
    text: str
    hint: str | None = None
    rows: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return the finding for JSON output."""
        return {**vars(self), "rows": list(self.rows)}


def class_findings(counts: Mapping[str, int]) -> list[DataFinding]:
    """Return the findings about classes that are almost equal or may be misspelled.

    Args:
        counts: Number of rows of each class.
    """
    described = {"almost_equal_classes": almost_equal_text(counts), "similar_classes": similar_text(counts)}
    return [
        DataFinding(name, "warning", len(merged) if text else 0, text, f"merge them: {merge_setting(merged)}")
        for name, (text, merged) in described.items()
    ]
