"""Row formats of fine-tuning data: column names, and the conversion of rows to records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from deltaw.data.bad_rows import BadRowError, OnBadRow, raise_error
from deltaw.data.messages import (
    MALFORMED,
    ROLES,
    WRONG_TYPE,
    Conversation,
    Message,
    conversation,
    drop_nulls,
    read_messages,
    read_tools,
    text_of,
)
from deltaw.data.row_images import COLUMNS, RowImage, count_markers, take_images
from deltaw.data.rows import NumberedRows, Row, RowFolder
from deltaw.errors import UserError, did_you_mean
from deltaw.settings import task_registry
from deltaw.settings.columns import all_columns, listed, wrong_columns
from deltaw.settings.row_kinds import PLAIN_TEXT, PROMPTED_FORMATS

if TYPE_CHECKING:
    from deltaw.data.row_stream import RowStream


@dataclass(frozen=True)
class Text:
    """Plain text, all of which is a label."""

    text: str


@dataclass(frozen=True)
class Pair:
    """Prompt and completion as strings. The completion is the label. The other texts refer to the images."""

    prompt: str
    completion: str
    system: str | None = None
    images: tuple[RowImage, ...] = ()

    def conversation(self) -> Conversation:
        """Return the pair as a conversation."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        messages += [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]
        learned = (False,) * (len(messages) - 1) + (True,)
        return Conversation(tuple(messages), learned, images=self.images)


Record = Text | Pair | Conversation


def system_of(record: Record) -> str:
    """Return the system message of a record, or an empty string."""
    if isinstance(record, Conversation) and record.messages[0]["role"] == "system":
        return str(record.messages[0]["content"])
    return record.system or "" if isinstance(record, Pair) else ""


def with_system(record: Record | None, system: str | None) -> Record | None:
    """Add a system message to a record that has none, unless it is plain text."""
    if record is None or not system or system_of(record) or isinstance(record, Text):
        return record
    if isinstance(record, Pair):
        return replace(record, system=system)
    messages = tuple(_with_system(system, list(record.messages)))
    return replace(record, messages=messages, learned=(False, *record.learned))


def with_images(record: Record, images: tuple[RowImage, ...]) -> Record:
    """Add the images that a record refers to, without those of dropped turns at its end."""
    if isinstance(record, Text):
        return record
    if isinstance(record, Conversation) and record.trailing:
        images = images[: count_markers(record.messages)]
    return replace(record, images=images)


@dataclass(frozen=True)
class RowFormat:
    """Row format.

    Attributes:
        name: Name of the format.
        needs: Required columns.
        can_use: Optional columns.
        read: Converts a row to a record. The second argument is its location, for errors.
    """

    name: str
    needs: tuple[str, ...]
    can_use: tuple[str, ...]
    read: Callable[[Row, str], Record]

    @property
    def reads_images(self) -> bool:
        """Return True if rows may have images."""
        return self.name != PLAIN_TEXT.name


def check_columns(rows: NumberedRows | RowStream, columns: Mapping[str, str]) -> None:
    """Raise a UserError if ``data.columns`` names a column that the file does not have."""
    for name, column in columns.items():
        if column not in rows.columns:
            message = f"the file has no column '{column}'"
            raise UserError(
                message, location=f"data.columns.{name} for {rows.name}", hint=did_you_mean(column, rows.columns)
            )


def choose_form(
    rows: NumberedRows | RowStream, form: str = "auto", columns: Mapping[str, str] | None = None
) -> RowFormat:
    """Return the format that fits the columns of a file.

    Args:
        rows: Rows of the file.
        form: Name of a format, or "auto".
        columns: Maps deltaw's column names to those of the file.

    Raises:
        UserError: if a column is missing, or no format fits. The message lists the columns of the file.
    """
    columns = columns or {}
    check_columns(rows, columns)
    available = (set(rows.columns) - set(columns.values())) | set(columns)
    fitting = [candidate for candidate in FORMS if available.issuperset(candidate.needs)]
    # Prefer the format with the most columns of data.columns, then the first one.
    fitting.sort(key=lambda candidate: -len(set(columns) & set(candidate.needs + candidate.can_use)))
    if form != "auto":
        requested = next(candidate for candidate in FORMS if candidate.name == form)
        if requested not in fitting:
            missing = [column for column in requested.needs if column not in available]
            raise _format_error(rows, f"the format '{form}' needs the column '{missing[0]}'", missing[0])
        return requested
    if not fitting:
        raise _format_error(rows, "no format has these columns", None)
    return fitting[0]


def unused_columns(
    rows: NumberedRows | RowStream, form: RowFormat, columns: Mapping[str, str], *, images: bool = False
) -> tuple[str, ...]:
    """Return the columns of the file that ``form`` does not read.

    Args:
        images: The rows may have images.
    """
    names = form.needs + form.can_use + (COLUMNS if images and form.reads_images else ())
    used = {columns.get(name, name) for name in names}
    return tuple(column for column in rows.columns if column not in used)


def read_records(
    rows: NumberedRows,
    indices: Sequence[int],
    form: RowFormat,
    columns: Mapping[str, str],
    on_bad: OnBadRow = raise_error,
    *,
    images: bool = False,
) -> list[Record | None]:
    """Convert the rows at ``indices`` to records. Rows that were passed to ``on_bad`` become None.

    Args:
        images: Read the images of the rows.

    Raises:
        BadRowError: if a row lacks a column, or a value has the wrong type. The message names the row, the key and, in
            a conversation, the turn.
    """
    records: list[Record | None] = []
    for position, index in enumerate(indices):
        _, row = rows[index]
        if rows.fills_nulls:
            row = {column: drop_nulls(value) for column, value in row.items()}
        try:
            folder = rows.folder(index) if images else None
            records.append(read_record(row, form, columns, rows.row_location(index), folder))
        except BadRowError as error:
            on_bad(position, error)
            records.append(None)
    return records


def read_record(
    row: Row, form: RowFormat, columns: Mapping[str, str], location: str, image_folder: RowFolder | None = None
) -> Record:
    """Convert one row to a record.

    Args:
        image_folder: Folder of the row's images. None to read texts only.

    Raises:
        BadRowError: if it lacks a column, or a value has the wrong type.
    """
    if columns:
        row = {**row, **{name: row.get(column) for name, column in columns.items()}}
    require(row, form.needs, location, f"every row of the format '{form.name}' has {listed(form.needs)}", columns)
    if image_folder is None or not form.reads_images:
        return form.read(row, location)
    row, images = take_images(row, image_folder, location, form.needs + form.can_use)
    return with_images(form.read(row, location), images)


def require(
    row: Row, needs: Sequence[str], location: str, hint: str, columns: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise a BadRowError if a row has no value in a required column.

    Args:
        columns: Maps deltaw's column names to those of the file, for the message.
    """
    for column in needs:
        if row.get(column) is None:
            problem = f"'{columns.get(column, column)}' is " + ("empty (null)" if column in row else "missing")
            raise BadRowError(problem, reason=problem, location=location, hint=hint)


# Number of columns for which similar names are searched.
_MAX_NEAR = 20


def _format_error(rows: NumberedRows | RowStream, message: str, missing: str | None) -> UserError:
    error = wrong_columns(task_registry.default_task(), rows.columns, rows.name)
    hint = f"did you mean data.columns: {{{missing}: …}}? " if missing else ""
    if not hint:
        near = [(column, did_you_mean(column, all_columns())) for column in rows.columns[:_MAX_NEAR]]
        hint = "; ".join(f"'{column}': {text}" for column, text in near if text.startswith("did"))
        hint += " " if hint else ""
    return UserError(message, location=error.location, hint=hint + str(error.hint))


def _system(row: Row, location: str) -> str | None:
    value = row.get("system")
    return None if value is None or value == "" else text_of(value, "system", location)


def read_pair(row: Row, location: str) -> Record:
    """Convert a row with a prompt and a completion, each text or messages, to a record.

    Raises:
        BadRowError: if a value has the wrong type, or turns are out of order.
    """
    prompt = row["prompt"]
    completion = row["completion"]
    system = _system(row, location)
    tools = read_tools(row.get("tools"), location)
    if not (tools or isinstance(prompt, list) or isinstance(completion, list)):
        return Pair(text_of(prompt, "prompt", location), text_of(completion, "completion", location), system)
    context = _as_messages(row, "prompt", "user", location)
    turns = _as_messages(row, "completion", "assistant", location)
    return conversation(_with_system(system, context), turns, location, tools)


def _as_messages(row: Row, key: str, role: str, location: str) -> list[Message]:
    """Return the value of ``key``, a list of messages or the text of one, as messages."""
    value = row[key]
    return read_messages(value, key, location) if isinstance(value, list) else [_message(role, value, key, location)]


def _message(role: str, text: object, key: str, location: str) -> Message:
    return {"role": role, "content": text_of(text, key, location)}


def _read_alpaca(row: Row, location: str) -> Conversation:
    question = text_of(row["instruction"], "instruction", location)
    input_text = "" if row.get("input") is None else text_of(row["input"], "input", location)
    user: Message = {"role": "user", "content": f"{question}\n\n{input_text}" if input_text.strip() else question}
    assistant = _message("assistant", row["output"], "output", location)
    return conversation(_with_system(_system(row, location), [user]), [assistant], location)


def _read_evals(row: Row, location: str) -> Record:
    ideal = row["ideal"]
    if isinstance(ideal, list):
        if not ideal:
            raise BadRowError("'ideal' is an empty list", reason="no answer", location=location, hint="give an answer")
        ideal = ideal[0]
    if isinstance(row["input"], list):
        answer = [_message("assistant", ideal, "ideal", location)]
        return conversation(read_messages(row["input"], "input", location), answer, location)
    return Pair(text_of(row["input"], "input", location), text_of(ideal, "ideal", location))


def _read_messages(row: Row, location: str) -> Conversation:
    messages = read_messages(row["messages"], "messages", location)
    return conversation([], messages, location, read_tools(row.get("tools"), location))


_SHAREGPT_ROLES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "observation": "tool"}


def _read_sharegpt(row: Row, location: str) -> Conversation:
    turns = row["conversations"]
    if not isinstance(turns, list):
        error_text = f"'conversations' must be a list but is a {type(turns).__name__}"
        hint = 'write it as [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]'
        raise BadRowError(error_text, reason=WRONG_TYPE, location=location, hint=hint)
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        turn_location = f"{location}, turn {number}"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            error_text = "a turn must be an object with 'from' and 'value'"
            raise BadRowError(
                error_text, reason=MALFORMED, location=turn_location, hint='write it as {"from": "human", "value": "…"}'
            )
        speaker = text_of(turn["from"], "from", turn_location)
        if speaker not in _SHAREGPT_ROLES:
            hint = did_you_mean(speaker, _SHAREGPT_ROLES)
            raise BadRowError(f"'{speaker}' is an unknown speaker", reason=MALFORMED, location=turn_location, hint=hint)
        message = _message(_SHAREGPT_ROLES[speaker], turn["value"], "value", turn_location)
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(message)
    messages = _with_system(_system(row, location), messages)
    return conversation([], messages, location, read_tools(row.get("tools"), location))


def _with_system(system: str | None, messages: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *messages] if system else messages


def _read_text(row: Row, location: str) -> Text:
    return Text(text_of(row["text"], "text", location))


_Reader = Callable[[Row, str], Record]
_READ: tuple[_Reader, ...] = (_read_messages, _read_sharegpt, read_pair, _read_alpaca, _read_evals, _read_text)
# All formats, in order of preference.
FORMS = tuple(
    RowFormat(kind.name, tuple(column for (column,) in kind.required), kind.optional, read)
    for kind, read in zip((*PROMPTED_FORMATS, PLAIN_TEXT), _READ, strict=True)
)
