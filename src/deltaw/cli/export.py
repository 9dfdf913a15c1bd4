"""`deltaw export`: export an adapter for another program."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.options import base_flags, console, json_flag, print_json
from deltaw.cli.suggestions import AdapterArgument
from deltaw.progress import track_progress

FORMATS = ("gguf-adapter", "gguf", "peft", "vllm", "mlx", "onnx")


@click.command("export")
@click.argument("run", type=AdapterArgument())
@click.option("--format", "format_name", required=True, type=click.Choice(FORMATS), help="output format")
@click.option("--output", required=True, type=click.Path(), help="output folder, or output file with the suffix .gguf")
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    help="storage type of a GGUF file: f32, f16, bf16; for models also q8_0, q5_0, q5_1, q4_0, q4_1, q6_k, "
    "q5_k, q4_k  [default: f32 for an adapter, q8_0 for a model]",
)
@base_flags
@click.option("--overwrite", is_flag=True, help="replace existing files")
@json_flag
def command(run: str, format_name: str, output: str, as_json: bool, **options: Any) -> None:
    """Export the adapter of RUN (the folder of a run or an adapter) for llama.cpp, Ollama, vLLM, mlx-lm or PEFT."""
    out = console(as_json)
    notes = console(True)
    with track_progress("starting"):
        from deltaw.export.formats import export
    exported = export(run, format_name, output, log=notes.print_line, **options)
    if as_json:
        print_json(exported.as_dict())
        return
    for line in [*exported.lines, *exported.files, *exported.notes]:
        out.print_line(line)
