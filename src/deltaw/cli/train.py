"""`deltaw train`: train an adapter from settings."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.options import GroupedCommand, console, json_flag, nested_settings, print_json, settings_flags
from deltaw.cli.suggestions import SettingsFile
from deltaw.errors import UserError
from deltaw.progress import track_progress, use_listener

if TYPE_CHECKING:
    from deltaw.reports.tables import TerminalOutput
    from deltaw.runs.result import Result
    from deltaw.settings.stages import Chain, Stage
    from deltaw.training.reducer import Reducer


@click.command("train", cls=GroupedCommand)
@click.argument("settings", required=False, type=SettingsFile())
@click.option("--resume", metavar="RUN", help="folder of a run to resume, even if finished; flags change its settings")
@click.option("--fresh", is_flag=True, help="start from the first step and rename an existing run")
@settings_flags
@json_flag
def command(settings: str | None, resume: str | None, fresh: bool, as_json: bool, **arguments: str | None) -> int:
    """Fine-tune a model. SETTINGS is a YAML file. Flags override its values. Running the same command again resumes an
    interrupted run and leaves a finished run unchanged. With torchrun, several processes train together. A file with
    several 'stages' trains one adapter after the other.
    """
    start_time = time.monotonic()
    out = console(as_json)
    flags = nested_settings(arguments)
    if resume is None and os.environ.get("WORLD_SIZE", "1") == "1":
        _require_valid(settings, flags)
    with track_progress("starting"):
        from deltaw.training.parallel.joining import join_processes
    with join_processes() as processes:
        chain = None if resume is not None or settings is None else _read_chain(settings, flags)
        if processes.rank:
            from deltaw.runs.worker_rank import follow
            from deltaw.training.parallel.group import Group

            assert isinstance(processes, Group)
            with use_listener(None):
                return max(follow(processes) for _ in range(1 if chain is None else len(chain.stages)))
        with track_progress("starting"):
            from deltaw.machine.memory import retain_freed_memory
            from deltaw.reports.progress import TerminalCallback, print_summary
            from deltaw.reports.run import finished_lines
            from deltaw.runs.fit import fit
            from deltaw.settings.config import RunConfig
        if resume is not None and settings is not None:
            message = "a resumed run uses its stored settings"
            hint = "replace the settings file with flags"
            raise UserError(message, location=f"--resume {resume}", hint=hint)
        retain_freed_memory()
        if chain is not None:
            return _train_chain(chain, out, fresh=fresh, as_json=as_json, processes=processes)
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


def _require_valid(settings: str | None, flags: dict[str, Any]) -> None:
    """Report invalid settings before the seconds that importing torch takes. Several processes must connect first."""
    from deltaw.settings.config import RunConfig

    if settings is None or _read_chain(settings, flags) is None:
        RunConfig.read(settings, flags)


def _read_chain(settings: str, flags: dict[str, Any]) -> Chain | None:
    from deltaw.settings.stages import read_chain

    return read_chain(settings, flags)


def _train_chain(chain: Chain, out: TerminalOutput, *, fresh: bool, as_json: bool, processes: Reducer) -> int:
    """Train all stages, print the results of each, and score all adapters on the same rows."""
    from deltaw.experiments.chain import ChainResult, score_stages, train_stages
    from deltaw.reports.chain import PAGE_FILE, terminal_tables, warning_lines, write_results
    from deltaw.reports.progress import TerminalCallback, print_summary

    def callback_for(stage: Stage) -> TerminalCallback:
        number = [other.name for other in chain.stages].index(stage.name) + 1
        out.print(f"\nstage '{stage.name}', {number} of {len(chain.stages)}")
        return TerminalCallback(out)

    results: dict[str, Result] = {}
    for stage, result in train_stages(chain, callback_for, fresh=fresh, processes=processes, log=out.print_line):
        results[stage.name] = result
        if result.earlier is None:
            print_summary(out, result)
        else:
            out.print_line(f"{result.output} is finished and left unchanged")
    if any(result.interrupted for result in results.values()):
        out.print_line("the chain was interrupted; repeat the command to resume it")
        if as_json:
            print_json(ChainResult(chain, results, ()).as_dict())
        return 130
    final = ChainResult(chain, results, score_stages(chain))
    write_results(final)
    for caption, table in terminal_tables(final):
        out.print(f"\n{caption}")
        out.print(table)
    for line in warning_lines(final):
        out.print_line(line)
    out.print_line(f"report: {chain.folder / PAGE_FILE}")
    if as_json:
        print_json(final.as_dict())
    return 0
