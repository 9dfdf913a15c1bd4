"""Flags made from the settings' one definition, and what all verbs share on the command line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
import yaml
from click.shell_completion import CompletionItem

from deltaw.cli.mistakes import no_part
from deltaw.errors import UserError
from deltaw.other_names import SHORT
from deltaw.reports.tables import Output
from deltaw.reports.working import WorkingDisplay
from deltaw.settings import RunConfig, Setting, parse_yaml, settings
from deltaw.working import listen

Command = TypeVar("Command", bound=Callable)
SHARE = click.FloatRange(0, 1, min_open=True)
ALL = "--help-all"
COMMON_TITLE = "Common settings"
# Characters of a setting's choices that stand behind its flag; longer ones are part of what is said of it.
LONGEST_KIND = 32
# The settings that --help shows, in this order.
COMMON = (
    *("model", "data.train", "data.eval", "task", "method", "output", "train.epochs", "train.max_steps"),
    *("train.learning_rate", "train.batch_size", "data.max_length", "lora.rank", "lora.alpha"),
    *("precision", "memory", "train.seed"),
)
# Settings whose values are files or folders, for a shell that completes them.
FILES = {"model": "file", "data.train": "file", "data.eval": "file", "data.chat_template": "file", "output": "dir"}


def with_options(command: Command, *options: Callable[[Command], Command]) -> Command:
    """Give ``command`` these options, shown in their order."""
    for option in reversed(options):
        command = option(command)
    return command


class Verb(click.Command):
    """A verb of many flags: ``--help`` shows the first of its groups, ``--help-all`` all of them.

    Args:
        groups: names of parameters by title; without it, the settings of a run by section.
    """

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]] | None = None, **how: Any) -> None:
        super().__init__(*args, **how)
        self.groups = groups
        told: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _help_all}
        self.params.append(click.Option([ALL], help="show every flag, in groups", **told))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = {str(param.name): param for param in self.get_params(ctx) if isinstance(param, click.Option)}
        every, groups = bool(ctx.meta.get(ALL)), self.groups or {COMMON_TITLE: tuple(map(_argument_name, COMMON))}
        kinds: dict[str, str] = {}
        if self.groups is None:
            from deltaw.schema import kinds_of

            settings_of = {option.setting.key: name for name, option in options.items() if hasattr(option, "setting")}
            kinds = kinds_of(settings_of if every else COMMON)
            if every:
                groups = _by_section(settings_of)
        grouped = {name for names in groups.values() for name in names}
        listed = dict(groups) if every else dict(list(groups.items())[:1])
        listed["Options"] = [n for n, o in options.items() if n not in grouped and not isinstance(o, SettingFlag)]
        for title, names in listed.items():
            flags = [options[name] for name in names]
            records = [o.record(kinds, every) if isinstance(o, SettingFlag) else o.get_help_record(ctx) for o in flags]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if not ctx.meta.get(ALL):
            count = sum(isinstance(param, click.Option) for param in self.params)
            formatter.write_paragraph()
            formatter.write_text(f"All {count} flags, in groups: {ctx.command_path} {ALL}")


def _help_all(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        ctx.meta[ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


def _by_section(flags: Mapping[str, str]) -> dict[str, Sequence[str]]:
    """The flags of settings by the section of each, those of none first."""
    groups: dict[str, list[str]] = {}
    for key, name in flags.items():
        section = key.rpartition(".")[0]
        told = str(RunConfig.model_fields[section].description).partition(";")[0] if section else ""
        title = f"{section} ({told})" if section else "General"
        groups.setdefault(title, []).append(name)
    return {**groups}


class Parts(click.Group):
    """Names the parts to whoever gives another word, or none."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise no_part(ctx, args[0])
        return super().resolve_command(ctx, args)


class SettingFlag(click.Option):
    """The flag of a setting; what it can be is found where help is shown."""

    def __init__(self, *args: Any, setting: Setting, **how: Any) -> None:
        super().__init__(*args, **how)
        self.setting = setting

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        from deltaw.schema import kinds_of

        return self.record(kinds_of([self.setting.key]), every=False)

    def record(self, kinds: Mapping[str, str], every: bool) -> tuple[str, str]:
        """Its names and what it is; among the common ones only the shortest name, and the file's for it behind."""
        key, said, kind = self.setting.key, self.setting.description, kinds[self.setting.key]
        if len(kind) > LONGEST_KIND:
            named = all(value in said for value in kind.split("|"))
            said, kind = said if named else f"{said}: {kind.replace('|', ', ')}", "NAME"
        shown = [] if self.setting.default is ... else [f"default: {_shown(self.setting.default)}"]
        if not every and self.opts[0] != f"--{key}":
            shown.insert(0, key)
        names = ", ".join([f"--{key}", *self.opts[:-1]]) if every else self.opts[0]
        return f"{names} {kind}", f"{said}  [{'; '.join(shown)}]" if shown else said


def settings_flags(command: Command) -> Command:
    """Give ``command`` a flag ``--key.sub VALUE`` for every setting; those given arrive as ``flags``."""
    options = []
    for setting in settings():
        names = [*(f"--{name}" for name in SHORT.get(setting.key, ())), f"--{setting.key}", _argument_name(setting.key)]
        how: dict[str, Any] = {"help": setting.description, "shell_complete": completing(setting.key)}
        options.append(click.option(*names, cls=SettingFlag, setting=setting, metavar="VALUE", **how))
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


def print_json_line(value: object) -> None:
    """One of several JSON objects, in a line of its own."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


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
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
