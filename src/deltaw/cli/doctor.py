"""`deltaw doctor`: diagnose the machine."""

from __future__ import annotations

import click

from deltaw.cli.options import complete_setting, console, json_flag, print_json


@click.command("doctor")
@click.option("--model", help="measure this model's layers and weight memory", shell_complete=complete_setting("model"))
@click.option("--output", default="runs", show_default=True, type=click.Path(), help="output folder of runs")
@json_flag
def command(model: str | None, output: str, as_json: bool) -> int:
    """Diagnose this machine: processor, kernels and their measured rates, memory, disks, versions, GPU, and causes of
    slow training. Exits with status 2 if training is impossible.
    """
    from deltaw.progress import track_progress
    from deltaw.reports.doctor import examine

    out = console(as_json)
    with track_progress("examining this machine"):
        diagnosis = examine(model, output, log=out.print_line)
    if as_json:
        print_json(diagnosis.as_dict())
    else:
        out.print(diagnosis.render(), soft_wrap=False)
    return 2 if diagnosis.status == "problem" else 0
