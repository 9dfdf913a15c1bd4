"""Which rows are trained on and which are held out: chosen, deduplicated, split.

Duplicates and rows of one group stay on the same side. It knows that an example has a length, labels and a
key that is equal for duplicates, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from deltaw.data.report import Report
from deltaw.data.settings import DataSettings, EvalSets, held_out_number, held_out_reference
from deltaw.data.sources import Rows
from deltaw.errors import UserError, did_you_mean

_CHOOSING, _SPLITTING = 1, 2  # independent random streams of one seed


class Kept(Protocol):
    """What splitting needs of an example."""

    def __len__(self) -> int: ...

    @property
    def label_count(self) -> int: ...


T = TypeVar("T", bound=Kept)


def choose(count: int, wanted: int | None, seed: int) -> Sequence[int]:
    """Indices of the chosen rows (``data.rows``), in the order of the file."""
    if wanted is None or wanted >= count:
        return range(count)
    return sorted(_random(seed, _CHOOSING).choice(count, size=wanted, replace=False).tolist())


def check_group(rows: Rows, column: str | None) -> None:
    """Raise a UserError if the file lacks the column of ``data.group``."""
    if column is not None and column not in rows.columns:
        raise UserError(
            f"the file has no column '{column}'",
            where=f"data.group for {rows.name}",
            hint=did_you_mean(column, rows.columns),
        )


def groups_of(rows: Rows, indices: Sequence[int], column: str | None) -> list[Hashable]:
    """The group of each row at ``indices``; a row without a value is a group of its own.

    Raises:
        UserError: a value is no text, number or truth value.
    """
    if column is None:
        return [None] * len(indices)
    groups: list[Hashable] = []
    for index in indices:
        value = rows[index][1].get(column)
        if isinstance(value, list | dict):
            raise UserError(
                f"'{column}' holds a {type(value).__name__}, which names no group",
                where=rows.place(index),
                hint="set data.group to a column of texts or numbers",
            )
        groups.append(None if value is None or value == "" else value)  # type: ignore[arg-type]
    return groups


def divide(
    examples: list[T],
    groups: list[Hashable],
    report: Report,
    settings: DataSettings,
    *,
    seed: int,
    key: Callable[[T], bytes],
    read_apart: Callable[[str], tuple[list[T], Report]],
) -> tuple[list[T], list[T], Report]:
    """Drop duplicates, and draw or read the rows that are held out.

    Args:
        examples: all usable rows of the training file.
        groups: the group of each of them, None for a row that is its own group.
        report: the report so far.
        key: equal for examples that are duplicates.
        read_apart: reads the evaluation file that ``data.eval`` names.

    Returns:
        examples to train on, examples held out, and the complete report.

    Raises:
        UserError: ``data.eval`` asks for more rows than there are, or no whole group can be held out.
    """
    keys = [key(example) for example in examples]
    report = replace(
        report, duplicates=len(keys) - len(set(keys)), duplicates_kept=settings.duplicates == "keep"
    )
    if not report.duplicates_kept:
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        places = sorted(first.values())
        examples = [examples[index] for index in places]
        keys = [keys[index] for index in places]
        groups = [groups[index] for index in places]
    apart = held_out_reference(settings.eval)
    if apart is not None:
        held_out, evaluation = read_apart(apart)
        seen = set(keys)
        overlap = sum(key(example) in seen for example in held_out)
        report = replace(report, held_out_source=apart, overlap=overlap, evaluation=evaluation)
        train = examples
    else:
        is_apart = _drawn(keys, groups, settings, seed)
        train = [example for example, out in zip(examples, is_apart, strict=True) if not out]
        held_out = [example for example, out in zip(examples, is_apart, strict=True) if out]
        if settings.group is not None:
            of_train = {g for g, out in zip(groups, is_apart, strict=True) if not out and g is not None}
            of_held_out = {g for g, out in zip(groups, is_apart, strict=True) if out and g is not None}
            report = replace(
                report, group=settings.group, groups=len(of_train), held_out_groups=len(of_held_out)
            )
    longest = max(len(example) for example in [*train, *held_out])
    return train, held_out, replace(counted(report, train), held_out=len(held_out), longest=longest)


def evaluated(examples: list[T], report: Report, key: Callable[[T], bytes]) -> Report:
    """The report of an evaluation file, which keeps duplicates."""
    duplicates = len(examples) - len({key(example) for example in examples})
    return replace(counted(report, examples), duplicates=duplicates, duplicates_kept=True)


def counted(report: Report, examples: Sequence[Kept]) -> Report:
    """The report with the sums over ``examples``."""
    return replace(
        report,
        rows_kept=len(examples),
        tokens=sum(len(example) for example in examples),
        label_tokens=sum(example.label_count for example in examples),
        longest=max(len(example) for example in examples),
    )


def _drawn(keys: list[bytes], groups: list[Hashable], settings: DataSettings, seed: int) -> list[bool]:
    """For each row, whether it is held out; linked rows are held out as a whole."""
    units = _units(keys, groups)
    sizes = Counter(dict(zip(keys, units, strict=True)).values())  # distinct rows in each
    order = list(dict.fromkeys(units))
    wanted = _held_out_size(settings.eval, sum(sizes.values()))
    if wanted and len(order) == 1 and sizes.total() > 1:
        raise UserError(
            f"'{settings.group}' links all rows into one group, so none can be held out",
            where="data.group",
            hint="group by another column, or set data.eval to a file or to null",
        )
    taken = 0
    apart: set[int] = set()
    for index in _random(seed, _SPLITTING).permutation(len(order)):
        size = sizes[order[index]]
        # The last group is taken or left, whichever comes closer to the number asked for.
        if (
            taken >= wanted
            or len(apart) == len(order) - 1
            or (taken and taken + size - wanted > wanted - taken)
        ):
            break
        apart.add(order[index])
        taken += size
    return [unit in apart for unit in units]


def _units(keys: list[bytes], groups: list[Hashable]) -> list[int]:
    """A number for each row, equal for duplicates, rows of one group, and rows linked through others."""
    parent: list[int] = list(range(len(keys)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[tuple[str, Hashable], int] = {}
    for place, (key, group) in enumerate(zip(keys, groups, strict=True)):
        for name in [("key", key)] + ([("group", group)] if group is not None else []):
            other = root(first.setdefault(name, place))
            low, high = sorted((other, root(place)))
            parent[high] = low
    return [root(place) for place in range(len(keys))]


def _held_out_size(share: EvalSets, distinct: int) -> int:
    """How many of ``distinct`` rows are held out; a share holds out at least one if that leaves one."""
    number = held_out_number(share)
    if number == 0:
        return 0
    if number < 1:
        return min(max(1, round(number * distinct)), distinct - 1)
    if number >= distinct:
        raise UserError(
            f"data.eval asks for {int(number)} rows, and there are {distinct} distinct ones",
            hint="hold out fewer rows: some must be left to train on",
        )
    return int(number)


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, stream])
