"""`deltaw generate`: complete prompts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from deltaw.cli.options import as_text, console, json_flag, model_flags, print_json
from deltaw.errors import UserError
from deltaw.working import working

if TYPE_CHECKING:
    from deltaw.serving.engine import Engine


@click.command("generate")
@click.argument("run")
@click.option("--prompt", "-p", "prompts", multiple=True, help="what to complete; may be given several times")
@click.option("--system", default=None, help="a system message before each prompt")
@click.option("--base", "with_base", is_flag=True, help="show the base model's completion too")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: the likeliest token"
)
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", default=0, show_default=True, type=int)
@model_flags
@json_flag
def command(
    run: str,
    prompts: tuple[str, ...],
    system: str | None,
    with_base: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    model: str | None,
    precision: str,
    device: str,
    as_json: bool,
) -> None:
    """Complete prompts with RUN: a run's folder, an adapter's, or a model. Without --prompt, one a line from
    standard input."""
    notes = console(True)
    with working("starting"):
        from deltaw.data import encode_prompt
        from deltaw.serving.opening import base_engine, open_engine
        from deltaw.serving.request import Request, Sampling
        from deltaw.training.inference import open_run
    asked = list(prompts) or [line for line in sys.stdin.read().splitlines() if line.strip()]
    asked = [as_text(prompt, "the prompt") for prompt in asked]
    if not asked:
        raise UserError("there is no prompt", hint="give --prompt, or lines on standard input")
    opened = open_run(run, model=model, precision=precision, device=device, say=notes.print)
    opened.require_generation()
    tokens = [encode_prompt(_messages(p, system), opened.data or "auto", opened.tokenizer) for p in asked]

    if (line := opened.not_invoked(tokens)) is not None:
        notes.print(line, highlight=False, markup=False)

    engine = open_engine(opened, say=lambda line: notes.print(line, highlight=False, markup=False))
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)

    def completed(using: Engine, adapter: str | None) -> list[str]:
        requests = [Request(t, adapter, sampling, max_new_tokens=max_new_tokens) for t in tokens]
        with working("writing", len(tokens)) as advance:
            return [text.text for text in using.write_all(requests, lambda done, _: advance(done))]

    base: list[str] | None = None
    if with_base:
        with base_engine(opened, engine, notes.print) as of_base:
            base = completed(of_base, None)
    written = completed(engine, engine.own_adapter)
    if as_json:
        rows = [{"prompt": p, "completion": c} for p, c in zip(asked, written, strict=True)]
        if base is not None:
            rows = [{**row, "base": b} for row, b in zip(rows, base, strict=True)]
        print_json({"completions": rows})
        return
    for number, completion in enumerate(written):
        if base is not None:
            click.echo(f"base:    {base[number]}\nadapter: {completion}")
        else:
            click.echo(completion)


def _messages(prompt: str, system: str | None) -> str | list[dict]:
    if system is None:
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
