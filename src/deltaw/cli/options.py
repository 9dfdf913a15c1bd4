"""Flags generated from the settings, and options shared by several commands."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from deltaw.cli.suggestions import unknown_subcommand_error
from deltaw.errors import UserError
from deltaw.progress import set_listener
from deltaw.reports.tables import TerminalOutput
from deltaw.reports.work_display import WorkingDisplay
from deltaw.settings.aliases import SHORT
from deltaw.settings.config import RunConfig, Setting, parse_setting, settings

Command = TypeVar("Command", bound=Callable)
SHARE = click.FloatRange(0, 1, min_open=True)
ALL = "--help-all"
COMMON_TITLE = "Common settings"
# Maximum length of a type next to its flag. Longer types are part of the description.
MAX_TYPE_LENGTH = 32
# Settings in --help, in this order.
COMMON = (
    *("model", "data.train", "data.eval", "task", "method", "output", "train.epochs", "train.max_steps"),
    *("train.learning_rate", "train.batch_size", "data.max_length", "lora.rank", "lora.alpha"),
    *("precision", "memory", "train.seed"),
)
# Shell completion of settings that are files or folders.
FILES = {"model": "file", "data.train": "file", "data.eval": "file", "data.chat_template": "file", "output": "dir"}


def with_options(command: Command, *options: Callable[[Command], Command]) -> Command:
    """Add options to a command, listed in the given order."""
    for option in reversed(options):
        command = option(command)
    return command


class GroupedCommand(click.Command):
    """Command with many flags: ``--help`` lists the first group, ``--help-all`` all groups.

    Args:
        groups: Parameter names by title. The default is the settings of a run by section.
    """

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.groups = groups
        flag_options: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _help_all}
        self.params.append(click.Option([ALL], help="list all flags, in groups", **flag_options))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = {str(param.name): param for param in self.get_params(ctx) if isinstance(param, click.Option)}
        show_all = bool(ctx.meta.get(ALL))
        groups = self.groups or {COMMON_TITLE: tuple(map(_argument_name, COMMON))}
        kinds: dict[str, str] = {}
        if self.groups is None:
            from deltaw.settings.schema import value_types

            settings_of = {option.setting.key: name for name, option in options.items() if hasattr(option, "setting")}
            kinds = value_types(settings_of if show_all else COMMON)
            if show_all:
                groups = _by_section(settings_of)
        grouped = {name for names in groups.values() for name in names}
        listed = dict(groups) if show_all else dict(list(groups.items())[:1])
        listed["Options"] = [n for n, o in options.items() if n not in grouped and not isinstance(o, SettingFlag)]
        for title, names in listed.items():
            flags = [options[name] for name in names]
            rows = [o.record(kinds, show_all) if isinstance(o, SettingFlag) else o.get_help_record(ctx) for o in flags]
            with formatter.section(title):
                formatter.write_dl([row for row in rows if row])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if not ctx.meta.get(ALL):
            count = sum(isinstance(param, click.Option) for param in self.params)
            formatter.write_paragraph()
            formatter.write_text(f"List all {count} flags: {ctx.command_path} {ALL}")


def _help_all(ctx: click.Context, _: click.Parameter, requested: bool) -> None:
    if requested and not ctx.resilient_parsing:
        ctx.meta[ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


def _by_section(flags: Mapping[str, str]) -> dict[str, Sequence[str]]:
    """Group the flags of settings by section. Settings without a section are first."""
    groups: dict[str, list[str]] = {}
    for key, name in flags.items():
        section = key.rpartition(".")[0]
        description = str(RunConfig.model_fields[section].description).partition(";")[0] if section else ""
        groups.setdefault(f"{section} ({description})" if section else "General", []).append(name)
    return {**groups}


class SubcommandGroup(click.Group):
    """Group that lists its subcommands if the subcommand is unknown or missing."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise unknown_subcommand_error(ctx, args[0])
        return super().resolve_command(ctx, args)


class SettingFlag(click.Option):
    """Flag of a setting. Its type is determined when the help is printed."""

    def __init__(self, *args: Any, setting: Setting, **options: Any) -> None:
        super().__init__(*args, **options)
        self.setting = setting

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        from deltaw.settings.schema import value_types

        return self.record(value_types([self.setting.key]), show_all=False)

    def record(self, kinds: Mapping[str, str], show_all: bool) -> tuple[str, str]:
        """Return the flag names and the description. The common list contains only the shortest flag, followed by the
        key.
        """
        key = self.setting.key
        description = self.setting.description
        type_name = kinds[self.setting.key]
        if len(type_name) > MAX_TYPE_LENGTH:
            if not all(value in description for value in type_name.split("|")):
                description = f"{description}: {type_name.replace('|', ', ')}"
            type_name = "NAME"
        notes = [] if self.setting.default is ... else [f"default: {_format_default(self.setting.default)}"]
        if not show_all and self.opts[0] != f"--{key}":
            notes.insert(0, key)
        if show_all and self.setting.when:
            description = f"{description}. {self.setting.when}"
        names = ", ".join([f"--{key}", *self.opts[:-1]]) if show_all else self.opts[0]
        return f"{names} {type_name}", f"{description}  [{'; '.join(notes)}]" if notes else description


def settings_flags(command: Command) -> Command:
    """Add a flag ``--key.sub VALUE`` for every setting. The values are passed as keyword arguments."""
    options = []
    for setting in settings():
        names = [*(f"--{name}" for name in SHORT.get(setting.key, ())), f"--{setting.key}", _argument_name(setting.key)]
        options_of_flag: dict[str, Any] = {"help": setting.description, "shell_complete": complete_setting(setting.key)}
        options.append(click.option(*names, cls=SettingFlag, setting=setting, metavar="VALUE", **options_of_flag))
    return with_options(command, *options)


def complete_setting(key: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return a function for the shell completion of a setting: its choices, or files."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from deltaw.settings.schema import allowed_values

        values = [CompletionItem(value) for value in allowed_values(key) if value.startswith(incomplete)]
        files = [CompletionItem(incomplete, type=FILES[key])] if key in FILES else []
        return values or files

    return complete


def nested_settings(flags: Mapping[str, object]) -> dict:
    """Return the given flags as nested settings. Values are parsed as YAML unless the setting is a string."""
    keys = {_argument_name(s.key): s for s in settings()}
    result: dict = {}
    for argument, text in flags.items():
        if text is None or argument not in keys:
            continue
        *sections, leaf = keys[argument].key.split(".")
        section_values = result
        for section in sections:
            section_values = section_values.setdefault(section, {})
        section_values[leaf] = parse_setting(keys[argument].key, str(text))
    return result


def console(as_json: bool) -> TerminalOutput:
    """Return the console for the user: standard output, or standard error with ``--json``. Also displays progress."""
    context = click.get_current_context(silent=True)
    output = TerminalOutput(stderr=as_json, verbose=context is not None and context.meta.get(VERBOSE, False))
    set_listener(WorkingDisplay(output))
    return output


def print_json(value: object) -> None:
    """Print a command's JSON object to standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2))


def print_json_line(value: object) -> None:
    """Print one of several JSON objects on one line."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _verbose(context: click.Context, _: click.Parameter, is_set: bool) -> None:
    if is_set:
        context.meta[VERBOSE] = True


VERBOSE = "deltaw.verbose"
VERBOSE_HELP = "print every choice with its reason, and all columns of tables"
verbose_flag = click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_verbose, help=VERBOSE_HELP)
JSON_HELP = "print one JSON object to standard output, and messages to standard error"


def json_flag(command: Command) -> Command:
    """Add the flags ``--json``, passed as ``as_json``, and ``--verbose``."""
    return with_options(command, click.option("--json", "as_json", is_flag=True, help=JSON_HELP), verbose_flag)


def cluster_flags(command: Command) -> Command:
    """Add flags for training on several machines. They are passed as ``cluster``, which is None for this machine."""

    @functools.wraps(command)
    def wrapper(*args: object, ray: str | None, ray_cpus: int | None, **arguments: object) -> object:
        from deltaw.experiments.cluster import Cluster

        if ray is None and ray_cpus is not None:
            raise UserError("--ray-cpus requires --ray", location=f"--ray-cpus {ray_cpus}", hint="add --ray")
        return command(*args, cluster=None if ray is None else Cluster(ray, ray_cpus), **arguments)

    address = "address of a Ray cluster for concurrent trainings: auto, HOST:PORT, or local for this machine"
    cores = "number of cores per training, with --ray  [default: all cores of a machine]"
    ray_option = click.option("--ray", metavar="ADDRESS", help=address)
    cpus_option = click.option("--ray-cpus", type=click.IntRange(1), help=cores)
    return with_options(wrapper, ray_option, cpus_option)  # type: ignore[return-value]


def require_utf8(text: str, location: str) -> str:
    """Return a user's text if it is valid. Invalid UTF-8 arguments contain surrogates.

    Raises:
        UserError: if the text is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        escaped = text.encode("utf-8", "backslashreplace").decode()[:80]
        hint = "encode it in UTF-8, or remove the character"
        raise UserError(f"{escaped!r} is not UTF-8 text", location=location, hint=hint) from error
    return text


def base_flags(command: Command) -> Command:
    """Add flags for the base model of a run and its Python code."""
    model_help = "base model; required if the folder does not name one or comes from an untrusted source"
    trust_help = "run Python code of the base model; enable only for models you trust"
    return with_options(
        command,
        click.option("--model", help=model_help, shell_complete=complete_setting("model")),
        click.option("--trust-remote-code", is_flag=True, help=trust_help),
    )


SAMPLERS = ("auto", "vllm", "transformers")


def model_flags(command: Command) -> Command:
    """Add flags for the base model of a run and for loading it."""
    precisions = "precision: auto, bf16, fp16, fp32, int8, gguf or nf4"
    return with_options(
        command,
        base_flags,
        click.option("--precision", default="auto", help=precisions, shell_complete=complete_setting("precision")),
        click.option("--device", default="auto", help="device: auto, cpu, cuda, cuda:1 or mps"),
        click.option("--sampler", default="auto", type=click.Choice(SAMPLERS), help="library that generates on a GPU"),
    )


def _argument_name(key: str) -> str:
    return "setting_" + key.replace(".", "__")


def _format_default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
