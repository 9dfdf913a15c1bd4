"""`deltaw inspect`: describe an adapter, or compare two."""

from __future__ import annotations

import click

from deltaw.cli.options import console, json_flag, print_json
from deltaw.cli.suggestions import AdapterArgument


@click.command("inspect")
@click.argument("adapter", type=AdapterArgument())
@click.argument("other", type=AdapterArgument(), required=False)
@json_flag
def command(adapter: str, other: str | None, as_json: bool) -> None:
    """Print rank, size, targets, norms and effective ranks of ADAPTER, or compare it with OTHER."""
    from deltaw.reports.adapter_comparison import AdapterComparison, compare_adapters
    from deltaw.reports.inspect import AdapterReport, inspect_adapter

    report: AdapterReport | AdapterComparison
    report = inspect_adapter(adapter) if other is None else compare_adapters(adapter, other)
    if as_json:
        print_json(report.as_dict())
    else:
        console(as_json).print(report.render(), soft_wrap=False)
