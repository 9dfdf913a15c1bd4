"""Rows with a prompt that the model answers, and any columns that rewards read.

Row formats are those of :mod:`deltaw.data.formats`. Answers are optional and never trained on.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.columns import PAIR_COLUMNS, PROMPT_ANSWERS
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import FORMS, Pair, Record
from deltaw.data.messages import Conversation, Message, empty_text, is_blank
from deltaw.data.preferences import AnswerReader, records_of
from deltaw.data.report import BadRowError, LogFunction, PreparationReport, quiet
from deltaw.data.rows import Row
from deltaw.data.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    columns_task = "rl"
    form = "prompts"
    noun = "a prompt"
    duplicate_text = "with the prompt of an earlier one"
    too_long_text = "that are, with an answer, longer than"

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, log: LogFunction = quiet) -> None:
        super().__init__(replace(settings, labels="last"), tokenizer, log=log)

    def records(self, row: Row, location: str) -> tuple[Record, ...]:
        return (read_prompt_row(row, location)[0],)

    def group(self, examples: tuple[Example, ...], row: Row, location: str) -> TokenizedPrompt:  # type: ignore[override]
        (example,) = examples
        length, has_answer = example.prompt_length, read_prompt_row(row, location)[1]
        answer = example.answer if has_answer else None
        columns = {name: value for name, value in row.items() if value is not None}
        tokens, is_label = example.tokens[:length], np.zeros(length, bool)
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
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, continues: bool, log: LogFunction = quiet
    ) -> None:
        overrides = {"template": "plain", "system": None} if continues else {}
        super().__init__(replace(settings, form="auto", **overrides), tokenizer, log=log)  # type: ignore[arg-type]
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
