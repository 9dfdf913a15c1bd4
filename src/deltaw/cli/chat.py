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
    from collections.abc import Callable

    import numpy as np
    from PIL.Image import Image

    from deltaw.data.messages import Message
    from deltaw.decoding.engine import Engine
    from deltaw.inference.opened_run import OpenedRun


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
        from deltaw.decoding.opening import base_engine
        from deltaw.inference.open_run import open_run
    session = open_run(run, log=notes.print_line, **opening)
    session.require_generation()

    with contextlib.closing(create_engine(session, notes.print_line)) as engine:
        # Generate zero tokens to validate the flags before the first question.
        engine.generate_all([replace(text_settings.request(np.zeros(1, dtype=np.int64)), max_new_tokens=0)])
        system = resolve_system_prompt(session, system, notes.print_line)
        conversation = _ChatConversation(session, system)

        def generate(tokens: np.ndarray, number: int) -> str:
            if with_base and session.adapter:
                with base_engine(session, engine, notes.print_line) as bare_engine:
                    _answer(bare_engine, None, tokens, number, text_settings, "base")
            name = "adapter" if session.adapter else "model"
            return _answer(engine, engine.session_adapter, tokens, number, text_settings, name)

        while (line := _read_line()) is not None:
            command_name, _, file = line.partition(" ")
            try:
                if line == "/new":
                    conversation = _ChatConversation(session, system)
                elif command_name == "/image":
                    conversation.images.append(decode(Path(file.strip()), file.strip()))
                else:
                    conversation.answer(line, generate)
            except UserError as error:
                notes.print_line(str(error))


class _ChatConversation:
    """Messages and images of a conversation.

    Attributes:
        images: Images of the answered questions, then of the next one.
    """

    def __init__(self, session: OpenedRun, system: str | None) -> None:
        self.images: list[Image] = []
        self._session = session
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._num_answered_images = 0

    def answer(self, line: str, generate: Callable[[np.ndarray, int], str]) -> None:
        """Add a question and the answer that ``generate`` returns for the tokens and the number of the question.

        Raises:
            UserError: for example if the conversation is too long. The question and its images are removed.
        """
        from deltaw.data.row_images import MARKER, without_markers

        placer = self._session.task.images
        num_new_images = len(self.images) - self._num_answered_images
        if placer is not None and not num_new_images:
            line = without_markers(line, placer)
        elif MARKER not in line:
            line = "\n".join([MARKER] * num_new_images + [line])
        number = sum(message["role"] == "user" for message in self._messages)
        question: Message = {"role": "user", "content": line}
        try:
            require_utf8(line, "your line")
            answer = generate(self._session.encode([*self._messages, question], self.images), number)
        except UserError:
            del self.images[self._num_answered_images :]
            raise
        answer = answer if placer is None else without_markers(answer, placer)
        self._messages += [question, {"role": "assistant", "content": answer}]
        self._num_answered_images = len(self.images)


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
