"""Flags of commands that generate text: sampling, stop strings and constraints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.options import SHARE, Command, require_utf8, with_options
from deltaw.errors import UserError
from deltaw.progress import Detail

if TYPE_CHECKING:
    import numpy as np

    from deltaw.decoding.engine import Engine
    from deltaw.decoding.request import Constraint, Request, Sampling
    from deltaw.inference.opened_run import OpenedRun

PENALTY = click.FloatRange(-2, 2)
FACTOR = click.FloatRange(0, 100, min_open=True)
# Sampling flags by field name of Sampling: default, type and description.
SAMPLING: dict[str, tuple[float, click.ParamType, str]] = {
    "temperature": (0.0, click.FloatRange(0, 100), "sampling temperature; 0: greedy"),
    "top_k": (0, click.IntRange(0), "number of most likely tokens to sample from; 0: all"),
    "top_p": (1.0, SHARE, "cumulative probability of the most likely tokens to sample from"),
    "min_p": (0.0, click.FloatRange(0, 1), "minimum probability of a token, relative to the most likely token"),
    "repetition_penalty": (1.0, FACTOR, "penalty for tokens of the prompt and the text; 1: none"),
    "presence_penalty": (0.0, PENALTY, "penalty subtracted from the logits of tokens that occur in the text"),
    "frequency_penalty": (0.0, PENALTY, "penalty subtracted from the logits for each occurrence of a token"),
    "seed": (0, click.IntRange(-(2**63), 2**63 - 1), "random seed"),
}


@dataclass(frozen=True)
class TextSettings:
    """Values of the text flags; see :class:`deltaw.decoding.request.Sampling`."""

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    json_schema: Path | None
    regex: str | None

    def validated(self) -> TextSettings:
        """Return self if the values are valid. Called before a model is loaded.

        Raises:
            UserError: if a stop string or a constraint is invalid, both constraints are given, or the package for
                constraints is missing.
        """
        for stop in self.stop:
            if not require_utf8(stop, "--stop"):
                raise UserError("a stop string is empty", location="--stop", hint="remove it")
        if self.constraint() is not None and find_spec("llguidance") is None:
            raise UserError("constraints require the package llguidance", hint='pip install "deltaw[serve]"')
        return self

    def constraint(self) -> Constraint | None:
        """Return the constraint of the generated text, or None.

        Raises:
            UserError: if the schema cannot be read, or both constraints are given.
        """
        from deltaw.decoding.request import Constraint

        if self.json_schema is not None and self.regex is not None:
            raise UserError("only one constraint is supported", hint="use either --json-schema or --regex")
        if self.regex is not None:
            return Constraint("regex", require_utf8(self.regex, "--regex"))
        if self.json_schema is None:
            return None
        try:
            return Constraint("json_schema", self.json_schema.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            message = f"the JSON schema cannot be read: {reason}"
            raise UserError(message, location=str(self.json_schema), hint="give a JSON file") from error

    def request(
        self, tokens: np.ndarray, adapter: str | None = None, *, number: int = 0, logprobs: int | None = None
    ) -> Request:
        """Return a request for one text.

        Args:
            tokens: (length,) prompt without virtual tokens.
            adapter: Name of the adapter, or None for the base model.
            number: Index of the prompt, added to the seed.
            logprobs: Number of top log-probabilities to return per token, if any.
        """
        from deltaw.decoding.request import Request

        sampling = replace(self.sampling, seed=self.sampling.seed + number, logprobs=logprobs)
        limits: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop": self.stop}
        return Request(tokens, adapter, sampling=sampling, constraint=self.constraint(), **limits)


def text_flags(max_new_tokens: int) -> Callable[[Command], Command]:
    """Add the flags of :class:`TextSettings`. They are passed as ``text_settings``."""
    sampling = [
        click.option(f"--{name.replace('_', '-')}", default=default, show_default=True, type=kind, help=description)
        for name, (default, kind, description) in SAMPLING.items()
    ]
    options = (
        click.option("--max-new-tokens", default=max_new_tokens, show_default=True, type=click.IntRange(1)),
        *sampling,
        click.option("--stop", multiple=True, help="stop string, at which the text is truncated; can be repeated"),
        click.option("--json-schema", type=click.Path(path_type=Path), help="file with a JSON schema for the text"),
        click.option("--regex", help="regular expression that the text must match"),
    )

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapper(*args: object, **arguments: Any) -> object:
            from deltaw.decoding.request import Sampling

            sampling = Sampling(**{name: arguments.pop(name) for name in SAMPLING})
            settings = {name: arguments.pop(name) for name in ("max_new_tokens", "stop", "json_schema", "regex")}
            return command(*args, text_settings=TextSettings(sampling=sampling, **settings).validated(), **arguments)

        return with_options(wrapper, *options)  # type: ignore[return-value]

    return decorate


SYSTEM_HELP = 'system prompt for prompts without one; "": none  [default: the one shared by the training rows]'
system_flag = click.option("--system", metavar="TEXT", help=SYSTEM_HELP)


def resolve_system_prompt(session: OpenedRun, requested: str | None, log: Callable[[str], None]) -> str:
    """Return the system prompt, which may be empty. Logs a message if it differs from the given one."""
    if (line := session.prompting.line(requested)) is not None:
        log(line)
    return session.prompting.system_for(None if requested is None else require_utf8(requested, "--system"))


def create_engine(session: OpenedRun, log: Callable[[str], None]) -> Engine:
    """Create the engine of a command that generates text.

    Args:
        session: Loaded model.
        log: Receives the reason if transformers decodes instead of the engine.

    Raises:
        UserError: if the model does not generate text.
    """
    from deltaw.decoding.opening import open_engine

    messages: list[str] = []
    engine = open_engine(session, log=messages.append)
    for line in messages or [Detail(f"generating with the decoding engine: {engine.why}")]:
        log(line)
    return engine
