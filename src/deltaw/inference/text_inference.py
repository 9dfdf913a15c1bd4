"""Predictions of tasks that generate text: completions."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from deltaw.data.prompts import QuestionReader
from deltaw.inference.task_inference import TaskInference, TaskType
from deltaw.settings.data import DataSettings
from deltaw.training.task import Classes

# Columns that contain a prompt. Without any of them, the column ``text`` is a text to continue.
_PROMPTS = {"prompt", "messages", "conversations", "instruction", "input", "chosen"}


class TextInference(TaskInference[TaskType]):
    """Completes prompts. It is the default of tasks that generate text."""

    def reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> QuestionReader:
        tokenizer = self.task.tokenizer
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        continues = "text" in columns and not _PROMPTS & {*columns}
        return QuestionReader(settings, tokenizer, continues=continues, images=self.task.images)
