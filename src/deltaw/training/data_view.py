"""A run's data before the run: what is wrong with it, and what single rows become.

Rows are read as a run reads them, by their task, with the model's tokenizer and none of its weights.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace

from deltaw.data.chat_template import with_chat_template
from deltaw.data.check import Check
from deltaw.data.mixture import shown
from deltaw.data.report import BadRows
from deltaw.data.row_reader import Reader, ShownRow
from deltaw.data.settings import eval_sets, held_out_reference
from deltaw.data.sources import with_lines
from deltaw.errors import UserError
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Say, silent
from deltaw.training.tasks.base import task_of


def check_data(config: RunConfig, say: Say = silent) -> Check:
    """Check all rows that a run would train and evaluate on.

    Raises:
        UserError: the data cannot be read at all, or the settings do not fit it.
    """
    apart = map(held_out_reference, eval_sets(config.data.eval).values())
    check = _reader(config, say).check([file for file in apart if file is not None])
    places = iter(with_lines([place for finding in check.findings for place in finding.rows]))
    findings = [replace(finding, rows=tuple(itertools.islice(places, len(finding.rows)))) for finding in check.findings]
    return replace(check, findings=tuple(findings))


def shown_rows(config: RunConfig, first: int | None, count: int, say: Say = silent) -> Iterator[ShownRow]:
    """Rows of the training data and what they become.

    Args:
        first: the number of the first row, as in messages; None for the first in the file.
        count: how many rows.

    Raises:
        UserError: the data cannot be read, or has no row of that number.
    """
    bad = BadRows("skip")
    rows = _with_bad(_reader(config, say).rows(bad), bad, "refused" if config.data.bad_rows == "error" else "skipped")
    if first is not None:
        rows = itertools.dropwhile(lambda row: row.row < first, rows)
    found = next(rows, None)
    if found is None or first not in (None, found.row):
        hint = "rows are counted from 1; in JSON Lines, the number is that of the line"
        raise UserError(f"there is no row {first}", where=shown(config.data.train), hint=hint)
    yield found
    yield from itertools.islice(rows, count - 1)


def _with_bad(rows: Iterator[ShownRow], bad: BadRows, done: str) -> Iterator[ShownRow]:
    """The rows with those that cannot be read, each at its place in its file."""
    waiting: deque[ShownRow] = deque()
    known, last = 0, None
    for row in itertools.chain(rows, [None]):
        if len(bad) > known:
            waiting.extend(_bad_row(line, done) for line in itertools.islice(bad.lines(), known, None))
            known = len(bad)
        file = None if row is None else row.where.rpartition(", ")[0]
        while waiting and _is_before(waiting[0], row, file, last):
            yield waiting.popleft()
        if row is not None:
            yield row
        last = file


def _is_before(bad: ShownRow, row: ShownRow | None, file: str | None, last: str | None) -> bool:
    """Whether a bad row comes before ``row`` of ``file``, or at the end of the ``last`` file."""
    own = bad.where.rpartition(", ")[0]
    return row is None or (bad.row < row.row if own == file else own == last)


def _bad_row(line: Mapping[str, object], done: str) -> ShownRow:
    number = re.search(r", (?:line|row) (\d+)", where := str(line["where"]))
    text = line["row"] if isinstance(line["row"], str) else json.dumps(line["row"], ensure_ascii=False)
    notes = (f"{done}: {line['error']}", f"it reads: {text[:200].rstrip()}")
    return ShownRow(int(number[1]) if number else 0, where, (), notes)


def _reader(config: RunConfig, say: Say) -> Reader:
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    code = config.trust_remote_code
    task = task_of(config.task, config.model, dtype, trust_remote_code=code, say=say, section=config.section)
    if task.tokenizer is not None and not task.has_labels:
        task.tokenizer = with_chat_template(task.tokenizer, config.data.chat_template)
    return task.reader(config.data)
