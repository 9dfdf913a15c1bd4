"""`deltaw deploy`: import a run into another program on this machine."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.options import Command, SubcommandGroup, base_flags, console, json_flag, print_json, with_options
from deltaw.cli.suggestions import AdapterArgument
from deltaw.progress import track_progress


@click.group("deploy", cls=SubcommandGroup, no_args_is_help=False)
def command() -> None:
    """Import a run into Ollama or LM Studio, and compare the answers of both."""


def _common_flags(part: Command) -> Command:
    """Add the flags that both programs support."""
    return with_options(
        part,
        click.option("--name", help="name of the model  [default: name of the run]"),
        click.option("--type", "kind", help="merge the weights and store this type  [default: q8_0]"),
        click.option("--server", "url", metavar="HOST:PORT", help="address of the program's server"),
        click.option("--questions", default=20, show_default=True, type=click.IntRange(0, 32), help="questions to ask"),
        base_flags,
        click.option("--overwrite", is_flag=True, help="replace an existing model with this name"),
        json_flag,
    )


@command.command("ollama")
@click.argument("run", type=AdapterArgument())
@_common_flags
def ollama(run: str, url: str | None, **options: Any) -> None:
    """Import RUN into Ollama, which must be running."""
    with track_progress("starting"):
        from deltaw.export.programs import Ollama
    _deploy(run, Ollama(url), **options)


@command.command("lmstudio")
@click.argument("run", type=AdapterArgument())
@click.option("--models", type=click.Path(file_okay=False), help="LM Studio's folder  [default: ~/.lmstudio/models]")
@_common_flags
def lmstudio(run: str, url: str | None, models: str | None, **options: Any) -> None:
    """Copy RUN into LM Studio's model folder. Answers are compared if its server is running."""
    with track_progress("starting"):
        from deltaw.export.programs import LMStudio
    _deploy(run, LMStudio(url, models), **options)


def _deploy(run: str, program: Any, as_json: bool, **options: Any) -> None:
    out = console(as_json)
    log = console(True).print_line
    with track_progress("starting"):
        from deltaw.decoding.opening import SessionGenerator
        from deltaw.export.deploy import deploy
        from deltaw.reports.comparison import agreement_table
    result = deploy(run, program, make_writer=lambda session: SessionGenerator(session, log), log=log, **options)
    if as_json:
        print_json(result.as_dict())
        return
    if result.asked:
        out.print(agreement_table(result))
    for line in result.lines():
        out.print_line(line)
