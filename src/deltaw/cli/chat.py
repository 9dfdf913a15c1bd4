"""`deltaw chat`: talk with a model and its adapter."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.mistakes import RunArgument
from deltaw.cli.options import as_text, console, model_flags, verbose_flag
from deltaw.cli.text_options import TextSettings, engine_for, system_flag, system_of, text_flags
from deltaw.errors import UserError
from deltaw.working import working

if TYPE_CHECKING:
    from deltaw.serving.engine import Engine
    from deltaw.training.origin import InferenceSession


@click.command("chat")
@click.argument("run", type=RunArgument())
@system_flag
@click.option("--base", "with_base", is_flag=True, help="let the base model answer first, then the adapter")
@text_flags(max_new_tokens=512)
@model_flags
@verbose_flag
def command(run: str, system: str | None, with_base: bool, how: TextSettings, **opening: Any) -> None:
    """Talk with RUN: a run's folder, an adapter's, or a model. An empty line or Ctrl-D
    ends; /new starts over."""
    notes = console(True)
    with working("starting"):
        import numpy as np

        from deltaw.serving.opening import base_engine
        from deltaw.training.origin import open_run
    opened = open_run(run, say=notes.say, **opening)
    opened.require_generation()

    with contextlib.closing(engine_for(opened, notes.say)) as engine:
        # A text of no tokens: what the flags say is checked before the first question.
        engine.write_all([replace(how.request(np.zeros(1, dtype=np.int64)), max_new_tokens=0)])
        system = system_of(opened, system, notes.say)
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
                    with base_engine(opened, engine, notes.say) as of_base:
                        _answer(opened, of_base, None, talk, how, "base")
                name = "adapter" if opened.adapter else "model"
                answer = _answer(opened, engine, engine.own_adapter, talk, how, name)
                talk.append({"role": "assistant", "content": answer})
            except UserError as error:
                # A talk that has grown too long, say: the question is taken back and the talk goes on.
                notes.say(str(error))
                talk.pop()


def _asked() -> str | None:
    """The next line of the user, None where there is none."""
    if sys.stdin.isatty():
        click.echo("you: ", nl=False)
    line = sys.stdin.readline()
    return line.strip() or None


def _answer(
    opened: InferenceSession, engine: Engine, adapter: str | None, talk: list[dict], how: TextSettings, name: str
) -> str:
    """Write the next answer of ``name``, and show it as it comes."""
    # Each answer of a talk draws anew, not by the same numbers as the one before.
    asked = sum(message["role"] == "user" for message in talk)
    writing = engine.submit(how.request(opened.encode(talk), adapter, number=asked - 1))
    click.echo(f"{name}: ", nl=False)
    try:
        for piece in writing:
            click.echo(piece.text, nl=False)
    finally:
        writing.cancel()
        click.echo()
    return writing.result().text
