"""`deltaw train`: from settings to an adapter."""

from __future__ import annotations

import time
from dataclasses import replace

import click

from deltaw.cli.mistakes import SettingsFile
from deltaw.cli.options import Verb, console, json_flag, nested, print_json, settings_flags
from deltaw.errors import UserError
from deltaw.working import listening, working


@click.command("train", cls=Verb)
@click.argument("settings", required=False, type=SettingsFile())
@click.option(
    "--resume", metavar="RUN", help="go on with the run in this folder, also a finished one; flags change its settings"
)
@click.option("--fresh", is_flag=True, help="begin with the first step, and move the run in the output folder")
@settings_flags
@json_flag
def command(settings: str | None, resume: str | None, fresh: bool, as_json: bool, **given: str | None) -> int:
    """Fine-tune a model: SETTINGS is a YAML file; every flag stands above it. The same command again goes on
    with a run that was stopped, and leaves one that is finished as it is. Started by torchrun, several processes
    train as one."""
    began, out = time.monotonic(), console(as_json)
    with working("starting"):
        from deltaw.training.parallel.joining import joined
    with joined() as processes:
        if processes.rank:
            from deltaw.reports.run import ENGINE
            from deltaw.runs.follower import follow
            from deltaw.training.parallel.group import Group

            assert isinstance(processes, Group)
            with listening(None):
                return follow(processes, ENGINE)
        with working("starting"):
            from deltaw.machine.memory import keep_freed_memory
            from deltaw.reports.progress import TerminalCallback, show_end
            from deltaw.reports.run import finished_lines, fit
            from deltaw.settings import RunConfig
        if resume is not None and settings is not None:
            what, hint = "a run that goes on has its own settings", "give flags for what is to change, and no file"
            raise UserError(what, where=f"--resume {resume}", hint=hint)
        keep_freed_memory()
        flags = nested(given)
        config = flags if resume is not None else RunConfig.read(settings, flags)
        starting = {"starting": round(time.monotonic() - began, 3)}
        result = fit(config, callback=TerminalCallback(out), resume=resume, fresh=fresh, processes=processes)
        if result.earlier is None:
            result = replace(result, seconds_by_part={**starting, **result.seconds_by_part})
            show_end(out, result)
        else:
            for line in finished_lines(result, settings if settings is not None and not flags else None):
                out.say(line)
        if as_json:
            print_json(result.as_dict())
        return 130 if result.interrupted else 0
