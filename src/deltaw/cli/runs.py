"""`deltaw runs`: list or compare runs."""

from __future__ import annotations

import click

from deltaw.cli.options import console, json_flag, print_json, print_json_line


@click.command("runs")
@click.argument("names", nargs=-1, type=click.Path())
@click.option("--output", type=click.Path(), help="write an HTML page that compares two or more runs to this file")
@click.option("--report", is_flag=True, help="regenerate report.html of each run")
@click.option("--watch", "watching_runs", is_flag=True, help="show live progress until all runs have finished")
@json_flag
def command(names: tuple[str, ...], output: str | None, report: bool, watching_runs: bool, as_json: bool) -> int:
    """List the runs in a folder, by default `runs`, or compare the runs NAMES.

    A name is the path of a run, or the name of a run in the folder `runs`.
    """
    from deltaw.errors import UserError
    from deltaw.reports.page.write import comparison_page, write_page
    from deltaw.reports.runs import comparison_tables, runs_as_dicts, runs_table, select_runs

    out = console(as_json)
    if watching_runs:
        from deltaw.reports.live_table import watch

        if output is not None or report:
            hint = "write the pages without --watch after the runs have finished"
            raise UserError("--watch cannot be combined with --output or --report", location="--watch", hint=hint)
        return watch(names, out, print_json_line if as_json else None)
    selection = select_runs(names)
    records = selection.records
    if output is not None:
        if len(records) < 2:
            hint = "give two or more runs: deltaw runs FIRST SECOND"
            raise UserError("a comparison requires at least two runs", location="--output", hint=hint)
        from deltaw.atomic_files import write_text

        write_text(output, comparison_page(records))
    report_pages = [write_page(record.path) for record in records] if report else []
    if as_json:
        print_json({"runs": runs_as_dicts(records), "page": output, "reports": [str(path) for path in report_pages]})
    elif not records:
        out.print(f"no runs in {selection.location}")
    elif selection.compared:
        for table in comparison_tables(records, out.width):
            out.print(table, soft_wrap=False)
            out.print()
    else:
        out.print(runs_table(records, out.width), soft_wrap=False)
    for path in [*report_pages, *([output] if output else [])]:
        out.print(f"page: {path}")
    return 0
