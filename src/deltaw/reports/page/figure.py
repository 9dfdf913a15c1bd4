"""A figure of the page: a drawing, what it shows in words, a legend, and the numbers behind it as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Numbers:
    """A table: the first cell of each row names the row.

    Attributes:
        caption: what it holds. head: of each column. rows: cells as texts.
        note: below the table, such as which rows are left out.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        identity: unique on the page; an anchor. title: its heading. text: what it shows, in a sentence.
        drawing: the SVG. numbers: behind it.
        legend: sign and name of what is drawn, where it is more than one thing.
    """

    identity: str
    title: str
    text: str
    drawing: Markup
    numbers: Numbers
    legend: Sequence[tuple[Markup, str]] = ()
