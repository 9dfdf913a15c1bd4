"""The result type of all checks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of the check.
        problem: Description of the failure, or None if the check passed.
        note: Details if the check passed.
    """

    name: str
    problem: str | None = None
    note: str = ""
