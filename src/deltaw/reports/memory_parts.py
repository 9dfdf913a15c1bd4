"""Parts of a memory plan in charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deltaw.reports.plan import PARTS
from deltaw.reports.svg import Bar, Legend, swatch


def memory_parts(sizes: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Return the style sheet class, label and size of the parts of a plan, in stacking order."""
    parts = ((f"p{n}", label, sizes.get(name, 0.0)) for n, (name, label, _) in enumerate(PARTS, 1))
    return [part for part in parts if part[2] > 0]


def memory_legend(items: Sequence[Bar]) -> Legend:
    """Return the parts that are at least 0.5% of the largest bar."""
    spans = [span for bar in items for span in bar.spans]
    largest = max((end for *_, end in spans), default=0.0)
    shown = {(kind, label) for kind, label, start, end in spans if end - start > 0.005 * largest}
    return [(swatch(kind, area=True), label) for kind, label in sorted(shown)]
