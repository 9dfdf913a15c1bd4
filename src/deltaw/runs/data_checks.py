"""Check and preview of the rows of a run, read with the tokenizer of the model but without its weights."""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace

from deltaw.data.bad_rows import BadRows
from deltaw.data.chat_template import with_chat_template
from deltaw.data.check import DataCheck
from deltaw.data.row_reader import Reader, RowPreview
from deltaw.data.sources import with_lines
from deltaw.errors import UserError
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.config import RunConfig
from deltaw.settings.data import eval_reference, eval_sets
from deltaw.settings.mixture import format_sources
from deltaw.training.task import task_of


def check_data(config: RunConfig, log: LogFunction = ignore_line) -> DataCheck:
    """Check all rows that a run would train and evaluate on.

    Raises:
        UserError: if the data cannot be read or does not fit the settings.
    """
    eval_files = map(eval_reference, eval_sets(config.data.eval).values())
    check = _reader(config, log).check([file for file in eval_files if file is not None])
    locations = iter(with_lines([row for finding in check.findings for row in finding.rows]))
    findings = [replace(f, rows=tuple(itertools.islice(locations, len(f.rows)))) for f in check.findings]
    return replace(check, findings=tuple(findings))


def preview_rows(
    config: RunConfig, first: int | None, count: int, log: LogFunction = ignore_line
) -> Iterator[RowPreview]:
    """Yield rows of the training data with the examples that they become.

    Args:
        config: Settings of the run.
        first: Number of the first row, as in messages. None for the first row in the file.
        count: Number of rows.
        log: Receives messages.

    Raises:
        UserError: if the data cannot be read or has no row with this number.
    """
    bad = BadRows("skip")
    status = "refused" if config.data.bad_rows == "error" else "skipped"
    rows = _merge_bad_rows(_reader(config, log).rows(bad), bad, status)
    if first is not None:
        rows = itertools.dropwhile(lambda row: row.row < first, rows)
    first_row = next(rows, None)
    if first_row is None or first not in (None, first_row.row):
        hint = "rows are counted from 1; in JSON Lines, the number is that of the line"
        raise UserError(f"the file has no row {first}", location=format_sources(config.data.train), hint=hint)
    yield first_row
    yield from itertools.islice(rows, count - 1)


def _merge_bad_rows(rows: Iterator[RowPreview], bad: BadRows, status: str) -> Iterator[RowPreview]:
    """Yield the rows and the unreadable ones, in file order."""
    pending: deque[RowPreview] = deque()
    num_reported = 0
    last = None
    for row in itertools.chain(rows, [None]):
        if len(bad) > num_reported:
            pending.extend(_bad_row(line, status) for line in itertools.islice(bad.lines(), num_reported, None))
            num_reported = len(bad)
        file = None if row is None else row.location.rpartition(", ")[0]
        while pending and _is_before(pending[0], row, file, last):
            yield pending.popleft()
        if row is not None:
            yield row
        last = file


def _is_before(bad: RowPreview, row: RowPreview | None, file: str | None, last: str | None) -> bool:
    """Return True if a bad row precedes ``row`` of ``file``, or belongs to the end of the ``last`` file."""
    bad_file = bad.location.rpartition(", ")[0]
    return row is None or (bad.row < row.row if bad_file == file else bad_file == last)


def _bad_row(line: Mapping[str, object], status: str) -> RowPreview:
    number = re.search(r", (?:line|row) (\d+)", location := str(line["where"]))
    text = line["row"] if isinstance(line["row"], str) else json.dumps(line["row"], ensure_ascii=False)
    notes = (f"{status}: {line['error']}", f"it reads: {text[:200].rstrip()}")
    return RowPreview(int(number[1]) if number else 0, location, (), notes)


def _reader(config: RunConfig, log: LogFunction) -> Reader:
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    code = config.trust_remote_code
    task = task_of(config.task, config.model, dtype, trust_remote_code=code, log=log, section=config.section)
    if task.tokenizer is not None and task.uses_chat_template:
        task.tokenizer = with_chat_template(task.tokenizer, config.data.chat_template)
    return task.reader(config.data)
