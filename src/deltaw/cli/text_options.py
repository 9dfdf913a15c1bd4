"""Flags of the verbs that write text: how tokens are chosen, and what ends or constrains a text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.options import SHARE, Command, as_text, with_options
from deltaw.errors import UserError
from deltaw.working import Detail

if TYPE_CHECKING:
    import numpy as np

    from deltaw.serving.engine import Engine
    from deltaw.serving.request import Constraint, Request, Sampling
    from deltaw.training.origin import InferenceSession

PENALTY, FACTOR = click.FloatRange(-2, 2), click.FloatRange(0, 100, min_open=True)
# The flags that say how tokens are chosen, by the names of Sampling's fields: default, kind, and what is said of it.
SAMPLING: dict[str, tuple[float, click.ParamType, str]] = {
    "temperature": (0.0, click.FloatRange(0, 100), "0: the likeliest token"),
    "top_k": (0, click.IntRange(0), "draw from so many likeliest tokens; 0: all"),
    "top_p": (1.0, SHARE, "draw from the likeliest tokens that together have this probability"),
    "min_p": (0.0, click.FloatRange(0, 1), "leave out tokens below this share of the likeliest's probability"),
    "repetition_penalty": (1.0, FACTOR, "make tokens of the prompt and the text less likely; 1: no change"),
    "presence_penalty": (0.0, PENALTY, "taken from the logits of tokens that the text has"),
    "frequency_penalty": (0.0, PENALTY, "the same, for each time that the text has them"),
    "seed": (0, click.IntRange(-(2**63), 2**63 - 1), ""),
}


@dataclass(frozen=True)
class TextSettings:
    """What the flags say, apart from the prompt; see :class:`deltaw.serving.request.Sampling`."""

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    json_schema: Path | None
    regex: str | None

    def checked(self) -> TextSettings:
        """Itself, where texts can be written so; asked before a model is loaded.

        Raises:
            UserError: a stop string or a constraint is no text, there are two constraints, or the
                package that constrains texts is missing.
        """
        for stop in self.stop:
            if not as_text(stop, "--stop"):
                raise UserError("a stop string is empty", where="--stop", hint="leave it out")
        if self.constraint() is not None and find_spec("llguidance") is None:
            raise UserError("constrained texts need the package llguidance", hint='pip install "deltaw[serve]"')
        return self

    def constraint(self) -> Constraint | None:
        """What a text must match; None for nothing.

        Raises:
            UserError: it cannot be read, or there are two.
        """
        from deltaw.serving.request import Constraint

        if self.json_schema is not None and self.regex is not None:
            raise UserError("a text cannot be held to two constraints", hint="give --json-schema or --regex")
        if self.regex is not None:
            return Constraint("regex", as_text(self.regex, "--regex"))
        if self.json_schema is None:
            return None
        try:
            return Constraint("json_schema", self.json_schema.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            what = f"the JSON schema cannot be read: {reason}"
            raise UserError(what, where=str(self.json_schema), hint="name a JSON file") from error

    def request(
        self, tokens: np.ndarray, adapter: str | None = None, *, number: int = 0, logprobs: int | None = None
    ) -> Request:
        """A request for one text.

        Args:
            tokens: (length,) of the prompt, without virtual tokens. adapter: the name of what writes it.
            number: of the prompt among several; each draws by a seed of its own.
        """
        from deltaw.serving.request import Request

        sampling = replace(self.sampling, seed=self.sampling.seed + number, logprobs=logprobs)
        ending: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop": self.stop}
        return Request(tokens, adapter, sampling=sampling, constraint=self.constraint(), **ending)


def text_flags(max_new_tokens: int) -> Callable[[Command], Command]:
    """Give a command the flags of :class:`TextSettings`; they arrive as one argument, ``how``."""
    sampling = [
        click.option(f"--{name.replace('_', '-')}", default=default, show_default=True, type=kind, help=told)
        for name, (default, kind, told) in SAMPLING.items()
    ]
    options = (
        click.option("--max-new-tokens", default=max_new_tokens, show_default=True, type=click.IntRange(1)),
        *sampling,
        click.option("--stop", multiple=True, help="end texts before this string; may be given several times"),
        click.option("--json-schema", type=click.Path(path_type=Path), help="a file; texts are JSON that matches it"),
        click.option("--regex", help="texts match this regular expression"),
    )

    def give(command: Command) -> Command:
        @functools.wraps(command)
        def called(*args: object, **given: Any) -> object:
            from deltaw.serving.request import Sampling

            sampling = Sampling(**{name: given.pop(name) for name in SAMPLING})
            rest = {name: given.pop(name) for name in ("max_new_tokens", "stop", "json_schema", "regex")}
            return command(*args, how=TextSettings(sampling=sampling, **rest).checked(), **given)

        return with_options(called, *options)  # type: ignore[return-value]

    return give


SYSTEM_HELP = 'a system prompt for what has none; "": none  [default: the one that the training rows share]'
system_flag = click.option("--system", metavar="TEXT", help=SYSTEM_HELP)


def system_of(session: InferenceSession, given: str | None, say: Callable[[str], None]) -> str:
    """The system prompt to write with, which may be empty; told if it is not the one given."""
    if (line := session.prompting.line(given)) is not None:
        say(line)
    return session.prompting.system_for(None if given is None else as_text(given, "--system"))


def engine_for(session: InferenceSession, say: Callable[[str], None]) -> Engine:
    """An engine that writes a verb's texts.

    Args:
        say: told what decodes: the engine, or transformers and why.

    Raises:
        UserError: the model writes no text.
    """
    from deltaw.serving.opening import open_engine

    told: list[str] = []
    engine = open_engine(session, say=told.append)
    for line in told or [Detail(f"the decoding engine writes: {engine.why}")]:
        say(line)
    return engine
