"""`deltaw plan`: predict the memory and the time of a run before weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.options import GroupedCommand, console, json_flag, nested_settings, print_json, settings_flags
from deltaw.cli.suggestions import SettingsFile
from deltaw.errors import UserError
from deltaw.progress import Detail

if TYPE_CHECKING:
    from deltaw.data.row_reader import RunData
    from deltaw.memory.plan import Plan
    from deltaw.reports.tables import TerminalOutput
    from deltaw.settings.config import RunConfig
    from deltaw.settings.stages import Chain
    from deltaw.training.task import Task


@click.command("plan", cls=GroupedCommand)
@click.argument("settings", required=False, type=SettingsFile())
@click.option("--methods", help="methods to plan: a,b,c or all  [default with --json, --picture and --fit-memory: all]")
@click.option("--picture", type=click.Path(), help="output file (.svg) for a stacked bar chart")
@click.option("--fit-memory", "budget", help="memory limit, such as 6GB; search for settings that fit")
@click.option(
    "--fit-time", "time_budget", help="time limit, such as 30min; search for rows, epochs and settings that fit"
)
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="processes; plans one of them")
@settings_flags
@json_flag
def command(
    settings: str | None,
    methods: str | None,
    picture: str | None,
    budget: str | None,
    time_budget: str | None,
    processes: int,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Predict the memory of a run by part, check if it fits, and predict its time. Reads the model's configuration and
    the rows, but no weights. The stages of a chain are planned one by one.
    """
    from deltaw.machine.choices import assumed_cards
    from deltaw.memory.plan import parse_bytes
    from deltaw.settings.config import RunConfig
    from deltaw.settings.stages import read_chain
    from deltaw.training.planning.plan_arguments import parse_methods
    from deltaw.training.planning.plan_cache import load_cached_plans

    click.get_current_context().with_resource(assumed_cards())
    out = console(as_json)
    flags = nested_settings(arguments)
    if picture is not None and Path(picture).suffix.lower() != ".svg":
        hint = "charts are SVG files: use a file name that ends with .svg"
        raise UserError(f"'{Path(picture).name}' does not end with .svg", location="--picture", hint=hint)
    if time_budget is not None and (methods is not None or processes > 1):
        flag = "--methods" if methods is not None else "--processes"
        raise UserError(
            "a search under a time budget is for one method and one process", location=flag, hint="remove it"
        )
    if settings is not None and (chain := read_chain(settings, flags)) is not None:
        options = {"--methods": methods, "--fit-memory": budget, "--fit-time": time_budget}
        if given := [flag for flag, value in options.items() if value is not None]:
            message = "a chain of stages is planned without this flag"
            raise UserError(message, location=given[0], hint="write the settings of one stage to a file")
        plans = _plan_chain(chain, processes, out)
        _end(plans, picture, out, as_json)
        return
    config = RunConfig.read(settings, flags)
    if config.start_from is not None:
        from deltaw.methods.start import resolve_start

        config = resolve_start(config, out.print_line)
    all_methods = as_json or picture is not None or budget is not None
    names = parse_methods(methods or ("all" if all_methods else config.method), config.method)
    size = None if budget is None else parse_bytes(budget)
    seconds = None if time_budget is None else _parse_duration(time_budget)
    cached = load_cached_plans(config, names, processes) if size is None and seconds is None else None
    if cached is not None:
        plans = {name: plan.per_process(processes, config.train.sharding) for name, plan in cached.plans.items()}
        _show(plans, config, processes, cached.lines, out)
        _end(plans, picture, out, as_json)
        if not (config.track or config.memory or getattr(config.section, "code_keys", None)):
            return  # all checks are done, without importing torch

    from deltaw.runs.checks import check_settings, read_and_check_data

    if cached is not None:
        check_settings(config)
        return
    lines: list[str] = []
    task, data = read_and_check_data(config, lines.append)
    if size is not None or seconds is not None:
        budgets = _search(config, (task, data), (size, seconds), names, processes, out)
        if as_json:
            print_json(budgets)
        return
    from deltaw.training.planning.budget import settings_for_card
    from deltaw.training.planning.plan_run import plan_methods

    config, planned = settings_for_card(config, task, data, out.print_line, processes)
    on_error = _append_to(lines)
    plans = plan_methods(config, task, data, names, on_error=on_error, processes=processes, planned=planned)
    if not plans:
        hint = "start deltaw train anyway: it works without a plan"
        raise UserError("no method can be planned", location=config.model, hint=hint)
    _show(plans, config, processes, lines, out)
    _end(plans, picture, out, as_json)


def _append_to(lines: list[str]) -> Callable[[str, UserError], None]:
    return lambda method, error: lines.append(f"{method}: {error.message}")


def _plan_chain(chain: Chain, processes: int, out: TerminalOutput) -> dict[str, Plan]:
    """Plan each stage of a chain. A stage is planned with a new adapter if its parent is not trained yet."""
    from deltaw.experiments.chain import planned_stages
    from deltaw.machine.memory import free_memory_bytes
    from deltaw.reports.plan import chain_report

    plans = planned_stages(chain, processes=processes)
    out.print(chain_report(plans, free_memory_bytes()))
    return plans


def _parse_duration(text: str) -> float:
    from deltaw.settings.config import duration_seconds

    try:
        return duration_seconds(text)
    except ValueError as error:
        message = f"'{text}' is not a valid duration"
        raise UserError(message, location="--fit-time", hint="write 30min, 90s or 2h30m") from error


def _search(
    config: RunConfig,
    inputs: tuple[Task[Any], RunData],
    budgets: tuple[int | None, float | None],
    methods: Sequence[str],
    processes: int,
    out: TerminalOutput,
) -> dict[str, object]:
    """Print settings that fit into the budgets, in bytes and seconds, and return them for JSON."""
    from deltaw.machine.memory import free_memory_bytes
    from deltaw.reports.plan import budget_table, fitting_times_table
    from deltaw.training.planning.budget import fitting_settings, fitting_times

    task, data = inputs
    size, seconds = budgets
    if seconds is None:
        assert size is not None
        fitting = fitting_settings(config, task, data, size, methods, log=out.print_line, processes=processes)
        out.print(budget_table(fitting))
        return {"budget_bytes": size, "settings": [settings.as_dict() for settings in fitting]}
    times = fitting_times(config, task, data, seconds, size or free_memory_bytes(), log=out.print_line)
    out.print(fitting_times_table(times))
    for reason in dict.fromkeys(fit.plan.time_uncertain for fit in times if fit.plan.time_uncertain):
        out.print(f"the times are uncertain: {reason}")
    return {"budget_seconds": seconds, "settings": [settings.as_dict() for settings in times]}


def _show(
    plans: Mapping[str, Plan], config: RunConfig, processes: int, lines: Sequence[str], out: TerminalOutput
) -> None:
    """Print the report, and lines about the rows."""
    from deltaw.memory.plan import available_bytes
    from deltaw.reports.plan import plan_report

    free = available_bytes(config.memory, plans[config.method].device)
    out.print(plan_report(plans, config.method, free, processes))
    if len(plans) == 1:
        out.print("other methods: --methods all; settings for less memory: --fit-memory 2GB")
    for line in lines:
        out.print_line(Detail(line) if len(plans) == 1 else line)  # for a single plan, the run reports the rows


def _end(plans: Mapping[str, Plan], picture: str | None, out: TerminalOutput, as_json: bool) -> None:
    if picture is not None:
        from deltaw.atomic_files import write_text
        from deltaw.reports.comparison import draw_plans

        write_text(picture, draw_plans(plans))
        out.print(f"chart: {picture}")
    if as_json:
        print_json({name: plan.as_dict() for name, plan in plans.items()})
