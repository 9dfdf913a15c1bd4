"""Readers of rows with a prompt: with one or several answers, or for completions that the model generates.

Row formats are those of :mod:`deltaw.data.formats`. Generated completions do not use the answers of the rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.bad_rows import BadRowError
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import FORMS, Pair, Record
from deltaw.data.messages import Conversation, Message, empty_text, is_blank
from deltaw.data.report import PreparationReport
from deltaw.data.row_images import ImagePlacer, take_images
from deltaw.data.rows import Row
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.data import DataSettings
from deltaw.settings.row_kinds import PAIR_COLUMNS, PROMPT_ANSWERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
import abc
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from deltaw.data.bad_rows import OnBadRow
from deltaw.data.formats import read_pair, require, system_of, with_images, with_system
from deltaw.data.long_rows import all_distinct
from deltaw.data.messages import WRONG_TYPE
from deltaw.data.report import count_system, frequent
from deltaw.data.row_reader import RowReader
from deltaw.data.rows import NumberedRows
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # rows per tokenizer call
_IMAGES = "images"  # column of the images that the texts refer to, in order


class AnswerReader(RowReader[RowGroup]):
    """Reads files with a prompt and one or several answers per row.

    Attributes:
        answers: Names of the columns with answers.
    """

    answers: ClassVar[tuple[str, ...]]
    can_use: tuple[str, ...] = ("prompt", "system", "tools")
    too_long_text = "with an answer that is, with its prompt, longer than"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        log: LogFunction = ignore_line,
        images: ImagePlacer | None = None,
    ) -> None:
        super().__init__(settings, tokenizer, log=log)
        if settings.form != "auto":
            raise UserError(f"{self.noun} has one form", location="data.form", hint="set it to auto")
        self.images = images
        if tokenizer is not None:
            self.encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date, images)
            self.template = self.encoder.template
            self.date = self.encoder.template_date

    @abc.abstractmethod
    def records(self, row: Row, location: str) -> tuple[Record, ...]:
        """Return each answer of a row with its prompt.

        Raises:
            BadRowError: if a value is missing or has the wrong type.
        """

    @property
    def added_prefix(self) -> str | None:
        return self.encoder.added_prefix

    def encode(
        self, records: Sequence[Record | None], locations: Sequence[str], on_bad: OnBadRow
    ) -> list[list[Encoded]]:
        """Tokenize records, see :meth:`deltaw.data.templates.Encoder.encode`."""
        return self.encoder.encode(records, locations, on_bad)

    def group(self, examples: tuple[Example, ...], row: Row, location: str) -> RowGroup:
        """Build the row group of the loss."""
        return RowGroup(examples)

    def groups(self, items: Sequence[RowGroup]) -> list[Hashable]:
        """Return the prompt of each row, so that rows with one prompt are on the same side of the split. Return None
        for all rows if they have the same prompt.
        """
        prompts: list[Hashable] = [prompt_key(item.rows[0]) for item in items]
        return prompts if len(set(prompts)) > 1 else [None] * len(items)

    def examples(self, rows: NumberedRows, indices: Sequence[int]) -> Iterator[RowGroup | None]:
        for start in range(0, len(indices), _CHUNK):
            part = indices[start : start + _CHUNK]
            for index, encoded in zip(part, self._encoded(rows, part), strict=True):
                try:
                    group = None if encoded is None else self._group(rows, index, encoded)
                except BadRowError as error:
                    self.skip(rows, index, error)
                    group = None
                yield group

    def row(self, rows: NumberedRows, index: int) -> Row:
        row = super().row(rows, index)
        if self.images is None:
            return row
        row, images = take_images(row, rows.folder(index), rows.row_location(index))
        return {**row, _IMAGES: images} if images else row

    def read_row(self, rows: NumberedRows, index: int) -> tuple[Record, ...]:
        return self.records(self.row(rows, index), rows.row_location(index))

    def _encoded(self, rows: NumberedRows, indices: Sequence[int]) -> list[list[list[Encoded]] | None]:
        """Return the tokens of each row's answers, or None if the row is unusable."""
        count = len(self.answers)
        records: list[Record | None] = []
        locations: list[str] = []
        bad: set[int] = set()

        def on_bad(position: int, error: BadRowError) -> None:
            if position // count not in bad:
                bad.add(position // count)
                self.skip(rows, indices[position // count], error)

        for number, index in enumerate(indices):
            location = rows.row_location(index)
            answers: tuple[Record | None, ...] = (None,) * count
            try:
                row = self.row(rows, index)
                answers = self.records(row, location)
                if self.images is not None and (images := row.get(_IMAGES)):
                    answers = tuple(with_images(record, images) for record in answers)  # type: ignore[arg-type]
            except BadRowError as error:
                on_bad(count * number, error)
            answers = tuple(with_system(record, self.settings.system) for record in answers)
            records += answers
            locations += [f"{location}, {column}" for column in self.answers]
        encoded = self.encode(records, locations, on_bad)
        for record in records[::count]:
            if record is not None:
                count_system(self.systems, system_of(record))
        self.systems = frequent(self.systems)
        return [None if n in bad else encoded[count * n : count * (n + 1)] for n in range(len(indices))]

    def _group(self, rows: NumberedRows, index: int, encoded: list[list[Encoded]]) -> RowGroup | None:
        """Build the group of a row, or return None if the row is dropped (and counted).

        Raises:
            BadRowError: if the row is unusable.
        """
        location = rows.row_location(index)
        if max(map(len, encoded)) > 1:
            message = "the template rewrites earlier turns of an answer of several turns, which would be several rows"
            hint = "use answers of one turn, or set data.labels: last"
            raise BadRowError(message, reason="a rewritten answer of several turns", location=location, hint=hint)
        if not all(encoded):
            self.account["without_label"] += 1
            return None
        examples = tuple(parts[0].example(rows.number(index)) for parts in encoded)
        if not all_distinct(examples):
            raise _identical_answers(location)
        group = self.limit_length(RowGroup(examples), location)
        return group and self.group(group.rows, self.row(rows, index), location)


def prompt_key(row: Example) -> bytes:
    """Return a key that is equal for rows with the same prompt."""
    return row.tokens[: row.prompt_length].tobytes()


def records_of(row: Row, location: str) -> tuple[Record, Record]:
    """Return the chosen and the rejected answer of a row, each with the prompt.

    Raises:
        BadRowError: if a value is missing or has the wrong type, or if the answers are identical.
    """
    require(row, PAIR_COLUMNS, location, "every row has 'chosen' and 'rejected'")
    if row["chosen"] == row["rejected"]:
        raise _identical_answers(location)
    if row.get("prompt") is None:
        row = {**row, **_split_prompt(row["chosen"], row["rejected"], location)}
    chosen, rejected = (read_pair({**row, "completion": row[column]}, location) for column in PAIR_COLUMNS)
    return chosen, rejected


def _split_prompt(chosen: object, rejected: object, location: str) -> dict[str, object]:
    """Split a row without a prompt into the common prefix of both answers, and the remainder of each.

    Raises:
        BadRowError: if the answers have different types or no common prefix.
    """
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if not texts and not (isinstance(chosen, list) and isinstance(rejected, list)):
        message = "'chosen' and 'rejected' must both be text, or both lists of messages"
        raise BadRowError(message, reason=WRONG_TYPE, location=location, hint="or give their prompt as 'prompt'")
    assert isinstance(chosen, str | list) and isinstance(rejected, str | list)
    shorter = min(len(chosen), len(rejected))
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((position for position, (left, right) in pairs if left != right), shorter)
    if texts and shared and chosen[shared - 1] == " ":
        shared -= 1  # a space belongs to the word that follows it
    if not shared:
        message = "'chosen' and 'rejected' have nothing in common at the start, and the row has no prompt"
        raise BadRowError(message, reason="no prompt", location=location, hint="give the prompt in a column 'prompt'")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _identical_answers(location: str) -> BadRowError:
    hint = "remove the row, which expresses no preference"
    return BadRowError("both answers are the same", reason="the same answer twice", location=location, hint=hint)


# Placeholder for a missing answer, because prompts are rendered together with an answer.
_PLACEHOLDER = "."


@dataclass(frozen=True, eq=False)
class TokenizedPrompt(Example):
    """Prompt for generation, without labels.

    Attributes:
        answer: Answer of the row, if any.
        columns: Columns of the row, for rewards.
    """

    columns: Mapping[str, Any] = field(default_factory=dict)


class PromptReader(AnswerReader):
    """Reads files of prompts."""

    answers = ("answer",)
    form = "prompts"
    noun = "a prompt"
    duplicate_text = "with the prompt of an earlier one"
    too_long_text = "that are, with an answer, longer than"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        log: LogFunction = ignore_line,
        images: ImagePlacer | None = None,
    ) -> None:
        super().__init__(replace(settings, labels="last"), tokenizer, log=log, images=images)

    def records(self, row: Row, location: str) -> tuple[Record, ...]:
        return (read_prompt_row(row, location)[0],)

    def group(self, examples: tuple[Example, ...], row: Row, location: str) -> TokenizedPrompt:  # type: ignore[override]
        (example,) = examples
        length = example.prompt_length
        has_answer = read_prompt_row(row, location)[1]
        answer = example.answer if has_answer else None
        columns = {name: value for name, value in row.items() if value is not None}
        tokens = example.tokens[:length]
        is_label = np.zeros(length, bool)
        return TokenizedPrompt(example.row, tokens, is_label, length, answer, columns=columns)

    def groups(self, items: Sequence[RowGroup]) -> list[Hashable]:
        return [None] * len(items)

    def add_counts(self, report: PreparationReport, items: Sequence[RowGroup]) -> PreparationReport:
        return replace(report, unused_columns=())  # rewards may read any column


class QuestionReader(PromptReader):
    """Reads prompts for generation. Answers of the rows are ignored.

    Args:
        continues: Read the column ``text`` as the start of a plain text to continue.
    """

    predicts = ("completion", "finish")

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        continues: bool,
        log: LogFunction = ignore_line,
        images: ImagePlacer | None = None,
    ) -> None:
        overrides = {"template": "plain", "system": None} if continues else {}
        super().__init__(replace(settings, form="auto", **overrides), tokenizer, log=log, images=images)  # type: ignore[arg-type]
        self.continues = continues

    def records(self, row: Row, location: str) -> tuple[Record, ...]:
        if self.continues:
            row = {"prompt": row.get("text")}
        record = with_answer(row, _PLACEHOLDER, location)
        last = record.prompt if isinstance(record, Pair) else record.messages[-2]["content"]  # type: ignore[union-attr]
        if is_blank(str(last)):
            raise empty_text("the prompt", location)
        return (record,)


def with_answer(row: Row, text: str, location: str) -> Record:
    """Return the record of a row's prompt with ``text`` as the answer.

    Raises:
        BadRowError: if the row has no prompt, or a value has the wrong type.
    """
    record, _ = read_prompt_row(row, location)
    if isinstance(record, Pair):
        return replace(record, completion=text)
    assert isinstance(record, Conversation)  # plain text has no prompt
    return replace(record, messages=(*record.messages[:-1], {"role": "assistant", "content": text}))


def prompt_messages(row: Row, location: str) -> tuple[list[Message], tuple[Message, ...]]:
    """Return the messages of a row's prompt, and the tools that the model may call.

    Raises:
        BadRowError: if the row has no prompt, or a value has the wrong type.
    """
    record = with_answer(row, _PLACEHOLDER, location)
    if isinstance(record, Pair):
        record = record.conversation()
    assert isinstance(record, Conversation)
    return list(record.messages[:-1]), record.tools


def last_prompt_text(row: Row) -> str:
    """Return the last turn of a row's prompt as text."""
    return str(prompt_messages(dict(row), "the prompt")[0][-1]["content"])


def read_prompt_row(row: Row, location: str) -> tuple[Record, bool]:
    """Return a record of the prompt with an answer, and True if the answer is from the row.

    Raises:
        BadRowError: if the row has no prompt, or a value has the wrong type.
    """
    answer = _answer(row)
    for column, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = row.get(column)
        last = turns[-1].get(role) if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else None
        if isinstance(turns, list) and last not in ("assistant", "gpt", None):
            row = {**row, column: [*turns, {role: "assistant", content: _PLACEHOLDER if answer is None else answer}]}
            return next(f for f in FORMS if f.needs == (column,)).read(row, location), answer is not None
    if row.get("prompt") is None and all(row.get(column) is not None for column in PAIR_COLUMNS):
        return records_of(row, location)[0], True
    for form in sorted(FORMS, key=lambda form: any(row.get(column) is None for column in form.needs)):
        missing = {column for column in form.needs if row.get(column) is None}
        if form.name != "text" and missing <= {*PROMPT_ANSWERS} and len(missing) < len(form.needs):
            defaults = dict.fromkeys(missing, _PLACEHOLDER if answer is None else answer)
            return form.read({**row, **defaults}, location), answer is not None or not missing
    hint = "name it 'prompt', or map it with data.columns: {prompt: …}"
    raise BadRowError("the row has no prompt", reason="no prompt", location=location, hint=hint)


def _answer(row: Row) -> str | None:
    """Return the answer of a row as text, or None."""
    value = next((row[name] for name in PROMPT_ANSWERS if row.get(name) is not None), None)
    value = value[0] if isinstance(value, list) and value else value
    return str(value) if isinstance(value, str | int | float) and str(value).strip() else None
