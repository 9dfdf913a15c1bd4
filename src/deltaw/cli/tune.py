"""`deltaw tune`: search for settings."""

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


@click.command("tune", cls=GroupedCommand)
@click.argument("settings", required=False, type=SettingsFile())
@click.option("--trials", default=20, show_default=True, type=click.IntRange(1), help="total number of trials")
@click.option(
    "--search", multiple=True, metavar="KEY=…", help="LOW..HIGH[:log] or [VALUE, VALUE]  [default: by method]"
)
@click.option("--storage", type=click.Path(), help="SQLite file of the trials")
@click.option("--share", default=1.0, show_default=True, type=SHARE, help="fraction of a run's steps per trial")
@cluster_flags
@settings_flags
@json_flag
def command(settings: str | None, as_json: bool, **arguments: Any) -> int:
    """Search for the best settings. SETTINGS is a YAML file, as for train.

    Trials are evaluated on rows split from the training rows. They are written to `output` with the suffix -tune, or to
    the folder given by --output. Run the same command again to resume a search.
    """
    from deltaw.experiments.tune import best_yaml, tune, tuning_findings
    from deltaw.reports.comparison import tuning_table
    from deltaw.settings.config import RunConfig

    out = console(as_json)
    flags = nested_settings(arguments)
    config = RunConfig.read(settings, flags)
    folder = config.output if "output" in flags else f"{config.output}-tune"
    options = {name: arguments[name] for name in ("trials", "search", "storage", "share", "cluster")}
    try:
        tuning = tune(config, folder=folder, log=out.print_line, **options)
    except KeyboardInterrupt:
        out.print_line(f"interrupted: completed trials are in {folder}; run the same command to resume")
        return 130
    out.print()
    out.print(tuning_table(tuning))
    out.print()
    for line in tuning_findings(tuning):
        out.print_line(line)
    out.print(f"\nbest settings:\n{best_yaml(tuning)}\n")
    out.print_line(f"train with them: deltaw train {folder}/best.yaml")
    if as_json:
        print_json(tuning.as_dict())
    return 0
