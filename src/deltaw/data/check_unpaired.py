"""What is wrong, or may be, with single answers that are desired or not.

It knows answers; the findings have the form of :mod:`deltaw.data.check`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaw.data.bad_rows import BadRows
from deltaw.data.check import Check, Finding, bad_rows_found, count_rows, lengths_of, ordered
from deltaw.data.check_pairs import long_answers, places_of
from deltaw.data.example import RowGroup
from deltaw.data.report import Report
from deltaw.data.row_store import key_of
from deltaw.data.settings import DataSettings

# The paper advises that desired answers weigh, all together, between 1 and 4/3 of what the others weigh
# (arXiv 2402.01306, section 4.2).
_BALANCE = (1.0, 4 / 3)


def check_unpaired(
    answers: Sequence[RowGroup],
    report: Report,
    bad: BadRows,
    settings: DataSettings,
    held_out: Sequence[tuple[str, Sequence[RowGroup]]] = (),
    weights: tuple[float, float] = (1.0, 1.0),
) -> Check:
    """What single answers say.

    Args:
        answers: all usable ones, of any length, with duplicates, each in a group whose first row it is.
        report: of them.
        bad: rows that cannot be used.
        settings: the ``data:`` section of the run.
        held_out: name and answers of each separate evaluation file.
        weights: of desired and of undesired answers in the loss.
    """
    rows = [answer.rows[0] for answer in answers]
    keys = [key_of(row) for row in rows]
    labels = [bool(row.desired) for row in rows]
    lengths = np.array([len(row) for row in rows])
    found = bad_rows_found(bad, settings, "")
    found.append(long_answers([RowGroup((row,)) for row in rows], settings, report.source))
    seen: dict[bytes, set[bool]] = {}
    again, turned = [], []
    for answer, key, label in zip(answers, keys, labels, strict=True):
        known = seen.setdefault(key, set())
        if label in known:
            again.append(answer)
        elif known:
            turned.append(answer)
        known.add(label)
    what = "dropped" if settings.duplicates == "drop" else "kept"
    text = f"{count_rows(len(again))} with the answer and label of an earlier one ({what})"
    found.append(Finding("duplicates", "warning", len(again), text, None, places_of(again, report.source)))
    text = f"{count_rows(len(turned))} with the answer of another row and the other label"
    hint = "if one is right, remove the other"
    found.append(
        Finding("contradictions", "warning", len(turned), text, hint, places_of(turned, report.source))
    )
    found += _unbalanced(labels, weights)
    for name, others in held_out:
        overlap = [answer for answer in others if key_of(answer.rows[0]) in seen]
        text = f"{count_rows(len(overlap))} of {name} that are also training rows, which inflates the scores"
        hint = "remove them from one of the files"
        found.append(Finding("overlap", "warning", len(overlap), text, hint, places_of(overlap, name)))
    return Check(
        report.source,
        report.form,
        report.template,
        report.rows_read,
        len(rows),
        int(lengths.sum()),
        sum(row.label_count for row in rows),
        lengths_of(lengths),
        ordered(found),
    )


def _unbalanced(labels: Sequence[bool], weights: tuple[float, float]) -> list[Finding]:
    """Whether answers of one kind outweigh the others."""
    desired = sum(labels)
    others = len(labels) - desired
    if not desired or not others:
        kind = "desired" if desired else "undesired"
        text, hint = f"all answers are {kind}", "add answers of the other kind"
        return [Finding("one_label", "warning", len(labels), text, hint, ())]
    ratio = weights[0] * desired / (weights[1] * others)
    if _BALANCE[0] <= ratio <= _BALANCE[1]:
        return []
    if ratio < 1:
        hint = f"preference.desirable_weight: {weights[1] * others / desired:.3g}"
    else:
        hint = f"preference.undesirable_weight: {weights[0] * desired / others:.3g}"
    text = f"{desired:,} answers are desired and {others:,} are not: one kind outweighs the other"
    return [Finding("unbalanced", "note", abs(desired - others), text, f"weigh them alike with {hint}", ())]
