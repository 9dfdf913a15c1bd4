"""Which rows are trained on and which are held out: chosen, deduplicated, split.

Duplicates and rows of one group stay on the same side. It knows rows by keys and groups of 16 bytes, and
works on arrays of them, so that millions of rows take seconds; of examples it knows that they have a length,
labels and a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from deltaw.data.report import Report
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings, EvalSets, held_out_number, held_out_reference
from deltaw.errors import UserError, did_you_mean

_CHOOSING, _SPLITTING = 1, 2  # independent random streams of one seed
# Rows whose keys are sorted at a time, roughly.
_BUCKET = 2**20
KEY_BYTES = 16


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


def check_group(name: str, columns: Sequence[str], column: str | None) -> None:
    """Raise a UserError if a file of these columns lacks that of ``data.group``."""
    if column is not None and column not in columns:
        raise UserError(
            f"the file has no column '{column}'",
            where=f"data.group for {name}",
            hint=did_you_mean(column, columns),
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


def as_keys(digests: Sequence[bytes]) -> np.ndarray:
    """(n, 2) uint64 of n digests of 16 bytes."""
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def group_digest(value: Hashable) -> bytes:
    """16 bytes, equal for equal groups; zeros for a row that is its own group."""
    if value is None or value != value:
        return bytes(KEY_BYTES)
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        value = int(value)  # 1, 1.0 and true are one group
    text = f"{type(value).__name__} {value}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class Division:
    """The outcome of a split.

    Attributes:
        train, held_out: places of the rows, ascending.
        duplicates: rows with the key of an earlier one.
        groups, held_out_groups: groups of either side, without rows that are their own group.
    """

    train: np.ndarray
    held_out: np.ndarray
    duplicates: int
    groups: int
    held_out_groups: int


def division(
    keys: np.ndarray,
    groups: np.ndarray | None,
    settings: DataSettings,
    seed: int,
    linked: np.ndarray | None = None,
) -> Division:
    """Drop duplicates, and draw the rows that are held out.

    Args:
        keys: (n, 2) uint64, equal for duplicates. groups: (n, 2), zeros for a row that is its own group.
        linked: (n,) int, equal for examples of one row, which stay on one side.

    Raises:
        UserError: ``data.eval`` asks for more rows than there are, or no whole group can be held out.
    """
    first = first_places(keys)
    distinct = first == np.arange(len(first))
    duplicates = len(first) - int(distinct.sum())
    kept = np.arange(len(first)) if settings.duplicates == "keep" else np.flatnonzero(distinct)
    if settings.duplicates != "keep":
        first, distinct = np.arange(len(kept)), np.ones(len(kept), bool)
    group_of = None if groups is None else _first_of_groups(groups[kept])
    classes = [first] if group_of is None else [first, group_of]
    if linked is not None:
        _, index, inverse = np.unique(linked[kept], return_index=True, return_inverse=True)
        classes.append(index[inverse])
    units = _connected(classes)
    is_apart = _drawn(units, distinct, settings, seed)
    counts = [0, 0]
    if group_of is not None and groups is not None:
        in_group = (groups[kept] != 0).any(1)
        counts = [len(np.unique(group_of[in_group & side])) for side in (~is_apart, is_apart)]
    return Division(kept[~is_apart], kept[is_apart], duplicates, *counts)


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
    keys = _keys(examples, key)
    of_groups = (
        as_keys([group_digest(group) for group in groups])
        if any(group is not None for group in groups)
        else None
    )
    divided = division(keys, of_groups, settings, seed)
    train = [examples[place] for place in divided.train.tolist()]
    report = with_division(report, divided, settings)
    apart = held_out_reference(settings.eval)
    if apart is not None:
        held_out, evaluation = read_apart(apart)
        overlap = count_overlap(keys[divided.train], _keys(held_out, key))
        report = replace(report, held_out_source=apart, overlap=overlap, evaluation=evaluation)
    else:
        held_out = [examples[place] for place in divided.held_out.tolist()]
    longest = max(len(example) for example in [*train, *held_out])
    return train, held_out, replace(counted(report, train), held_out=len(held_out), longest=longest)


def with_division(report: Report, divided: Division, settings: DataSettings) -> Report:
    """The report with the counts of duplicates and groups."""
    report = replace(report, duplicates=divided.duplicates, duplicates_kept=settings.duplicates == "keep")
    if settings.group is None or held_out_reference(settings.eval) is not None:
        return report
    return replace(
        report, group=settings.group, groups=divided.groups, held_out_groups=divided.held_out_groups
    )


def evaluated(examples: list[T], report: Report, key: Callable[[T], bytes]) -> Report:
    """The report of an evaluation file, which keeps duplicates."""
    duplicates = count_duplicates(_keys(examples, key))
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


def first_places(keys: np.ndarray) -> np.ndarray:
    """(n,) for each of the keys (n, 2) the place of the first equal one.

    Keys are sorted a part at a time, so that this takes little memory beside its result.
    """
    count = len(keys)
    first = np.arange(count)
    bits = max(0, (count // _BUCKET).bit_length())
    bucket = keys[:, 0] >> np.uint64(64 - bits) if bits else np.zeros(count, np.uint8)
    for number in range(1 << bits):
        places = np.flatnonzero(bucket == number)
        if len(places) < 2:
            continue
        part = keys[places]
        order = np.lexsort((part[:, 1], part[:, 0]))  # stable: equal keys stay in the order of the file
        part = part[order]
        begins = np.concatenate([[True], (part[1:] != part[:-1]).any(1)])
        leaders = places[order[begins]]
        first[places[order]] = leaders[np.cumsum(begins) - 1]
    return first


def count_duplicates(keys: np.ndarray) -> int:
    """Rows with the key of an earlier one."""
    return int((first_places(keys) != np.arange(len(keys))).sum())


def count_overlap(train: np.ndarray, held_out: np.ndarray) -> int:
    """How many of the held-out keys are also among those of the training rows."""
    first = first_places(np.concatenate([train, held_out]))
    return int((first[len(train) :] < len(train)).sum())


def _keys(examples: Sequence[T], key: Callable[[T], bytes]) -> np.ndarray:
    return as_keys([hashlib.blake2b(key(example), digest_size=KEY_BYTES).digest() for example in examples])


def _first_of_groups(groups: np.ndarray) -> np.ndarray:
    """The place of the first row of each row's group; its own for a row that is its own group."""
    first = first_places(groups)
    alone = ~(groups != 0).any(1)
    first[alone] = np.flatnonzero(alone)
    return first


def _connected(classes: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) a number for each row, equal for rows that are linked, also through others: the first of them.

    Args:
        classes: each (n,) the place of the first row that this row is linked with.
    """
    units = classes[0]
    if len(classes) == 1:
        return units
    while True:
        before = units
        for of_class in classes:
            lowest = np.full(len(units), len(units))
            np.minimum.at(lowest, of_class, units)
            units = lowest[of_class]
        if (units == before).all():
            return units


def _drawn(units: np.ndarray, distinct: np.ndarray, settings: DataSettings, seed: int) -> np.ndarray:
    """(n,) bool, whether each row is held out; linked rows are held out as a whole.

    Args:
        distinct: (n,) whether a row is the first of its key.
    """
    if held_out_reference(settings.eval) is not None:
        return np.zeros(len(units), bool)
    wanted = _held_out_size(settings.eval, int(distinct.sum()))
    if distinct.all() and (units == np.arange(len(units))).all():  # each alone: millions need no loop
        apart = np.zeros(len(units), bool)
        drawn = _random(seed, _SPLITTING).permutation(len(units))
        apart[drawn[: min(wanted, len(units) - 1)]] = True
        return apart
    order, unit_of = np.unique(units, return_inverse=True)
    apart = np.zeros(len(order), bool)
    sizes = np.bincount(unit_of[distinct], minlength=len(order)).tolist()  # distinct rows in each
    if wanted and len(order) == 1 and sizes[0] > 1:
        raise UserError(
            f"'{settings.group}' links all rows into one group, so none can be held out",
            where="data.group",
            hint="group by another column, or set data.eval to a file or to null",
        )
    taken = 0
    for count, index in enumerate(_random(seed, _SPLITTING).permutation(len(order)).tolist()):
        size = sizes[index]
        # The last group is taken or left, whichever comes closer to the number asked for.
        if taken >= wanted or count == len(order) - 1 or (taken and taken + size - wanted > wanted - taken):
            break
        apart[index] = True
        taken += size
    return apart[unit_of]


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
