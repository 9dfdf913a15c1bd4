"""`deltaw train`: train an adapter from settings."""

from __future__ import annotations

import time
from dataclasses import replace

import click

from deltaw.cli.options import GroupedCommand, console, json_flag, nested_settings, print_json, settings_flags
from deltaw.cli.suggestions import SettingsFile
from deltaw.errors import UserError
from deltaw.progress import track_progress, use_listener


@click.command("train", cls=GroupedCommand)
@click.argument("settings", required=False, type=SettingsFile())
@click.option("--resume", metavar="RUN", help="folder of a run to resume, even if finished; flags change its settings")
@click.option("--fresh", is_flag=True, help="start from the first step and rename an existing run")
@settings_flags
@json_flag
def command(settings: str | None, resume: str | None, fresh: bool, as_json: bool, **arguments: str | None) -> int:
    """Fine-tune a model. SETTINGS is a YAML file. Flags override its values. Running the same command again resumes an
    interrupted run and leaves a finished run unchanged. With torchrun, several processes train together.
    """
    start_time, out = time.monotonic(), console(as_json)
    with track_progress("starting"):
        from deltaw.training.parallel.joining import join_processes
    with join_processes() as processes:
        if processes.rank:
            from deltaw.runs.fit import follow
            from deltaw.training.parallel.group import Group

            assert isinstance(processes, Group)
            with use_listener(None):
                return follow(processes)
        with track_progress("starting"):
            from deltaw.machine.memory import retain_freed_memory
            from deltaw.reports.progress import TerminalCallback, print_summary
            from deltaw.reports.run import finished_lines
            from deltaw.runs.fit import fit
            from deltaw.settings.config import RunConfig
        if resume is not None and settings is not None:
            message, hint = "a resumed run uses its stored settings", "replace the settings file with flags"
            raise UserError(message, location=f"--resume {resume}", hint=hint)
        retain_freed_memory()
        flags = nested_settings(arguments)
        config = flags if resume is not None else RunConfig.read(settings, flags)
        startup_seconds = {"starting": round(time.monotonic() - start_time, 3)}
        result = fit(config, callback=TerminalCallback(out), resume=resume, fresh=fresh, processes=processes)
        if result.earlier is None:
            result = replace(result, seconds_by_part={**startup_seconds, **result.seconds_by_part})
            print_summary(out, result)
        else:
            for line in finished_lines(result, settings if settings is not None and not flags else None):
                out.print_line(line)
        if as_json:
            print_json(result.as_dict())
        return 130 if result.interrupted else 0
