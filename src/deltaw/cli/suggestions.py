"""Error messages with suggestions for invalid command lines: unknown commands and flags, invalid values, and confused
files.

Errors of click's parser are converted to :class:`UserError`. This module imports neither torch nor the commands.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from deltaw.errors import UserError, did_you_mean, find_similar_files, nearest
from deltaw.hub.app_stores import SCHEMES
from deltaw.platforms import shell_word
from deltaw.settings import aliases, task_registry
from deltaw.settings.aliases import normalize

# Default folder of runs.
RUNS = "runs"
_SETTINGS_FILES = (".yaml", ".yml")
# Beginnings of model references that are not paths.
_MODEL_SCHEMES = ("pypi:", *SCHEMES)
# Hints for an extra argument, by command.
_EXTRA_ARGUMENT_HINTS = {
    "generate": "quote a text: deltaw generate {first} {texts}; for several, repeat --prompt: deltaw generate {first} "
    "--prompt TEXT --prompt TEXT",
    "chat": "chat reads standard input; for a single answer: deltaw generate {first} {texts}",
    "eval": "deltaw eval {first} --data {more}",
    "serve": "deltaw serve {first} --adapter NAME={more}",
    "merge": "deltaw merge {first} --output {more}",
    "export": "deltaw export {first} --format FORMAT --output {more}",
    "push": "deltaw push {first} {more}",
    "compare": "deltaw compare {first} --methods {more}",
    "doctor": "deltaw doctor --model {more}",
}


def to_user_error(error: click.ClickException, arguments: Sequence[str], root: click.Group) -> UserError:
    """Convert an error of click for the arguments ``arguments`` to a UserError."""
    context = getattr(error, "ctx", None) or _context(arguments, root)
    location = context.command_path
    if misspelled := next((text for text in arguments if re.fullmatch(r"[‐-―−]+[A-Za-z][\w.-]*", text)), None):
        message = f"'{misspelled}' starts with a typographic dash instead of '--'"
        return UserError(message, location=location, hint=f"write --{misspelled.lstrip('‐‑‒–—―−')}")
    if isinstance(error, click.NoSuchOption):
        return _unknown_flag_error(_flag_as_typed(error.option_name, arguments), context)
    if isinstance(error, click.BadOptionUsage):
        return _flag_usage_error(error, context)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return _missing_parameter_error(error.param, context)
    if isinstance(error, click.BadParameter) and error.param is not None:
        return _invalid_value_error(error, error.param, context)
    if extra := re.search(r"unexpected extra arguments? \((.*)\)", error.message, re.DOTALL):
        return _extra_arguments_error(extra[1], context)
    if isinstance(context.command, click.Group):
        return unknown_subcommand_error(context, None)
    return UserError(error.message.strip().splitlines()[0].rstrip("."), location=location, hint=_help_hint(context))


def _context(arguments: Sequence[str], root: click.Group) -> click.Context:
    """Return the context of the requested command, which some errors of click lack."""
    context = click.Context(root, info_name="deltaw")
    for word in arguments:
        subcommand = context.command.get_command(context, word) if isinstance(context.command, click.Group) else None
        context = context if subcommand is None else click.Context(subcommand, context, info_name=word)
    return context


def unknown_command_error(args: Sequence[str], commands: Mapping[str, str]) -> UserError:
    """Return the error for an unknown command."""
    word, *other_arguments = args
    command = next((other for other in other_arguments if other in commands), None)
    hint = aliases.command_hint(word, commands)
    if normalize(word) == "help":
        hint = f"deltaw {command} --help" if command else "deltaw --help"
    elif Path(word).exists() or "/" in word:
        hint = _command_with(word, command or ("train" if Path(word).suffix in _SETTINGS_FILES else None))
        hint = f"put the command first: {hint}"
    return UserError(f"unknown command '{word}'", hint=hint or "list the commands with 'deltaw --help'")


def unknown_subcommand_error(context: click.Context, word: str | None) -> UserError:
    """Return the error for an unknown or missing subcommand."""
    assert isinstance(context.command, click.Group)
    path = context.command_path
    names = sorted(context.command.list_commands(context))
    file_argument = shell_word(word) if word and (Path(word).exists() or Path(word).suffix) else None
    first = context.command.get_command(context, names[0])
    file = file_argument or (first.params[0].human_readable_name if first else "FILE")
    similar = [] if file_argument else nearest(word or "", names)
    hint = f"did you mean '{path} {similar[0]}'?" if similar else " or ".join(f"{path} {name} {file}" for name in names)
    message = f"'{word}' is neither {' nor '.join(names)}" if word else f"{' or '.join(names)} is missing"
    return UserError(message, location=path, hint=hint)


class RunArgument(click.Path):
    """Folder of a run or an adapter, name of a run in the folder ``runs``, hub id, or model."""

    models = True

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self.models and value.startswith(_MODEL_SCHEMES):
            return value
        path = Path(os.path.expanduser(value))
        name = value.partition("@")[0]
        is_hub_id = name.count("/") == 1 and path.parts[0] != RUNS and not path.parent.is_dir()
        is_model = is_hub_id or (self.models and value.lower().endswith(".gguf"))
        if path.is_file() and not is_model:
            raise _not_a_run_error(path, value, str(ctx and ctx.info_name), ctx.params if ctx else {})
        if path.exists() or is_model:
            return value
        if not (Path(RUNS) / value).is_dir():
            raise _missing_run_error(value)
        return str(Path(RUNS) / value)


class AdapterArgument(RunArgument):
    """Like :class:`RunArgument`, without models."""

    models = False


class SettingsFile(click.Path):
    """Settings file. Rows and models result in an error with the correct flag."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from deltaw.data.row_files import kind_of

        path = Path(value)
        command = str(ctx and ctx.info_name)
        problem = None
        hint = ""
        if kind_of(path) is not None and path.suffix != ".json" and path.exists():
            model = ctx.params.get("setting_model") if ctx else None
            problem = "contains rows"
            hint = _command_with(value, command, model)
        elif path.suffix == ".gguf" or (path / "config.json").is_file() or value.startswith(_MODEL_SCHEMES):
            problem = "is a model"
            hint = f"deltaw {command} --model {shell_word(value)} --data FILE"
        if problem is not None:
            raise UserError(f"'{value}' {problem}, not a settings file", hint=hint)
        return super().convert(value, param, ctx)


class TaskName(click.Choice):
    """Task or an alias of a task."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        entry, implied = task_registry.aliases().get(str(value).lower(), (None, {}))
        if value in self.choices or entry is None:
            return super().convert(value, param, ctx)
        defaults = {} if entry.settings is None else entry.settings().model_dump()
        for key, implied_value in implied.items():
            if defaults[key] != implied_value:
                hint = f"use task: {entry.name} with {entry.section_name}.{key}: {implied_value}"
                raise UserError(f"'{value}' is a {key} of the task '{entry.name}'", location="--task", hint=hint)
        return super().convert(entry.name, param, ctx)


def _missing_run_error(name: str) -> UserError:
    """Return the error for a run that does not exist, with similar runs or models in the hint."""
    from deltaw.runs.folder import nearby_runs_hint

    path = Path(name)
    models = [path.parent / near for near in find_similar_files(path, lambda entry: False)]
    models = [model for model in models if (model / "config.json").is_file() or model.suffix == ".gguf"]
    hint = f"did you mean '{models[0]}'?" if models else nearby_runs_hint(path)
    return UserError(f"no run '{name}' found", location=str(path.parent.resolve()), hint=hint)


def _not_a_run_error(path: Path, value: str, command: str, parameters: Mapping[str, Any]) -> UserError:
    """Return the error for a file instead of a run's folder, with the intended command in the hint."""
    from yaml import YAMLError

    from deltaw.data.row_files import kind_of
    from deltaw.settings.config import SETTINGS, parse_yaml

    kind = ""
    folder = str(path.parent)
    rows = kind_of(path) is not None and path.name not in ("adapter_config.json", "run.json", "config.json")
    if rows:
        kind = " of rows"
        folder = parameters.get("data") or "RUN"
    elif path.suffix in _SETTINGS_FILES and path.name != SETTINGS:
        kind = " of settings"
        loaded = None
        with contextlib.suppress(OSError, ValueError, YAMLError):
            loaded = parse_yaml(path.read_text(encoding="utf-8"))
        folder = str(loaded.get("output", f"{RUNS}/latest")) if isinstance(loaded, dict) else "RUN"
    data_flag = f" --data {shell_word(value)}" if rows and command == "eval" else ""
    message = f"'{value}' is a file{kind}, not the folder of a run"
    return UserError(message, hint=f"deltaw {command} {shell_word(folder)}{data_flag}")


def _command_with(value: str, command: str | None, model: str | None = None) -> str:
    """Return the command line of a command with a file or folder in the right position."""
    from deltaw.data.row_files import kind_of

    if kind_of(Path(value)) is None or command not in (None, "train", "plan", "compare", "tune", "init"):
        return f"deltaw {command or 'chat'} {shell_word(value)}"
    model = "" if command == "init" else f"--model {shell_word(model or 'MODEL')} "
    return f"deltaw {command or 'train'} {model}--data {shell_word(value)}"


def _flag_as_typed(option: str, arguments: Sequence[str]) -> str:
    """Return a flag as the user typed it. click normalizes it, or returns only the first letter of ``-lr``."""
    flags = [text.partition("=")[0] for text in arguments if text.startswith("-")]
    equivalent = [flag for flag in flags if normalize(flag) == normalize(option)]
    long = [flag for flag in flags if len(option) == 2 and flag.startswith(option) and len(flag) > 2]
    return next(iter([*long, *equivalent]), option)


def _known_parameters(context: click.Context) -> dict[str, str]:
    """Return the spelling of each flag and argument of a command, by setting or parameter name."""
    spellings: dict[str, str] = {}
    for param in context.command.get_params(context):
        if isinstance(param, click.Option):
            setting = next((name[2:] for name in param.opts if "." in name), None)
            spellings |= {setting or normalize(name): f"'{param.opts[0]}'" for name in param.opts if len(name) > 2}
        else:
            spellings[normalize(str(param.name))] = f"{param.human_readable_name}, without a flag"
    return spellings


def _unknown_flag_error(flag: str, context: click.Context) -> UserError:
    """Return the error for an unknown flag."""
    path = context.command_path
    name = normalize(flag)
    hint = None
    parameters = _known_parameters(context)
    if "." in flag:
        parameters = {key: f"'--{key}'" if "." in key else spelling for key, spelling in parameters.items()}
    if isinstance(context.command, click.Group):
        hint = f"put flags after the command: {path} COMMAND {flag} …"
    elif (setting := flag.removeprefix("--").rpartition("."))[0] in parameters:
        hint = f"its settings are one value: --{setting[0]} '{{{setting[2]}: …}}'"
    elif section_flags := [f"--{key}" for key in parameters if key.startswith(f"{name}.")]:
        hint = f"it is a section: {', '.join(section_flags[:3])}, …"
    else:
        hint = aliases.alias_hint(flag, parameters) or _commands_with_flag(flag, context)
        hint = hint or aliases.unknown_name_hint(flag, parameters)
    return UserError(f"unknown flag '{flag}'", location=path, hint=hint or _help_hint(context))


def _commands_with_flag(flag: str, context: click.Context) -> str | None:
    """Return a hint that lists other commands with this flag, or None."""
    root = context.find_root()
    assert isinstance(root.command, click.Group)
    commands = {name: root.command.get_command(root, name) for name in root.command.list_commands(root)}
    flags = {name: [o for p in command.params for o in p.opts] for name, command in commands.items() if command}
    matches = [name for name, options in flags.items() if normalize(flag) in map(normalize, options)]
    return f"it is a flag of {', '.join(matches)}" if matches else None


def _flag_usage_error(error: click.BadOptionUsage, context: click.Context) -> UserError:
    """Return the error for a flag with a missing or an unexpected value."""
    flag = error.option_name
    matching = [p for p in context.command.get_params(context) for o in p.opts if normalize(o) == normalize(flag)]
    name = matching[0].opts[0] if matching else flag
    problem = "takes no value" if "does not take" in error.message else "needs a value"
    hint = _parameter_help(matching[0], context) if matching else None
    return UserError(f"'{name}' {problem}", location=context.command_path, hint=hint)


def _missing_parameter_error(param: click.Parameter, context: click.Context) -> UserError:
    """Return the error for a missing argument or required flag."""
    path = context.command_path
    name = param.human_readable_name
    if isinstance(param, click.Option):
        return UserError(f"'{param.opts[0]}' is missing", location=path, hint=_parameter_help(param, context))
    hint = f"use: {path} {name}"
    if isinstance(param.type, RunArgument) and Path(RUNS).is_dir():
        from deltaw.runs.folder import find_runs

        latest = max(find_runs(Path(RUNS)), key=lambda run: run.stat().st_mtime, default=None)
        hint += f", such as {path} {latest}" if latest else ""
    elif isinstance(param.type, click.Choice):
        hint = f"use one of: {', '.join(map(str, param.type.choices))}"
    return UserError(f"{name} is missing", location=path, hint=hint)


def _invalid_value_error(error: click.BadParameter, param: click.Parameter, context: click.Context) -> UserError:
    """Return the error for an invalid value of a flag or argument."""
    name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
    message = re.sub("valid integer( range)?", "whole number", re.sub("valid float( range)?", "number", error.message))
    message = f"{name}: {message.strip().rstrip('.')}"
    hint = None
    value = next(iter(re.findall(r"'((?:[^'\\]|\\.)*)'", error.message)), "")
    if isinstance(param.type, click.Choice):
        choices = list(map(str, param.type.choices))
        similar = [f"did you mean '{match}'?" for match in difflib.get_close_matches(value, choices, n=1, cutoff=0.65)]
        message = f"{name} cannot be '{value}'"
        hint = aliases.value_hint(normalize(name), value) or next(iter(similar), f"use {', '.join(choices)}")
    elif isinstance(param.type, click.Path) and (files := find_similar_files(Path(value), lambda entry: False)):
        hint = did_you_mean(Path(value).name, files)
    return UserError(message, location=context.command_path, hint=hint or _parameter_help(param, context))


def _extra_arguments_error(more: str, context: click.Context) -> UserError:
    """Return the error for unexpected arguments."""
    path = context.command_path
    command = str(context.info_name)
    arguments = [p for p in context.command.get_params(context) if isinstance(p, click.Argument)]
    filled = [str(context.params[p.name]) for p in arguments if p.name and context.params.get(p.name)]
    first = (filled or [""])[0]
    words = more.split()
    parameters = _known_parameters(context)
    unquoted = {key: spelled.strip("'") for key, spelled in parameters.items()}
    flags = {normalize(spelling): flag for key, flag in unquoted.items() for spelling in (key, flag)}
    hint = f"the command takes one {arguments[-1].human_readable_name}" if arguments else _help_hint(context)
    if all("=" in word for word in words):
        pairs = [word.partition("=") for word in words]
        hint = "use " + " ".join(f"{flags.get(normalize(key), f'--{key}')} {value}" for key, _, value in pairs)
    elif command in _EXTRA_ARGUMENT_HINTS:
        texts = shell_word(" ".join([*filled[1:], more]))
        hint = _EXTRA_ARGUMENT_HINTS[command].format(first=shell_word(first), more=shell_word(words[0]), texts=texts)
    return UserError(f"unexpected argument '{more}'", location=path, hint=hint)


def _parameter_help(param: click.Parameter, context: click.Context) -> str | None:
    """Return the help record of a parameter."""
    record = param.get_help_record(context)
    return ": ".join(part.strip() for part in record if part) if record else _help_hint(context)


def _help_hint(context: click.Context) -> str:
    return f"list the flags with '{context.command_path} --help'"
