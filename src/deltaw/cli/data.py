"""`deltaw data`: display and check training rows, and mine hard negatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.options import (
    GroupedCommand,
    SubcommandGroup,
    complete_setting,
    console,
    json_flag,
    nested_settings,
    print_json,
    settings_flags,
)
from deltaw.errors import UserError

if TYPE_CHECKING:
    from deltaw.settings.config import RunConfig


MINING = {
    "Common": ("corpus", "output", "model", "negatives", "relative_margin", "fewer", "force"),
    "Passage selection": ("from_rank", "to_rank", "absolute_margin", "max_score"),
    "Columns and rows": ("query_column", "positive_column", "passage_column", "bad_rows", "max_row_bytes", "examples"),
    "Model": ("query_prompt", "passage_prompt", "pooling", "precision", "device", "trust_remote_code"),
}


@click.group("data", cls=SubcommandGroup, no_args_is_help=False)
def command() -> None:
    """Display and check training rows as a model receives them, and mine hard negatives."""


@command.command("show", cls=GroupedCommand)
@click.argument("file", required=False, type=click.Path())
@click.option("--row", type=click.IntRange(1), help="number of the row, as in messages")
@click.option("--limit", "count", type=click.IntRange(1), help="number of rows  [default: 3, or 1 with --row]")
@click.option("--settings", type=click.Path(), help="YAML file with the run's settings")
@settings_flags
@json_flag
def show(
    file: str | None, row: int | None, count: int | None, settings: str | None, as_json: bool, **arguments: str | None
) -> None:
    """Display the examples created from the rows of FILE: their tokens as text, and the labels.

    FILE is a data file, a run's YAML file, or a run's folder. --model selects the tokenizer.
    """
    from deltaw.reports.rendered_rows import LEGEND, PLAIN_LEGEND, row_as_dict, row_lines
    from deltaw.runs.data_checks import preview_rows

    out = console(as_json)
    config = _config(file, settings, arguments, out.print_line)
    previews = preview_rows(config, row, count or (3 if row is None else 1), out.print_line)
    if as_json:
        print_json({"rows": [row_as_dict(preview) for preview in previews]})
        return
    color = out.is_terminal and not out.no_color
    out.print(LEGEND if color else PLAIN_LEGEND)
    for preview in previews:
        for line in row_lines(preview, color=color):
            out.print(line)


@command.command("check", cls=GroupedCommand)
@click.argument("file", required=False, type=click.Path())
@click.option("--settings", type=click.Path(), help="YAML file with the run's settings")
@settings_flags
@json_flag
def check(file: str | None, settings: str | None, as_json: bool, **arguments: str | None) -> int:
    """Check the rows of FILE for problems: long, empty, duplicate or contradictory rows, and more.

    FILE is a data file, a run's YAML file, or a run's folder. --model selects the tokenizer. Exits with status 2 if
    training would fail or be pointless.
    """
    from deltaw.reports.data import check_lines
    from deltaw.runs.checks import check_data_and_run

    out = console(as_json)
    config = _config(file, settings, arguments, out.print_line)
    result = check_data_and_run(config, out.print_line, folder=config.data.train != file)
    for line in check_lines(result):
        out.print(line)
    if as_json:
        print_json(result.as_dict())
    return 0 if result.usable else 2


_MARGIN_HELP = "minimum margin of a negative's score below the positive's, as a fraction of the positive's score"
_BAD_ROWS = "handling of unusable rows: error rejects the file, skip drops them  [default: error]"
_KEEP_OR_DROP = click.Choice(["keep", "drop"])
_COLUMN_HELP = "column of the {}  [default: detected by name]"


@command.command("mine", cls=GroupedCommand, groups=MINING)
@click.argument("file", type=click.Path())
@click.option("--corpus", type=click.Path(), help="file of passages to search  [default: the positives of FILE]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="output file  [default: FILE.mined.jsonl]")
@click.option("--model", help="embedding model", shell_complete=complete_setting("model"))
@click.option("--negatives", default=5, show_default=True, type=click.IntRange(1), help="number of negatives per row")
@click.option("--from-rank", default=1, show_default=True, type=click.IntRange(1), help="first rank to consider")
@click.option("--to-rank", default=100, show_default=True, type=click.IntRange(1), help="last rank to consider")
@click.option("--absolute-margin", type=click.FloatRange(0), help="minimum margin as an absolute difference of scores")
@click.option("--relative-margin", default=0.05, show_default=True, type=click.FloatRange(0), help=_MARGIN_HELP)
@click.option("--max-score", type=float, help="maximum score of a negative")
@click.option("--query-prompt", help="prefix of each query  [default: from the model]")
@click.option("--passage-prompt", help="prefix of each passage  [default: from the model]")
@click.option("--query-column", help=_COLUMN_HELP.format("queries"))
@click.option("--positive-column", help=_COLUMN_HELP.format("passages that answer them"))
@click.option("--passage-column", help=_COLUMN_HELP.format("corpus"))
@click.option("--fewer", default="keep", show_default=True, type=_KEEP_OR_DROP, help="rows with fewer negatives")
@click.option("--bad-rows", "--data.bad_rows", default="error", type=click.Choice(["error", "skip"]), help=_BAD_ROWS)
@click.option("--max-row-bytes", "--data.max_row_bytes", type=click.IntRange(1), help="maximum size  [default: 16 MiB]")
@click.option("--examples", default=3, show_default=True, type=click.IntRange(0), help="number of rows to print")
@click.option("--force", is_flag=True, help="overwrite the output")
@click.option("--pooling", default="auto", show_default=True, type=click.Choice(["auto", "mean", "first", "last"]))
@click.option(
    "--precision", default="auto", help="auto, bf16, fp32 or int8", shell_complete=complete_setting("precision")
)
@click.option("--device", default="auto", help="device: auto, cpu, cuda, cuda:1 or mps")
@click.option("--trust-remote-code", is_flag=True, help="run the model's Python code; enable only for models you trust")
@json_flag
def mine(
    file: str, corpus: str | None, output: Path | None, model: str | None, force: bool, as_json: bool, **flags: Any
) -> None:
    """Mine hard negatives for the rows of FILE, which contain a query and its passage.

    Negatives are passages of --corpus that the embedding model ranks high but that do not answer the query. Passages
    with almost the score of the positive are excluded.
    """
    from deltaw.data.bad_rows import BadRows
    from deltaw.data.starter import EMBEDDER
    from deltaw.evaluation.mining import MiningSettings, mine, mining_output, read_pairs, read_passages, write_mined
    from deltaw.reports.mined_negatives import mined_lines
    from deltaw.serving.encoders import read_embedder
    from deltaw.settings.data import MAX_ROW_BYTES

    out = console(as_json)
    mining_options = {name: flags.pop(name) for name in MiningSettings.__dataclass_fields__}
    settings = MiningSettings(**mining_options)
    bad_rows = BadRows(flags["bad_rows"])
    max_bytes = flags["max_row_bytes"] or MAX_ROW_BYTES
    target = mining_output(file, output, corpus, force=force)
    pairs = read_pairs(file, bad_rows, columns=(flags["query_column"], flags["positive_column"]), max_bytes=max_bytes)
    passages = [passage for _, passage in pairs]
    if corpus is not None:
        passages = read_passages(corpus, bad_rows, column=flags["passage_column"], max_bytes=max_bytes)
    if model is None:
        out.print_line(f"embedding model: {EMBEDDER}; change it with --model")
    encoder_options = {name: flags[name] for name in ("pooling", "precision", "device", "trust_remote_code")}
    embedder = read_embedder(model or EMBEDDER, log=out.print_line, **encoder_options)
    result = mine(pairs, passages, embedder, settings, out.print_line)
    rows = result.rows if flags["fewer"] == "keep" else result.complete()
    write_mined(rows, target)
    for line in mined_lines(result, len(rows), bad_rows, flags["examples"]):
        out.print(line)
    out.print_line(f"written: {target}")
    if as_json:
        print_json({"output": str(target), "written": len(rows), **result.as_dict(), "bad_rows": dict(bad_rows.counts)})


def _config(
    file: str | None, settings: str | None, arguments: dict[str, str | None], log: Callable[[str], None]
) -> RunConfig:
    """Return the settings for ``file``, which is a data file, a settings file or a run's folder.

    For a data file without settings, the task and the columns are detected as in `deltaw init`.
    """
    from deltaw.methods.trust import read_run_settings
    from deltaw.settings.config import SETTINGS, RunConfig

    flags = nested_settings(arguments)
    if file is None:
        return RunConfig.read(settings, flags)
    path = Path(file)
    is_folder = (path / SETTINGS).is_file()
    if is_folder or path.suffix in (".yaml", ".yml"):
        if settings is not None:
            raise UserError(f"'{file}' contains settings, so --settings is not allowed", hint="use only one of them")
        return read_run_settings(path, flags) if is_folder else RunConfig.read(path, flags)
    flags["data"] = {**flags.get("data", {}), "train": file}
    if settings is None:
        from deltaw.data.starter import default_model
        from deltaw.reports.starter import names_local_rows, settings_for_rows
        from deltaw.settings import task_registry

        task = None if flags.get("task") is None else task_registry.name_of(str(flags["task"]))
        has_columns = "columns" in flags["data"]
        detected: dict[str, Any] = {"task": task, "model": model} if (model := default_model(task)) else {}
        with contextlib.suppress(*([UserError] if has_columns else [])):  # detection may fail if flags give the columns
            detected = settings_for_rows(file, flags.get("model"), task) if names_local_rows(file) else detected
        if detected.get("model") and "model" not in flags:
            log(f"task {detected['task']}, tokenizer of {detected['model']}; change them with --task and --model")
        for key, value in detected.items():
            flags[key] = {**value, **flags.get(key, {})} if isinstance(value, dict) else flags.get(key, value)
    return RunConfig.read(settings, flags)
