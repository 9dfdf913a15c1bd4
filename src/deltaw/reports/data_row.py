"""What a row becomes, for a person: its text with what is trained on in color, or between marks without."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from deltaw.data.pieces import Piece
from deltaw.training.data_view import ShownExample, ShownRow

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
    return {
        "row": row.row,
        "where": row.where,
        "notes": list(row.notes),
        "examples": [
            {
                "tokens": example.tokens,
                "label_tokens": None if example.label is not None else example.labels,
                "label": example.label,
                "pieces": [vars(piece) for piece in example.pieces],
            }
            for example in row.examples
        ],
    }


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
