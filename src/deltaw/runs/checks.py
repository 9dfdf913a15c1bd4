"""Checks of a run and its rows before weights are loaded, and previews of rows.

``deltaw train`` runs them first. ``deltaw data check`` runs the same ones, so that both reject the same settings, and
``deltaw plan`` all except that of the output folder.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaw.data.bad_rows import BadRows
from deltaw.data.chat_template import with_chat_template
from deltaw.data.check import DataCheck
from deltaw.data.data_findings import DataFinding
from deltaw.data.row_reader import Reader, RowPreview, RunData
from deltaw.data.sources import with_lines
from deltaw.errors import UserError, first_line
from deltaw.hub.checkpoint import match_names
from deltaw.hub.folders import config_folder, resolve
from deltaw.hub.skeletons import skeleton
from deltaw.hub.weight_digests import folder_digests, record_stored_digests
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.methods.start import StartAdapter, open_start
from deltaw.progress import LogFunction, ignore_line
from deltaw.runs.decision import decide_start
from deltaw.runs.folder import CHECKPOINT_FOLDER, Run, check_output
from deltaw.runs.tracking import check_installed
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.data import eval_reference, eval_sets
from deltaw.settings.mixture import format_sources
from deltaw.training.monitoring.monitor import check_evaluation_settings
from deltaw.training.planning.budget import memory_budget
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.process import preserved_process_state
from deltaw.training.session import method_for, read_data
from deltaw.training.task import Task, task_of


def check_settings(config: RunConfig) -> None:
    """Check everything that needs no rows: tracker, device, precision, memory limit and the section of the
    task.

    Raises:
        UserError: If a setting cannot be used on this machine.
    """
    if config.track is not None:
        check_installed(config.track)
    device = choose_device(config.device).value
    choose_precision(device, config.precision)
    memory_budget(config.memory, device)
    task_registry.entry_of(config.task).load().check_settings(config.section)


def check_start_folders(config: RunConfig, output: Path) -> None:
    """Check that the output folder, which a new run moves, contains no adapter of ``start_from``.

    Raises:
        UserError: If it does.
    """
    start = open_start(config)
    for source in start.sources if start is not None else ():
        if output.resolve() in (source.folder.resolve(), *source.folder.resolve().parents):
            message = f"the output folder contains the adapter of start_from: {source.folder}"
            raise UserError(message, location="output", hint="set 'output' to another folder")


def check_rows(config: RunConfig, task: Task[Any], data: RunData) -> None:
    """Check that the settings fit the rows and the task.

    Raises:
        UserError: If they do not.
    """
    check_evaluation_settings(config, task, data)
    method_for(task, config)
    task.check_steps(data.train, config.train.batch_size)
    if (start := open_start(config)) is not None:
        start.require_classes(data.classes)
        start.require_tokenizer(task.tokenizer, has_template=config.data.chat_template is not None)
        _check_start_base(config, task, data, start)


def _check_start_base(config: RunConfig, task: Task[Any], data: RunData, start: StartAdapter) -> None:
    """Check that the files of the base model are those that the adapters of ``start_from`` were trained on.

    Fingerprints of files with converted weights, such as .gguf, and of models with new or trained modules, are checked
    after loading.
    """
    if task.trains_head or start.has_modules or resolve(config.model).kind == "gguf":
        return
    with torch.device("meta"):
        model = skeleton(config.model, dtype="fp32", task=config.task, trust_remote_code=config.trust_remote_code)
    if record_file_digests(model, config):
        start.require_base(base_fingerprint(model))


def record_file_digests(model: PreTrainedModel, config: RunConfig) -> bool:
    """Record the digests of the base model's files on a model whose values are missing.

    Returns:
        False if the weights are not in safetensors files, or are converted when they are loaded.
    """
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    folder = config_folder(config.model, dtype, config.trust_remote_code)
    if resolve(config.model).kind == "gguf" or not any(folder.glob("*.safetensors")):
        return False
    digests = folder_digests(folder)
    if match_names(model, digests).converted:
        return False
    record_stored_digests(model, digests)
    return True


def check_folder(config: RunConfig) -> None:
    """Check that ``deltaw train`` could write to the output folder.

    Raises:
        UserError: If the folder cannot be written to, or contains a run with other settings.
    """
    output = Path(os.path.expanduser(config.output))
    check_output(output, is_resumed=Run(output).training is not None)
    if (output / CHECKPOINT_FOLDER).is_dir():
        decide_start(output, config, False, ignore_line)


def read_checked(config: RunConfig, log: LogFunction = ignore_line) -> tuple[Task[Any], RunData]:
    """Check the settings, read the rows, and check that they fit: everything that needs no model.

    Raises:
        UserError: If ``deltaw train`` would reject the run.
    """
    check_settings(config)
    task, data = read_data(config, log)
    check_rows(config, task, data)
    return task, data


def check_run(config: RunConfig, log: LogFunction = ignore_line, *, folder: bool, dry_run: bool = True) -> DataCheck:
    """Check the rows, and add the error that ``deltaw train`` would raise before it loads weights, if any.

    Args:
        config: Settings of the run.
        log: Receives messages.
        folder: Check the output folder, too.
        dry_run: Also compute the plan of the run, which reports errors of the model.

    Raises:
        UserError: if the data cannot be read.
    """
    check = check_data(config, log)
    if not check.usable:
        return check
    try:
        with preserved_process_state():
            task, data = read_checked(config)
            try:
                if dry_run:
                    plan_run(config, task, data)
            except UserError:
                raise
            except Exception as error:  # the dry run of a custom model may fail although the model trains
                text = f"the dry run failed, so the model was not checked: {first_line(error)}"
                check = replace(check, findings=(*check.findings, DataFinding("not_checked", "note", 1, text)))
        if folder:
            check_folder(config)
    except UserError as error:
        locations = () if error.location is None else (error.location,)
        text = f"deltaw train refuses: {error.message}"
        refusal = DataFinding("training_refused", "error", 1, text, error.hint, locations)
        return replace(check, findings=(refusal, *check.findings))
    return check


# Check and preview of the data of a run, read with the model's tokenizer but without its weights.


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
