"""What is wrong, or may be, with labeled rows: texts with a class or a number, images with a class.

It knows examples; the findings have the form of :mod:`deltaw.data.check`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from deltaw.data.check import Check, Finding, bad_rows_found, count_rows, lengths_of, ordered
from deltaw.data.example import RowGroup
from deltaw.data.labels import AnyExample, LabeledExample
from deltaw.data.report import BadRows, Report
from deltaw.data.row_store import key_of
from deltaw.data.settings import DataSettings

# A class with less than this share of the largest one's rows is rare.
_RARE = 0.1
_SHOWN = 5


def check_labeled(
    examples: Sequence[AnyExample],
    report: Report,
    bad: BadRows,
    settings: DataSettings,
    held_out: Sequence[tuple[str, Sequence[AnyExample]]] = (),
) -> Check:
    """What labeled rows say.

    Args:
        examples: all usable ones, of any length, with duplicates. report: of them.
        bad: rows that cannot be used.
        settings: the ``data:`` section of the run.
        held_out: name and examples of each separate evaluation file.
    """
    keys = [example.key() for example in examples]
    contents = [_content(example) for example in examples]
    found = bad_rows_found(bad, settings, "")
    lengths = np.array([len(e) for e in examples if isinstance(e, LabeledExample)])
    long = [e for e in examples if isinstance(e, LabeledExample) and len(e) > settings.max_length]
    ways = {"error": "", "drop": ": dropped", "cut": ": truncated"}
    found.append(
        Finding(
            "long_rows",
            "error" if settings.long_rows == "error" else "warning",
            len(long),
            f"{count_rows(len(long))} longer than data.max_length ({settings.max_length:,} tokens)"
            + ways.get(settings.long_rows, ""),
            f"data.max_length: {int(lengths.max(initial=0))} fits all",
            _rows(long, report.source),
        )
    )
    again = [example for example, key, first in zip(examples, keys, _firsts(keys), strict=True) if not first]
    what = "dropped" if settings.duplicates == "drop" else "kept"
    found.append(
        Finding(
            "duplicates",
            "warning",
            len(again),
            f"{count_rows(len(again))} with the same content and label as an earlier one ({what})",
            None,
            _rows(again, report.source),
        )
    )
    labels: dict[bytes, set[object]] = {}
    for content, example in zip(contents, examples, strict=True):
        labels.setdefault(content, set()).add(example.label)
    torn = [e for content, e in zip(contents, examples, strict=True) if len(labels[content]) > 1]
    found.append(
        Finding(
            "contradictions",
            "warning",
            sum(len(of_content) > 1 for of_content in labels.values()),
            f"{count_rows(len(torn))} with content that has another label elsewhere",
            "if one label is right, correct the others",
            _rows(torn, report.source),
        )
    )
    found += _classes(report)
    for name, others in held_out:
        found += _overlap(name, others, set(keys), set(contents))
    return Check(
        report.source,
        report.form,
        "",
        report.rows_read,
        len(examples),
        int(lengths.sum()),
        None,
        lengths_of(lengths),
        ordered(found),
        class_counts=report.class_counts,
    )


def _classes(report: Report) -> list[Finding]:
    counts = report.class_counts
    if not counts:
        return []
    most = max(counts.values())
    rare = [f"{name} ({count:,})" for name, count in counts.items() if 2 <= count < most * _RARE]
    single = [name for name, count in counts.items() if count < 2]
    hint = "a classifier may never answer with them; add rows of them, or drop some of the others"
    return [
        Finding(
            "unbalanced",
            "warning",
            len(rare),
            f"classes with less than {_RARE:.0%} of the rows of the largest: {', '.join(rare[:12])}",
            hint,
        ),
        Finding(
            "classes_without_rows",
            "warning",
            len(single),
            f"classes with fewer than 2 rows: {', '.join(single[:12])}",
            hint,
        ),
    ]


def _overlap(name: str, others: Sequence[AnyExample], keys: set[bytes], contents: set[bytes]) -> list[Finding]:
    exact = [example for example in others if example.key() in keys]
    alike = [e for e in others if e.key() not in keys and _content(e) in contents]
    return [
        Finding(
            "overlap",
            "warning",
            len(exact),
            f"{count_rows(len(exact))} of {name} that are also training rows, which inflates the scores",
            "remove them from one of the files",
            _rows(exact, name),
        ),
        Finding(
            "prompt_overlap",
            "warning",
            len(alike),
            f"{count_rows(len(alike))} of {name} with the content of a training row and another label",
            None,
            _rows(alike, name),
        ),
    ]


def _content(example: AnyExample) -> bytes:
    """Equal for the same text or image, whatever its label."""
    if not isinstance(example, LabeledExample):
        return example.digest
    digest = hashlib.blake2b(example.tokens.tobytes(), digest_size=16)
    if example.segments is not None:
        digest.update(example.segments.tobytes())
    return digest.digest()


def _firsts(keys: Sequence[bytes]) -> list[bool]:
    seen: set[bytes] = set()
    firsts = []
    for key in keys:
        firsts.append(key not in seen)
        seen.add(key)
    return firsts


def _rows(examples: Sequence[AnyExample], source: str) -> tuple[str, ...]:
    return tuple(f"{source}, row {example.row}" for example in examples[:_SHOWN])


# ---- What is wrong, or may be, with pairs of a chosen and a rejected answer.
#
# It knows pairs; the findings have the form of :mod:`deltaw.data.check`.


# From this share of pairs on whose chosen answer is the longer one, length alone tells most of them apart.
_LOPSIDED = 0.75
# Fewer pairs say nothing about a share.
_FEW_PAIRS = 20


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
        pair for place, (pair, key) in enumerate(zip(pairs, keys, strict=True)) if first.setdefault(key, place) != place
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


# ---- What is wrong, or may be, with single answers that are desired or not.
#
# It knows answers; the findings have the form of :mod:`deltaw.data.check`.


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
    found.append(Finding("contradictions", "warning", len(turned), text, hint, places_of(turned, report.source)))
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
