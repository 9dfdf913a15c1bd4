"""`deltaw train`: from settings to an adapter."""

from __future__ import annotations

import click

from deltaw.cli.options import console, json_flag, nested, print_json, settings_flags


@click.command("train")
@click.argument("settings", required=False, type=click.Path())
@settings_flags
@json_flag
def command(settings: str | None, as_json: bool, **given: str | None) -> int:
    """Fine-tune a model: SETTINGS is a YAML file; every flag stands above it."""
    from deltaw.config import RunConfig
    from deltaw.host.memory import keep_freed_memory
    from deltaw.reports.progress import TerminalCallback
    from deltaw.training.fit import fit

    out = console(as_json)
    keep_freed_memory()
    result = fit(RunConfig.read(settings, nested(given)), callback=TerminalCallback(out))
    done = result.outcome
    if result.interrupted:
        out.print(f"interrupted after {done.steps} steps: the adapter is saved in {result.output}")
    elif done.seconds:
        held_out = "".join(f", held-out {k} {v:.4f}" for k, v in result.evaluation.metrics.items())
        planned = result.planned_memory_bytes
        plan_note = "" if planned is None else f" (planned {planned / 1e9:.2f} GB)"
        out.print(
            f"{done.rows} rows in {done.seconds:.1f} s ({done.rows / done.seconds:.1f} rows/s, "
            f"{done.tokens / done.seconds:,.0f} tokens/s), "
            f"peak memory {result.peak_memory_bytes / 1e9:.2f} GB{plan_note}"
        )
        out.print(f"training loss {done.loss:.4f}{held_out}")
        for line in [] if result.drift is None else result.drift.lines():
            out.print(line, highlight=False)
        use = "talk with it: deltaw chat" if result.writes_text else "evaluate it: deltaw eval"
        out.print(f"the adapter is in {result.output}; {use} {result.output}")
    if as_json:
        print_json(result.as_dict())
    return 130 if result.interrupted else 0
