"""`deltaw train`: from settings to an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deltaw.cli.options import console, json_flag, nested, print_json, settings_flags
from deltaw.errors import UserError
from deltaw.working import working

if TYPE_CHECKING:
    from deltaw.training.parallel.reducer import Reducer


@click.command("train")
@click.argument("settings", required=False, type=click.Path())
@click.option(
    "--resume",
    metavar="RUN",
    default=None,
    help="go on with the run in this folder and its own settings, also if it was finished; flags change them",
)
@click.option(
    "--fresh",
    is_flag=True,
    help="begin with the first step, even if the output folder holds a run that is not finished; it is moved",
)
@settings_flags
@json_flag
def command(settings: str | None, resume: str | None, fresh: bool, as_json: bool, **given: str | None) -> int:
    """Fine-tune a model: SETTINGS is a YAML file; every flag stands above it. The same command again goes on
    with a run that was stopped. Started by torchrun, several processes train as one."""
    with working("starting"):
        from deltaw.training.parallel.joining import joined
    with joined() as processes:
        if processes.rank:
            from deltaw.runs.follower import follow
            from deltaw.training.parallel.group import Group

            assert isinstance(processes, Group)
            return follow(processes)
        return _train(settings, resume, fresh, as_json, given, processes)


def _train(
    settings: str | None,
    resume: str | None,
    fresh: bool,
    as_json: bool,
    given: dict[str, str | None],
    processes: Reducer,
) -> int:
    """As process 0, or alone."""
    out = console(as_json)
    with working("starting"):
        from deltaw.machine.memory import keep_freed_memory
        from deltaw.reports.progress import TerminalCallback, show_end
        from deltaw.reports.run import fit
        from deltaw.settings import RunConfig
    if resume is not None and settings is not None:
        raise UserError(
            "a run that goes on has its own settings",
            where=f"--resume {resume}",
            hint="give flags for what is to change, and no file of settings",
        )
    keep_freed_memory()
    flags = nested(given)
    config = flags if resume is not None else RunConfig.read(settings, flags)
    result = fit(config, callback=TerminalCallback(out), resume=resume, fresh=fresh, processes=processes)
    show_end(out, result)
    if as_json:
        print_json(result.as_dict())
    return 130 if result.interrupted else 0
