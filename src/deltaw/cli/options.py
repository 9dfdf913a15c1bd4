"""Flags made from the settings' one definition, and what all verbs share on the command line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
import yaml
from click.shell_completion import CompletionItem

from deltaw.errors import UserError
from deltaw.reports.tables import Output
from deltaw.reports.working import WorkingDisplay
from deltaw.settings import parse_yaml, settings
from deltaw.working import listen

Command = TypeVar("Command", bound=Callable)
SHARE = click.FloatRange(0, 1, min_open=True)
# Settings whose values are files or folders, for a shell that completes them.
FILES = {"model": "file", "data.train": "file", "data.eval": "file", "data.chat_template": "file", "output": "dir"}


def with_options(command: Command, *options: Callable[[Command], Command]) -> Command:
    """Give ``command`` these options, shown in their order."""
    for option in reversed(options):
        command = option(command)
    return command


def settings_flags(command: Command) -> Command:
    """Give ``command`` a flag ``--key.sub VALUE`` for every setting; those given arrive as ``flags``."""
    options = []
    for setting in settings():
        default = "" if setting.default is ... else f"  [default: {_shown(setting.default)}]"
        # As in the file, where `data: rows.jsonl` stands for `data: {train: rows.jsonl}`.
        names = [f"--{setting.key}", *(["--data"] if setting.key == "data.train" else []), _argument_name(setting.key)]
        how: dict[str, Any] = {"help": setting.description + default, "shell_complete": completing(setting.key)}
        options.append(click.option(*names, metavar="VALUE", **how))
    return with_options(command, *options)


def completing(key: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """What a shell offers as values of a setting: its choices, or files."""

    def complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
        from deltaw.schema import values_of

        values = [CompletionItem(value) for value in values_of(key) if value.startswith(begun)]
        files = [CompletionItem(begun, type=FILES[key])] if key in FILES else []
        return values or files

    return complete


def nested(given: Mapping[str, object]) -> dict:
    """The flags that were given, as nested settings; a value that is not to be a text is read as YAML."""
    keys = {_argument_name(s.key): s for s in settings()}
    result: dict = {}
    for argument, text in given.items():
        if text is None or argument not in keys:
            continue
        *sections, leaf = keys[argument].key.split(".")
        at = result
        for section in sections:
            at = at.setdefault(section, {})
        is_text = keys[argument].annotation in (str, "str") or (
            argument == _argument_name("data.train") and not str(text).lstrip().startswith("[")
        )
        at[leaf] = str(text) if is_text else _value(str(text))
    return result


def console(as_json: bool) -> Output:
    """Where a person reads: standard output, or standard error where that belongs to the JSON. Long work is
    shown there too, up to the verb's end."""
    context = click.get_current_context(silent=True)
    made = Output(stderr=as_json, verbose=context is not None and context.meta.get(VERBOSE, False))
    listen(WorkingDisplay(made))
    return made


def print_json(value: object) -> None:
    """The one JSON object of a verb, on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2))


def _note_verbose(context: click.Context, _: click.Parameter, given: bool) -> None:
    if given:
        context.meta[VERBOSE] = True


VERBOSE = "deltaw.verbose"
VERBOSE_HELP = "print every choice with its reason, and tables with all their columns"
verbose_flag = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_note_verbose, help=VERBOSE_HELP
)
JSON_HELP = "one JSON object on standard output, the rest on standard error"


def json_flag(command: Command) -> Command:
    """Give ``command`` the flags ``--json``, which arrives as ``as_json``, and ``--verbose``."""
    return with_options(command, click.option("--json", "as_json", is_flag=True, help=JSON_HELP), verbose_flag)


def cluster_flags(command: Command) -> Command:
    """Flags of the verbs whose trainings may run on several machines; they arrive as one argument, ``cluster``,
    which is None if trainings run on this machine, one after another."""

    @functools.wraps(command)
    def called(*args: object, ray: str | None, ray_cpus: int | None, **given: object) -> object:
        from deltaw.experiments.jobs import Cluster

        if ray is None and ray_cpus is not None:
            raise UserError("there is no cluster", where=f"--ray-cpus {ray_cpus}", hint="give --ray too")
        return command(*args, cluster=None if ray is None else Cluster(ray, ray_cpus), **given)

    address = "train on the machines of a Ray cluster, several at once: auto, HOST:PORT, or local (this one)"
    cores = "with --ray: cores that a training takes  [default: all of a machine]"
    options = (
        click.option("--ray", metavar="ADDRESS", help=address),
        click.option("--ray-cpus", type=click.IntRange(1), help=cores),
    )
    return with_options(called, *options)  # type: ignore[return-value]


def as_text(given: str, where: str) -> str:
    """What a user wrote, which must be text: bytes that are not UTF-8 arrive as halves of surrogate pairs.

    Raises:
        UserError: it is not.
    """
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = given.encode("utf-8", "backslashreplace").decode()[:80]
        hint = "write it in UTF-8, or remove the character"
        raise UserError(f"{shown!r} is not UTF-8 text", where=where, hint=hint) from error
    return given


def base_flags(command: Command) -> Command:
    """Flags of the verbs that need a run's base model: which one, and whether its own code is run."""
    which = "the base model: where the folder does not name it, names another, or comes from somewhere else"
    trust = "run Python code that comes with the base model; only if you know it"
    return with_options(
        command,
        click.option("--model", help=which, shell_complete=completing("model")),
        click.option("--trust-remote-code", is_flag=True, help=trust),
    )


def model_flags(command: Command) -> Command:
    """Flags of the verbs that open a run: its base model, and how it is loaded."""
    types: dict[str, Any] = {"help": "auto, bf16, fp32, int8, gguf, nf4", "shell_complete": completing("precision")}
    return with_options(
        command,
        base_flags,
        click.option("--precision", default="auto", **types),
        click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps"),
    )


def _argument_name(key: str) -> str:
    return "setting_" + key.replace(".", "__")


def _value(text: str) -> object:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return str(list(value)) if isinstance(value, tuple) else str(value)
