"""`deltaw export`: an adapter in another program's format."""

from __future__ import annotations

from typing import Any

import click

from deltaw.cli.mistakes import AdapterArgument
from deltaw.cli.options import base_flags, console, json_flag, print_json
from deltaw.working import working

FORMATS = ("gguf-adapter", "gguf", "peft", "vllm", "mlx", "onnx")


@click.command("export")
@click.argument("run", type=AdapterArgument())
@click.option("--format", "format_name", required=True, type=click.Choice(FORMATS), help="the program's format")
@click.option("--output", required=True, type=click.Path(), help="the folder to make, or a file that ends in .gguf")
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    help="how a GGUF file stores numbers: f32, f16, bf16; of a model also q8_0, q5_0, q5_1, q4_0, q4_1, "
    "q6_k, q5_k, q4_k  [default: f32 for an adapter, q8_0 for a model]",
)
@base_flags
@click.option("--overwrite", is_flag=True, help="replace what is there")
@json_flag
def command(run: str, format_name: str, output: str, as_json: bool, **how: Any) -> None:
    """Write RUN's adapter (a run's folder, or an adapter's) for llama.cpp, Ollama, vLLM, mlx-lm or PEFT."""
    out = console(as_json)
    notes = console(True)
    with working("starting"):
        from deltaw.export.formats import export
    done = export(run, format_name, output, say=notes.say, **how)
    if as_json:
        print_json(done.as_dict())
        return
    for line in [*done.lines, *done.files, *done.told]:
        out.say(line)
