"""`deltaw doctor`: what this machine is, what is slow on it and why."""

from __future__ import annotations

import click

from deltaw.cli.options import completing, console, json_flag, print_json


@click.command("doctor")
@click.option(
    "--model", help="measure this model's sizes, and say what its weights take", shell_complete=completing("model")
)
@click.option("--output", default="runs", show_default=True, type=click.Path(), help="folder that runs are written to")
@json_flag
def command(model: str | None, output: str, as_json: bool) -> int:
    """Look at this machine: processor, kernels and their measured rates, memory, disks, versions, GPU, and
    what makes training slow. Exit status 2 if something makes it impossible."""
    from deltaw.reports.doctor import examine
    from deltaw.working import working

    out = console(as_json)
    with working("looking at this machine"):
        found = examine(model, output, say=out.say)
    if as_json:
        print_json(found.as_dict())
    else:
        out.print(found.render(), soft_wrap=False)
    return 2 if found.status == "problem" else 0
