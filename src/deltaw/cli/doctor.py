"""`deltaw doctor`: diagnose the machine, or test the installation."""

from __future__ import annotations

import click
from click.core import ParameterSource

from deltaw.cli.options import complete_setting, console, json_flag, print_json
from deltaw.errors import UserError


@click.command("doctor")
@click.option("--model", help="measure this model's layers and weight memory", shell_complete=complete_setting("model"))
@click.option("--output", default="runs", show_default=True, type=click.Path(), help="output folder of runs")
@click.option("--self-test", "self_test", is_flag=True, help="test the installation instead, in about a minute")
@json_flag
@click.pass_context
def command(context: click.Context, model: str | None, output: str, self_test: bool, as_json: bool) -> int:
    """Diagnose this machine: processor, kernels and their measured rates, memory, disks, versions, GPU, and causes of
    slow training. Exits with status 2 if training is impossible.

    With --self-test: compare each kernel, a training run and a decoded text with references and stored values, and kill
    and resume the run. Exits with status 1 if a check fails.
    """
    from deltaw.progress import track_progress

    out = console(as_json)
    if self_test:
        from deltaw.selftest.run import run_self_test

        given = [n for n in ("model", "output") if context.get_parameter_source(n) is not ParameterSource.DEFAULT]
        if given:
            raise UserError(f"--{given[0]} has no effect on the self-test", hint="give --self-test without it")
        with track_progress("testing this installation"):
            result = run_self_test(log=out.print_line)
        if as_json:
            print_json(result.as_dict())
        else:
            click.echo(result.as_text())
        return 0 if result.passed else 1
    from deltaw.reports.doctor import examine

    with track_progress("examining this machine"):
        diagnosis = examine(model, output, log=out.print_line)
    if as_json:
        print_json(diagnosis.as_dict())
    else:
        out.print(diagnosis.render(), soft_wrap=False)
    return 2 if diagnosis.status == "problem" else 0
