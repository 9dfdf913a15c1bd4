"""`deltaw compare`: methods side by side on the same rows."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.mistakes import SettingsFile
from deltaw.cli.options import SHARE, Verb, cluster_flags, console, json_flag, nested, print_json, settings_flags


@click.command("compare", cls=Verb)
@click.argument("settings", required=False, type=SettingsFile())
@click.option("--methods", help="names of methods  [default: lora,head,prompt,bias,random,full]")
@click.option("--rates", multiple=True, metavar="METHOD=RATE,…", help="learning rates to try; a single one is used")
@click.option(
    "--share", default=0.3, type=SHARE, help="share of the budget that each rate is tried for  [default: 0.3]"
)
@click.option("--seeds", default=1, type=click.IntRange(1), help="seeds of each method; 3 make evidence  [default: 1]")
@click.option("--reference", metavar="METHOD", help="the method that others are compared with  [default: the best]")
@click.option("--budget", metavar="TIME", help="most time of one training, such as 10m  [default: train.epochs]")
@cluster_flags
@settings_flags
@json_flag
def command(
    settings: str | None, methods: str | None, rates: tuple[str, ...], budget: str | None, as_json: bool, **given: Any
) -> int:
    """Train with each of several methods: SETTINGS is a YAML file, as for train.

    A learning rate is found for each method, then each trains on the same rows, with each seed, until its
    validation loss flattens or the budget ends (train.epochs, train.max_steps or --budget). All are scored on
    the same held-out rows, with intervals over seeds and rows. The comparison is written to `output` with
    -compare behind it, or to exactly the folder that --output names; the same command goes on with one that
    was interrupted.
    """
    from deltaw.experiments.compare import check_methods, compare
    from deltaw.experiments.comparison import as_json as as_plain
    from deltaw.experiments.comparison import failures, findings
    from deltaw.experiments.entry import parse_rates
    from deltaw.methods import registry
    from deltaw.reports.comparison import comparison_tables, draw_comparison
    from deltaw.reports.page.write import write_pages
    from deltaw.settings import RunConfig

    out = console(as_json)
    flags = nested(given)
    if budget is not None:
        flags.setdefault("train", {})["time"] = budget
    config = RunConfig.read(settings, flags)
    named = registry.compared_names() if methods is None else filter(None, map(str.strip, methods.split(",")))
    chosen = check_methods(list(named))
    folder = config.output if "output" in flags else f"{config.output}-compare"
    asked = {name: given[name] for name in ("share", "seeds", "reference", "cluster")}
    tried = parse_rates(rates, chosen)
    try:
        comparison = compare(config, chosen, folder=folder, rates=tried, say=out.say, draw=draw_comparison, **asked)
    except KeyboardInterrupt:
        out.say(f"interrupted: what is done is in {folder}, and the same command resumes there")
        return 130
    for table in comparison_tables(comparison, out.width):
        out.print()
        out.print(table)
    out.print()
    for line in [*findings(comparison), *failures(comparison)]:
        out.say(line)
    write_pages(folder)
    out.say(f"table, numbers, figure and curves are in {folder}: comparison.md, .json, .png, .html")
    if as_json:
        print_json(as_plain(comparison))
    return 0
