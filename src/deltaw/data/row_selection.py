"""Selection, deduplication and splitting of rows.

Rows are represented by arrays of 16-byte keys and group digests, so that millions of rows take seconds. Duplicates and
rows of one group are on the same side of the split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from deltaw.data.example import lengths_of, rows_of, select_rows
from deltaw.data.report import PreparationReport
from deltaw.data.rows import NumberedRows
from deltaw.errors import UserError, did_you_mean
from deltaw.settings.data import DataSettings, EvalSets, eval_reference, eval_size
from deltaw.settings.mixture import format_sources, sources_of

# independent random streams of one seed
_CHOOSING = 1
_SPLITTING = 2
_WEIGHING = 3
# Approximate number of keys that are sorted at a time.
_BUCKET = 2**20
KEY_BYTES = 16

T = TypeVar("T")


def choose_rows(count: int, max_rows: int | None, seed: int) -> Sequence[int]:
    """Return the indices of the chosen rows (``data.rows``), in file order."""
    if max_rows is None or max_rows >= count:
        return range(count)
    return sorted(_random(seed, _CHOOSING).choice(count, size=max_rows, replace=False).tolist())


def check_group(name: str, columns: Sequence[str], column: str | None) -> None:
    """Raise a UserError if the columns of a file do not include ``data.group``."""
    if column is not None and column not in columns:
        hint = did_you_mean(column, columns)
        raise UserError(f"the file has no column '{column}'", location=f"data.group for {name}", hint=hint)


def groups_of(rows: NumberedRows, indices: Sequence[int], column: str | None) -> list[Hashable]:
    """Return the group of each row at ``indices``. A row without a value gets None.

    Raises:
        UserError: if a value is a list or an object.
    """
    if column is None:
        return [None] * len(indices)
    groups: list[Hashable] = []
    for index in indices:
        value = rows[index][1].get(column)
        if isinstance(value, list | dict):
            message = f"'{column}' is a {type(value).__name__}, which cannot name a group"
            raise UserError(message, location=rows.row_location(index), hint="use a column of texts or numbers")
        groups.append(None if value is None or value == "" else value)  # type: ignore[arg-type]
    return groups


def as_keys(digests: Sequence[bytes]) -> np.ndarray:
    """Return n 16-byte digests as (n, 2) uint64."""
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def group_digest(value: Hashable) -> bytes:
    """Return 16 bytes that are equal for equal groups, or zeros for a row without a group."""
    if value is None or value != value:
        return bytes(KEY_BYTES)
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        value = int(value)  # 1, 1.0 and true are one group
    text = f"{type(value).__name__} {value}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


def split_indices(
    keys: np.ndarray, groups: np.ndarray | None, settings: DataSettings, seed: int, linked: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, int, list[int]]:
    """Drop duplicates and sample the held-out rows.

    Args:
        keys: (n, 2) uint64, equal for duplicates.
        groups: (n, 2) uint64 group digests, zeros for rows without a group.
        linked: (n,) integers, equal for examples of one row, which are on the same side.

    Returns:
        Indices of the training rows and of the held-out rows, ascending; the number of duplicates; and the number of
        groups on each side.

    Raises:
        UserError: if ``data.eval`` requests more rows than exist, or if all rows are in one group.
    """
    first = first_occurrences(keys)
    selected = np.arange(len(first))
    distinct = first == selected
    duplicates = len(first) - int(distinct.sum())
    if settings.duplicates != "keep":
        selected = np.flatnonzero(distinct)
        first = np.arange(len(selected))
        distinct = np.ones(len(selected), bool)
    group_of = None if groups is None else _first_of_groups(groups[selected])
    classes = [first] if group_of is None else [first, group_of]
    if linked is not None:
        _, index, inverse = np.unique(linked[selected], return_index=True, return_inverse=True)
        classes.append(index[inverse])
    is_held_out = _sample_eval_rows(_connected(classes), distinct, settings, seed)
    counts = [0, 0]
    if group_of is not None and groups is not None:
        in_group = (groups[selected] != 0).any(1)
        counts = [len(np.unique(group_of[in_group & side])) for side in (~is_held_out, is_held_out)]
    return selected[~is_held_out], selected[is_held_out], duplicates, counts


@dataclass(frozen=True)
class ReadResult:
    """Usable rows of one or several sources, before they are split.

    Attributes:
        rows: Items in memory, or a view of stored examples.
        keys: Keys of the rows, see :func:`split_indices`.
        groups: Groups of the rows, see :func:`split_indices`.
        report: Row counts.
        ordinals: (n,) number of each example's row over all sources. None if sources have no weights and each row is
            one item.
        ends: For each source, the cumulative number of rows. Empty without ``ordinals``.
    """

    rows: Sequence[Any]
    keys: np.ndarray
    groups: np.ndarray | None
    report: PreparationReport
    ordinals: np.ndarray | None = None
    ends: Sequence[int] = ()

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """Return (n,) the source index of each example."""
        if self.ordinals is None or len(self.ends) == 1:
            return np.zeros(len(indices), np.int64)
        return np.searchsorted(self.ends, self.ordinals[indices], side="right")

    @property
    def linked(self) -> np.ndarray | None:
        """Return ``ordinals`` if one row became several examples, which are on the same side of the split."""
        return None if self.ordinals is None or (np.diff(self.ordinals) != 0).all() else self.ordinals


def split_rows(
    read: ReadResult, settings: DataSettings, *, seed: int, read_eval: Callable[[str], ReadResult]
) -> tuple[Sequence[Any], Sequence[Any], PreparationReport]:
    """Drop duplicates, sample or read the evaluation rows, and apply the weights of the sources.

    Args:
        read: Usable rows of the training files.
        read_eval: Reads the evaluation file that ``data.eval`` names.

    Returns:
        Training rows of an epoch, evaluation rows, and the complete report.

    Raises:
        UserError: if ``data.eval`` requests more rows than exist, or if all rows are in one group.
    """
    split = split_indices(read.keys, read.groups, settings, seed, read.linked)
    train_indices, eval_indices, duplicates, (train_groups, eval_groups) = split
    sources = sources_of(settings.train)
    weights = [source.weight for source in sources]
    epoch_indices = apply_weights(train_indices, read.source_of(train_indices), weights, seed)
    train = select_rows(read.rows, epoch_indices)
    num_distinct = len(np.unique(epoch_indices))
    report = replace(
        with_token_counts(read.report, train),
        source=format_sources(settings.train),
        rows_kept=num_distinct,
        repeated=len(epoch_indices) - num_distinct,
        not_sampled=len(train_indices) - num_distinct,
        duplicates=duplicates,
        duplicates_kept=settings.duplicates == "keep",
    )
    if len(read.ends) > 1:
        counts = np.bincount(read.source_of(epoch_indices), minlength=len(sources)).tolist()
        source_counts = zip(sources, counts, strict=True)
        by_source = {source.reference: {"weight": source.weight, "rows": count} for source, count in source_counts}
        report = replace(report, sources=by_source)
    reference = eval_reference(settings.eval)
    if reference is not None:
        evaluation = read_eval(reference)
        eval_rows = evaluation.rows
        overlap = count_overlap(read.keys[train_indices], evaluation.keys)
        report = replace(report, held_out_source=reference, overlap=overlap, evaluation=evaluation.report)
    else:
        eval_rows = select_rows(read.rows, eval_indices)
        if settings.group is not None:
            report = replace(report, group=settings.group, groups=train_groups, held_out_groups=eval_groups)
    report = replace(report, held_out=len(eval_rows), longest=max(report.longest, _longest(eval_rows)))
    return train, eval_rows, report


def apply_weights(rows: np.ndarray, source_of: np.ndarray, weights: Sequence[float], seed: int) -> np.ndarray:
    """Return the rows of an epoch: rows of a source with weight 2 twice, half of the rows of a source with weight 0.5.

    Args:
        rows: (n,) indices of the training rows, ascending.
        source_of: (n,) source of each row.
        weights: Weight of each source.
        seed: Seed for sampling fractions. The sample is the same in all epochs.

    Returns:
        Ascending indices, repeated as often as they occur in an epoch.
    """
    if all(weight == 1 for weight in weights):
        return rows
    random = _random(seed, _WEIGHING)
    parts = []
    for number, weight in enumerate(weights):
        source_rows = rows[source_of == number]
        repeats = math.floor(weight)
        num_sampled = round((weight - repeats) * len(source_rows))
        parts += [np.repeat(source_rows, repeats), random.choice(source_rows, size=num_sampled, replace=False)]
    return np.sort(np.concatenate(parts))


def with_eval_counts(read: ReadResult) -> ReadResult:
    """Return the rows of an evaluation file, in which duplicates are used, with the counts in their report."""
    duplicates = int((first_occurrences(read.keys) != np.arange(len(read.keys))).sum())
    report = replace(with_token_counts(read.report, read.rows), duplicates=duplicates, duplicates_kept=True)
    return replace(read, report=report)


def with_token_counts(report: PreparationReport, rows: Sequence[Any]) -> PreparationReport:
    """Return the report with the totals over ``rows``."""
    labels = rows.label_counts if hasattr(rows, "label_counts") else [row.label_count for row in rows]
    tokens = int(lengths_of(rows).sum())
    return replace(report, rows_kept=len(rows), tokens=tokens, label_tokens=int(np.sum(labels)), longest=_longest(rows))


def _longest(rows: Sequence[Any]) -> int:
    """Return the number of tokens of the longest row, including rows of groups."""
    if isinstance(rows, list):
        rows = [row for item in rows for row in rows_of(item)]
    return int(lengths_of(rows).max(initial=0))


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """Return (n,) the index of the first equal key, for (n, 2) uint64 keys.

    Keys are sorted in buckets, which limits the additional memory.
    """
    count = len(keys)
    first = np.arange(count)
    bits = max(0, (count // _BUCKET).bit_length())
    bucket = keys[:, 0] >> np.uint64(64 - bits) if bits else np.zeros(count, np.uint8)
    for number in range(1 << bits):
        indices = np.flatnonzero(bucket == number)
        if len(indices) < 2:
            continue
        part = keys[indices]
        order = np.lexsort((part[:, 1], part[:, 0]))  # stable: equal keys stay in the order of the file
        part = part[order]
        is_first = np.concatenate([[True], (part[1:] != part[:-1]).any(1)])
        first[indices[order]] = indices[order[is_first]][np.cumsum(is_first) - 1]
    return first


def count_overlap(train: np.ndarray, evaluation: np.ndarray) -> int:
    """Return the number of evaluation keys that are also training keys."""
    return int((first_occurrences(np.concatenate([train, evaluation]))[len(train) :] < len(train)).sum())


def keys_of(items: Sequence[T], key: Callable[[T], bytes]) -> np.ndarray:
    """Return (n, 2) uint64, equal for items with equal ``key``."""
    return as_keys([hashlib.blake2b(key(item), digest_size=KEY_BYTES).digest() for item in items])


def group_keys(groups: Sequence[Hashable]) -> np.ndarray | None:
    """Return (n, 2) uint64 digests of the groups of n rows, or None if no row has a group."""
    return None if all(group is None for group in groups) else as_keys(list(map(group_digest, groups)))


def _first_of_groups(groups: np.ndarray) -> np.ndarray:
    """Return the index of the first row of each row's group, or the row's index if it has no group."""
    first = first_occurrences(groups)
    ungrouped = ~(groups != 0).any(1)
    first[ungrouped] = np.flatnonzero(ungrouped)
    return first


def _connected(classes: Sequence[np.ndarray]) -> np.ndarray:
    """Return (n,) a component number per row, equal for directly or indirectly linked rows: the smallest index.

    Args:
        classes: Arrays of shape (n,), each with the index of the first row that a row is linked to.
    """
    units = classes[0]
    if len(classes) == 1:
        return units
    while True:
        previous = units
        for links in classes:
            smallest = np.full(len(units), len(units))
            np.minimum.at(smallest, links, units)
            units = smallest[links]
        if (units == previous).all():
            return units


def _sample_eval_rows(units: np.ndarray, distinct: np.ndarray, settings: DataSettings, seed: int) -> np.ndarray:
    """Return (n,) bool, True for held-out rows. Linked rows are held out together.

    Args:
        units: (n,) component of each row.
        distinct: (n,) True if a row is the first with its key.
    """
    if eval_reference(settings.eval) is not None:
        return np.zeros(len(units), bool)
    num_eval = _num_eval_rows(settings.eval, int(distinct.sum()))
    if distinct.all() and (units == np.arange(len(units))).all():  # no links: vectorized for millions of rows
        is_held_out = np.zeros(len(units), bool)
        permutation = _random(seed, _SPLITTING).permutation(len(units))
        is_held_out[permutation[: min(num_eval, len(units) - 1)]] = True
        return is_held_out
    order, unit_of = np.unique(units, return_inverse=True)
    is_held_out = np.zeros(len(order), bool)
    sizes = np.bincount(unit_of[distinct], minlength=len(order)).tolist()  # distinct rows in each
    if num_eval and len(order) == 1 and sizes[0] > 1:
        message = f"'{settings.group}' links all rows into one group, so none can be held out"
        raise UserError(message, location="data.group", hint="use another column, or set data.eval to a file or null")
    taken = 0
    for count, index in enumerate(_random(seed, _SPLITTING).permutation(len(order)).tolist()):
        size = sizes[index]
        # Include the last group if that is closer to the requested number.
        if taken >= num_eval or count == len(order) - 1 or (taken and taken + size - num_eval > num_eval - taken):
            break
        is_held_out[index] = True
        taken += size
    return is_held_out[unit_of]


def _num_eval_rows(share: EvalSets, distinct: int) -> int:
    """Return the number of held-out rows. A share holds out at least one row if another one remains."""
    number = eval_size(share)
    if number == 0:
        return 0
    if number < 1:
        return min(max(1, round(number * distinct)), distinct - 1)
    if number >= distinct:
        hint = "hold out fewer rows, so that some remain for training"
        raise UserError(f"data.eval requests {int(number)} of {distinct} distinct rows", hint=hint)
    return int(number)


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, stream])
