"""`deltaw plan`: what a run will need in memory, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.mistakes import SettingsFile
from deltaw.cli.options import Verb, console, json_flag, nested, print_json, settings_flags
from deltaw.errors import UserError
from deltaw.working import Detail

if TYPE_CHECKING:
    from deltaw.memory.plan import Plan
    from deltaw.reports.tables import Output


@click.command("plan", cls=Verb)
@click.argument("settings", required=False, type=SettingsFile())
@click.option("--methods", help="plan these methods too: a,b,c, or all; with --json, --picture and --budget all")
@click.option("--picture", type=click.Path(), help="draw stacked bars into a .png, .svg or .pdf file")
@click.option("--budget", help="search for settings that fit into so much memory, such as 6GB")
@click.option(
    "--processes", default=1, show_default=True, type=click.IntRange(1), help="plan one of so many that train together"
)
@settings_flags
@json_flag
def command(
    settings: str | None,
    methods: str | None,
    picture: str | None,
    budget: str | None,
    processes: int,
    as_json: bool,
    **given: Any,
) -> None:
    """The memory that a run needs, whether it fits, and its parts. Reads the model's configuration and the
    rows, no weights."""
    from deltaw.reports.plan import budget_table, picture_kind
    from deltaw.settings import RunConfig
    from deltaw.training.planning.asked import chosen_methods, of_each, parse_bytes
    from deltaw.training.planning.remembered import recalled

    out = console(as_json)
    config = RunConfig.read(settings, nested(given))
    several = as_json or picture is not None or budget is not None
    names = chosen_methods(methods or ("all" if several else config.method), config.method)
    size = None if budget is None else parse_bytes(budget)
    if picture is not None:
        picture_kind(Path(picture))
    known = recalled(config, names, processes) if size is None else None
    if known is not None:
        plans = {name: of_each(plan, config.train.sharding, processes) for name, plan in known.plans.items()}
        _show(plans, config.method, processes, known.lines, out)
        _end(plans, picture, out, as_json)
        if not (config.track or config.memory or config.task == "reward" or Path(config.output).expanduser().exists()):
            return  # nothing is left to check, and torch need not be imported

    from deltaw.runs.checks import check_folder, check_rows, check_settings
    from deltaw.training.session import read_data

    check_settings(config)
    if known is not None:
        check_folder(config)
        return
    lines: list[str] = []
    task, data = read_data(config, lines.append)
    check_rows(config, task, data)
    if size is not None:
        from deltaw.training.planning.budget import fitting_settings

        found = fitting_settings(config, task, data, size, names, say=out.say, processes=processes)
        out.print(budget_table(found))
        if as_json:
            print_json({"budget_bytes": size, "settings": [fitting.as_dict() for fitting in found]})
        return
    from deltaw.training.planning.plan_run import plan_each

    def refused(method: str, error: UserError) -> None:
        lines.append(f"{method}: {error.what}")

    plans = plan_each(config, task, data, names, refused=refused, processes=processes)
    if not plans:
        hint = "train it all the same: deltaw train goes without a plan where none can be made"
        raise UserError("no method can be planned", where=config.model, hint=hint)
    _show(plans, config.method, processes, lines, out)
    _end(plans, picture, out, as_json)
    check_folder(config)


def _show(plans: Mapping[str, Plan], own: str, processes: int, rows: Sequence[str], out: Output) -> None:
    """The report, and below it what became of the rows."""
    from deltaw.machine.memory import free_memory_bytes
    from deltaw.reports.plan import plan_report

    out.print(plan_report(plans, own, free_memory_bytes(), processes))
    if len(plans) == 1:
        out.print("other methods: --methods all; what fits into less memory: --budget 2GB")
    for line in rows:
        out.say(Detail(line) if len(plans) == 1 else line)  # of one plan the memory alone; its run tells the rows


def _end(plans: Mapping[str, Plan], picture: str | None, out: Output, as_json: bool) -> None:
    from deltaw.reports.plan import draw_plans

    if picture is not None:
        draw_plans(plans, Path(picture))
        out.print(f"drawn to {picture}")
    if as_json:
        print_json({name: plan.as_dict() for name, plan in plans.items()})
