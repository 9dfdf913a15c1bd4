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
LONG = click.Choice(["error", "cut", "drop"])
# Flags of models that write text.
TEXT = {*SAMPLING, "max_new_tokens", "stop", "json_schema", "regex", "system"}


@click.command("predict")
@click.argument("run", type=RunArgument())
@click.argument("file", type=click.Path())
@click.option("-o", "--output", type=click.Path(path_type=Path), help=OUTPUT_HELP)
@click.option("--force", is_flag=True, help="overwrite the output, and discard unfinished predictions of other rows")
@click.option("--rows", type=click.IntRange(1), help="only the first N rows", metavar="N")
@click.option("--data.columns", "columns", metavar="YAML", help=COLUMNS_HELP)
@click.option("--data.max_length", "max_length", type=click.IntRange(2), help="the most tokens in a row")
@click.option("--data.long_rows", "long_rows", type=LONG, help="cut truncates longer rows, others give them an error")
@system_flag
@text_flags(max_new_tokens=256)
@click.option("--task", type=TaskName(tasks.names()), help="the task of a bare model")
@model_flags
@json_flag
def command(
    run: str,
    file: str,
    output: Path | None,
    force: bool,
    rows: int | None,
    columns: str | None,
    system: str | None,
    how: TextSettings,
    as_json: bool,
    **opening: Any,
) -> None:
    """Predict the rows of FILE with RUN: a run's folder, an adapter's, or a model. The rows need no labels. Each gives
    a record with its number, its columns, the predictions and, if it cannot be used, an error."""
    notes, context, began = console(True), click.get_current_context(), time.monotonic()
    if output is None and (as_json or force):
        flag = "--json" if as_json else "--force"
        raise UserError("the predictions go to standard output", where=flag, hint="name a file with --output")
    given = {name: opening.pop(name) for name in ("max_length", "long_rows")} | {"columns": _columns(columns)}
    given = {name: value for name, value in given.items() if value is not None}
    with working("starting"):
        from deltaw.serving.predicting import InputRows, Predictor, identity_of_run, input_settings, predict_rows
        from deltaw.serving.prediction_file import PredictionFile, check_output
        from deltaw.training.origin import open_run
    if output is not None:
        check_output(output, file, force=force)
    session = open_run(run, say=notes.say, **opening)
    source = InputRows(file, images=session.task.tokenizer is None, most=rows)
    settings = input_settings(session, source, given)
    if session.task.writes_text:
        settings = replace(
            settings, system=system_of(session, system, notes.say) or (None if system == "" else settings.system)
        )
    elif flag := next((n for n in TEXT if context.get_parameter_source(n) == ParameterSource.COMMANDLINE), None):
        what = f"the run is for {session.task.name}, and writes no text"
        raise UserError(what, where=f"--{flag.replace('_', '-')}", hint="leave it out")
    with contextlib.ExitStack() as stack:
        predictor = stack.enter_context(
            contextlib.closing(Predictor(session, settings, source, how.request, notes.say))
        )
        target = None
        if output is not None:
            named = {"the run": identity_of_run(session), "the file": source.identity()}
            named["the settings"] = [asdict(settings), asdict(how), rows]
            target = stack.enter_context(contextlib.closing(PredictionFile(output, named, force=force)))
        found = predict_rows(predictor, source, target, lambda data: click.echo(data, nl=False), notes.say)
        if target is not None:
            target.finish()
    failed = found.errors.total()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.errors.most_common(5))
    notes.say(f"{found.rows:,} rows" + (f", {failed:,} of them without a prediction: {reasons}" if failed else ""))
    if output is not None:
        notes.say(f"written: {output}")
    if as_json:
        counts = {"rows": found.rows, "predicted": found.rows - failed, "errors": dict(found.errors)}
        seconds = round(time.monotonic() - began, 3)
        print_json({"output": str(output), "task": session.task.name, **counts, "seconds": seconds})


def _columns(given: str | None) -> dict[str, str] | None:
    """The columns that ``--data.columns`` maps."""
    found = None if given is None else nested({"setting_data__columns": given})["data"]["columns"]
    if found is not None and not (isinstance(found, dict) and all(isinstance(v, str) for v in found.values())):
        raise UserError("this is no mapping of columns", where="--data.columns", hint="write it as {text: review}")
    return found
