"""Columns of the rows of each registered task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from deltaw.errors import UserError
from deltaw.settings import task_registry
from deltaw.settings.row_kinds import (
    BUILT_IN_KINDS,
    GRADED_PASSAGES,
    PASSAGE_SEARCH,
    PLAIN_TEXT,
    PROMPTED_FORMATS,
    RowKind,
)


def row_kinds() -> tuple[RowKind, ...]:
    """Return the kinds of rows of all tasks, in the order in which ``deltaw init`` tries them."""
    return tuple(dict.fromkeys([*BUILT_IN_KINDS, *(k for e in task_registry.registered() for k in e.row_kinds)]))


def kinds_of(task: str) -> tuple[RowKind, ...]:
    """Return the kinds of rows that a task accepts; empty if it does not declare them."""
    accepted = task_registry.entry_of(task).row_kinds
    return tuple(kind for kind in row_kinds() if kind in accepted)


def tasks_of(kind: RowKind) -> tuple[str, ...]:
    """Return the tasks that accept these rows. ``deltaw init`` infers the first one, which prefers this kind most."""
    accepting = [entry for entry in task_registry.registered() if kind in entry.row_kinds]
    return tuple(entry.name for entry in sorted(accepting, key=lambda entry: entry.row_kinds.index(kind)))


def mapped_columns(columns: Collection[str], mapped: Mapping[str, str]) -> list[str]:
    """Return the columns of a file as named after ``data.columns`` is applied."""
    return [*mapped, *(column for column in columns if column not in mapped.values())]


def require_columns(task: str, columns: Collection[str], file: str, mapped: Mapping[str, str]) -> None:
    """Reject a file if its columns fit no row kind of the task.

    Raises:
        UserError: if the columns do not fit. The message lists the columns of the file and of the task.
    """
    kinds = kinds_of(task)
    available = mapped_columns(columns, mapped)
    if not kinds or any(kind.fits(available) for kind in kinds):
        return
    raise wrong_columns(task, columns, file)


def listed(names: Sequence[str]) -> str:
    """Return the first 20 names in quotes, for a message."""
    quoted_names = ", ".join(f"'{name}'" for name in names[:20])
    return quoted_names + (", …" if len(names) > 20 else "") if quoted_names else "none"


def all_columns() -> tuple[str, ...]:
    """Return the names of all columns that a format or a task reads."""
    text = [column for kind in (*PROMPTED_FORMATS, PLAIN_TEXT) for column in kind.columns]
    return tuple(dict.fromkeys([*text, "label", "text_pair", "image", *(c for k in row_kinds() for c in k.columns)]))


def _alternatives(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names[:3])


def wrong_columns(task: str, columns: Collection[str], file: str) -> UserError:
    """Return the error for columns that fit no kind of rows of the task."""
    kinds = kinds_of(task)
    other_kinds = [kind for kind in row_kinds() if kind not in kinds and kind.infer(columns) is not None]
    missing = [absent[0] for kind in kinds if len(absent := kind.missing(columns)) == 1 < len(kind.required)]
    hint = ""
    if missing:
        hint = f"if one of them is {_alternatives(missing[0])}, set data.columns: {{{missing[0][0]}: NAME}}. "
    hint += f"For {other_kinds[0].name}, set task: {tasks_of(other_kinds[0])[0]}. " if other_kinds else ""
    if kinds == (GRADED_PASSAGES,) and other_kinds and other_kinds[0] == PASSAGE_SEARCH:
        hint += "Use deltaw data mine to find negatives. "
    hint += f"{task} accepts {'; '.join(map(str, kinds))}. Map other names with data.columns: "
    hint += f"{{{kinds[0].required[0][0]}: …}}" if kinds else "{…}"
    location = f"{file}, whose columns are {listed(list(columns))}"
    return UserError(f"the columns do not fit the task {task}", location=location, hint=hint)
