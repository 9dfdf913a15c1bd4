"""Format the results of `deltaw data` commands: data checks, rendered rows and mined negatives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from deltaw.data.check import DataCheck, Lengths
from deltaw.data.example import TokenSpan
from deltaw.data.report import BadRows, class_counts_line, count_of, label_number_lines, quoted
from deltaw.data.row_reader import ExamplePreview, RowPreview
from deltaw.reports.tables import wrap_line

if TYPE_CHECKING:
    from deltaw.evaluation.mining import MiningResult

# Width of the longest bar in characters, and the last character of a bar by eighths.
_WIDTH = 36
_EIGHTHS = " ▏▎▍▌▋▊▉"
_STYLES = {"error": "red", "warning": "yellow", "note": "default"}
_VERDICTS = {
    "fine": ("no problems found", "green"),
    "warnings": ("the data can be trained on; review the warnings first", "yellow"),
    "unusable": ("training would fail or learn nothing", "red"),
}


def check_lines(check: DataCheck) -> Iterator[Text]:
    """Yield the lines of a data check, at most 80 columns wide except for user text."""
    template = f" ({check.template} template)" if check.template else ""
    yield Text(f"{check.source}: {check.rows:,} rows read as {check.form}{template}")
    if check.label_tokens is not None and check.tokens:
        labels = f"{check.label_tokens:,} of them labels ({check.label_tokens / check.tokens:.1%})"
        yield Text(f"{check.examples:,} examples: {check.tokens:,} tokens, {labels}")
    if check.class_counts:
        yield Text(wrap_line(class_counts_line(check.class_counts)))
    yield from map(Text, map(wrap_line, label_number_lines(check.label_numbers)))
    if check.ends:
        endings = [f"{name} in {count:,} examples" for name, count in check.ends.items()]
        yield Text(wrap_line(f"examples end with {', '.join(endings)}"))
    if check.lengths is not None:
        yield from _length_lines(check.lengths)
    for finding, following in itertools.zip_longest(check.findings, check.findings[1:]):
        is_single = finding.name == "bad_rows" and finding.count == 1  # the row's line already contains the reason
        text = finding.rows[0].removeprefix(f"{check.source}, ") if is_single else finding.text
        line = Text(wrap_line(f"{finding.level}: {text}"))
        line.stylize(_STYLES[finding.level], 0, len(finding.level) + 1)
        yield line
        for row in finding.rows[is_single:]:
            yield Text(wrap_line(f"  {row}"), style="dim")
        if finding.hint and (following is None or following.hint != finding.hint):
            yield Text(wrap_line(f"  hint:  {finding.hint}"))
    verdict, style = _VERDICTS[check.verdict]
    yield Text(f"{check.verdict}: {verdict}", style=style)


def _length_lines(lengths: Lengths) -> Iterator[Text]:
    yield Text(
        f"tokens: {lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,}, "
        f"mean {lengths.mean:,}, 95 % up to {lengths.p95:,}"
    )
    largest = max(count for _, _, count in lengths.bins)
    labels = [f"{low:,} – {high:,}" if high > low else f"{low:,}" for low, high, _ in lengths.bins]
    width = max(map(len, labels))
    for label, (_, _, count) in zip(labels, lengths.bins, strict=True):
        if count:
            yield Text(f"  {label:>{width}}  {_bar(count / largest)} {count:,}")


def _bar(share: float) -> str:
    full, eighths = divmod(max(int(share > 0), round(share * _WIDTH * 8)), 8)
    return "█" * full + (_EIGHTHS[eighths] if eighths else "")


# Rendered rows. Text that the loss is computed on is green, or enclosed in marks in output without color.


MARKS = ("«", "»")
LEGEND = "text that is trained on is green, special tokens are inverted"
PLAIN_LEGEND = f"text that is trained on is between {MARKS[0]} and {MARKS[1]}"


def row_lines(row: RowPreview, *, color: bool) -> Iterator[Text]:
    """Yield a heading and the text of each example of a row."""
    yield Text(f"{row.location}", style="bold")
    for note in row.notes:
        yield Text(f"  {note}", style="yellow" if color else "")
    for number, example in enumerate(row.examples, start=1):
        yield Text(f"  {_heading(example, number, len(row.examples))}", style="dim" if color else "")
        yield _colored(example) if color else Text(_marked(example.spans))
    yield Text("")


def row_as_dict(row: RowPreview) -> dict[str, object]:
    """Return plain values for JSON."""
    examples = []
    for example in row.examples:
        labels = example.labels if example.label is None else None
        pieces = [vars(piece) for piece in example.spans]
        examples.append({"tokens": example.tokens, "label_tokens": labels, "label": example.label, "pieces": pieces})
    return {"row": row.row, "where": row.location, "notes": list(row.notes), "examples": examples}


def _heading(example: ExamplePreview, number: int, count: int) -> str:
    prefix = f"example {number} of {count}: " if count > 1 else ""
    tokens = f"{example.tokens:,} token{'s' if example.tokens != 1 else ''}"
    if example.label is not None:
        return f"{prefix}{tokens}, label '{example.label}'"
    return f"{prefix}{tokens}, {example.labels:,} of them labels ({example.labels / max(1, example.tokens):.0%})"


def _colored(example: ExamplePreview) -> Text:
    text = Text()
    for span in example.spans:
        style = "green" if span.label else "default"
        text.append(span.text, style=f"{style} reverse" if span.special else style)
    return text


def _marked(spans: tuple[TokenSpan, ...]) -> str:
    text, is_open = "", False
    for span in spans:
        if span.label is not is_open:
            text += MARKS[0] if span.label else MARKS[1]
            is_open = span.label
        text += span.text
    return text + (MARKS[1] if is_open else "")


# Mined negatives: row counts, score ranges and example rows.


def mined_lines(mined: MiningResult, num_output_rows: int, bad: BadRows, num_examples: int) -> Iterator[Text]:
    """Yield the lines about mined negatives.

    Args:
        num_output_rows: Number of rows that were written.
        num_examples: Number of rows that are printed as examples.
    """
    rows, complete = len(mined.rows), len(mined.complete())
    yield Text(f"{count_of(rows)}, {mined.queries:,} different queries, {count_of(mined.passages, 'passage')}")
    for reason, count in bad.counts.items():
        yield Text(wrap_line(f"{count_of(count)} skipped: {reason}"), style="yellow")
    yield Text(f"{count_of(complete)} with {count_of(mined.num_negatives, 'negative')}")
    if complete < rows:
        outcome = "written with fewer negatives" if num_output_rows == rows else "not written"
        text = f"{count_of(rows - complete)} with fewer, {mined.num_without_negatives():,} of them with none: {outcome}"
        yield Text(wrap_line(f"{text}; increase --to-rank to find more"), style="yellow")
    if mined.too_close or mined.too_high:
        explanation = "their score is close to that of the row's passage, so they may also be positives"
        high = f"; {mined.too_high:,} more exceed the maximum score" if mined.too_high else ""
        yield Text(wrap_line(f"{count_of(mined.too_close, 'candidate')} excluded: {explanation}{high}"))
    if mined.truncated:
        yield Text(f"{count_of(mined.truncated, 'text')} truncated to the model's maximum length")
    for name, scores in mined.scores().items():
        if len(scores):
            low, high = np.quantile(scores, (0.05, 0.95))
            yield Text(f"scores of {name}s: mean {scores.mean():.3f}, 90 % from {low:.3f} to {high:.3f}")
    for row in itertools.islice((row for row in mined.rows if row.negatives), num_examples):
        yield Text(f"\nquery           {quoted(row.anchor, 60)}")
        for name, (text, score) in (("positive", (row.positive, row.score)), *(("negative", n) for n in row.negatives)):
            yield Text(f"{name:8} {score:6.3f} {quoted(text, 60)}", style="green" if name == "positive" else "")
