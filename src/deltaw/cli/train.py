"""`deltaw train`: from settings to an adapter."""

from __future__ import annotations

import click

from deltaw.cli.options import console, json_flag, nested, print_json, settings_flags
from deltaw.config import RunConfig
from deltaw.host.memory import keep_freed_memory
from deltaw.reports.closing import show_end
from deltaw.reports.progress import TerminalCallback
from deltaw.reports.run import fit


@click.command("train")
@click.argument("settings", required=False, type=click.Path())
@settings_flags
@json_flag
def command(settings: str | None, as_json: bool, **given: str | None) -> int:
    """Fine-tune a model: SETTINGS is a YAML file; every flag stands above it."""
    out = console(as_json)
    keep_freed_memory()
    config = RunConfig.read(settings, nested(given))
    result = fit(config, callback=TerminalCallback(out))
    show_end(out, result, config.method)
    if as_json:
        print_json(result.as_dict())
    return 130 if result.interrupted else 0
