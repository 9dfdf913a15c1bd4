"""`deltaw deploy`: a run in another program of this machine."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.mistakes import AdapterArgument
from deltaw.cli.options import Command, Parts, base_flags, console, json_flag, print_json, with_options
from deltaw.working import working


@click.group("deploy", cls=Parts, no_args_is_help=False)
def command() -> None:
    """Make a run a model of Ollama or LM Studio, and compare its answers with the run's."""


def _flags(part: Command) -> Command:
    """What both programs take."""
    return with_options(
        part,
        click.option("--name", help="of the model  [default: the run's]"),
        click.option("--type", "kind", default="q8_0", show_default=True, help="how numbers are stored, as in export"),
        click.option("--server", "url", metavar="HOST:PORT", help="where the program listens"),
        click.option("--questions", default=20, show_default=True, type=click.IntRange(0, 32), help="asked of both"),
        base_flags,
        click.option("--overwrite", is_flag=True, help="replace a model of that name"),
        json_flag,
    )


@command.command("ollama")
@click.argument("run", type=AdapterArgument())
@_flags
def ollama(run: str, url: str | None, **how: Any) -> None:
    """Make RUN a model of Ollama, which must be running."""
    with working("starting"):
        from deltaw.export.programs import Ollama
    _deploy(run, Ollama(url), **how)


@command.command("lmstudio")
@click.argument("run", type=AdapterArgument())
@click.option("--models", type=click.Path(file_okay=False), help="LM Studio's folder  [default: ~/.lmstudio/models]")
@_flags
def lmstudio(run: str, url: str | None, models: str | None, **how: Any) -> None:
    """Put RUN into LM Studio's folder of models. Its server is asked if it is running."""
    with working("starting"):
        from deltaw.export.programs import LMStudio
    _deploy(run, LMStudio(url, models), **how)


def _deploy(run: str, program: Any, as_json: bool, **how: Any) -> None:
    out, notes = console(as_json), console(True)
    with working("starting"):
        from deltaw.export.deploy import deploy
        from deltaw.reports.scores import agreement_table
        from deltaw.serving.opening import SessionWriter
    done = deploy(run, program, writes=lambda session: SessionWriter(session, notes.say), say=notes.say, **how)
    if as_json:
        print_json(done.as_dict())
        return
    if done.asked:
        out.print(agreement_table(done))
    for line in done.lines():
        out.say(line)
