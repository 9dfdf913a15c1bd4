"""`deltaw predict`: predictions for the rows of a file."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from deltaw import tasks
from deltaw.cli.mistakes import RunArgument, TaskName
from deltaw.cli.options import console, json_flag, model_flags, nested, print_json
from deltaw.cli.text_options import SAMPLING, TextSettings, system_flag, system_of, text_flags
from deltaw.errors import UserError
from deltaw.working import working

OUTPUT_HELP = "a .jsonl, .csv or .parquet file  [default: JSON Lines on standard output]"
COLUMNS_HELP = "the file's columns by our names, as in {text: review}  [default: as the run read its rows]"
LONG_HELP = "cut truncates longer rows; the others give them an error"
# Flags for models that write text.
TEXT = {*SAMPLING, "max_new_tokens", "stop", "json_schema", "regex", "system"}


@click.command("predict")
@click.argument("run", type=RunArgument())
@click.argument("file", type=click.Path())
@click.option("-o", "--output", type=click.Path(path_type=Path), help=OUTPUT_HELP)
@click.option(
    "--force",
    is_flag=True,
    help="overwrite the output, and discard unfinished predictions of another run, file or settings",
)
@click.option("--rows", type=click.IntRange(1), metavar="N", help="only the first N rows")
@click.option("--data.columns", "columns", metavar="YAML", help=COLUMNS_HELP)
@click.option("--data.max_length", "max_length", type=click.IntRange(2), help="the most tokens in a row")
@click.option("--data.long_rows", "long_rows", type=click.Choice(["error", "cut", "drop"]), help=LONG_HELP)
@system_flag
@text_flags(max_new_tokens=256)
@click.option("--task", type=TaskName(tasks.names()), help="the task of a bare model")
@model_flags
@json_flag
def command(run: str, file: str, output: Path | None, force: bool, rows: int | None, **options: Any) -> None:
    """Predict the rows of FILE with RUN: a run's folder, an adapter's, or a model. The rows need no labels. Each gives
    a record with its number, its columns, the predictions and, if it cannot be used, an error."""
    notes, start_time, as_json = console(True), time.monotonic(), options.pop("as_json")
    if output is None and (as_json or force):
        flag = "--json" if as_json else "--force"
        raise UserError("the predictions go to standard output", where=flag, hint="name a file with --output")
    text: TextSettings = options.pop("how")
    system, columns = options.pop("system"), _columns(options.pop("columns"))
    overrides = {name: options.pop(name) for name in ("max_length", "long_rows")} | {"columns": columns}
    with working("starting"):
        from deltaw.data.report import MAX_ROW_BYTES, count_of
        from deltaw.data.sources import open_source
        from deltaw.hub.packages import local_path
        from deltaw.serving.predicting import InputRows, Predictor, identity_of_run, input_settings
        from deltaw.serving.prediction_file import PredictionFile, Progress, check_output
        from deltaw.training.origin import open_run
    if output is not None:
        check_output(output, file, force=force)
    if not local_path(file).is_dir():  # a folder may hold rows or images, depending on the model
        open_source(file)
    session = open_run(run, say=notes.say, **options)
    max_bytes = MAX_ROW_BYTES if session.data is None else session.data.max_row_bytes
    source = InputRows(file, images=session.task.tokenizer is None, limit=rows, max_bytes=max_bytes)
    settings = input_settings(session, source, {name: value for name, value in overrides.items() if value is not None})
    if session.task.writes_text:
        default = None if system == "" else settings.system
        settings = replace(settings, system=system_of(session, system, notes.say) or default)
    else:
        _reject_text_flags(session.task.name)
    with contextlib.ExitStack() as stack:
        flat = output is not None and output.suffix.lower() != ".jsonl"
        predictor = Predictor(session, settings, source, text.request, notes.say, flat=flat)
        stack.callback(predictor.close)
        if output is None:
            progress = Progress()
            predictor.run(progress, lambda lines: click.echo(lines, nl=False))
        else:
            named = {"the run": identity_of_run(session), "the file": source.identity}
            named["the settings"] = [asdict(settings), asdict(text), rows]
            target = stack.enter_context(contextlib.closing(PredictionFile(output, named, force=force)))
            progress = target.progress
            predictor.run(progress, target.write)
            target.finish()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in progress.errors.most_common(5))
    failed = f", {progress.rows - progress.predicted:,} of them without a prediction: {reasons}" if reasons else ""
    notes.say(count_of(progress.rows) + failed)
    if output is not None:
        notes.say(f"written: {output}")
    if as_json:
        counts = {"rows": progress.rows, "predicted": progress.predicted, "errors": progress.errors}
        seconds = round(time.monotonic() - start_time, 3)
        print_json({"output": str(output), "task": session.task.name, **counts, "seconds": seconds})


def _columns(text: str | None) -> dict[str, str] | None:
    """Parse ``--data.columns``."""
    columns = None if text is None else nested({"setting_data__columns": text})["data"]["columns"]
    if text is None or (isinstance(columns, dict) and all(isinstance(name, str) for name in columns.values())):
        return columns
    raise UserError("this is no mapping of columns", where="--data.columns", hint="write it as {text: review}")


def _reject_text_flags(task: str) -> None:
    source_of = click.get_current_context().get_parameter_source
    if flag := next((name for name in sorted(TEXT) if source_of(name) == ParameterSource.COMMANDLINE), None):
        what = f"the run is for {task}, and writes no text"
        raise UserError(what, where=f"--{flag.replace('_', '-')}", hint="leave it out")
