"""`deltaw data`: what rows become, and what is wrong with them, before a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltaw.cli.options import Parts, Verb, console, json_flag, nested, print_json, settings_flags
from deltaw.errors import UserError

if TYPE_CHECKING:
    from deltaw.settings import RunConfig


@click.group("data", cls=Parts, no_args_is_help=False)
def command() -> None:
    """What rows become when a model is trained on them, and what is wrong with them."""


@command.command("show", cls=Verb)
@click.argument("file", required=False, type=click.Path())
@click.option("--row", type=click.IntRange(1), help="the row of this number, as in messages")
@click.option("--rows", "count", type=click.IntRange(1), help="so many rows  [default: 3, or 1]")
@click.option("--settings", type=click.Path(), help="a YAML file with the run's settings")
@settings_flags
@json_flag
def show(
    file: str | None, row: int | None, count: int | None, settings: str | None, as_json: bool, **given: str | None
) -> None:
    """Show what rows of FILE become: their tokens as text, and which of them are trained on.

    FILE is data, a run's YAML file, or a run's folder. --model names the model whose tokenizer reads it.
    """
    from deltaw.reports.data import LEGEND, PLAIN_LEGEND, row_as_dict, row_lines
    from deltaw.training.data_view import shown_rows

    out = console(as_json)
    found = shown_rows(_config(file, settings, given, out.say), row, count or (3 if row is None else 1), out.say)
    if as_json:
        print_json({"rows": [row_as_dict(one) for one in found]})
        return
    color = out.is_terminal and not out.no_color
    out.print(LEGEND if color else PLAIN_LEGEND)
    for one in found:
        for line in row_lines(one, color=color):
            out.print(line)


@command.command("check", cls=Verb)
@click.argument("file", required=False, type=click.Path())
@click.option("--settings", type=click.Path(), help="a YAML file with the run's settings")
@settings_flags
@json_flag
def check(file: str | None, settings: str | None, as_json: bool, **given: str | None) -> int:
    """Look for what is wrong with the rows of FILE: long, empty, repeated or contradictory ones, and more.

    FILE is data, a run's YAML file, or a run's folder. --model names the model whose tokenizer reads it. Ends
    with status 2 if training would fail or be pointless.
    """
    from deltaw.reports.data import check_lines
    from deltaw.training.data_view import check_data

    out = console(as_json)
    found = check_data(_config(file, settings, given, out.say), out.say)
    for line in check_lines(found):
        out.print(line)
    if as_json:
        print_json(found.as_dict())
    return 0 if found.usable else 2


def _config(
    file: str | None, settings: str | None, given: dict[str, str | None], say: Callable[[str], None]
) -> RunConfig:
    """The settings of a run on ``file``, which may itself be settings or a run's folder. Rows alone are read as
    `deltaw init` would have them read."""
    from deltaw.settings import SETTINGS, RunConfig
    from deltaw.training.origin import settings_in

    flags = nested(given)
    if file is None:
        return RunConfig.read(settings, flags)
    path = Path(file)
    is_folder = (path / SETTINGS).is_file()
    if is_folder or path.suffix in (".yaml", ".yml"):
        if settings is not None:
            raise UserError(f"'{file}' holds settings, and --settings names others", hint="give one of them")
        return settings_in(path, flags) if is_folder else RunConfig.read(path, flags)
    flags["data"] = {**flags.get("data", {}), "train": file}
    if settings is None and "model" not in flags:
        from deltaw.reports.starter import MODELS, is_here, look_at

        task = flags.get("task") or (look_at(file).task if is_here(file) else None)
        if task in MODELS:
            flags |= {"task": task, "model": MODELS[task]}
            say(f"task {task}, tokens of {MODELS[task]}; --task and --model change it")
    return RunConfig.read(settings, flags)
