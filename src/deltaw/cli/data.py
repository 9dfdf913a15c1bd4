"""`deltaw data`: what rows become, what is wrong with them, and which negatives they may have, before a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.options import Parts, Verb, completing, console, json_flag, nested, print_json, settings_flags
from deltaw.errors import UserError

if TYPE_CHECKING:
    from deltaw.settings import RunConfig


MINING = {
    "Common": ("corpus", "output", "model", "negatives", "relative_margin", "fewer", "force"),
    "Which passages": ("from_rank", "to_rank", "absolute_margin", "max_score"),
    "Columns and rows": ("query_column", "positive_column", "passage_column", "bad_rows", "max_row_bytes", "examples"),
    "Model": ("query_prompt", "passage_prompt", "pooling", "precision", "device", "trust_remote_code"),
}


@click.group("data", cls=Parts, no_args_is_help=False)
def command() -> None:
    """What rows become when a model is trained on them, what is wrong with them, and hard negatives for them."""


@command.command("show", cls=Verb)
@click.argument("file", required=False, type=click.Path())
@click.option("--row", type=click.IntRange(1), help="the row of this number, as in messages")
@click.option("--rows", "count", type=click.IntRange(1), help="so many rows  [default: 3, or 1]")
@click.option("--settings", type=click.Path(), help="a YAML file with the run's settings")
@settings_flags
@json_flag
def show(
    file: str | None, row: int | None, count: int | None, settings: str | None, as_json: bool, **given: str | None
) -> None:
    """Show what rows of FILE become: their tokens as text, and which of them are trained on.

    FILE is data, a run's YAML file, or a run's folder. --model names the model whose tokenizer reads it.
    """
    from deltaw.reports.data import LEGEND, PLAIN_LEGEND, row_as_dict, row_lines
    from deltaw.training.data_view import shown_rows

    out = console(as_json)
    found = shown_rows(_config(file, settings, given, out.say), row, count or (3 if row is None else 1), out.say)
    if as_json:
        print_json({"rows": [row_as_dict(one) for one in found]})
        return
    color = out.is_terminal and not out.no_color
    out.print(LEGEND if color else PLAIN_LEGEND)
    for one in found:
        for line in row_lines(one, color=color):
            out.print(line)


@command.command("check", cls=Verb)
@click.argument("file", required=False, type=click.Path())
@click.option("--settings", type=click.Path(), help="a YAML file with the run's settings")
@settings_flags
@json_flag
def check(file: str | None, settings: str | None, as_json: bool, **given: str | None) -> int:
    """Look for what is wrong with the rows of FILE: long, empty, repeated or contradictory ones, and more.

    FILE is data, a run's YAML file, or a run's folder. --model names the model whose tokenizer reads it. Ends
    with status 2 if training would fail or be pointless.
    """
    from deltaw.reports.data import check_lines
    from deltaw.training.data_view import check_data

    out = console(as_json)
    config = _config(file, settings, given, out.say)
    found = check_data(config, out.say)
    if found.usable:
        from deltaw.runs.checks import with_refusal

        found = with_refusal(found, config, folder=config.data.train != file)
    for line in check_lines(found):
        out.print(line)
    if as_json:
        print_json(found.as_dict())
    return 0 if found.usable else 2


_MARGIN = "how far a negative must score below the row's passage, by a share of its score"
_BAD = "rows that cannot be used: error refuses the file, skip leaves them out  [default: error]"
_NAMED = "column of the {}  [default: by usual names]"


@command.command("mine", cls=Verb, groups=MINING)
@click.argument("file", type=click.Path())
@click.option("--corpus", type=click.Path(), help="passages to search  [default: the positives of FILE]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="file to write  [default: FILE.mined.jsonl]")
@click.option("--model", help="the encoder", shell_complete=completing("model"))
@click.option("--negatives", default=5, show_default=True, type=click.IntRange(1), help="negatives of a row")
@click.option("--from-rank", default=1, show_default=True, type=click.IntRange(1), help="nearer passages are skipped")
@click.option("--to-rank", default=100, show_default=True, type=click.IntRange(1), help="farther passages are skipped")
@click.option("--absolute-margin", type=click.FloatRange(0), help="the same, by a difference of scores")
@click.option("--relative-margin", default=0.05, show_default=True, type=click.FloatRange(0), help=_MARGIN)
@click.option("--max-score", type=float, help="the highest score of a negative")
@click.option("--query-prompt", help="a text put before each query  [default: as the model says]")
@click.option("--passage-prompt", help="a text put before each passage  [default: as the model says]")
@click.option("--query-column", help=_NAMED.format("queries"))
@click.option("--positive-column", help=_NAMED.format("passages that answer them"))
@click.option("--passage-column", help=_NAMED.format("corpus"))
@click.option("--fewer", default="keep", show_default=True, type=click.Choice(["keep", "drop"]), help="rows with fewer")
@click.option("--bad-rows", "--data.bad_rows", default="error", type=click.Choice(["error", "skip"]), help=_BAD)
@click.option("--max-row-bytes", "--data.max_row_bytes", type=click.IntRange(1), help="of a row  [default: 16 MiB]")
@click.option("--examples", default=3, show_default=True, type=click.IntRange(0), help="rows to show")
@click.option("--force", is_flag=True, help="overwrite the output")
@click.option("--pooling", default="auto", show_default=True, type=click.Choice(["auto", "mean", "first", "last"]))
@click.option("--precision", default="auto", help="auto, bf16, fp32, int8", shell_complete=completing("precision"))
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
@click.option("--trust-remote-code", is_flag=True, help="run Python code that comes with it; only if you know it")
@json_flag
def mine(
    file: str, corpus: str | None, output: Path | None, model: str | None, force: bool, as_json: bool, **given: Any
) -> None:
    """Find hard negatives for the rows of FILE, each a query with its passage: passages of --corpus that a model
    takes for near and that do not answer the query. What scores almost as the row's own passage is left out."""
    from deltaw.data.passages import read_pairs, read_passages
    from deltaw.data.report import MAX_ROW_BYTES, BadRows
    from deltaw.reports.data import mined_lines
    from deltaw.reports.starter import EMBEDDER
    from deltaw.serving.encoders import read_embedder
    from deltaw.serving.mining import MiningSettings, mine, mined_file, write_mined

    out = console(as_json)
    take = {name: given.pop(name) for name in MiningSettings.__dataclass_fields__}
    settings, bad, most = MiningSettings(**take), BadRows(given["bad_rows"]), given["max_row_bytes"] or MAX_ROW_BYTES
    target = mined_file(file, output, corpus, force=force)
    pairs = read_pairs(file, bad, columns=(given["query_column"], given["positive_column"]), max_bytes=most)
    passages = [passage for _, passage in pairs]
    if corpus is not None:
        passages = read_passages(corpus, bad, column=given["passage_column"], max_bytes=most)
    if model is None:
        out.say(f"vectors by {EMBEDDER}; --model changes it")
    how = {name: given[name] for name in ("pooling", "precision", "device", "trust_remote_code")}
    found = mine(pairs, passages, read_embedder(model or EMBEDDER, say=out.say, **how), settings, out.say)
    kept = found.rows if given["fewer"] == "keep" else found.complete()
    write_mined(kept, target)
    for line in mined_lines(found, len(kept), bad, given["examples"]):
        out.print(line)
    out.say(f"written: {target}")
    if as_json:
        print_json({"output": str(target), "written": len(kept), **found.as_dict(), "bad_rows": dict(bad.counts)})


def _config(
    file: str | None, settings: str | None, given: dict[str, str | None], say: Callable[[str], None]
) -> RunConfig:
    """The settings of a run on ``file``, which may itself be settings or a run's folder. Rows alone are read as
    `deltaw init` would have them read."""
    from deltaw.settings import SETTINGS, RunConfig
    from deltaw.training.origin import settings_in

    flags = nested(given)
    if file is None:
        return RunConfig.read(settings, flags)
    path = Path(file)
    is_folder = (path / SETTINGS).is_file()
    if is_folder or path.suffix in (".yaml", ".yml"):
        if settings is not None:
            raise UserError(f"'{file}' holds settings, and --settings names others", hint="give one of them")
        return settings_in(path, flags) if is_folder else RunConfig.read(path, flags)
    flags["data"] = {**flags.get("data", {}), "train": file}
    if settings is None:
        from deltaw.reports.starter import MODELS, is_here, settings_for_rows

        task, named = flags.get("task"), "columns" in flags["data"]
        found: dict[str, Any] = {"task": task, "model": MODELS.get(task)} if task in MODELS else {}
        with contextlib.suppress(*([UserError] if named else [])):  # the columns may have names that only flags give
            found = settings_for_rows(file, flags.get("model"), task) if is_here(file) else found
        if found.get("model") and "model" not in flags:
            say(f"task {found['task']}, tokens of {found['model']}; --task and --model change it")
        for key, value in found.items():
            flags[key] = {**value, **flags.get(key, {})} if isinstance(value, dict) else flags.get(key, value)
    return RunConfig.read(settings, flags)
