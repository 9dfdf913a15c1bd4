"""`deltaw merge`: base and adapter as one model, or several adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltaw.cli.mistakes import AdapterArgument
from deltaw.cli.options import base_flags, console, json_flag, print_json
from deltaw.errors import UserError
from deltaw.working import working

PRECISIONS = click.Choice(["keep", "bf16", "fp16", "fp32"])
METHODS = click.Choice(["concat", "svd", "linear", "ties", "dare"])


@click.command("merge")
@click.argument("run", type=AdapterArgument())
@click.option("--output", required=True, type=click.Path(), help="the folder to make")
@base_flags
@click.option(
    "--precision", default="keep", type=PRECISIONS, help="of the merged weights; keep: that of the base's files"
)
@click.option("--shard-size", help="most bytes of a file, as 5GB; by default as the base's")
@click.option("--overwrite", is_flag=True, help="replace an output folder that holds files")
@click.option("--other-base", is_flag=True, help="merge also into another base model than the adapter's")
@click.option(
    "--verify/--no-verify", default=True, help="compare with the unmerged pair; refuse what rounding does not explain"
)
@click.option("--keep", is_flag=True, help="keep the folder also where verifying refuses it")
@click.option("--with", "others", multiple=True, metavar="RUN=WEIGHT", help="a further adapter; repeatable")
@click.option("--weight", default=1.0, type=float, help="of RUN's own update")
@click.option("--method", default="concat", type=METHODS, help="how several adapters are combined")
@click.option("--rank", type=click.IntRange(1), help="of method svd, or of the adapter written")
@click.option("--density", default=0.5, type=float, help="share of each update that ties and dare keep [default: 0.5]")
@click.option("--seed", default=0, type=click.IntRange(0), help="of dare")
@click.option("--as-adapter", is_flag=True, help="write one adapter in PEFT's format, not a model")
@json_flag
def command(
    run: str, output: str, others: tuple[str, ...], weight: float, method: str, rank: int | None, **given: Any
) -> None:
    """Merge RUN (a run's folder, or an adapter's) into its base model: a folder that transformers loads."""
    as_json, as_adapter, shard_size = (given.pop(name) for name in ("as_json", "as_adapter", "shard_size"))
    verify, keep, density, seed = (given.pop(name) for name in ("verify", "keep", "density", "seed"))
    out = console(as_json)
    with working("starting"):
        from deltaw.export.as_adapter import write_adapter
        from deltaw.export.base import MergeOptions
        from deltaw.export.combine import Recipe
        from deltaw.export.merge import merge_run
        from deltaw.export.verify import Verify
        from deltaw.reports.merging import adapter_lines, as_dict, merge_lines
        from deltaw.training.planning.asked import parse_bytes
    several = [_weighted(text) for text in others]
    recipe = None
    if several or weight != 1.0:
        weights = (weight, *(w for _, w in several))
        recipe = Recipe(method, weights, rank if method == "svd" else None, density, seed)
    options = MergeOptions(
        **given,
        shard_size=None if shard_size is None else parse_bytes(shard_size, "--shard-size"),
        others=tuple(folder for folder, _ in several),
        recipe=recipe,
    )
    if as_adapter:
        adapter = write_adapter(run, output, options, rank=rank, say=out.say)
        lines, value = adapter_lines(adapter), as_dict(adapter)
    else:
        if rank is not None and (recipe is None or method != "svd"):
            what = "--rank is for method svd and for --as-adapter: a merged weight has no rank to choose"
            raise UserError(what, where="--rank", hint="add --as-adapter, or --with other=0.5 --method svd")
        checked = Verify(out.say) if verify else None
        merged = merge_run(run, output, options, verify=checked, keep=keep, say=out.say)
        lines, value = merge_lines(merged), as_dict(merged)
    if as_json:
        print_json(value)
        return
    for line in lines:
        out.say(line)


def _weighted(text: str) -> tuple[Path, float]:
    """The folder and the weight of ``folder=0.5``; a folder alone has weight 1."""
    folder, found, number = text.rpartition("=")
    if not found:
        return Path(text), 1.0
    try:
        return Path(folder), float(number)
    except ValueError as error:
        if Path(text).is_dir():
            return Path(text), 1.0
        hint = "write it as --with runs/other=0.5"
        raise UserError(f"'{number}' is not a valid weight", where=f"--with {text}", hint=hint) from error
