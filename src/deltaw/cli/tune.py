"""`deltaw tune`: a search for settings."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.mistakes import SettingsFile
from deltaw.cli.options import SHARE, Verb, cluster_flags, console, json_flag, nested, print_json, settings_flags


@click.command("tune", cls=Verb)
@click.argument("settings", required=False, type=SettingsFile())
@click.option("--trials", default=20, show_default=True, type=click.IntRange(1), help="trials to have in the end")
@click.option(
    "--search",
    multiple=True,
    metavar="KEY=…",
    help="what may change: KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=[VALUE, VALUE]  [default: by method]",
)
@click.option("--storage", type=click.Path(), help="SQLite file that the trials are kept in")
@click.option("--share", default=1.0, show_default=True, type=SHARE, help="part of a run's steps that a trial takes")
@cluster_flags
@settings_flags
@json_flag
def command(settings: str | None, as_json: bool, **given: Any) -> int:
    """Search for the settings that train best: SETTINGS is a YAML file, as for train.

    Trials are evaluated on rows taken out of the training rows. They are written to `output` with -tune
    behind it, or to exactly the folder that --output names. The same command resumes a search.
    """
    from deltaw.experiments.tune import best_yaml, lessons, tune
    from deltaw.reports.comparison import tuning_table
    from deltaw.settings import RunConfig

    out = console(as_json)
    flags = nested(given)
    config = RunConfig.read(settings, flags)
    folder = config.output if "output" in flags else f"{config.output}-tune"
    asked = {name: given[name] for name in ("trials", "search", "storage", "share", "cluster")}
    try:
        tuning = tune(config, folder=folder, say=out.say, **asked)
    except KeyboardInterrupt:
        out.say(f"interrupted: what is done is in {folder}, and the same command resumes there")
        return 130
    out.print()
    out.print(tuning_table(tuning))
    out.print()
    for line in lessons(tuning):
        out.say(line)
    out.print(f"\nbest settings:\n{best_yaml(tuning)}\n")
    out.say(f"train with them: deltaw train {folder}/best.yaml")
    if as_json:
        print_json(tuning.as_dict())
    return 0
