"""`deltaw predict`: predict the rows of a file."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from deltaw.cli.options import console, json_flag, model_flags, nested_settings, print_json, require_utf8
from deltaw.cli.suggestions import RunArgument, TaskName
from deltaw.cli.text_options import SAMPLING, TextSettings, resolve_system_prompt, system_flag, text_flags
from deltaw.errors import UserError
from deltaw.progress import track_progress
from deltaw.settings import task_registry

OUTPUT_HELP = "output file (.jsonl, .csv or .parquet)  [default: JSON Lines on standard output]"
COLUMNS_HELP = "mapping of deltaw's column names to the file's, as in {text: review}  [default: as in training]"
LONG_HELP = "handling of longer rows: cut truncates them; error and drop report an error for them"
# Flags for models that generate text.
TEXT = {*SAMPLING, "max_new_tokens", "stop", "json_schema", "regex", "system"}


@click.command("predict")
@click.argument("run", type=RunArgument())
@click.argument("file", type=click.Path())
@click.option("-o", "--output", type=click.Path(path_type=Path), help=OUTPUT_HELP)
@click.option("--force", is_flag=True, help="overwrite the output; discard unfinished predictions of other settings")
@click.option("--name", metavar="COLUMN", help="column of the predictions, and prefix of the other new columns")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="number of rows to predict  [default: all]")
@click.option("--data.columns", "columns", metavar="YAML", help=COLUMNS_HELP)
@click.option("--data.max_length", "max_length", type=click.IntRange(2), help="maximum number of tokens per row")
@click.option("--data.long_rows", "long_rows", type=click.Choice(["error", "cut", "drop"]), help=LONG_HELP)
@system_flag
@text_flags(max_new_tokens=256)
@click.option("--task", type=TaskName(task_registry.names()), help="task of a model without an adapter")
@model_flags
@json_flag
def command(
    run: str, file: str, output: Path | None, force: bool, name: str | None, limit: int | None, **options: Any
) -> None:
    """Predict the rows of FILE with RUN: the folder of a run or an adapter, or a model. Rows need no labels. Each row
    produces a record with its number, its columns, the predictions and, if it is unusable, an error.
    """
    notes = console(True)
    start_time = time.monotonic()
    as_json = options.pop("as_json")
    if output is None and (as_json or force):
        flag = "--json" if as_json else "--force"
        raise UserError("the predictions are written to standard output", location=flag, hint="add --output FILE")
    if name is not None and not require_utf8(name, "--name").strip():
        raise UserError("the name is empty", location="--name", hint="for example --name topic")
    text: TextSettings = options.pop("text_settings")
    system = options.pop("system")
    columns = _columns(options.pop("columns"))
    overrides = {name: options.pop(name) for name in ("max_length", "long_rows")} | {"columns": columns}
    with track_progress("starting"):
        from deltaw.data.report import count_of
        from deltaw.data.sources import open_source
        from deltaw.hub.packages import local_path
        from deltaw.inference.open_run import open_run
        from deltaw.inference.predicting import (
            InputRows,
            PredictionFile,
            PredictionProgress,
            Predictor,
            check_output,
            identity_of_run,
            input_settings,
        )
        from deltaw.settings.data import MAX_ROW_BYTES
    if output is not None:
        check_output(output, file, force=force)
    if not local_path(file).is_dir():  # a folder may contain rows or images, depending on the model
        open_source(file)
    session = open_run(run, log=notes.print_line, **options)
    max_bytes = MAX_ROW_BYTES if session.data is None else session.data.max_row_bytes
    source = InputRows(file, images=session.task.tokenizer is None, limit=limit, max_bytes=max_bytes)
    settings = input_settings(session, source, {name: value for name, value in overrides.items() if value is not None})
    if session.task.generates_text:
        default = None if system == "" else settings.system
        settings = replace(settings, system=resolve_system_prompt(session, system, notes.print_line) or default)
    else:
        _reject_text_flags(session.task.name)
    with contextlib.ExitStack() as stack:
        flat = output is not None and output.suffix.lower() != ".jsonl"
        predictor = Predictor(session, settings, source, text.request, notes.print_line, flat=flat, name=name)
        stack.callback(predictor.close)
        if output is None:
            progress = PredictionProgress()
            predictor.run(progress, lambda lines: click.echo(lines, nl=False))
        else:
            identity = {"the run": identity_of_run(session), "the file": source.identity}
            identity["the settings"] = [asdict(settings), asdict(text), limit, name]
            target = stack.enter_context(contextlib.closing(PredictionFile(output, identity, force=force)))
            progress = target.progress
            predictor.run(progress, target.write)
            target.finish()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in progress.errors.most_common(5))
    failed = f", {progress.rows - progress.predicted:,} of them without a prediction: {reasons}" if reasons else ""
    notes.print_line(count_of(progress.rows) + failed)
    if output is not None:
        notes.print_line(f"written: {output}")
    if as_json:
        counts = {"rows": progress.rows, "predicted": progress.predicted, "errors": progress.errors}
        seconds = round(time.monotonic() - start_time, 3)
        print_json({"output": str(output), "task": session.task.name, **counts, "seconds": seconds})


def _columns(text: str | None) -> dict[str, str] | None:
    """Parse ``--data.columns``."""
    columns = None if text is None else nested_settings({"setting_data__columns": text})["data"]["columns"]
    if text is None or (isinstance(columns, dict) and all(isinstance(name, str) for name in columns.values())):
        return columns
    raise UserError("this is not a mapping of columns", location="--data.columns", hint="for example {text: review}")


def _reject_text_flags(task: str) -> None:
    source_of = click.get_current_context().get_parameter_source
    if flag := next((name for name in sorted(TEXT) if source_of(name) == ParameterSource.COMMANDLINE), None):
        message = f"the run's task is {task}, which does not generate text"
        raise UserError(message, location=f"--{flag.replace('_', '-')}", hint="remove the flag")
