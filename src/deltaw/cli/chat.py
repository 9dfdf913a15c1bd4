"""`deltaw chat`: chat with a model and its adapter."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.options import console, model_flags, require_utf8, verbose_flag
from deltaw.cli.suggestions import RunArgument
from deltaw.cli.text_options import TextSettings, create_engine, resolve_system_prompt, system_flag, text_flags
from deltaw.errors import UserError
from deltaw.progress import track_progress

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from deltaw.data.messages import Message
    from deltaw.decoding.engine import Engine


@click.command("chat")
@click.argument("run", type=RunArgument())
@system_flag
@click.option("--with-base", is_flag=True, help="also print the base model's answers, before the adapter's")
@text_flags(max_new_tokens=512)
@model_flags
@verbose_flag
def command(run: str, system: str | None, with_base: bool, text_settings: TextSettings, **opening: Any) -> None:
    """Chat with RUN: the folder of a run or an adapter, or a model. An empty line or Ctrl-D exits, /new starts a new
    conversation, and /image FILE adds an image to the next message.
    """
    notes = console(True)
    with track_progress("starting"):
        import numpy as np

        from deltaw.data.image_files import decode
        from deltaw.data.row_images import MARKER, without_markers
        from deltaw.decoding.opening import base_engine
        from deltaw.inference.open_run import open_run
    session = open_run(run, log=notes.print_line, **opening)
    session.require_generation()

    with contextlib.closing(create_engine(session, notes.print_line)) as engine:
        # Generate zero tokens to validate the flags before the first question.
        engine.generate_all([replace(text_settings.request(np.zeros(1, dtype=np.int64)), max_new_tokens=0)])
        system = resolve_system_prompt(session, system, notes.print_line)
        start: list[Message] = [{"role": "system", "content": system}] if system else []
        messages = list(start)
        images: list[Image] = []  # of sent messages, then of the next one
        num_sent = 0
        placer = session.task.images
        while (line := _read_line()) is not None:
            if line == "/new":
                messages = list(start)
                images = []
                num_sent = 0
                continue
            command_name, _, file = line.partition(" ")
            if command_name == "/image":
                try:
                    images.append(decode(Path(file.strip()), file.strip()))
                except UserError as error:
                    notes.print_line(str(error))
                continue
            if placer is not None and len(images) == num_sent:
                line = without_markers(line, placer)
            elif MARKER not in line:
                line = "\n".join([MARKER] * (len(images) - num_sent) + [line])
            messages.append({"role": "user", "content": line})
            try:
                require_utf8(line, "your line")
                number = sum(message["role"] == "user" for message in messages) - 1
                tokens = session.encode(messages, images)
                if with_base and session.adapter:
                    with base_engine(session, engine, notes.print_line) as bare_engine:
                        _answer(bare_engine, None, tokens, number, text_settings, "base")
                name = "adapter" if session.adapter else "model"
                answer = _answer(engine, engine.session_adapter, tokens, number, text_settings, name)
                answer = answer if placer is None else without_markers(answer, placer)
                messages.append({"role": "assistant", "content": answer})
                num_sent = len(images)
            except UserError as error:
                # For example, the conversation is too long: remove the question and continue.
                notes.print_line(str(error))
                messages.pop()
                del images[num_sent:]


def _read_line() -> str | None:
    """Return the next line of the user, or None at the end of the input."""
    if sys.stdin.isatty():
        click.echo("you: ", nl=False)
    return sys.stdin.readline().strip() or None


def _answer(
    engine: Engine, adapter: str | None, tokens: np.ndarray, number: int, settings: TextSettings, name: str
) -> str:
    """Generate and print the answer to question ``number``."""
    # The seed depends on the question number, so that answers use different random numbers.
    handle = engine.submit(settings.request(tokens, adapter, number=number))
    click.echo(f"{name}: ", nl=False)
    try:
        for chunk in handle:
            click.echo(chunk.text, nl=False)
    finally:
        handle.cancel()
        click.echo()
    return handle.result().text
