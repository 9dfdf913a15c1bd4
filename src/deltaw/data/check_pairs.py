"""What is wrong, or may be, with pairs of a chosen and a rejected answer.

It knows pairs; the findings have the form of :mod:`deltaw.data.check`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaw.data.bad_rows import BadRows
from deltaw.data.check import Check, Finding, bad_rows_found, count_rows, lengths_of, ordered
from deltaw.data.example import RowGroup
from deltaw.data.report import Report
from deltaw.data.row_store import key_of
from deltaw.data.settings import DataSettings

# From this share of pairs on whose chosen answer is the longer one, length alone tells most of them apart.
_LOPSIDED = 0.75
# Fewer pairs say nothing about a share.
_FEW_PAIRS = 20
_SHOWN = 5


def check_pairs(
    pairs: Sequence[RowGroup],
    report: Report,
    bad: BadRows,
    settings: DataSettings,
    held_out: Sequence[tuple[str, Sequence[RowGroup]]] = (),
) -> Check:
    """What pairs say.

    Args:
        pairs: all usable ones, of any length, with duplicates. report: of them.
        bad: rows that cannot be used.
        settings: the ``data:`` section of the run.
        held_out: name and pairs of each separate evaluation file.
    """
    keys = [_key(pair) for pair in pairs]
    lengths = np.array([len(row) for pair in pairs for row in pair.rows])
    found = bad_rows_found(bad, settings, "")
    found.append(long_answers(pairs, settings, report.source))
    first: dict[tuple[bytes, ...], int] = {}
    again = [
        pair
        for place, (pair, key) in enumerate(zip(pairs, keys, strict=True))
        if first.setdefault(key, place) != place
    ]
    what = "dropped" if settings.duplicates == "drop" else "kept"
    text = f"{count_rows(len(again))} with the same answers as an earlier one ({what})"
    found.append(Finding("duplicates", "warning", len(again), text, None, places_of(again, report.source)))
    turned = [pair for pair, key in zip(pairs, keys, strict=True) if key[::-1] in first]
    found.append(
        Finding(
            "contradictions",
            "warning",
            len(turned),
            f"{count_rows(len(turned))} whose answers another row prefers the other way round",
            "if one is right, remove the other; or set preference.label_smoothing",
            places_of(turned, report.source),
        )
    )
    found += _lopsided(pairs)
    for name, others in held_out:
        seen = [pair for pair in others if _key(pair) in first]
        text = f"{count_rows(len(seen))} of {name} that are also training rows, which inflates the scores"
        hint = "remove them from one of the files"
        found.append(Finding("overlap", "warning", len(seen), text, hint, places_of(seen, name)))
    labels = sum(pair.label_count for pair in pairs)
    return Check(
        report.source,
        report.form,
        report.template,
        report.rows_read,
        2 * len(pairs),
        int(lengths.sum()),
        labels,
        lengths_of(lengths),
        ordered(found),
    )


def long_answers(pairs: Sequence[RowGroup], settings: DataSettings, source: str) -> Finding:
    """Answers that are longer than ``data.max_length``."""
    limit = settings.max_length
    long = [pair for pair in pairs if max(map(len, pair.rows)) > limit]
    most = max((len(row) for pair in long for row in pair.rows), default=0)
    ways = {"error": "", "drop": ": dropped", "cut": ": truncated"}
    return Finding(
        "long_rows",
        "error" if settings.long_rows == "error" else "warning",
        len(long),
        f"{count_rows(len(long))} with an answer that is, with its prompt, longer than data.max_length "
        f"({limit:,} tokens)" + ways.get(settings.long_rows, ""),
        f"data.max_length: {most} fits all",
        places_of(long, source),
    )


def _lopsided(pairs: Sequence[RowGroup]) -> list[Finding]:
    """Whether a model could prefer by length alone."""
    counts = np.array([[row.label_count for row in pair.rows] for pair in pairs])
    longer = int((counts[:, 0] > counts[:, 1]).sum())
    if len(pairs) < _FEW_PAIRS or longer < _LOPSIDED * len(pairs):
        return []
    return [
        Finding(
            "longer_chosen",
            "note",
            longer,
            f"in {longer / len(pairs):.0%} of the pairs the chosen answer is the longer one: a model may "
            "learn to write more",
            "balance the lengths, or set preference.loss: simpo, which divides by them",
        )
    ]


def _key(pair: RowGroup) -> tuple[bytes, ...]:
    return tuple(key_of(row) for row in pair.rows)


def places_of(pairs: Sequence[RowGroup], source: str) -> tuple[str, ...]:
    """Where some of these rows are."""
    return tuple(f"{source}, row {pair.row}" for pair in pairs[:_SHOWN])
