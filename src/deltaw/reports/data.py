"""The outcome of a check of the data, for a person: a histogram of lengths, the findings, the verdict."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from deltaw.data.check import Check, Lengths
from deltaw.data.pieces import Piece
from deltaw.data.report import BadRows, class_counts_line, count_of, quoted
from deltaw.data.row_reader import ShownExample, ShownRow
from deltaw.reports.tables import folded

if TYPE_CHECKING:
    from deltaw.serving.mining import Mined

# Characters of the longest bar, and what a bar may end in, by eighths.
_WIDTH = 36
_EIGHTHS = " ▏▎▍▌▋▊▉"
_STYLES = {"error": "red", "warning": "yellow", "note": "default"}
_VERDICTS = {
    "fine": ("no problem was found in this data", "green"),
    "warnings": ("it can be trained on; look at the warnings first", "yellow"),
    "unusable": ("training would fail or be pointless", "red"),
}


def check_lines(check: Check) -> Iterator[Text]:
    """All of it, at most 80 columns wide but for the user's own text."""
    template = f" ({check.template} template)" if check.template else ""
    yield Text(f"{check.source}: {check.rows:,} rows read as {check.form}{template}")
    if check.label_tokens is not None and check.tokens:
        share = check.label_tokens / check.tokens
        labels = f"{check.label_tokens:,} of them labels ({share:.1%})"
        yield Text(f"{check.examples:,} examples: {check.tokens:,} tokens, {labels}")
    if check.class_counts:
        yield Text(folded(class_counts_line(check.class_counts)))
    if check.ends:
        shown = [f"{name} in {count:,} examples" for name, count in check.ends.items()]
        yield Text(folded(f"trained to end with {', '.join(shown)}"))
    if check.lengths is not None:
        yield from _length_lines(check.lengths)
    for finding, following in itertools.zip_longest(check.findings, check.findings[1:]):
        alone = finding.name == "bad_rows" and finding.count == 1  # its place says all that its reason does
        text = finding.rows[0].removeprefix(f"{check.source}, ") if alone else finding.text
        told = Text(folded(f"{finding.level}: {text}"))
        told.stylize(_STYLES[finding.level], 0, len(finding.level) + 1)
        yield told
        for row in finding.rows[alone:]:
            yield Text(folded(f"  {row}"), style="dim")
        if finding.hint and (following is None or following.hint != finding.hint):
            yield Text(folded(f"  hint:  {finding.hint}"))
    said, style = _VERDICTS[check.verdict]
    yield Text(f"{check.verdict}: {said}", style=style)


def _length_lines(lengths: Lengths) -> Iterator[Text]:
    yield Text(
        f"tokens: {lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,}, "
        f"mean {lengths.mean:,}, 95 % up to {lengths.p95:,}"
    )
    most = max(count for _, _, count in lengths.bins)
    labels = [f"{low:,} – {high:,}" if high > low else f"{low:,}" for low, high, _ in lengths.bins]
    width = max(map(len, labels))
    for label, (_, _, count) in zip(labels, lengths.bins, strict=True):
        if count:
            yield Text(f"  {label:>{width}}  {_bar(count / most)} {count:,}")


def _bar(share: float) -> str:
    whole, rest = divmod(max(int(share > 0), round(share * _WIDTH * 8)), 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


# What a row becomes, for a person: its text with what is trained on in color, or between marks without.


# Around what is trained on where there is no color.
MARKS = ("«", "»")
LEGEND = "what is trained on is green, special tokens are inverted"
PLAIN_LEGEND = f"what is trained on is between {MARKS[0]} and {MARKS[1]}"


def row_lines(row: ShownRow, *, color: bool) -> Iterator[Text]:
    """A heading for each example of a row, and its text."""
    yield Text(f"{row.where}", style="bold")
    for note in row.notes:
        yield Text(f"  {note}", style="yellow" if color else "")
    for number, example in enumerate(row.examples, start=1):
        yield Text(f"  {_heading(example, number, len(row.examples))}", style="dim" if color else "")
        yield _colored(example) if color else Text(_marked(example.pieces))
    yield Text("")


def row_as_dict(row: ShownRow) -> dict[str, object]:
    """For JSON."""
    examples = []
    for one in row.examples:
        labels = one.labels if one.label is None else None
        pieces = [vars(piece) for piece in one.pieces]
        examples.append({"tokens": one.tokens, "label_tokens": labels, "label": one.label, "pieces": pieces})
    return {"row": row.row, "where": row.where, "notes": list(row.notes), "examples": examples}


def _heading(example: ShownExample, number: int, count: int) -> str:
    which = f"example {number} of {count}: " if count > 1 else ""
    tokens = f"{example.tokens:,} token{'s' if example.tokens != 1 else ''}"
    if example.label is not None:
        return f"{which}{tokens}, label '{example.label}'"
    share = example.labels / max(1, example.tokens)
    return f"{which}{tokens}, {example.labels:,} of them labels ({share:.0%})"


def _colored(example: ShownExample) -> Text:
    text = Text()
    for piece in example.pieces:
        style = "green" if piece.label else "default"
        text.append(piece.text, style=f"{style} reverse" if piece.special else style)
    return text


def _marked(pieces: tuple[Piece, ...]) -> str:
    shown, open_ = "", False
    for piece in pieces:
        if piece.label is not open_:
            shown += MARKS[0] if piece.label else MARKS[1]
            open_ = piece.label
        shown += piece.text
    return shown + (MARKS[1] if open_ else "")


# Mined negatives: what became of the rows, how high texts score, and rows to look at.


def mined_lines(mined: Mined, written: int, bad: BadRows, shown: int) -> Iterator[Text]:
    """All of it; ``written`` rows were kept, of which ``shown`` are printed."""
    rows, complete = len(mined.rows), len(mined.complete())
    yield Text(f"{count_of(rows)}, {mined.queries:,} different queries, {count_of(mined.passages, 'passage')}")
    for reason, count in bad.counts.items():
        yield Text(folded(f"{count_of(count)} skipped: {reason}"), style="yellow")
    yield Text(f"{count_of(complete)} with {count_of(mined.wanted, 'negative')}")
    if complete < rows:
        kept = "written with what there is" if written == rows else "not written"
        fewer = f"{count_of(rows - complete)} with fewer, {mined.bare():,} of them with none: {kept}"
        yield Text(folded(f"{fewer}; a higher --to-rank finds more"), style="yellow")
    if mined.too_close or mined.too_high:
        taken = "score too close to the row's own passage, and may answer it too"
        high = f"; {mined.too_high:,} score above the highest allowed" if mined.too_high else ""
        yield Text(folded(f"{count_of(mined.too_close, 'candidate')} left out: {taken}{high}"))
    if mined.truncated:
        yield Text(f"{count_of(mined.truncated, 'text')} truncated to what the model takes")
    for name, scores in mined.scores().items():
        if len(scores):
            low, high = np.quantile(scores, (0.05, 0.95))
            yield Text(f"scores of {name}s: mean {scores.mean():.3f}, 90 % from {low:.3f} to {high:.3f}")
    for row in itertools.islice((row for row in mined.rows if row.negatives), shown):
        yield Text(f"\nquery           {quoted(row.anchor, 60)}")
        for name, (text, score) in (("positive", (row.positive, row.score)), *(("negative", n) for n in row.negatives)):
            yield Text(f"{name:8} {score:6.3f} {quoted(text, 60)}", style="green" if name == "positive" else "")
