"""`deltaw inspect`: an adapter on one page."""

from __future__ import annotations

import click

from deltaw.cli.options import console, json_flag, print_json


@click.command("inspect")
@click.argument("adapter", type=click.Path())
@json_flag
def command(adapter: str, as_json: bool) -> None:
    """Rank, size, targets, norms and effective ranks of ADAPTER, a folder."""
    from deltaw.reports.inspect import inspect_adapter

    report = inspect_adapter(adapter)
    if as_json:
        print_json(report.as_dict())
    else:
        console(as_json).print(report.render())
