"""Result of a check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A check that was made.

    Attributes:
        name: What was checked.
        problem: What failed, or None if it passed.
        note: Details of a check that passed.
    """

    name: str
    problem: str | None = None
    note: str = ""
