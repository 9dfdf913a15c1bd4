"""Command line of deltaw. Each command is a thin module in this package.

Exit status: 2 with a message for invalid user input, 130 for an interruption, and 1 with a message for a bug in deltaw.
``--traceback`` adds the traceback to the message.
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
from deltaw.cli import crash_report, suggestions
from deltaw.errors import UserError, escape_control_characters, format_error
from deltaw.kernels import variants
from deltaw.progress import use_listener
from deltaw.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Buffer

TRACEBACK = "--traceback"

GROUPS = {
    "Prepare": {
        "init": "create a commented settings file from three questions",
        "data": "display and check training rows, and mine hard negatives",
        "plan": "predict the memory that a run needs, for every method",
        "doctor": "diagnose this machine and report causes of slow training",
    },
    "Train": {
        "train": "fine-tune a model on a file of rows and save an adapter",
        "studio": "train, try and export from a web page, without programming",
        "compare": "train with several methods and compare cost and score",
        "tune": "search for the best settings",
        "runs": "list the runs in a folder, or compare runs",
    },
    "Check": {
        "eval": "evaluate a run: loss, perplexity and exact match",
        "predict": "predict labels, numbers, scores, vectors or completions for the rows of a file",
        "generate": "complete prompts",
        "chat": "chat with a model and its adapter",
        "inspect": "describe an adapter: rank, size, targets and norms; or compare two adapters",
    },
    "Ship": {
        "serve": "serve a model and its adapters with the OpenAI API",
        "merge": "merge a run into its base model, or several adapters into one",
        "export": "export an adapter for llama.cpp, Ollama, vLLM, mlx-lm or PEFT",
        "push": "upload a run's adapter to a model hub, with a model card",
        "deploy": "import a run into Ollama or LM Studio and compare the answers",
    },
    "Tools": {
        "mcp": "serve tools for agents with the Model Context Protocol",
        "schema": "print the JSON schema of the settings file for editors",
        "completion": "print the shell completion script for bash, zsh or fish",
    },
}
COMMANDS = {name: text for commands in GROUPS.values() for name, text in commands.items()}
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Example in the help of each command. A subcommand follows its group after a space.
EXAMPLES = {
    "init": f"deltaw init --model {MODEL} --data rows.jsonl",
    "data": "deltaw data check rows.jsonl",
    "data check": f"deltaw data check rows.jsonl --model {MODEL}",
    "data show": f"deltaw data show rows.jsonl --row 1 \\\n    --model {MODEL}",
    "data mine": "deltaw data mine pairs.jsonl \\\n    --model sentence-transformers/all-MiniLM-L6-v2",
    "plan": "deltaw plan train.yaml --fit-memory 4GB",
    "doctor": f"deltaw doctor --model {MODEL}",
    "train": f"deltaw train --model {MODEL} \\\n    --data rows.jsonl --output runs/first",
    "studio": "deltaw studio my-studio",
    "compare": "deltaw compare train.yaml --methods lora,bias,full",
    "tune": "deltaw tune train.yaml --trials 20",
    "runs": "deltaw runs first second --output comparison.html",
    "eval": "deltaw eval runs/first --with-base --answers 5",
    "predict": "deltaw predict runs/first unlabeled.csv -o predicted.csv",
    "generate": 'deltaw generate runs/first --with-base "Where is my parcel?"',
    "chat": "deltaw chat runs/first --with-base",
    "inspect": "deltaw inspect runs/first runs/second",
    "serve": f"deltaw serve {MODEL} \\\n    --adapter first=runs/first --port 8000",
    "merge": "deltaw merge runs/first --output merged",
    "export": "deltaw export runs/first --format gguf --type q8_0 --output first.gguf",
    "push": "deltaw push runs/first USER/NAME --dry-run",
    "deploy": "deltaw deploy ollama runs/first",
    "deploy ollama": "deltaw deploy ollama runs/first",
    "deploy lmstudio": "deltaw deploy lmstudio runs/first",
    "mcp": "deltaw mcp --allow . --allow-models",
    "schema": "deltaw schema --output run.schema.json",
    "completion": "deltaw completion fish > ~/.config/fish/completions/deltaw.fish",
}


FIRST_STEPS = """\
deltaw fine-tunes a language model on your rows. From a file to an adapter:

  deltaw init --data rows.jsonl    inspect the rows and create train.yaml
  deltaw plan train.yaml           predict the memory that training needs
  deltaw train train.yaml          train; the adapter is saved in runs/
  deltaw eval runs/NAME --with-base     compare scores with the base model
  deltaw chat runs/NAME            chat with the model

'deltaw --help' lists all commands, 'deltaw COMMAND --help' the flags of one."""

# Commands that write files or serve. They continue if their standard output is closed. Other commands exit.
DETACHED = ("train", "compare", "tune", "merge", "export", "push", "deploy", "serve", "studio", "mcp", "init")


# Disables telemetry of libraries, unless the user has set these variables.
TELEMETRY_OFF = {"HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False", "RAY_USAGE_STATS_ENABLED": "0"}


class _StandardStream(io.FileIO):
    """Standard stream that tolerates a closed reader, for example after ``head``. Later output is discarded.

    Attributes:
        ends: Exit with status 0 if the reader is closed. Shared by all streams.
    """

    ends = False

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.fileno(), "wb", closefd=False)
        self._stream = stream  # reference that prevents the stream from closing the file

    def write(self, buffer: Buffer) -> int | None:  # type: ignore[override]
        try:
            return super().write(buffer)
        except OSError as error:
            # EIO: the terminal was closed. EINVAL: a pipe without a reader on Windows.
            if error.errno not in (errno.EPIPE, errno.EIO, *([errno.EINVAL] if platforms.WINDOWS else [])):
                raise
        if self.ends:
            raise SystemExit(0)
        return memoryview(buffer).nbytes


class _LazyGroup(click.Group):
    """Group that imports the module of a command on first use, so that --help is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"deltaw.cli.{name}").command
        subcommands = command.commands if isinstance(command, click.Group) else {}
        for path, documented in {name: command, **{f"{name} {n}": c for n, c in subcommands.items()}}.items():
            if path in EXAMPLES:
                example = EXAMPLES[path].replace("\n", "\n  ")
                documented.epilog = f"\b\nExample:\n  {example}"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        unknown = args and args[0] not in COMMANDS and not args[0].startswith("-")
        if unknown and not ctx.resilient_parsing:  # no error during shell completion
            raise suggestions.unknown_command_error(args, COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        column = max(map(len, COMMANDS)) + 2
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(column - 2), text) for name, text in commands.items()])


def _normalize_flag(name: str) -> str:
    """Return the canonical form of a flag: dashes and underscores are equivalent, and PEFT's names are mapped to
    deltaw's.
    """
    section, _, leaf = name.rpartition(".")
    if section == "lora":
        from deltaw.lora.config import PEFT_NAMES

        leaf = leaf.replace("-", "_")
        name = f"lora.{PEFT_NAMES.get(leaf, leaf)}"
    return name.replace("_", "-")


SPELLING = {"help_option_names": ["-h", "--help"], "token_normalize_func": _normalize_flag}


@click.group(cls=_LazyGroup, context_settings=SPELLING, invoke_without_command=True)
@click.version_option(__version__, prog_name="deltaw")
@click.option(TRACEBACK, is_flag=True, help="print the traceback of unexpected errors")
@click.option("-v", "--verbose", is_flag=True, help="print every choice with its reason")
def group(traceback: bool, verbose: bool) -> None:
    """LoRA fine-tuning on your own machine. Run `deltaw COMMAND --help` for the flags of a command."""
    variants.check_overrides()
    context = click.get_current_context()
    context.meta["deltaw.verbose"] = verbose
    reject_torchrun(context.invoked_subcommand)
    _StandardStream.ends = context.invoked_subcommand not in DETACHED
    # A failing command exits with the status of its error, even if its output is closed.
    context.call_on_close(lambda: setattr(_StandardStream, "ends", False))
    if context.invoked_subcommand is None:
        click.echo(FIRST_STEPS)


def reject_torchrun(command: str | None) -> None:
    """Raise an error if ``torchrun`` starts several processes of a command other than train.

    Raises:
        UserError: if the command does not support several processes.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if command in (None, "train") or size in ("", "1") or "RANK" not in os.environ:
        return
    message = f"'{command}' runs in one process, but the environment sets {size}"
    hint = "start it without torchrun"
    raise UserError(message, location="WORLD_SIZE", hint=f"{hint}; only 'train' supports several processes")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``deltaw`` command."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # --traceback is accepted in any position, because users append it to a failed command.
    show_traceback = TRACEBACK in argv or os.environ.get(crash_report.VARIABLE, "0") not in ("", "0")
    argv = [argument for argument in argv if argument != TRACEBACK]
    _configure_streams()
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings(), use_listener(None):
            warnings.showwarning = _show_warning
            status = group.main(args=argv, prog_name="deltaw", standalone_mode=False)
    except UserError as error:
        click.echo(format_error(error), err=True)
        status = 2
    except click.ClickException as error:
        click.echo(format_error(suggestions.to_user_error(error, argv, group)), err=True)
        status = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        status = 130
    except Exception as error:
        status, message = crash_report.describe(error, traceback=show_traceback)
        click.echo(message, err=True)
    sys.exit(status if isinstance(status, int) else 0)


def _configure_streams() -> None:
    """Configure the standard streams for arbitrary text and closed readers.

    Characters that cannot be encoded are escaped, invalid input is decoded to surrogates so that commands can reject
    it, and files and pipes tolerate closed readers. On Windows, files and pipes use UTF-8 unless PYTHONIOENCODING is
    set, because the default code page lacks characters such as arrows.
    """
    encoding = "utf-8" if platforms.WINDOWS and "PYTHONIOENCODING" not in os.environ else None
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        with contextlib.suppress(OSError):  # the stream has no file descriptor
            if not stream.isatty():
                options: dict[str, Any] = {key: getattr(stream, key) for key in ("line_buffering", "write_through")}
                raw: Any = _StandardStream(stream)
                binary = raw if stream.write_through else io.BufferedWriter(raw)
                setattr(sys, name, io.TextIOWrapper(binary, encoding or stream.encoding, "backslashreplace", **options))
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):
            sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else encoding, errors="surrogateescape")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning without its source location."""
    from deltaw.reports.tables import wrap_line

    click.echo(wrap_line(escape_control_characters(f"warning: {message}")), err=True)
