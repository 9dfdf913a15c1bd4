"""`deltaw chat`: talk with a model and its adapter."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from deltaw.cli.options import as_text, console, model_flags
from deltaw.errors import UserError
from deltaw.working import working

if TYPE_CHECKING:
    from deltaw.serving.engine import Engine
    from deltaw.training.inference import InferenceSession


@click.command("chat")
@click.argument("run")
@click.option("--system", default=None, help="a system message at the start")
@click.option("--base", "with_base", is_flag=True, help="let the base model answer first, then the adapter")
@click.option("--max-new-tokens", default=512, show_default=True, type=click.IntRange(1))
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: the likeliest token"
)
@model_flags
def command(
    run: str,
    system: str | None,
    with_base: bool,
    max_new_tokens: int,
    temperature: float,
    model: str | None,
    precision: str,
    device: str,
) -> None:
    """Talk with RUN: a run's folder, an adapter's, or a model. An empty line or Ctrl-D
    ends; /new starts over."""
    notes = console(True)
    with working("starting"):
        from deltaw.serving.opening import base_engine, open_engine
        from deltaw.training.inference import open_run
    opened = open_run(run, model=model, precision=precision, device=device, say=notes.print)
    engine = open_engine(opened, say=notes.print)
    start = [{"role": "system", "content": system}] if system else []
    talk = list(start)
    while (line := _asked()) is not None:
        if line == "/new":
            talk = list(start)
            continue
        talk.append({"role": "user", "content": line})
        try:
            as_text(line, "your line")
            if with_base and opened.adapter:
                with base_engine(opened, engine, notes.print) as of_base:
                    _answer(opened, of_base, None, talk, "base", max_new_tokens, temperature)
            name = "adapter" if opened.adapter else "model"
            written = _answer(opened, engine, engine.own_adapter, talk, name, max_new_tokens, temperature)
            talk.append({"role": "assistant", "content": written})
        except UserError as error:
            # A talk that has grown too long, say: the question is taken back and the talk goes on.
            notes.print(str(error), markup=False)
            talk.pop()


def _asked() -> str | None:
    """The next line of the user, None where there is none."""
    if sys.stdin.isatty():
        click.echo("you: ", nl=False)
    line = sys.stdin.readline()
    return line.strip() or None


def _answer(
    opened: InferenceSession,
    engine: Engine,
    adapter: str | None,
    talk: list[dict],
    name: str,
    max_new_tokens: int,
    temperature: float,
) -> str:
    """Print the next answer while it is written; the seed differs by turn, so that a question asked again is
    answered anew."""
    from deltaw.data import encode_prompt
    from deltaw.serving.request import Request, Sampling

    prompt = encode_prompt(talk, opened.data or "auto", opened.tokenizer)
    sampling = Sampling(temperature=temperature, seed=len(talk))
    writing = engine.submit(Request(prompt, adapter, sampling, max_new_tokens=max_new_tokens))
    click.echo(f"{name}: ", nl=False)
    try:
        for piece in writing:
            click.echo(piece.text, nl=False)
    finally:
        writing.cancel()
    click.echo()
    return writing.result().text
