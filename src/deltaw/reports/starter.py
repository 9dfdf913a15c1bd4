"""Create a commented settings file for a user's data: infer the task and columns, count tokens, and choose settings.

Prompts and file output are in :mod:`deltaw.cli.init`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deltaw.data.bad_rows import BadRows
from deltaw.data.class_names import almost_equal_text, merge_setting, merged_classes
from deltaw.data.example import RowGroup, lengths_of
from deltaw.data.formats import choose_form
from deltaw.data.pixels import image_rows
from deltaw.data.report import count_of
from deltaw.data.row_files import KINDS
from deltaw.data.row_images import COLUMNS
from deltaw.data.rows import NumberedRows
from deltaw.data.sources import with_lines
from deltaw.data.starter import TaskStarter, default_model, form_name, starter_of
from deltaw.errors import UserError
from deltaw.hub.folders import find_cached, resolve
from deltaw.hub.packages import is_available as is_in_cache
from deltaw.hub.packages import is_package_reference
from deltaw.machine.choices import choose_precision
from deltaw.progress import track_progress
from deltaw.reports.tables import one_line
from deltaw.settings import task_registry
from deltaw.settings.columns import kinds_of, require_columns, row_kinds, tasks_of
from deltaw.settings.config import RunConfig, parse_yaml
from deltaw.settings.data import DataSettings
from deltaw.settings.model_parts import parse_parts
from deltaw.settings.row_kinds import IMAGES, JUDGED_COLUMNS, LABELED_IMAGES, LABELED_ROWS, SINGLE_ANSWERS
from deltaw.training.optimizer import count_steps
from deltaw.training.small_data import eval_share, eval_size_warning, recommended_settings
from deltaw.training.task import Task, task_of

# Files with more rows are not tokenized: tokens are estimated, as without a tokenizer.
MAX_TOKENIZED_ROWS = 50_000
# The same limit if images are decoded.
MAX_IMAGE_ROWS = 2_000
BYTES_PER_TOKEN = 3
# Tokens that a chat template adds to each text.
TOKENS_PER_TEXT = 4
# Tokens that it adds to a row, such as a default system prompt.
TOKENS_PER_ROW = 32
# Tokens of a large image.
TOKENS_PER_IMAGE = 1_536
# Safety factor for estimated lengths.
ESTIMATE_MARGIN = 1.2
# Maximum number of classes of a column that is treated as class labels.
MAX_CLASSES = 20
# Minimum number of rows per class of such a column.
MIN_ROWS_PER_CLASS = 2
# Minimum number of rows for treating the longest 1% as outliers.
MIN_ROWS_FOR_OUTLIERS = 20
# Minimum length of an outlier, relative to the other rows.
OUTLIER_RATIO = 1.5
# Maximum number of unusable rows that are listed.
MAX_BAD_ROWS = 5
# Common column names of questions and answers.
_QUESTIONS = ("question", "prompt", "query", "instruction", "input", "request", "user", "message", "ask", "q")
_ANSWERS = ("answer", "completion", "response", "output", "reply", "assistant", "result", "a")
_UNLIMITED = 10**9


@dataclass(frozen=True)
class DataPreview:
    """Task, columns and statistics of a data file.

    Attributes:
        task: Inferred or given task.
        form: Description of the row format.
        rows: Number of usable rows.
        columns: Column names.
        reason: Reason for the task, or '' if the columns have standard names.
        mapped: ``data.columns`` for columns with other names.
        bad: Location and error of the first unusable rows.
        bad_rows: Number of unusable rows.
        unlabeled: Number of rows without a label or answer.
        lengths: (rows,) tokens of each row in ascending order, empty for images.
        estimated: Reason why lengths are estimated from characters, or ''.
        classes: Class names of a classification.
        class_counts: Number of rows of each label of a classification.
        max_tokens: Maximum sequence length of the model, or 0 if unknown.
        vision: Task with a vision-language model on this machine, or None.
    """

    task: str
    form: str
    rows: int
    columns: tuple[str, ...]
    reason: str = ""
    mapped: Mapping[str, str] = field(default_factory=dict)
    bad: tuple[tuple[str, str], ...] = ()
    bad_rows: int = 0
    unlabeled: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    estimated: str = ""
    classes: tuple[str, ...] = ()
    class_counts: Mapping[str, int] = field(default_factory=dict)
    max_tokens: int = 0
    vision: Task[Any] | None = None

    def lines(self) -> list[str]:
        """Return the summary for the user: rows, reason for the task, and unusable rows."""
        longest = ""
        if len(self.lengths):
            longest = f", the longest of {'about ' if self.estimated else ''}{self.lengths[-1]:,} tokens"
        classes = f", {len(self.classes)} classes" if self.classes else ""
        lines = [f"{self.rows:,} rows of {self.form}{classes}{longest}"]
        lines += [f"task: {self.task}: {self.reason}"] if self.reason else []
        lines += [f"tokens are estimated from characters: {self.estimated}"] if self.estimated else []
        if self.bad:
            lines.append(f"{count_of(self.bad_rows)} of {self.rows + self.bad_rows:,} cannot be used:")
            lines += ["  " + one_line(f"{location}: {message}", 78) for location, message in self.bad[:MAX_BAD_ROWS]]
            lines += [f"  and {self.bad_rows - MAX_BAD_ROWS:,} more"] if self.bad_rows > MAX_BAD_ROWS else []
        if self.unlabeled:
            lines.append(f"{count_of(self.unlabeled)} without an answer or label will be dropped")
        almost_equal, merged = almost_equal_text(self.class_counts)
        if almost_equal:
            lines += [almost_equal, f"to merge them: {merge_setting(merged)}"]
        return lines

    def length(self) -> tuple[int, int]:
        """Return ``data.max_length`` and the number of longer rows.

        The limit is the longest row, without outliers: the longest 1% of the rows, if they are :data:`OUTLIER_RATIO`
        times as long as all other rows. It is rounded up to a multiple of 64 and capped at the model's maximum.
        """
        lengths = self.lengths * (ESTIMATE_MARGIN if self.estimated else 1.0)
        num_outliers = -(-len(lengths) // 100) if len(lengths) >= MIN_ROWS_FOR_OUTLIERS else 0
        usual = lengths[-1 - num_outliers]
        longest = lengths[-1]
        limit = max(128, math.ceil((longest if longest <= OUTLIER_RATIO * usual else usual) / 64) * 64)
        limit = min(limit, self.max_tokens or limit)
        return limit, int((lengths > limit).sum())


def find_data_file(folder: Path) -> str | None:
    """Return the file in a folder that is probably the training data, or None."""
    held_out = re.compile(r"(test|dev|val|valid|validation|eval)\b", re.IGNORECASE)
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return None
    data_files = [name for name in names if set(Path(name).suffixes[-2:]) & (KINDS.keys() - {".json"})]
    return next((name for name in data_files if not held_out.match(name)), None)


def is_local(reference: str) -> bool:
    """Return True if the data can be read without a download."""
    if is_package_reference(reference):
        return is_in_cache(reference)
    return Path(os.path.expanduser(reference)).exists()


def names_local_rows(reference: str) -> bool:
    """Return True if the rows can be read without a download, or the reference names a file that does not exist."""
    is_file = not is_package_reference(reference) and Path(reference).suffix in KINDS
    return is_file or is_local(reference)


def preview_data(
    reference: str, model: str | None = None, task: str | None = None, columns: Mapping[str, str] | None = None
) -> DataPreview:
    """Read a file or folder and summarize it. Unusable rows are listed.

    Args:
        model: Model whose tokenizer is used if it is available without the weights. None: the default model of the
            task.
        task: Task, or None to infer it from the columns.
        columns: ``data.columns``, or None to infer it. Requires a task.

    Raises:
        UserError: If the data cannot be read, or no task matches it.
    """
    with track_progress(f"looking at {reference}"):
        bad = BadRows("skip")
        rows, preview = _recognize(reference, task, bad, model, columns)
        starter = starter_of(preview.task)
        preview = _count_tokens(preview, starter, rows, reference, model or default_model(preview.task), bad)
        if _predicts_number(preview.task):
            return preview
        labels = [label for label in starter.labels(rows, preview.mapped) or () if label not in (None, "")]
        class_counts = Counter(map(str, labels))
        return replace(preview, classes=preview.classes or tuple(sorted(class_counts)), class_counts=class_counts)


def settings_for_rows(reference: str, model: str | None = None, task: str | None = None) -> dict[str, Any]:
    """Return the settings that follow from the columns of a file: task, model, columns and the task's section.

    Raises:
        UserError: the file cannot be read, or no task takes its columns.
    """
    _, preview = _recognize(reference, task, BadRows("skip"), model)
    model = model or default_model(preview.task)
    if model is None:
        return {"task": preview.task}
    settings = parse_yaml(settings_text(model, reference, preview.task, preview, "train.yaml", skip=True))
    assert isinstance(settings, Mapping)
    section = str(task_registry.entry_of(preview.task).section_name)
    sections = {key: settings[key] for key in ("task", "model", section) if key in settings}
    return sections | {"data": {"columns": dict(preview.mapped)}}


def _recognize(
    file: str, task: str | None, bad: BadRows, model: str | None, columns: Mapping[str, str] | None = None
) -> tuple[NumberedRows, DataPreview]:
    """Return the rows of a file, and their task, columns and form.

    Args:
        task: Task of the rows; None to infer it.
        bad: Receives lines that cannot be read.
        model: Model that may read images. None for the default model.
        columns: ``data.columns`` of the task; None to infer it.
    """
    rows, _ = image_rows(file, bad.add)
    if task is not None and columns is not None:
        mapped = dict(columns)
        why = ""
    else:
        task, mapped, why = _task(rows) if task is None else _columns(rows, task)
    starter = starter_of(task)
    vision = None if model is None else _vision_task(model, task)
    if vision is not None and (named := [column for column in rows.columns if column.lower() in IMAGES]):
        mapped = mapped if columns or {*COLUMNS} & {*rows.columns} else {"image": named[0], **mapped}
    if not starter.reads_images:
        require_columns(task, rows.columns, file, mapped)
    return rows, DataPreview(task, starter.form(rows, mapped), len(rows), (*rows.columns,), why, mapped, vision=vision)


def _vision_task(model: str, task: str) -> Task[Any] | None:
    """Return the task with a vision-language model that reads images and is on this machine, or None."""
    parts = parse_parts(model)
    references = (model,) if parts is None else (parts.language, parts.vision)
    with contextlib.suppress(UserError, OSError):
        if all(is_local(part) or find_cached(part) for part in references) and resolve(model).kind != "gguf":
            opened = task_of(task, model, choose_precision("cpu").value, section=None)
            return None if opened.images is None else opened
    return None


def settings_text(
    model: str, data: str, task: str, preview: DataPreview | None, file: str, *, skip: bool, merge: bool = False
) -> str:
    """Return the commented settings file.

    Args:
        preview: Summary of the data, or None if it is not available locally.
        file: Name of the settings file, for the commands in it.
        skip: Skip unusable rows (``data.bad_rows: skip``).
        merge: Merge classes with almost equal names. Otherwise the setting that merges them is a comment.
    """
    rows = 0 if preview is None else preview.rows
    data_comment = "not inspected: it is not on this machine" if preview is None else preview.lines()[0]
    starter = starter_of(task)
    section = starter.section(preview.form, preview.columns) if preview is not None else starter.section("", ())
    limit, long = (0, 0) if preview is None or not len(preview.lengths) else preview.length()
    long_rows = starter.long_rows(long, rows)
    num_used_rows = rows - (long if long_rows == "drop" else 0)
    share = eval_share(num_used_rows) if rows else 0.05
    num_held_out = round((share or 0) * num_used_rows)
    epochs, batch_size = recommended_settings(num_used_rows - num_held_out) if rows else (1, 16)
    batch_size = max(batch_size, starter.min_batch_size)
    steps = count_steps(num_used_rows - num_held_out, batch_size, epochs, None)
    merged = {} if preview is None else merged_classes(preview.class_counts)
    bad = [_line("bad_rows: skip", f"{count_of(preview.bad_rows)} skipped")] if preview and preview.bad and skip else []
    lines = [
        f"# Settings of a run:  deltaw train {file}",
        f"# Memory estimate:    deltaw plan {file}",
        "# Every key can also be given as a flag, as in --train.epochs 2; deltaw train --help lists all.",
        f"model: {_scalar(model)}",
        *_task_lines(),
        *([f"# {preview.reason}"] if preview is not None and preview.reason else []),
        f"task: {_scalar(task)}",
        "data:",
        f"  # {data_comment}",
        f"  train: {_scalar(data)}",
        *([f"  columns: {_scalar(dict(preview.mapped))}"] if preview is not None and preview.mapped else []),
        *([f"  {'' if merge else '# '}classes: {_scalar(merged)}"] if merged else []),
        *bad,
        *([f"  # {warning}"] if (warning := eval_size_warning(num_held_out)) else []),
        _line(f"eval: {'null' if share is None else f'{share:g}'}", _held_out_comment(num_held_out, rows)),
        *_length(limit, long, long_rows, preview),
        *section,
        "# Which parameters are trained: lora (below), head, prompt, bias, random, last or full.",
        "method: lora",
        "lora:",
        "  rank: 16                # a higher rank learns more and needs more memory",
        "  alpha: 32               # scaling is alpha / rank",
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


def _task_lines() -> list[str]:
    """Return the comment that lists the tasks with their goals."""
    entries = [task_registry.entry_of(name) for name in task_registry.names()]
    tasks = [f"{entry.name} ({entry.goal})" if entry.goal else entry.name for entry in entries]
    text = ", ".join(task.replace(" ", "\N{NO-BREAK SPACE}") for task in tasks)
    options: dict[str, Any] = {"initial_indent": "# ", "subsequent_indent": "# ", "break_on_hyphens": False}
    lines = textwrap.wrap(f"What the model learns: {text}.", 100, **options)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _task(rows: NumberedRows) -> tuple[str, dict[str, str], str]:
    """Infer the task of a file, ``data.columns``, and the reason if the columns have no standard names."""
    if set(rows.columns) == {"image", "label"} and len(rows) and isinstance(rows[0][1].get("image"), Path):
        return tasks_of(LABELED_IMAGES)[0], {}, ""
    if _are_judged(rows):
        return tasks_of(SINGLE_ANSWERS)[0], {}, ""
    for kind in row_kinds():
        if (mapped := kind.infer(rows.columns)) is not None:
            return tasks_of(kind)[0], mapped, f"the rows are {kind.name}" if mapped else ""
    form = form_name(rows)
    try:
        return _label_task(starter_of(_labeled_task()).labels(rows, {}) or ()), {}, ""
    except UserError:
        guessed = _guess_task(rows, labeled=form == "text")
    if guessed is not None:
        return guessed
    if form is None:
        choose_form(rows)  # raises an error that lists the existing and the expected columns
    return task_registry.default_task(), {}, ""


def _columns(rows: NumberedRows, task: str) -> tuple[str, dict[str, str], str]:
    """Infer ``data.columns`` for a given task, if possible."""
    try:
        inferred = _task(rows)
    except UserError:
        return task, {}, ""
    starter = starter_of(task)
    default = task_registry.default_task()
    if starter.writes and inferred[0] != default and form_name(rows) is None:
        inferred = _guess_task(rows, labeled=False) or inferred
    fits = inferred[0] == task or (inferred[0] == default and starter.writes)
    if fits and starter.samples and any(kind.fits(rows.columns) for kind in kinds_of(task)):
        return task, {}, ""
    return (task, *inferred[1:]) if fits else (task, {}, "")


def _labeled_task(*, numbers: bool = False) -> str:
    """Return the task of texts with labels, which are classes or numbers."""
    return next(task for task in tasks_of(LABELED_ROWS[0]) if _predicts_number(task) is numbers)


def _predicts_number(task: str) -> bool:
    return task_registry.entry_of(task).serves == "numbers"


def _label_task(labels: Sequence[object]) -> str:
    numbers = [_number(label) for label in labels if label not in (None, "")]
    integers = [number for number in numbers if number is not None and number.is_integer()]
    are_classes = None in numbers or (len(integers) == len(numbers) and len(set(numbers)) <= MAX_CLASSES)
    return _labeled_task(numbers=not are_classes)


def _guess_task(rows: NumberedRows, *, labeled: bool) -> tuple[str, dict[str, str], str] | None:
    """Guess the task and the columns from the values of columns with non-standard names, or return None.

    Args:
        labeled: Look only for a text and a label.
    """
    values: dict[str, list[Any]] = {name: [] for name in rows.columns}
    for _, row in rows:
        for name, cell in row.items():
            if cell not in (None, ""):
                values[name].append(cell)
    types = str | int | float
    values = {name: cells for name, cells in values.items() if cells and all(isinstance(v, types) for v in cells)}
    texts = {name: column for name, column in values.items() if any(_number(value) is None for value in column)}
    columns = (texts, _QUESTIONS), (values, _ANSWERS)
    by_name = [next((name for name in names if name.lower() in usual), None) for names, usual in columns]
    if all(by_name) and not labeled:
        return _question_columns(str(by_name[0]), str(by_name[1]))
    class_counts = {name: len(set(map(str, column))) for name, column in values.items() if not _is_json(column)}
    limits = {name: min(MAX_CLASSES, len(values[name]) // MIN_ROWS_PER_CLASS) for name in class_counts}
    class_counts = {name: count for name, count in class_counts.items() if 2 <= count <= limits[name]}
    text_columns = [name for name in texts if name not in class_counts]
    text = max(text_columns, key=lambda name: sum(map(len, map(str, texts[name]))) / len(texts[name]), default=None)
    numbers = [
        name for name in values if name not in texts and name not in class_counts and not _is_index(values[name])
    ]
    if text is not None and class_counts:
        label = max(reversed(class_counts), key=lambda name: len(values[name]))  # the column with the fewest gaps
        reason = f"'{text}' contains texts and '{label}' has {class_counts[label]} different values"
        others = [f"'{name}' ({count} values)" for name, count in class_counts.items() if name != label]
        others += [f"'{name}' (numbers, with task: {_labeled_task(numbers=True)})" for name in numbers]
        if others:
            reason += f". The label can also be {' or '.join(others)}: change label in data.columns"
        return _labeled_task(), {"text": text, "label": label}, reason
    if text is not None and len(numbers) == 1:
        reason = f"'{text}' contains texts and '{numbers[0]}' numbers"
        return _labeled_task(numbers=True), {"text": text, "label": numbers[0]}, reason
    return _question_columns(*text_columns) if len(text_columns) == 2 and not labeled else None


def _question_columns(question: str, answer: str) -> tuple[str, dict[str, str], str]:
    reason = f"'{question}' contains the prompts and '{answer}' the answers"
    mapped = {"prompt": question, "completion": answer}
    columns = {standard: column for standard, column in mapped.items() if standard != column}
    return task_registry.default_task(), columns, reason


def _is_index(values: Sequence[object]) -> bool:
    """Return True if the values are consecutive numbers."""
    numbers = [_number(value) or 0.0 for value in values]
    return all(b - a == 1 for a, b in itertools.pairwise(numbers))


def _is_json(values: Sequence[object]) -> bool:
    """Return True if all values are JSON objects or lists, which are answers rather than class names."""
    try:
        return all(isinstance(json.loads(str(value)), dict | list) for value in values)
    except (ValueError, RecursionError):
        return False


def _are_judged(rows: NumberedRows) -> bool:
    """Return True if each row is an answer with a boolean label."""
    if not set(JUDGED_COLUMNS) <= set(rows.columns):
        return False
    return all(isinstance(row.get("label"), bool) for _, row in rows)


def _number(label: object) -> float | None:
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return None
    try:
        number = float(label)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _settings(reference: str, preview: DataPreview) -> DataSettings:
    columns = dict(preview.mapped)
    return DataSettings(train=reference, max_length=_UNLIMITED, bad_rows="skip", columns=columns, cache=False)


def _count_tokens(
    preview: DataPreview, starter: TaskStarter, rows: NumberedRows, file: str, model: str | None, bad: BadRows
) -> DataPreview:
    """Add the token counts and all unusable rows to a preview.

    Args:
        bad: Lines that cannot be read.
    """
    from deltaw.hub.tokenizers import find_tokenizer, max_positions

    vision = preview.vision
    reader = None
    max_rows, image_tokens = (MAX_TOKENIZED_ROWS, 0) if vision is None else (MAX_IMAGE_ROWS, TOKENS_PER_IMAGE)
    can_tokenize = len(rows) <= max_rows and not starter.reads_images
    reason = "the model is not on this machine yet" if can_tokenize else f"over {max_rows:,} rows"
    tokenizer = vision.tokenizer if vision is not None else None if model is None else find_tokenizer(model)
    if can_tokenize and tokenizer is not None:
        reader = starter.reader(rows, _settings(file, preview), tokenizer)
        reason = f"task {preview.task} has no reader"
        preview = replace(preview, max_tokens=max_positions(tokenizer) or 0)
    if reader is None:
        usable = starter.usable_rows(rows, _settings(file, preview), bad)
        if starter.reads_images:
            return replace(_with_lengths(preview, file, bad, ()), rows=len(usable))
        cells = [list(rows[index][1].values()) for index in usable]
        estimates = [_estimate_tokens(values) + TOKENS_PER_ROW + image_tokens for values in cells]
        return _with_lengths(replace(preview, estimated=reason), file, bad, estimates)
    if vision is not None:
        reader.images = vision.images
    examples, report = reader.file(file)
    groups = len(examples) and isinstance(examples[0], RowGroup)
    lengths = [max(map(len, group.rows)) for group in examples] if groups else lengths_of(examples).tolist()
    classes = getattr(reader, "classes", None) or ()
    preview = replace(preview, classes=classes, unlabeled=report.without_label)
    return _with_lengths(preview, file, reader.bad, lengths)


def _with_lengths(preview: DataPreview, file: str, bad: BadRows, lengths: Sequence[int] | np.ndarray) -> DataPreview:
    errors = sorted(bad.lines(), key=lambda line: [int(n) for n in re.findall(r"\d+", str(line["where"]))])
    numbered = with_lines([str(line["where"]) for line in errors[:MAX_BAD_ROWS]])
    pairs = [(text.removeprefix(f"{file}, "), str(line["error"])) for text, line in zip(numbered, errors, strict=False)]
    messages = [(location, message.removeprefix(f"{location} is ")) for location, message in pairs]
    ascending = np.sort(np.asarray(lengths, np.int64))
    return replace(preview, rows=len(ascending), bad=tuple(messages), bad_rows=len(bad), lengths=ascending)


def _estimate_tokens(value: object) -> int:
    """Estimate the number of tokens in all texts of a row from their characters."""
    if isinstance(value, str):
        return math.ceil(len(value.encode(errors="replace")) / BYTES_PER_TOKEN) + TOKENS_PER_TEXT
    if isinstance(value, Mapping):
        return sum(map(_estimate_tokens, value.values()))
    return sum(map(_estimate_tokens, value)) if isinstance(value, list | tuple) else 0


def _line(key: str, comment: str) -> str:
    """Return a line with a key and an aligned comment."""
    return f"  {key}".ljust(26) + f"# {comment}"


def _length(limit: int, num_long: int, long_rows: str, preview: DataPreview | None) -> list[str]:
    """Return the lines about the maximum length."""
    if preview is None or not limit:
        return []
    key = f"max_length: {limit}"
    estimated = " (estimated)" if preview.estimated else ""
    if not num_long:
        return [_line(key, f"tokens{estimated}; longer rows are rejected unless long_rows is set")]
    action = {"cut": "truncated", "drop": "dropped", "split": "split"}[long_rows]
    description = f"{count_of(num_long, 'longer row')} {'is' if num_long == 1 else 'are'} {action}"
    full_length = math.ceil(preview.lengths[-1] * (ESTIMATE_MARGIN if preview.estimated else 1) / 64) * 64
    note = f"max_length: {full_length} includes all"
    if 0 < preview.max_tokens < full_length:
        note = f"the maximum of the model is {preview.max_tokens:,} tokens"
    return [_line(key, f"tokens{estimated}"), _line(f"long_rows: {long_rows}", f"{description}; {note}")]


def _held_out_comment(num_held_out: int, rows: int) -> str:
    """Return the comment about held-out rows."""
    if 0 < rows < 10:
        return "too few rows for evaluation"
    return "share of the rows that is held out for evaluation" + (f": {num_held_out:,}" if num_held_out else "")


def _name(data: str) -> str:
    """Return a run name derived from its data."""
    last = data.rstrip("/").rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^\w-]+", "-", last).strip("-") or "run"


def _scalar(value: object) -> str:
    """Return a value as one line of YAML."""
    text = yaml.safe_dump(value, width=_UNLIMITED, allow_unicode=True, default_flow_style=True, sort_keys=False)
    return text.removesuffix("\n...\n").strip()
