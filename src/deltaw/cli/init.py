"""`deltaw init`: create a commented settings file from three questions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltaw.cli.options import complete_setting, console
from deltaw.cli.suggestions import SettingsFile, TaskName
from deltaw.errors import UserError
from deltaw.platforms import shell_word
from deltaw.settings import task_registry

if TYPE_CHECKING:
    from deltaw.reports.starter import DataPreview


@click.command("init")
@click.argument("file", default="train.yaml", type=SettingsFile())
@click.option("--model", help="base model", shell_complete=complete_setting("model"))
@click.option("--data", help="training rows", shell_complete=complete_setting("data.train"))
@click.option("--task", type=TaskName(task_registry.names()), help="training task")
@click.option("--yes", is_flag=True, help="do not ask questions; use the flags and defaults")
@click.option("--force", is_flag=True, help="overwrite FILE")
def command(file: str, model: str | None, data: str | None, task: str | None, yes: bool, force: bool) -> None:
    """Ask for the rows, the task and the model, inspect the rows, and create a commented settings FILE.

    Without a terminal, there are no questions and unusable rows are skipped.
    """
    from deltaw.atomic_files import write_text
    from deltaw.data.class_names import merged_classes
    from deltaw.data.starter import default_model
    from deltaw.reports.starter import preview_data, settings_text

    if Path(file).exists() and not force:
        raise UserError("the file already exists", location=file, hint="choose another name, or overwrite with --force")
    out = console(False)
    interactive = sys.stdin.isatty() and not yes
    data, preview = _data(data, model, task, interactive)
    skip = True
    merge = False
    if preview is not None:
        for line in preview.lines():
            out.print_line(line)
        if preview.bad:
            skip = not interactive or click.confirm("Skip the unusable rows?", default=True)
            note = "unusable rows will be skipped:" if skip else "training will stop with an error, unless you set"
            out.print(f"{note} data.bad_rows: skip")
        if interactive and merged_classes(preview.class_counts):
            merge = click.confirm("Merge the classes with almost equal names?", default=True)
    if task is None:
        task = task_registry.default_task() if preview is None else preview.task
        if interactive:
            task = click.prompt("Which task?", default=task, type=click.Choice(task_registry.names()))
    requested_model = model
    if model is None:
        model = default_model(task)
        if interactive:
            model = click.prompt("Which model? A folder, a hub id, a .gguf file", default=model)
        elif model is None:
            raise UserError(f"there is no default model for {task}", hint="set --model")
    if preview is not None and (preview.task != task or (requested_model or default_model(preview.task)) != model):
        preview = preview_data(data, model, task)  # token counts depend on the model's tokenizer
        out.print_line(preview.lines()[0])
    write_text(file, settings_text(model, data, task, preview, file, skip=skip, merge=merge))
    quoted_file = shell_word(file)
    out.print(f"written to {file}. Next:")
    out.print(f"  deltaw plan {quoted_file}     # predict the memory")
    out.print(f"  deltaw train {quoted_file}")


def _data(data: str | None, model: str | None, task: str | None, interactive: bool) -> tuple[str, DataPreview | None]:
    """Return the rows and their preview. Interactively, ask until the rows can be used."""
    from deltaw.reports.starter import find_data_file

    if data is not None:
        return data, _preview(data, model, task)
    default = find_data_file(Path.cwd())
    if not interactive:
        if default is None:
            raise UserError("no data file found in this folder", location=str(Path.cwd()), hint="set --data")
        return default, _preview(default, model, task)
    while True:
        data = str(click.prompt("Which rows? A file, a folder, a hub id", default=default)).strip()
        try:
            return data, _preview(data, model, task)
        except UserError as error:
            click.echo(str(error), err=True)


def _preview(data: str, model: str | None, task: str | None) -> DataPreview | None:
    from deltaw.reports.starter import names_local_rows, preview_data

    return preview_data(data, model, task) if names_local_rows(data) else None
