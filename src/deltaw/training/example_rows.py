"""A few rows of a run as its model sees them: pieces of text, each trained on or only read.

It shows nothing and writes nothing; a row becomes plain values of bounded size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.example import Example, RowGroup
from deltaw.data.pieces import pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 6
# Characters of a row that are kept; of a longer piece, the beginning and the end.
TEXT = 2400
PIECE = 800
# Rows whose lengths are looked at, evenly spread, where there are more.
SAMPLED = 20_000
BINS = 24


def example_rows(
    rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, classes: Sequence[str] | None
) -> list[dict[str, object]]:
    """Some rows: the first, the shortest, the longest, one of median length, and others spread evenly.

    Args:
        rows: examples or groups of them; may be read from a file one by one.
        tokenizer: None for images, which have no text.
        classes: names of labels that are numbers of classes.

    Returns:
        for each row its number in the file, why it is shown, its tokens, how many of them are labels, its
        pieces ``{"text", "trained"}``, special tokens with
        ``"special"``, and its label where it has one.
    """
    if not len(rows):
        return []
    places = _places(len(rows))
    lengths = np.array([len(rows[int(place)]) for place in places])
    order = np.argsort(lengths, kind="stable")
    wanted = {0: "the first row"}
    if lengths.min() < lengths.max():
        wanted.setdefault(int(places[order[-1]]), "the longest row")
        wanted.setdefault(int(places[order[0]]), "the shortest row")
        wanted.setdefault(int(places[order[len(order) // 2]]), "a row of median length")
    for place in np.linspace(0, len(rows) - 1, ROWS).round():
        if len(wanted) < min(ROWS, len(rows)):
            wanted.setdefault(int(place), "one more row")
    return [
        {"why": why, **_described(row, tokenizer, classes)}
        for place, why in wanted.items()
        for row in _single(rows[place])
    ][:ROWS]


def length_counts(rows: Sequence[Any]) -> dict[str, object] | None:
    """How many rows have how many tokens: edges of bins, and rows and label tokens in each.

    None where rows have no length that says anything (images).
    """
    if not len(rows):
        return None
    places = _places(len(rows))
    sampled = [rows[int(place)] for place in places]
    lengths = np.array([len(row) for row in sampled])
    if lengths.max() <= 1:
        return None
    labels = np.array([row.label_count for row in sampled])
    bins = min(BINS, int(lengths.max() - lengths.min()) + 1)
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, bins + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    return {
        "edges": edges.tolist(),
        "rows": counts.tolist(),
        "sampled": len(sampled),
        "of": len(rows),
        "median": float(np.median(lengths)),
        "labels_median": float(np.median(labels)),
    }


def _places(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).round().astype(int))


def _single(row: Any) -> Iterator[Any]:
    """A row, or the rows of a group."""
    if isinstance(row, RowGroup):
        yield from row.rows
    else:
        yield row


def _described(
    row: Any, tokenizer: PreTrainedTokenizerBase | None, classes: Sequence[str] | None
) -> dict[str, object]:
    tokens = getattr(row, "tokens", None)
    described: dict[str, object] = {"row": row.row, "tokens": 0 if tokens is None else len(tokens)}
    if not isinstance(row, Example):
        label = row.label
        named = classes is not None and isinstance(label, int) and 0 <= label < len(classes)
        described["label"] = classes[label] if named and classes is not None else label
    else:
        described["label_tokens"] = row.label_count
    if tokens is None or tokenizer is None:
        size = getattr(row, "size", None)
        text = f"an image of {size[0]}×{size[1]} pixels" if size else "no text"
        described["pieces"] = [{"text": text, "trained": False}]
        return described
    mask = row.is_label if isinstance(row, Example) else np.zeros(len(tokens), bool)
    described["pieces"] = _bounded(_pieces(tokens, mask, tokenizer))
    return described


def _pieces(
    tokens: np.ndarray, mask: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, object]]:
    """Runs of tokens with the same mask, as text; a special token is a piece of its own."""
    known = len(tokenizer)
    virtual = tokens >= known  # of a method; they have no text
    cuts = [0, *(np.flatnonzero(np.diff(virtual)) + 1).tolist(), len(tokens)]
    found: list[dict[str, object]] = []
    for start, end in itertools.pairwise(cuts):
        if start < end and virtual[start]:
            text = f"[{end - start} virtual token{'s' if end - start > 1 else ''}]"
            found.append({"text": text, "trained": False, "special": True})
        elif start < end:
            for piece in pieces(tokens[start:end], mask[start:end], tokenizer):
                told: dict[str, object] = {"text": piece.text, "trained": piece.label}
                found.append({**told, "special": True} if piece.special else told)
    return found


def _bounded(given: list[dict[str, object]]) -> list[dict[str, object]]:
    """Pieces of at most :data:`TEXT` characters together: what is left out is counted in its place."""
    kept: list[dict[str, object]] = []
    left = TEXT
    for number, piece in enumerate(given):
        text = str(piece["text"])
        most = min(PIECE, left)
        if most <= 0:
            rest = sum(len(str(p["text"])) for p in given[number:])
            kept.append({"text": f" … {rest:,} more characters", "trained": False, "cut": True})
            break
        left -= min(len(text), most)
        if len(text) > most:
            half = most // 2
            text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
        kept.append({**piece, "text": text})
    return kept
