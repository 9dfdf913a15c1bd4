"""`deltaw compare`: train with several methods on the same rows and compare the results."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.options import (
    SHARE,
    GroupedCommand,
    cluster_flags,
    console,
    json_flag,
    nested_settings,
    print_json,
    settings_flags,
)
from deltaw.cli.suggestions import SettingsFile


@click.command("compare", cls=GroupedCommand)
@click.argument("settings", required=False, type=SettingsFile())
@click.option("--methods", help="methods to compare  [default: lora,head,prompt,bias,random,full]")
@click.option("--rates", multiple=True, metavar="METHOD=RATE,…", help="learning rates to try, or the rate to use")
@click.option("--share", default=0.3, type=SHARE, help="fraction of the budget for each tried rate  [default: 0.3]")
@click.option("--seeds", default=1, type=click.IntRange(1), help="number of seeds; 3+ for significance  [default: 1]")
@click.option("--reference", metavar="METHOD", help="reference method of the comparison  [default: the best]")
@click.option("--max-time", "time", metavar="TIME", help="time limit per run, such as 10m  [default: train.epochs]")
@cluster_flags
@settings_flags
@json_flag
def command(
    settings: str | None, methods: str | None, rates: tuple[str, ...], time: str | None, as_json: bool, **arguments: Any
) -> int:
    """Train with each of several methods. SETTINGS is a YAML file, as for train.

    A learning rate is selected for each method. Each method then trains on the same rows with each seed, until its
    validation loss flattens or the budget ends (train.epochs, train.max_steps or --max-time). All are evaluated on the
    same held-out rows, with intervals over seeds and rows. The comparison is written to `output` with the suffix
    -compare, or to the folder given by --output. Run the same command again to resume an interrupted comparison.
    """
    from deltaw.experiments.compare import check_methods, compare
    from deltaw.experiments.comparison import failures, findings
    from deltaw.experiments.entry import parse_rates
    from deltaw.reports.comparison import comparison_tables, draw_comparison
    from deltaw.reports.page.write import write_pages
    from deltaw.settings import method_registry
    from deltaw.settings.config import RunConfig

    out = console(as_json)
    flags = nested_settings(arguments)
    if time is not None:
        flags.setdefault("train", {})["time"] = time
    config = RunConfig.read(settings, flags)
    default = method_registry.compared_names() if config.start_from is None else [config.method]
    requested = default if methods is None else filter(None, map(str.strip, methods.split(",")))
    selected = check_methods(list(requested))
    folder = config.output if "output" in flags else f"{config.output}-compare"
    options = {name: arguments[name] for name in ("share", "seeds", "reference", "cluster")}
    options |= {"rates": parse_rates(rates, selected), "draw": draw_comparison}
    try:
        comparison = compare(config, selected, folder=folder, log=out.print_line, **options)
    except KeyboardInterrupt:
        out.print_line(f"interrupted: completed results are in {folder}; run the same command to resume")
        return 130
    for table in comparison_tables(comparison, out.width):
        out.print()
        out.print(table)
    out.print()
    for line in [*findings(comparison), *failures(comparison)]:
        out.print_line(line)
    write_pages(folder)
    out.print_line(f"results are in {folder}: comparison.md, .json, .svg, .html")
    if as_json:
        print_json(comparison.as_dict())
    return 0
