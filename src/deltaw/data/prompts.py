"""Rows with a prompt whose answers the model writes itself, and whatever columns a reward reads.

The forms are those of rows with answers (:mod:`deltaw.data.formats`), with or without the answer, which is never
trained on: rewards may compare with it. Knows neither models nor rewards.
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
from deltaw.data.report import BadRowError, Report, Say, silent
from deltaw.data.rows import Row
from deltaw.data.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for the answer where a row has none: what precedes an answer is rendered with one behind it.
_ANY = "."


@dataclass(frozen=True, eq=False)
class Prompt(Example):
    """A prompt: ``tokens`` are what a model is given to answer it, and none of them is a label.

    Attributes:
        answer: the answer that the row has, if it has one.
        columns: of the row in its file, that rewards read.
    """

    columns: Mapping[str, Any] = field(default_factory=dict)


class PromptReader(AnswerReader):
    """Reads files of prompts."""

    answers = ("answer",)
    columns_task = "reward"
    form = "prompts"
    noun = "a prompt"
    same = "with the prompt of an earlier one"
    too_long = "that are, with an answer, longer than"

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, say: Say = silent) -> None:
        super().__init__(replace(settings, labels="last"), tokenizer, say=say)

    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        return (read_prompt_row(row, where)[0],)

    def group(self, examples: tuple[Example, ...], row: Row, where: str) -> Prompt:  # type: ignore[override]
        (whole,) = examples
        length, answered = whole.prompt_length, read_prompt_row(row, where)[1]
        answer = whole.answer if answered else None
        columns = {name: value for name, value in row.items() if value is not None}
        return Prompt(whole.row, whole.tokens[:length], np.zeros(length, bool), length, answer, columns=columns)

    def groups(self, items: Sequence[RowGroup]) -> list[Hashable]:
        return [None] * len(items)

    def told(self, report: Report, items: Sequence[RowGroup]) -> Report:
        return replace(report, unused_columns=())  # rewards may read any


class QuestionReader(PromptReader):
    """Reads prompts for a model to answer; answers of the rows are ignored.

    Args:
        continues: Read the column ``text`` as the beginning of a plain text to continue.
    """

    predicts = ("completion", "finish")

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, continues: bool, say: Say = silent
    ) -> None:
        how = {"template": "plain", "system": None} if continues else {}
        super().__init__(replace(settings, form="auto", **how), tokenizer, say=say)  # type: ignore[arg-type]
        self.continues = continues

    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        if self.continues:
            row = {"prompt": row.get("text")}
        record = answered(row, _ANY, where)
        last = record.prompt if isinstance(record, Pair) else record.messages[-2]["content"]  # type: ignore[union-attr]
        if is_blank(str(last)):
            raise empty_text("the prompt", where)
        return (record,)


def answered(row: Row, text: str, where: str) -> Record:
    """The record of a row's prompt with this text as the answer.

    Raises:
        BadRowError: the row has no prompt, or a value has the wrong type.
    """
    record, _ = read_prompt_row(row, where)
    if isinstance(record, Pair):
        return replace(record, completion=text)
    assert isinstance(record, Conversation)  # plain text has no prompt
    return replace(record, messages=(*record.messages[:-1], {"role": "assistant", "content": text}))


def asked(row: Row, where: str) -> tuple[list[Message], tuple[Message, ...]]:
    """The messages of a row's prompt, and the tools that the model may call.

    Raises:
        BadRowError: the row has no prompt, or a value has the wrong type.
    """
    record = answered(row, _ANY, where)
    if isinstance(record, Pair):
        record = record.conversation()
    assert isinstance(record, Conversation)
    return list(record.messages[:-1]), record.tools


def last_asked(row: Row) -> str:
    """The last turn of a row's prompt, as text."""
    return str(asked(dict(row), "the prompt")[0][-1]["content"])


def read_prompt_row(row: Row, where: str) -> tuple[Record, bool]:
    """The prompt with an answer, and whether that is the row's own.

    Raises:
        BadRowError: there is no prompt, or a value has the wrong type.
    """
    answer = _answer(row)
    for column, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = row.get(column)
        last = turns[-1].get(role) if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else None
        if isinstance(turns, list) and last not in ("assistant", "gpt", None):
            row = {**row, column: [*turns, {role: "assistant", content: _ANY if answer is None else answer}]}
            return next(f for f in FORMS if f.needs == (column,)).read(row, where), answer is not None
    if row.get("prompt") is None and all(row.get(column) is not None for column in PAIR_COLUMNS):
        return records_of(row, where)[0], True
    for form in sorted(FORMS, key=lambda form: any(row.get(column) is None for column in form.needs)):
        lacking = {column for column in form.needs if row.get(column) is None}
        if form.name != "text" and lacking <= {*PROMPT_ANSWERS} and len(lacking) < len(form.needs):
            given = dict.fromkeys(lacking, _ANY if answer is None else answer)
            return form.read({**row, **given}, where), answer is not None or not lacking
    hint = "name it 'prompt', or map it with data.columns: {prompt: …}"
    raise BadRowError("the row has no prompt", reason="no prompt", where=where, hint=hint)


def _answer(row: Row) -> str | None:
    """The text of the answer that a row brings; None if it brings none."""
    found = next((row[name] for name in PROMPT_ANSWERS if row.get(name) is not None), None)
    found = found[0] if isinstance(found, list) and found else found
    return str(found) if isinstance(found, str | int | float) and str(found).strip() else None
