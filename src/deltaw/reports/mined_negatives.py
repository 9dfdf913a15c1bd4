"""Report of mined negatives: row counts, score ranges and example rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from deltaw.data.bad_rows import BadRows
from deltaw.data.report import count_of, quoted
from deltaw.reports.tables import wrap_line

if TYPE_CHECKING:
    from deltaw.evaluation.mining import MiningResult


def mined_lines(mined: MiningResult, num_output_rows: int, bad: BadRows, num_examples: int) -> Iterator[Text]:
    """Yield the lines about mined negatives.

    Args:
        num_output_rows: Number of rows that were written.
        num_examples: Number of rows that are printed as examples.
    """
    rows = len(mined.rows)
    complete = len(mined.complete())
    yield Text(f"{count_of(rows)}, {mined.queries:,} different queries, {count_of(mined.passages, 'passage')}")
    for reason, count in bad.counts.items():
        yield Text(wrap_line(f"{count_of(count)} skipped: {reason}"), style="yellow")
    yield Text(f"{count_of(complete)} with {count_of(mined.num_negatives, 'negative')}")
    if complete < rows:
        outcome = "written with fewer negatives" if num_output_rows == rows else "not written"
        text = f"{count_of(rows - complete)} with fewer, {mined.num_without_negatives():,} of them with none: {outcome}"
        yield Text(wrap_line(f"{text}; increase --to-rank to find more"), style="yellow")
    if mined.too_close:
        explanation = "the score is close to the positive's, so they may also be positives"
        yield Text(wrap_line(f"{count_of(mined.too_close, 'candidate')} excluded: {explanation}"))
    if mined.too_high:
        yield Text(wrap_line(f"{count_of(mined.too_high, 'candidate')} excluded: the score exceeds --max-score"))
    if mined.truncated:
        yield Text(f"{count_of(mined.truncated, 'text')} truncated to the model's maximum length")
    for name, scores in mined.scores().items():
        if len(scores):
            low, high = np.quantile(scores, (0.05, 0.95))
            yield Text(f"scores of {name}s: mean {scores.mean():.3f}, 90 % from {low:.3f} to {high:.3f}")
    for row in itertools.islice((row for row in mined.rows if row.negatives), num_examples):
        yield Text(f"\nquery           {quoted(row.anchor, 60)}")
        yield Text(f"positive {row.score:6.3f} {quoted(row.positive, 60)}", style="green")
        for text, score in row.negatives:
            yield Text(f"negative {score:6.3f} {quoted(text, 60)}")
