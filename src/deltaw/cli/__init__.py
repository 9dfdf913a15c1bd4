"""The command line: one thin file a verb, no logic.

A user's mistake ends with status 2 and one message; an interruption with 130; a fault of ours with 1 and one
message, which ``--traceback`` makes longer.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import click

from deltaw import platforms
from deltaw.cli import faults, mistakes
from deltaw.errors import UserError, as_message, escape_control_characters
from deltaw.kernels import variants
from deltaw.version import __version__
from deltaw.working import listening

if TYPE_CHECKING:
    from typing_extensions import Buffer

TRACEBACK = "--traceback"

VERBS = {
    "train": "fine-tune a model on a file of rows, and leave an adapter",
    "plan": "the memory that a run needs, before it starts, for every method",
    "eval": "loss, perplexity and exact match on a file",
    "predict": "labels, numbers, scores, vectors or completions for the rows of a file",
    "generate": "complete prompts",
    "chat": "talk with a model and its adapter",
    "serve": "a model and its adapters over HTTP, as the OpenAI API",
    "data": "what rows become, and what is wrong with them",
    "compare": "train with several methods, and put cost and score side by side",
    "tune": "search for settings that train best",
    "runs": "the runs of a folder as a table, or some of them compared",
    "inspect": "an adapter's rank, size, targets and norms on one page, or two adapters compared",
    "merge": "a run and its base model as one model, or several adapters as one",
    "export": "an adapter for llama.cpp, Ollama, vLLM, mlx-lm or PEFT",
    "push": "a run's adapter to a model hub, with a model card",
    "deploy": "a run in Ollama or LM Studio, its answers compared",
    "doctor": "what this machine is, what is slow on it and why",
    "init": "ask three questions, and write a commented settings file",
    "mcp": "tools for an agent, over the Model Context Protocol",
    "schema": "the JSON schema of the settings file, for editors",
    "completion": "the script that completes commands in bash, zsh or fish",
}


FIRST_STEPS = """\
deltaw fine-tunes a language model on your rows. From a file to an adapter:

  deltaw init --data rows.jsonl    look at the rows, and write train.yaml
  deltaw plan train.yaml           the memory that training needs
  deltaw train train.yaml          train; the adapter is in runs/
  deltaw eval runs/NAME --base     scores beside those of the base model
  deltaw chat runs/NAME            talk with it

'deltaw --help' lists all verbs, 'deltaw VERB --help' the flags of one."""

# Verbs that leave files, or serve: they go on if nobody reads any more what they print. The others end.
GOING_ON = ("train", "compare", "tune", "merge", "export", "push", "deploy", "serve", "mcp", "init")


# Libraries that would report how they are used; whoever sets one of these otherwise is obeyed.
UNREPORTED = {"HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False", "RAY_USAGE_STATS_ENABLED": "0"}


class _Printed(io.FileIO):
    """A standard stream whose reader may leave, as ``head`` does: what is printed afterwards goes nowhere.

    Attributes:
        ends: whether the command ends then, with status 0. Of all streams.
    """

    ends = False

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.fileno(), "wb", closefd=False)
        self._stream = stream  # which would close the file

    def write(self, data: Buffer) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            # EIO: the terminal behind it is gone; EINVAL: Windows says so of a pipe without a reader
            if error.errno not in (errno.EPIPE, errno.EIO, *([errno.EINVAL] if platforms.WINDOWS else [])):
                raise
        if self.ends:
            raise SystemExit(0)
        return memoryview(data).nbytes


class _Verbs(click.Group):
    """Imports a verb's module only when it is asked for, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        return importlib.import_module(f"deltaw.cli.{name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        unknown = args and args[0] not in VERBS and not args[0].startswith("-")
        if unknown and not ctx.resilient_parsing:  # a shell that completes an unknown verb gets nothing
            raise mistakes.no_verb(args, VERBS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _one_spelling(name: str) -> str:
    """The form in which flags are compared: underscores and dashes are the same, and PEFT's names are ours."""
    section, _, leaf = name.rpartition(".")
    if section == "lora":
        from deltaw.lora.config import PEFT_NAMES

        leaf = leaf.replace("-", "_")
        name = f"lora.{PEFT_NAMES.get(leaf, leaf)}"
    return name.replace("_", "-")


SPELLING = {"help_option_names": ["-h", "--help"], "token_normalize_func": _one_spelling}


@click.group(cls=_Verbs, context_settings=SPELLING, invoke_without_command=True)
@click.version_option(__version__, prog_name="deltaw")
@click.option(TRACEBACK, is_flag=True, help="show where in the code an unexpected error arose")
@click.option("-v", "--verbose", is_flag=True, help="print every choice with its reason")
def group(traceback: bool, verbose: bool) -> None:
    """LoRA fine-tuning on the machine you have. `deltaw VERB --help` tells a verb's settings."""
    variants.check_asked()
    context = click.get_current_context()
    context.meta["deltaw.verbose"] = verbose
    refuse_several(context.invoked_subcommand)
    _Printed.ends = context.invoked_subcommand not in GOING_ON
    # The status of a command that fails is that of its error, also if nobody reads it.
    context.call_on_close(lambda: setattr(_Printed, "ends", False))
    if context.invoked_subcommand is None:
        click.echo(FIRST_STEPS)


def refuse_several(verb: str | None) -> None:
    """Let ``torchrun`` start several processes of the one verb that knows of them.

    Raises:
        UserError: it started several of another one.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if verb in (None, "train") or size in ("", "1") or "RANK" not in os.environ:
        return
    what, hint = f"'{verb}' runs in one process, but the environment sets {size}", "start it without torchrun"
    raise UserError(what, where="WORLD_SIZE", hint=f"{hint}; 'train' alone takes several processes")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``deltaw`` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Whoever adds it to a command that failed writes it at the end, behind the verb.
    asked = TRACEBACK in given or os.environ.get(faults.VARIABLE, "0") not in ("", "0")
    given = [argument for argument in given if argument != TRACEBACK]
    _print_any_text()
    for name, value in UNREPORTED.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings(), listening(None):
            warnings.showwarning = _show_warning
            status = group.main(args=given, prog_name="deltaw", standalone_mode=False)
    except UserError as error:
        click.echo(as_message(error), err=True)
        status = 2
    except click.ClickException as error:
        click.echo(as_message(mistakes.explained(error, given, group)), err=True)
        status = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        status = 130
    except Exception as error:
        status, message = faults.explained(error, traceback=asked)
        click.echo(message, err=True)
    sys.exit(status if isinstance(status, int) else 0)


def _print_any_text() -> None:
    """Let the streams show what they cannot encode, such as a file's name that is not UTF-8, by its code, read what
    they cannot decode, so that a verb can refuse it, and let those that are files or pipes outlive their readers.

    On Windows, files and pipes are UTF-8, as everything else that deltaw reads and writes, unless the variable
    PYTHONIOENCODING says otherwise; the code page of old programs has no arrows.
    """
    of_files = "utf-8" if platforms.WINDOWS and "PYTHONIOENCODING" not in os.environ else None
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        with contextlib.suppress(OSError):  # a stream without a file
            if not stream.isatty():
                how: dict[str, Any] = {key: getattr(stream, key) for key in ("line_buffering", "write_through")}
                raw: Any = _Printed(stream)
                binary = raw if stream.write_through else io.BufferedWriter(raw)
                setattr(sys, name, io.TextIOWrapper(binary, of_files or stream.encoding, "backslashreplace", **how))
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):
            sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else of_files, errors="surrogateescape")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a person reads it, without the place in our code that gave it."""
    from deltaw.reports.tables import folded

    click.echo(folded(escape_control_characters(f"warning: {message}")), err=True)
