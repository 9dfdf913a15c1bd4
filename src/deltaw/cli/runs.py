"""`deltaw runs`: the runs of a folder, or some of them side by side."""

from __future__ import annotations

import click

from deltaw.cli.options import console, json_flag, print_json, print_json_line


@click.command("runs")
@click.argument("names", nargs=-1, type=click.Path())
@click.option("--output", type=click.Path(), help="with two or more runs: write a page that compares them")
@click.option("--report", is_flag=True, help="write report.html of each run again, from the files in its folder")
@click.option("--watch", "watching", is_flag=True, help="follow the runs until they end; one may start later")
@json_flag
def command(names: tuple[str, ...], output: str | None, report: bool, watching: bool, as_json: bool) -> int:
    """List the runs below a folder, by default the folder `runs`; compare the runs that NAMES lists.

    A name is the path of a run, or its name in the folder `runs`.
    """
    from deltaw.errors import UserError
    from deltaw.reports.page.write import comparison_page, write_page
    from deltaw.reports.runs import as_values, choose_runs, comparison_tables, runs_table

    out = console(as_json)
    if watching:
        from deltaw.reports.watching import watch

        if output is not None or report:
            hint = "give it alone, and write pages once the runs have ended"
            raise UserError("--watch only follows runs", where="--watch", hint=hint)
        return watch(names, out, print_json_line if as_json else None)
    chosen = choose_runs(names)
    records = chosen.records
    if output is not None:
        if len(records) < 2:
            hint = "name two or more: deltaw runs ONE OTHER"
            raise UserError("a comparison needs two runs", where="--output", hint=hint)
        from deltaw.durable import write_text

        write_text(output, comparison_page(records))
    written = [write_page(record.path) for record in records] if report else []
    if as_json:
        print_json({"runs": as_values(records), "page": output, "reports": [str(path) for path in written]})
    elif not records:
        out.print(f"there are no runs in {chosen.where}")
    elif chosen.compared:
        for table in comparison_tables(records, out.width):
            out.print(table, soft_wrap=False)
            out.print()
    else:
        out.print(runs_table(records, out.width), soft_wrap=False)
    for path in [*written, *([output] if output else [])]:
        out.print(f"page: {path}")
    return 0
