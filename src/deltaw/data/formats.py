"""Rows become records: what the columns of a file mean, and whether each row is valid.

It knows the usual formats of fine-tuning data and nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from deltaw.data.sources import Row, Rows
from deltaw.errors import UserError, did_you_mean

FormName = Literal["auto", "messages", "prompt-completion", "text", "alpaca", "sharegpt", "evals"]
Message = dict[str, object]
# Columns of labeled rows besides 'text' (see deltaw.data.classes).
LABELLED_COLUMNS = ("label", "text_pair", "image")


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
        messages += [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.completion},
        ]
        return Conversation(tuple(messages), (False,) * (len(messages) - 1) + (True,))


@dataclass(frozen=True)
class Conversation:
    """Messages with ``role`` and ``content``; the last is the assistant's.

    Attributes:
        messages: the turns.
        learned: for each turn, whether it may be a label.
        trailing: turns after the assistant's last one, which were dropped.
    """

    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    trailing: int = 0


Record = Text | Pair | Conversation


@dataclass(frozen=True)
class Form:
    """One format: the columns it needs, those it can use, and how a row is read."""

    name: str
    needs: tuple[str, ...]
    can_use: tuple[str, ...]
    read: Callable[[Row, str], Record]


def forms() -> tuple[Form, ...]:
    """All formats, in the order in which they are tried."""
    return (
        Form("messages", ("messages",), (), _read_messages),
        Form("sharegpt", ("conversations",), ("system",), _read_sharegpt),
        Form("prompt-completion", ("prompt", "completion"), ("system",), _read_pair),
        Form("alpaca", ("instruction", "output"), ("input", "system"), _read_alpaca),
        Form("evals", ("input", "ideal"), (), _read_evals),
        Form("text", ("text",), (), _read_text),
    )


def known_columns() -> tuple[str, ...]:
    """Every column name that a format, or a task with labels, reads."""
    of_forms = [column for form in forms() for column in form.needs + form.can_use]
    return tuple(dict.fromkeys([*of_forms, *LABELLED_COLUMNS]))


def check_columns(rows: Rows, columns: Mapping[str, str]) -> None:
    """Raise a UserError if ``data.columns`` names a column that the file does not have."""
    for ours, theirs in columns.items():
        if theirs not in rows.columns:
            raise UserError(
                f"the file has no column '{theirs}'",
                where=f"data.columns.{ours} for {rows.name}",
                hint=did_you_mean(theirs, rows.columns),
            )


def choose_form(rows: Rows, form: str = "auto", columns: Mapping[str, str] | None = None) -> Form:
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
    fitting = [candidate for candidate in forms() if there.issuperset(candidate.needs)]
    # Columns named in data.columns decide first, then the order of the formats.
    fitting.sort(key=lambda candidate: -len(set(columns) & set(candidate.needs + candidate.can_use)))
    if form != "auto":
        asked = next(candidate for candidate in forms() if candidate.name == form)
        if asked not in fitting:
            lacking = [column for column in asked.needs if column not in there]
            raise _no_form(rows, f"the format '{form}' needs the column '{lacking[0]}'", lacking[0])
        return asked
    if not fitting:
        raise _no_form(rows, "no format has these columns", None)
    return fitting[0]


def unused_columns(rows: Rows, form: Form, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Columns of the file that ``form`` does not read."""
    used = {columns.get(name, name) for name in form.needs + form.can_use}
    return tuple(column for column in rows.columns if column not in used)


def read_records(rows: Rows, indices: Sequence[int], form: Form, columns: Mapping[str, str]) -> list[Record]:
    """The rows at ``indices`` as records.

    Raises:
        UserError: a row lacks a column, or a value has the wrong type; the message names the row, the key
            and, in a conversation, the turn.
    """
    records = []
    for index in indices:
        _, row = rows[index]
        if columns:
            row = {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}
        where = rows.place(index)
        for column in form.needs:
            if row.get(column) is None:
                found = "is empty (null)" if column in row else "is missing"
                shown = columns.get(column, column)
                raise UserError(
                    f"'{shown}' {found}",
                    where=where,
                    hint=f"every row of the format '{form.name}' has {_list(form.needs)}",
                )
        records.append(form.read(row, where))
    return records


def _no_form(rows: Rows, what: str, lacking: str | None) -> UserError:
    known = known_columns()
    if lacking:
        hint = f"did you mean data.columns: {{{lacking}: …}}? "
    else:
        near = [(column, did_you_mean(column, known)) for column in rows.columns]
        hint = "; ".join(f"'{column}': {said}" for column, said in near if said.startswith("did")) or ""
        hint = hint + ". " if hint else ""
    shapes = "; ".join(f"{form.name} ({', '.join(form.needs)})" for form in forms())
    return UserError(
        what,
        where=f"{rows.name}, whose columns are {_list(rows.columns)}",
        hint=f"{hint}the formats are {shapes}; map other names with data.columns: {{prompt: question, …}}",
    )


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:20])
    return shown + (", …" if len(names) > 20 else "") if shown else "none"


def _string(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise UserError(f"'{key}' must be text but is {kind}", where=where, hint="write it as a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"'{key}' holds half of a surrogate pair, which is not text",
                where=where,
                hint="write the whole character, or remove it",
            ) from error
    return value


def _system(row: Row, where: str) -> str | None:
    value = row.get("system")
    return None if value is None or value == "" else _string(value, "system", where)


def _read_text(row: Row, where: str) -> Text:
    return Text(_string(row["text"], "text", where))


def _read_pair(row: Row, where: str) -> Record:
    prompt, completion, system = row["prompt"], row["completion"], _system(row, where)
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Pair(_string(prompt, "prompt", where), _string(completion, "completion", where), system)
    if isinstance(prompt, list):
        before = _messages(prompt, "prompt", where)
    else:
        before = [{"role": "user", "content": _string(prompt, "prompt", where)}]
    if isinstance(completion, list):
        after = _messages(completion, "completion", where)
    else:
        after = [{"role": "assistant", "content": _string(completion, "completion", where)}]
    return _conversation(_with_system(system, before), after, where)


def _read_alpaca(row: Row, where: str) -> Conversation:
    instruction = _string(row["instruction"], "instruction", where)
    given = row.get("input")
    given = "" if given is None else _string(given, "input", where)
    question: Message = {
        "role": "user",
        "content": f"{instruction}\n\n{given}" if given.strip() else instruction,
    }
    answer: Message = {"role": "assistant", "content": _string(row["output"], "output", where)}
    return _conversation(_with_system(_system(row, where), [question]), [answer], where)


def _read_evals(row: Row, where: str) -> Record:
    ideal = row["ideal"]
    if isinstance(ideal, list):
        if not ideal:
            raise UserError("'ideal' is an empty list", where=where, hint="give at least one answer")
        ideal = ideal[0]
    answer = _string(ideal, "ideal", where)
    if not isinstance(row["input"], list):
        return Pair(_string(row["input"], "input", where), answer)
    return _conversation(
        _messages(row["input"], "input", where), [{"role": "assistant", "content": answer}], where
    )


def _read_messages(row: Row, where: str) -> Conversation:
    return _conversation([], _messages(row["messages"], "messages", where), where)


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def _read_sharegpt(row: Row, where: str) -> Conversation:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise UserError(
            f"'conversations' must be a list but is a {type(turns).__name__}",
            where=where,
            hint='write it as [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]',
        )
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise UserError(
                "a turn must be an object with 'from' and 'value'",
                where=place,
                hint='write it as {"from": "human", "value": "…"}',
            )
        speaker = _string(turn["from"], "from", place)
        if speaker not in _SHAREGPT_ROLES:
            raise UserError(
                f"'{speaker}' is not a known speaker",
                where=place,
                hint=did_you_mean(speaker, _SHAREGPT_ROLES),
            )
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": _string(turn["value"], "value", place)})
    return _conversation([], _with_system(_system(row, where), messages), where)


def _with_system(system: str | None, messages: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *messages] if system else messages


_ROLES = ("system", "user", "assistant", "tool")


def _messages(value: object, key: str, where: str) -> list[Message]:
    """A list of messages, each with a known role and text as content; null keys are dropped."""
    if not isinstance(value, list):
        raise UserError(
            f"'{key}' must be a list of messages but is a {type(value).__name__}",
            where=where,
            hint='write it as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]',
        )
    messages: list[Message] = []
    for number, turn in enumerate(value, start=1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, dict):
            raise UserError(
                f"a message must be an object but is a {type(turn).__name__}",
                where=place,
                hint="a message is " + '{"role": "user", "content": "…"}',
            )
        message: Message = {name: part for name, part in turn.items() if part is not None}
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            hint = f": {did_you_mean(role, _ROLES)}" if isinstance(role, str) else ""
            raise UserError(f"the role is {role!r}{hint}", where=place, hint=f"the roles are {_list(_ROLES)}")
        if role == "assistant" and message.get("tool_calls"):
            message.setdefault("content", "")
        message["content"] = _string(message.get("content"), "content", place)
        messages.append(message)
    return messages


def _conversation(before: list[Message], after: list[Message], where: str) -> Conversation:
    """Join the context and the part that may be labels, and check the order of the turns."""
    turns = before + after
    _check_order(turns, where)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < len(before):
        raise UserError(
            "no turn is the assistant's, so there is no label",
            where=where,
            hint="end the conversation with a message of the role 'assistant'",
        )
    learned = tuple(
        turn["role"] == "assistant" and i >= len(before) and turn.pop("weight", 1) != 0
        for i, turn in enumerate(turns[: last + 1])
    )
    return Conversation(tuple(turns[: last + 1]), learned, trailing=len(turns) - last - 1)


def _check_order(turns: Sequence[Message], where: str) -> None:
    """System first or not at all, then user and assistant by turns; a tool answers the assistant."""
    may_follow = {
        None: ("system", "user"),
        "system": ("user", "assistant"),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    previous: str | None = None
    for number, turn in enumerate(turns, start=1):
        role = str(turn["role"])
        if role not in may_follow[previous]:
            after = f"cannot follow '{previous}'" if previous else "cannot begin a conversation"
            allowed = " or ".join(f"'{name}'" for name in may_follow[previous])
            raise UserError(
                f"turn {number} is out of order: '{role}' {after}",
                where=f"{where}, turn {number}",
                hint=f"expected {allowed}",
            )
        previous = role


def read_prompt(value: object, where: str) -> list[Message]:
    """Messages that ask for an answer.

    Raises:
        UserError: they are not messages, are out of order, or end with the assistant's.
    """
    messages = _messages(value, "messages", where)
    _check_order(messages, where)
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError("there is no question to answer", where=where, hint="end with a message of the user")
    return messages


def without_blank_answers(conversation: Conversation) -> Conversation:
    """The same, with empty answers of the assistant marked as no labels."""
    learned = tuple(
        may and bool(str(message["content"]).strip() or message.get("tool_calls"))
        for may, message in zip(conversation.learned, conversation.messages, strict=True)
    )
    return replace(conversation, learned=learned)
