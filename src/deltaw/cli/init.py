"""`deltaw init`: three questions, and a commented settings file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltaw import tasks
from deltaw.cli.mistakes import SettingsFile, TaskName
from deltaw.cli.options import completing, console
from deltaw.errors import UserError
from deltaw.platforms import shell_word

if TYPE_CHECKING:
    from deltaw.reports.starter import Look


@click.command("init")
@click.argument("file", default="train.yaml", type=SettingsFile())
@click.option("--model", help="which model", shell_complete=completing("model"))
@click.option("--data", help="which rows", shell_complete=completing("data.train"))
@click.option("--task", type=TaskName(tasks.names()), help="what the model is to learn")
@click.option("--yes", is_flag=True, help="ask nothing: take the flags, and the defaults for the rest")
@click.option("--force", is_flag=True, help="overwrite FILE")
def command(file: str, model: str | None, data: str | None, task: str | None, yes: bool, force: bool) -> None:
    """Ask which rows, what for and which model, look at the rows, and write a commented settings FILE.

    Without a terminal nothing is asked, and rows that cannot be used are skipped.
    """
    from deltaw.durable import write_text
    from deltaw.reports.starter import MODELS, look_at, settings_text

    if Path(file).exists() and not force:
        raise UserError("the file exists", where=file, hint="name another, or overwrite it with --force")
    out = console(False)
    ask = sys.stdin.isatty() and not yes
    data, look = _data(data, model, task, ask)
    skip = True
    if look is not None:
        for line in look.lines():
            out.say(line)
        if look.bad:
            skip = not ask or click.confirm("Skip them?", default=True)
            way = "they are skipped:" if skip else "a run will stop at them, unless you set"
            out.print(f"{way} data.bad_rows: skip")
    if task is None:
        task = "causal-lm" if look is None else look.task
        if ask:
            task = click.prompt("What is the model to learn?", default=task, type=click.Choice(tasks.names()))
    given = model
    if model is None:
        model = MODELS.get(task)
        if ask:
            model = click.prompt("Which model? A folder, a hub id, a .gguf file", default=model)
        elif model is None:
            raise UserError(f"there is no usual model for {task}", hint="name one with --model")
    if look is not None and (look.task != task or (given or MODELS.get(look.task)) != model):
        look = look_at(data, model, task)  # its tokens are counted by the model's tokenizer
        out.say(look.lines()[0])
    write_text(file, settings_text(model, data, task, look, file, skip=skip))
    shown = shell_word(file)
    out.print(f"written to {file}. Next:")
    out.print(f"  deltaw plan {shown}     # the memory that it needs")
    out.print(f"  deltaw train {shown}")


def _data(data: str | None, model: str | None, task: str | None, ask: bool) -> tuple[str, Look | None]:
    """The rows, and what was found in them; asked again until they can be used."""
    from deltaw.reports.starter import data_here

    if data is not None:
        return data, _look(data, model, task)
    found = data_here(Path.cwd())
    if not ask:
        if found is None:
            raise UserError("there is no data file in this folder", where=str(Path.cwd()), hint="name one with --data")
        return found, _look(found, model, task)
    while True:
        data = str(click.prompt("Which rows? A file, a folder, a hub id", default=found)).strip()
        try:
            return data, _look(data, model, task)
        except UserError as error:
            click.echo(str(error), err=True)


def _look(data: str, model: str | None, task: str | None) -> Look | None:
    from deltaw.data.sources import KINDS
    from deltaw.hub.packages import is_package_reference
    from deltaw.reports.starter import is_here, look_at

    is_file = not is_package_reference(data) and Path(data).suffix in KINDS
    return look_at(data, model, task) if is_file or is_here(data) else None
