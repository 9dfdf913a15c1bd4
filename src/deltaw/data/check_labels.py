"""What is wrong, or may be, with labeled rows: texts with a class or a number, images with a class.

It knows examples; the findings have the form of :mod:`deltaw.data.check`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from deltaw.data.bad_rows import BadRows
from deltaw.data.check import Check, Finding, bad_rows_found, count_rows, lengths_of, ordered
from deltaw.data.labels import AnyExample, LabeledExample
from deltaw.data.report import Report
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


def _overlap(
    name: str, others: Sequence[AnyExample], keys: set[bytes], contents: set[bytes]
) -> list[Finding]:
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
