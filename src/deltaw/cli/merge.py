"""`deltaw merge`: merge an adapter into its base model, or several adapters into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltaw.cli.options import base_flags, console, json_flag, print_json
from deltaw.cli.suggestions import AdapterArgument
from deltaw.errors import UserError
from deltaw.progress import track_progress

PRECISIONS = click.Choice(["keep", "bf16", "fp16", "fp32"])
METHODS = click.Choice(["concat", "svd", "linear", "ties", "dare"])


@click.command("merge")
@click.argument("run", type=AdapterArgument())
@click.option("--output", required=True, type=click.Path(), help="output folder")
@base_flags
@click.option("--precision", default="keep", type=PRECISIONS, help="type of the merged weights; keep: that of the base")
@click.option("--shard-size", help="maximum size of a file, such as 5GB  [default: files of the base model]")
@click.option("--overwrite", is_flag=True, help="replace an output folder that contains files")
@click.option("--other-base", is_flag=True, help="allow another base model than the adapter was trained on")
@click.option("--verify/--no-verify", default=True, help="compare with the unmerged model; fail beyond rounding error")
@click.option("--keep", is_flag=True, help="create the folder even if the verification fails")
@click.option("--with", "others", multiple=True, metavar="RUN=WEIGHT", help="weighted adapter to add; can be repeated")
@click.option("--weight", default=1.0, type=float, help="weight of RUN's update")
@click.option("--method", default="concat", type=METHODS, help="method to combine several adapters")
@click.option("--rank", type=click.IntRange(1), help="rank for method svd, or rank of the adapter with --as-adapter")
@click.option("--density", default=0.5, type=float, help="fraction of updates that ties and dare keep  [default: 0.5]")
@click.option("--seed", default=0, type=click.IntRange(0), help="random seed for method dare")
@click.option("--as-adapter", is_flag=True, help="write an adapter in PEFT's format instead of a model")
@json_flag
def command(
    run: str, output: str, others: tuple[str, ...], weight: float, method: str, rank: int | None, **arguments: Any
) -> None:
    """Merge RUN (the folder of a run or an adapter) into its base model. The output is a folder that transformers
    loads.
    """
    as_json, as_adapter, shard_size = (arguments.pop(name) for name in ("as_json", "as_adapter", "shard_size"))
    verify, keep, density, seed = (arguments.pop(name) for name in ("verify", "keep", "density", "seed"))
    out = console(as_json)
    with track_progress("starting"):
        from deltaw.export.as_adapter import write_adapter
        from deltaw.export.combine import Recipe
        from deltaw.export.merge import merge_run
        from deltaw.export.merge_plan import MergeOptions
        from deltaw.export.verify import MergeVerifier
        from deltaw.memory.plan import parse_bytes
        from deltaw.reports.adapter_comparison import adapter_lines, as_dict, merge_lines
    additional = [_weighted(text) for text in others]
    recipe = None
    if additional or weight != 1.0:
        recipe = Recipe(method, (weight, *(w for _, w in additional)), rank if method == "svd" else None, density, seed)
    options = MergeOptions(
        **arguments,
        shard_size=None if shard_size is None else parse_bytes(shard_size, "--shard-size"),
        additional_adapters=tuple(folder for folder, _ in additional),
        recipe=recipe,
    )
    if as_adapter:
        adapter = write_adapter(run, output, options, rank=rank, log=out.print_line)
        lines = adapter_lines(adapter)
        value = as_dict(adapter)
    else:
        if rank is not None and (recipe is None or method != "svd"):
            message = "--rank applies only to method svd and to --as-adapter"
            raise UserError(message, location="--rank", hint="add --as-adapter, or --with other=0.5 --method svd")
        verifier = MergeVerifier(out.print_line) if verify else None
        merged = merge_run(run, output, options, verify=verifier, keep=keep, log=out.print_line)
        lines = merge_lines(merged)
        value = as_dict(merged)
    if as_json:
        print_json(value)
        return
    for line in lines:
        out.print_line(line)


def _weighted(text: str) -> tuple[Path, float]:
    """Parse ``folder=0.5``. The weight of a plain folder is 1."""
    folder, separator, number = text.rpartition("=")
    if not separator:
        return Path(text), 1.0
    try:
        return Path(folder), float(number)
    except ValueError as error:
        if Path(text).is_dir():
            return Path(text), 1.0
        hint = "use for example --with runs/other=0.5"
        raise UserError(f"'{number}' is not a valid weight", location=f"--with {text}", hint=hint) from error
