"""Rows for distillation: a prompt for the student, one for the teacher, and an optional completion.

Row formats are those of :mod:`deltaw.data.prompts`. The teacher's additional instructions precede the system message of
the row. In plain text they are the first line.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.example import Example
from deltaw.data.formats import Pair, Record, system_of, with_system
from deltaw.data.messages import Conversation
from deltaw.data.prompts import PromptReader, read_prompt_row
from deltaw.data.rows import Row
from deltaw.data.starter import TaskStarter
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.data import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, kw_only=True)
class DistillExample(Example):
    """Prompt and completion of a distillation row. The completion's tokens are the labels.

    A row without a completion consists of the prompt only.

    Attributes:
        teacher_prompt: (length,) int32, the teacher's prompt for the same completion.
        taught: Stored top-k of the teacher's distributions: (labels, k) int32 tokens and (labels, k) fp32
            log-probabilities in nats. None if the distributions are computed.
        by_student: True if the student generated the completion.
    """

    teacher_prompt: np.ndarray
    taught: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    by_student: bool = False

    @property
    def prompt(self) -> np.ndarray:
        """Return the student's prompt, including virtual tokens."""
        return self.tokens[: self.prompt_length]

    def with_completion(self, completion: np.ndarray, text: str | None, *, by_student: bool) -> DistillExample:
        """Return the same prompt with another (length,) completion."""
        tokens = np.concatenate([self.prompt, completion.astype(np.int32)])
        is_label = np.arange(len(tokens)) >= self.prompt_length
        return replace(self, tokens=tokens, is_label=is_label, answer=text, taught=None, by_student=by_student)

    def as_taught(self) -> Example:
        """Return the row for the teacher, without virtual tokens and activation."""
        length = len(self.teacher_prompt)
        tokens = np.concatenate([self.teacher_prompt, self.tokens[self.prompt_length :]])
        is_label = np.concatenate([np.zeros(length, bool), self.is_label[self.prompt_length :]])
        return Example(self.row, tokens, is_label, length, self.answer)


class DistillReader(PromptReader):
    """Reads files of prompts with or without answers.

    Args:
        prompt: Additional instructions for the teacher, or an empty string.
    """

    columns_task = "distill"
    form = "lessons"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str = "",
        *,
        log: LogFunction = ignore_line,
    ) -> None:
        super().__init__(settings, tokenizer, log=log)
        self.prompt = prompt
        if prompt:
            self.answers = ("answer", "answer after the teacher's prompt")  # type: ignore[misc, assignment]
            self.too_long_text = "that are, with the teacher's prompt and an answer, longer than"

    def records(self, row: Row, location: str) -> tuple[Record, ...]:
        record, _ = read_prompt_row(row, location)
        if not self.prompt:
            return (record,)
        with_default_system = with_system(record, self.settings.system)
        assert isinstance(with_default_system, Pair | Conversation)
        return record, with_instruction(with_default_system, self.prompt)

    def group(self, examples: tuple[Example, ...], row: Row, location: str) -> DistillExample:  # type: ignore[override]
        student = examples[0]
        teacher = examples[-1]
        has_answer = read_prompt_row(row, location)[1]
        length = len(student.tokens) if has_answer else student.prompt_length
        answer = student.answer if has_answer else None
        prompt = teacher.tokens[: teacher.prompt_length]
        tokens = student.tokens[:length]
        is_label = student.is_label[:length]
        return DistillExample(student.row, tokens, is_label, student.prompt_length, answer, teacher_prompt=prompt)


class DistillStarter(TaskStarter):
    """Starter of the task, with a prompt for the teacher."""

    def section(self, form: str, columns: Collection[str]) -> tuple[str, ...]:
        return (
            "distill:",
            "  # text or file that only the teacher receives; or set a larger model: teachers",
            "  prompt: Think about the question. Then answer correctly and briefly.",
        )


def with_instruction(record: Pair | Conversation, prompt: str) -> Pair | Conversation:
    """Return the record with ``prompt`` at the start of its system message."""
    system = system_of(record)
    if isinstance(record, Pair):
        return replace(record, system=f"{prompt}\n\n{system}" if system else prompt)
    if not system:
        conversation = with_system(record, prompt)
        assert isinstance(conversation, Conversation)
        return conversation
    first = {**record.messages[0], "content": f"{prompt}\n\n{system}"}
    return replace(record, messages=(first, *record.messages[1:]))


def max_example_length(rows: Sequence[DistillExample], max_new_tokens: int) -> int:
    """Return the maximum number of tokens of a row, for student or teacher, including a completion of up to
    ``max_new_tokens`` tokens.
    """
    prompts = (max(row.prompt_length, len(row.teacher_prompt)) + max(row.label_count, max_new_tokens) for row in rows)
    return max(prompts, default=1)
