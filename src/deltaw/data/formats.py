"""Rows become records: what the columns of a file mean, and whether each row is valid.

It knows the usual formats of fine-tuning data and nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from deltaw.data.columns import kinds_of, known_names, listed, wrong_columns
from deltaw.data.messages import (
    MALFORMED,
    ROLES,
    WRONG_TYPE,
    Conversation,
    Message,
    conversation,
    read_messages,
    read_tools,
    text_of,
    without_nulls,
)
from deltaw.data.report import BadRowError, Refuse, refuse
from deltaw.data.rows import Row, Rows
from deltaw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from deltaw.data.row_stream import RowStream

FormName = Literal["auto", "messages", "prompt-completion", "text", "alpaca", "sharegpt", "evals"]
# Columns of labeled rows besides 'text' (see deltaw.data.classes).
LABELED_COLUMNS = ("label", "text_pair", "image")


@dataclass(frozen=True)
class Text:
    """Plain text: all of it is a label."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion, both plain strings; the completion is the label."""

    prompt: str
    completion: str
    system: str | None = None

    def conversation(self) -> Conversation:
        """The same as a conversation with one question."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        messages += [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]
        return Conversation(tuple(messages), (False,) * (len(messages) - 1) + (True,))


Record = Text | Pair | Conversation


def system_of(record: Record) -> str:
    """The system message that a record begins with; empty if there is none."""
    if isinstance(record, Conversation) and record.messages[0]["role"] == "system":
        return str(record.messages[0]["content"])
    return record.system or "" if isinstance(record, Pair) else ""


def with_system(record: Record | None, system: str | None) -> Record | None:
    """The same with a system message, if it has none and is not plain text."""
    if record is None or not system or system_of(record) or isinstance(record, Text):
        return record
    if isinstance(record, Pair):
        return replace(record, system=system)
    messages = tuple(_with_system(system, list(record.messages)))
    return replace(record, messages=messages, learned=(False, *record.learned))


@dataclass(frozen=True)
class Form:
    """One format: the columns it needs, those it can use, and how a row is read."""

    name: str
    needs: tuple[str, ...]
    can_use: tuple[str, ...]
    read: Callable[[Row, str], Record]


def known_columns() -> tuple[str, ...]:
    """Every column name that a format, or another task, reads."""
    of_forms = [column for form in FORMS for column in form.needs + form.can_use]
    return tuple(dict.fromkeys([*of_forms, *LABELED_COLUMNS, *known_names()]))


def check_columns(rows: Rows | RowStream, columns: Mapping[str, str]) -> None:
    """Raise a UserError if ``data.columns`` names a column that the file does not have."""
    for ours, theirs in columns.items():
        if theirs not in rows.columns:
            what = f"the file has no column '{theirs}'"
            raise UserError(what, where=f"data.columns.{ours} for {rows.name}", hint=did_you_mean(theirs, rows.columns))


def choose_form(rows: Rows | RowStream, form: str = "auto", columns: Mapping[str, str] | None = None) -> Form:
    """The format of a file by its columns, or ``form``, if the file has its columns.

    Args:
        rows: the file.
        form: a format's name, or "auto".
        columns: our name -> the file's column.

    Raises:
        UserError: a column is missing, or no format fits; the message lists the columns of the file.
    """
    columns = columns or {}
    check_columns(rows, columns)
    there = (set(rows.columns) - set(columns.values())) | set(columns)
    fitting = [candidate for candidate in FORMS if there.issuperset(candidate.needs)]
    # Columns named in data.columns decide first, then the order of the formats.
    fitting.sort(key=lambda candidate: -len(set(columns) & set(candidate.needs + candidate.can_use)))
    if form != "auto":
        asked = next(candidate for candidate in FORMS if candidate.name == form)
        if asked not in fitting:
            lacking = [column for column in asked.needs if column not in there]
            raise _no_form(rows, f"the format '{form}' needs the column '{lacking[0]}'", lacking[0])
        return asked
    if not fitting:
        raise _no_form(rows, "no format has these columns", None)
    return fitting[0]


def unused_columns(rows: Rows | RowStream, form: Form, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Columns of the file that ``form`` does not read."""
    used = {columns.get(name, name) for name in form.needs + form.can_use}
    return tuple(column for column in rows.columns if column not in used)


def read_records(
    rows: Rows, indices: Sequence[int], form: Form, columns: Mapping[str, str], on_bad: Refuse = refuse
) -> list[Record | None]:
    """The rows at ``indices`` as records; None for one that ``on_bad`` was told of.

    Raises:
        BadRowError: a row lacks a column, or a value has the wrong type; the message names the row, the key
            and, in a conversation, the turn.
    """
    records: list[Record | None] = []
    for place, index in enumerate(indices):
        _, row = rows[index]
        if rows.fills_nulls:
            row = {column: without_nulls(value) for column, value in row.items()}
        try:
            records.append(read_record(row, form, columns, rows.place(index)))
        except BadRowError as error:
            on_bad(place, error)
            records.append(None)
    return records


def read_record(row: Row, form: Form, columns: Mapping[str, str], where: str) -> Record:
    """One row as a record.

    Raises:
        BadRowError: it lacks a column, or a value has the wrong type.
    """
    if columns:
        row = {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}
    require(row, form.needs, where, f"every row of the format '{form.name}' has {listed(form.needs)}", columns)
    return form.read(row, where)


def require(
    row: Row, needs: Sequence[str], where: str, hint: str, columns: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise a BadRowError if a row has no value in one of the columns that it needs.

    Args:
        columns: our name -> the file's column, for the message.
    """
    for column in needs:
        if row.get(column) is None:
            found = f"'{columns.get(column, column)}' is " + ("empty (null)" if column in row else "missing")
            raise BadRowError(found, reason=found, where=where, hint=hint)


def _no_form(rows: Rows | RowStream, what: str, lacking: str | None) -> UserError:
    error = wrong_columns("causal-lm", rows.columns, rows.name)
    hint = f"did you mean data.columns: {{{lacking}: …}}? " if lacking else ""
    if not hint:
        near = [(column, did_you_mean(column, known_columns())) for column in rows.columns]
        hint = "; ".join(f"'{column}': {text}" for column, text in near if text.startswith("did"))
        hint += " " if hint else ""
    return UserError(what, where=error.where, hint=hint + str(error.hint))


def _system(row: Row, where: str) -> str | None:
    value = row.get("system")
    return None if value is None or value == "" else text_of(value, "system", where)


def read_pair(row: Row, where: str) -> Record:
    """A row with a prompt and a completion, each text or messages, as a record.

    Raises:
        BadRowError: a value has the wrong type, or turns are out of order.
    """
    prompt, completion, system = row["prompt"], row["completion"], _system(row, where)
    tools = read_tools(row.get("tools"), where)
    if not (tools or isinstance(prompt, list) or isinstance(completion, list)):
        return Pair(text_of(prompt, "prompt", where), text_of(completion, "completion", where), system)
    before, after = _as_messages(row, "prompt", "user", where), _as_messages(row, "completion", "assistant", where)
    return conversation(_with_system(system, before), after, where, tools)


def _as_messages(row: Row, key: str, role: str, where: str) -> list[Message]:
    """The value of ``key``, a list of messages or the text of one, as messages."""
    value = row[key]
    return read_messages(value, key, where) if isinstance(value, list) else [_message(role, value, key, where)]


def _message(role: str, text: object, key: str, where: str) -> Message:
    return {"role": role, "content": text_of(text, key, where)}


def _read_alpaca(row: Row, where: str) -> Conversation:
    question = text_of(row["instruction"], "instruction", where)
    given = "" if row.get("input") is None else text_of(row["input"], "input", where)
    before: Message = {"role": "user", "content": f"{question}\n\n{given}" if given.strip() else question}
    after = _message("assistant", row["output"], "output", where)
    return conversation(_with_system(_system(row, where), [before]), [after], where)


def _read_evals(row: Row, where: str) -> Record:
    ideal = row["ideal"]
    if isinstance(ideal, list):
        if not ideal:
            raise BadRowError("'ideal' is an empty list", reason="no answer", where=where, hint="give an answer")
        ideal = ideal[0]
    if isinstance(row["input"], list):
        answer = [_message("assistant", ideal, "ideal", where)]
        return conversation(read_messages(row["input"], "input", where), answer, where)
    return Pair(text_of(row["input"], "input", where), text_of(ideal, "ideal", where))


def _read_messages(row: Row, where: str) -> Conversation:
    messages = read_messages(row["messages"], "messages", where)
    return conversation([], messages, where, read_tools(row.get("tools"), where))


_SHAREGPT_ROLES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "observation": "tool"}


def _read_sharegpt(row: Row, where: str) -> Conversation:
    turns = row["conversations"]
    if not isinstance(turns, list):
        what = f"'conversations' must be a list but is a {type(turns).__name__}"
        hint = 'write it as [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]'
        raise BadRowError(what, reason=WRONG_TYPE, where=where, hint=hint)
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            what = "a turn must be an object with 'from' and 'value'"
            raise BadRowError(what, reason=MALFORMED, where=place, hint='write it as {"from": "human", "value": "…"}')
        speaker = text_of(turn["from"], "from", place)
        if speaker not in _SHAREGPT_ROLES:
            hint = did_you_mean(speaker, _SHAREGPT_ROLES)
            raise BadRowError(f"'{speaker}' is not a known speaker", reason=MALFORMED, where=place, hint=hint)
        message = _message(_SHAREGPT_ROLES[speaker], turn["value"], "value", place)
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(message)
    messages = _with_system(_system(row, where), messages)
    return conversation([], messages, where, read_tools(row.get("tools"), where))


def _with_system(system: str | None, messages: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *messages] if system else messages


def _read_text(row: Row, where: str) -> Text:
    return Text(text_of(row["text"], "text", where))


_READ = (_read_messages, _read_sharegpt, read_pair, _read_alpaca, _read_evals, _read_text)
# All formats, in the order in which they are tried.
FORMS = tuple(
    Form(kind.name, tuple(column for (column,) in kind.required), kind.optional, read)
    for kind, read in zip(kinds_of("causal-lm"), _READ, strict=True)
)
