"""Rendered rows. Text that the loss is computed on is green, or enclosed in marks in output without color."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from deltaw.data.example import TokenSpan
from deltaw.data.row_reader import ExamplePreview, RowPreview

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
    text = ""
    is_open = False
    for span in spans:
        if span.label is not is_open:
            text += MARKS[0] if span.label else MARKS[1]
            is_open = span.label
        text += span.text
    return text + (MARKS[1] if is_open else "")
