"""Rows to learn from a teacher: a prompt as the student gets it and as the teacher does, and an answer if there is one.

The forms are those of :mod:`deltaw.data.prompts`. What the teacher alone is given stands in the system message, before
the row's own if it has one; rows rendered as plain text begin with it. Knows neither models nor teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.example import Example
from deltaw.data.formats import Conversation, Pair, Record, system_of, with_system
from deltaw.data.prompts import PromptReader, read_prompt_row
from deltaw.data.report import Say, silent
from deltaw.data.rows import Row
from deltaw.data.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, kw_only=True)
class Lesson(Example):
    """A prompt and a completion, whose tokens are the labels; without one, the prompt alone.

    Attributes:
        teacher_prompt: int32 (length,), the prompt as the teacher gets it, before the same completion.
        taught: what was kept of the teacher's distributions: tokens int32 (labels, k) and their log-probabilities
            fp32 (labels, k), in nats; None where it is computed anew.
        own: whether the student wrote the completion.
    """

    teacher_prompt: np.ndarray
    taught: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    own: bool = False

    @property
    def prompt(self) -> np.ndarray:
        """The student's prompt, virtual tokens among it."""
        return self.tokens[: self.prompt_length]

    def with_completion(self, completion: np.ndarray, text: str | None, *, own: bool) -> Lesson:
        """The same prompt with another completion (length,)."""
        tokens = np.concatenate([self.prompt, completion.astype(np.int32)])
        is_label = np.arange(len(tokens)) >= self.prompt_length
        return replace(self, tokens=tokens, is_label=is_label, answer=text, taught=None, own=own)

    def as_taught(self) -> Example:
        """The row as the teacher gets it: no virtual tokens, and no token on which an adapter acts alone."""
        length = len(self.teacher_prompt)
        tokens = np.concatenate([self.teacher_prompt, self.tokens[self.prompt_length :]])
        is_label = np.concatenate([np.zeros(length, bool), self.is_label[self.prompt_length :]])
        return Example(self.row, tokens, is_label, length, self.answer)


class LessonReader(PromptReader):
    """Reads files of prompts with or without answers.

    Args:
        prompt: what the teacher alone is given; empty for nothing.
    """

    columns_task = "distill"
    form = "lessons"

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, prompt: str = "", *, say: Say = silent
    ) -> None:
        super().__init__(settings, tokenizer, say=say)
        self.prompt = prompt
        if prompt:
            self.answers = ("answer", "answer after the teacher's prompt")  # type: ignore[misc, assignment]
            self.too_long = "that are, with the teacher's prompt and an answer, longer than"

    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        record, _ = read_prompt_row(row, where)
        if not self.prompt:
            return (record,)
        whole = with_system(record, self.settings.system)
        assert isinstance(whole, Pair | Conversation)
        return record, instructed(whole, self.prompt)

    def group(self, examples: tuple[Example, ...], row: Row, where: str) -> Lesson:  # type: ignore[override]
        own, taught = examples[0], examples[-1]
        answered = read_prompt_row(row, where)[1]
        length = len(own.tokens) if answered else own.prompt_length
        answer = own.answer if answered else None
        prompt = taught.tokens[: taught.prompt_length]
        known = {"prompt_length": own.prompt_length, "answer": answer, "teacher_prompt": prompt}
        return Lesson(own.row, own.tokens[:length], own.is_label[:length], **known)  # type: ignore[arg-type]


def instructed(record: Pair | Conversation, prompt: str) -> Pair | Conversation:
    """The record with ``prompt`` at the beginning of its system message."""
    own = system_of(record)
    if isinstance(record, Pair):
        return replace(record, system=f"{prompt}\n\n{own}" if own else prompt)
    if not own:
        found = with_system(record, prompt)
        assert isinstance(found, Conversation)
        return found
    first = {**record.messages[0], "content": f"{prompt}\n\n{own}"}
    return replace(record, messages=(first, *record.messages[1:]))


def longest_lesson(rows: Sequence[Lesson], max_new_tokens: int) -> int:
    """Tokens of the longest row, as student or teacher get it, with whatever completion it may have."""
    prompts = (max(row.prompt_length, len(row.teacher_prompt)) + max(row.label_count, max_new_tokens) for row in rows)
    return max(prompts, default=1)
