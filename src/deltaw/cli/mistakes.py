"""What somebody typed wrong, in words: verbs, flags, values, files in the place of others.

Parsing the command line raises click's errors, which become the errors of all other wrong input. It imports
neither torch nor what a verb does.
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

from deltaw import other_names
from deltaw.errors import UserError, did_you_mean, files_near, nearest
from deltaw.other_names import plain
from deltaw.platforms import shell_word

# Where runs are by default.
RUNS = "runs"
_SETTINGS_FILES = (".yaml", ".yml")
# Verbs and what another argument would be for them: how it is written.
_MORE = {
    "generate": "put the text in quotes: deltaw generate {first} {texts}",
    "chat": "it asks for lines; for one answer: deltaw generate {first} {texts}",
    "eval": "deltaw eval {first} --data {more}",
    "serve": "deltaw serve {first} --adapter NAME={more}",
    "merge": "deltaw merge {first} --output {more}",
    "export": "deltaw export {first} --format FORMAT --output {more}",
    "push": "deltaw push {first} {more}",
    "compare": "deltaw compare {first} --methods {more}",
    "doctor": "deltaw doctor --model {more}",
}


def explained(error: click.ClickException, given: Sequence[str], root: click.Group) -> UserError:
    """Click's error about the arguments ``given`` to ``root`` as one of ours."""
    context = getattr(error, "ctx", None) or _context(given, root)
    where = context.command_path
    if dashed := next((text for text in given if re.fullmatch(r"[‐-―−]+[A-Za-z][\w.-]*", text)), None):
        what = f"'{dashed}' begins with a long dash, as word processors write it"
        return UserError(what, where=where, hint=f"write --{dashed.lstrip('‐‑‒–—―−')}")
    if isinstance(error, click.NoSuchOption):
        return _no_flag(_typed(error.option_name, given), context)
    if isinstance(error, click.BadOptionUsage):
        return _without_value(error, context)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return _missing(error.param, context)
    if isinstance(error, click.BadParameter) and error.param is not None:
        return _not_fitting(error, error.param, context)
    if found := re.search(r"unexpected extra arguments? \((.*)\)", error.message, re.DOTALL):
        return _too_much(found[1], context)
    if isinstance(context.command, click.Group):
        return no_part(context, None)
    return UserError(error.message.strip().splitlines()[0].rstrip("."), where=where, hint=_help_of(context))


def _context(given: Sequence[str], root: click.Group) -> click.Context:
    """Of the verb that was asked for; click's parser says it of some errors only."""
    context = click.Context(root, info_name="deltaw")
    for word in given:
        verb = context.command.get_command(context, word) if isinstance(context.command, click.Group) else None
        context = context if verb is None else click.Context(verb, context, info_name=word)
    return context


def no_verb(args: Sequence[str], verbs: Mapping[str, str]) -> UserError:
    """The refusal of a first word that is no verb."""
    word, *rest = args
    verb = next((other for other in rest if other in verbs), None)
    hint = other_names.verb_hint(word, verbs)
    if plain(word) == "help":
        hint = f"deltaw {verb} --help" if verb else "deltaw --help"
    elif Path(word).exists() or "/" in word:
        hint = _with(word, verb or ("train" if Path(word).suffix in _SETTINGS_FILES else None))
        hint = f"the verb comes first: {hint}"
    return UserError(f"there is no verb '{word}'", hint=hint or "'deltaw --help' lists the verbs")


def no_part(context: click.Context, word: str | None) -> UserError:
    """The refusal of a word behind a verb that has parts, or of none."""
    assert isinstance(context.command, click.Group)
    path, parts = context.command_path, sorted(context.command.list_commands(context))
    given = shell_word(word) if word and (Path(word).exists() or Path(word).suffix) else None
    first = context.command.get_command(context, parts[0])
    file = given or (first.params[0].human_readable_name if first else "FILE")
    near = [] if given else nearest(word or "", parts)
    hint = f"did you mean '{path} {near[0]}'?" if near else " or ".join(f"{path} {part} {file}" for part in parts)
    what = f"'{word}' is neither {' nor '.join(parts)}" if word else f"{' or '.join(parts)} is missing"
    return UserError(what, where=path, hint=hint)


class RunArgument(click.Path):
    """The folder of a run or an adapter, a run's name in the folder ``runs``, a hub id, or a model."""

    models = True

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path, name = Path(os.path.expanduser(value)), value.partition("@")[0]
        is_hub_id = name.count("/") == 1 and path.parts[0] != RUNS and not path.parent.is_dir()
        is_model = is_hub_id or (self.models and (value.startswith("pypi:") or value.lower().endswith(".gguf")))
        if path.is_file() and not is_model:
            raise _file_for_run(path, value, str(ctx and ctx.info_name), ctx.params if ctx else {})
        if path.exists() or is_model:
            return value
        if not (Path(RUNS) / value).is_dir():
            raise _no_run(value)
        return str(Path(RUNS) / value)


class AdapterArgument(RunArgument):
    """The same where a model has no place."""

    models = False


class SettingsFile(click.Path):
    """A settings file; rows, and models, are other flags' business."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from deltaw.data.row_files import kind_of

        path, verb, what, hint = Path(value), str(ctx and ctx.info_name), None, ""
        if kind_of(path) is not None and path.suffix != ".json" and path.exists():
            what, hint = "holds rows", _with(value, verb, ctx.params.get("setting_model") if ctx else None)
        elif path.suffix == ".gguf" or (path / "config.json").is_file() or value.startswith("pypi:"):
            what, hint = "is a model", f"deltaw {verb} --model {shell_word(value)} --data FILE"
        if what is not None:
            raise UserError(f"'{value}' {what}, and is not a settings file", hint=hint)
        return super().convert(value, param, ctx)


class TaskName(click.Choice):
    """A task, or another word for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        task, loss = other_names.TASKS.get(str(value).lower(), (value, None))
        if loss not in (None, "dpo"):
            hint = f"write task: {task}, and preference.loss: {loss}"
            raise UserError(f"'{value}' is a loss of the task '{task}'", where="--task", hint=hint)
        return super().convert(value if value in self.choices else task, param, ctx)


def _no_run(name: str) -> UserError:
    """The refusal of a run that is not there, with those that are, or with a model's folder of a similar name."""
    from deltaw.runs.folder import runs_near

    path = Path(name)
    models = [path.parent / near for near in files_near(path, lambda entry: False)]
    models = [model for model in models if (model / "config.json").is_file() or model.suffix == ".gguf"]
    hint = f"did you mean '{models[0]}'?" if models else runs_near(path)
    return UserError(f"there is no run '{name}'", where=str(path.parent.resolve()), hint=hint)


def _file_for_run(path: Path, value: str, verb: str, given: Mapping[str, Any]) -> UserError:
    """The refusal of a file in the place of a run's folder, with the command that is meant."""
    from yaml import YAMLError

    from deltaw.data.row_files import kind_of
    from deltaw.settings import SETTINGS, parse_yaml

    kind, folder = "", str(path.parent)
    rows = kind_of(path) is not None and path.name not in ("adapter_config.json", "run.json", "config.json")
    if rows:
        kind, folder = " of rows", given.get("data") or "RUN"
    elif path.suffix in _SETTINGS_FILES and path.name != SETTINGS:
        kind, loaded = " of settings", None
        with contextlib.suppress(OSError, ValueError, YAMLError):
            loaded = parse_yaml(path.read_text(encoding="utf-8"))
        folder = str(loaded.get("output", f"{RUNS}/latest")) if isinstance(loaded, dict) else "RUN"
    more = f" --data {shell_word(value)}" if rows and verb == "eval" else ""
    what = f"'{value}' is a file{kind}, not the folder of a run"
    return UserError(what, hint=f"deltaw {verb} {shell_word(folder)}{more}")


def _with(value: str, verb: str | None, model: str | None = None) -> str:
    """A verb's command with a file or folder at its right place."""
    from deltaw.data.row_files import kind_of

    if kind_of(Path(value)) is None or verb not in (None, "train", "plan", "compare", "tune", "init"):
        return f"deltaw {verb or 'chat'} {shell_word(value)}"
    model = "" if verb == "init" else f"--model {shell_word(model or 'MODEL')} "
    return f"deltaw {verb or 'train'} {model}--data {shell_word(value)}"


def _typed(option: str, given: Sequence[str]) -> str:
    """A flag as it was typed; click gives it in another spelling, or the first letter of ``-lr``."""
    flags = [text.partition("=")[0] for text in given if text.startswith("-")]
    same = [flag for flag in flags if plain(flag) == plain(option)]
    long = [flag for flag in flags if len(option) == 2 and flag.startswith(option) and len(flag) > 2]
    return next(iter([*long, *same]), option)


def _known(context: click.Context) -> dict[str, str]:
    """The flags of a verb by the name of their setting, or their own, and the way to write them; arguments too."""
    known: dict[str, str] = {}
    for param in context.command.get_params(context):
        if isinstance(param, click.Option):
            setting = next((name[2:] for name in param.opts if "." in name), None)
            known |= {setting or plain(name): f"'{param.opts[0]}'" for name in param.opts if len(name) > 2}
        else:
            known[plain(str(param.name))] = f"{param.human_readable_name}, without a flag"
    return known


def _no_flag(flag: str, context: click.Context) -> UserError:
    """The refusal of an unknown flag."""
    path, name, hint = context.command_path, plain(flag), None
    known = _known(context)
    if "." in flag:
        known = {key: f"'--{key}'" if "." in key else how for key, how in known.items()}
    if isinstance(context.command, click.Group):
        hint = f"flags come behind the verb: {path} VERB {flag} …"
    elif inside := [f"--{key}" for key in known if key.startswith(f"{name}.")]:
        hint = f"it is a section: {', '.join(inside[:3])}, …"
    else:
        hint = other_names.meaning(flag, known) or _of_other_verbs(flag, context) or other_names.hint_for(flag, known)
    return UserError(f"there is no flag '{flag}'", where=path, hint=hint or _help_of(context))


def _of_other_verbs(flag: str, context: click.Context) -> str | None:
    """Which other verbs have this flag."""
    root = context.find_root()
    assert isinstance(root.command, click.Group)
    verbs = {name: root.command.get_command(root, name) for name in root.command.list_commands(root)}
    flags = {name: [option for p in verb.params for option in p.opts] for name, verb in verbs.items() if verb}
    found = [name for name, own in flags.items() if plain(flag) in map(plain, own)]
    return f"it is a flag of {', '.join(found)}" if found else None


def _without_value(error: click.BadOptionUsage, context: click.Context) -> UserError:
    """The refusal of a flag without its value, or of one with a value that takes none."""
    takes = [p for p in context.command.get_params(context) for o in p.opts if plain(o) == plain(error.option_name)]
    name = takes[0].opts[0] if takes else error.option_name
    what = "takes no value" if "does not take" in error.message else "needs a value"
    return UserError(f"'{name}' {what}", where=context.command_path, hint=_about(takes[0], context) if takes else None)


def _missing(param: click.Parameter, context: click.Context) -> UserError:
    """The refusal of a command that lacks an argument, or a flag that it needs."""
    path, name = context.command_path, param.human_readable_name
    if isinstance(param, click.Option):
        return UserError(f"'{param.opts[0]}' is not given", where=path, hint=_about(param, context))
    hint = f"write: {path} {name}"
    if isinstance(param.type, RunArgument) and Path(RUNS).is_dir():
        from deltaw.runs.folder import find_runs

        latest = max(find_runs(Path(RUNS)), key=lambda run: run.stat().st_mtime, default=None)
        hint += f", such as {path} {latest}" if latest else ""
    elif isinstance(param.type, click.Choice):
        hint = f"write one of: {', '.join(map(str, param.type.choices))}"
    return UserError(f"{name} is missing", where=path, hint=hint)


def _not_fitting(error: click.BadParameter, param: click.Parameter, context: click.Context) -> UserError:
    """The refusal of a flag's or an argument's value."""
    name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
    what = re.sub("valid integer(?: range)?", "whole number", re.sub("valid float(?: range)?", "number", error.message))
    what, hint = f"{name}: {what.strip().rstrip('.')}", None
    value = next(iter(re.findall(r"'((?:[^'\\]|\\.)*)'", error.message)), "")
    if isinstance(param.type, click.Choice):
        choices = list(map(str, param.type.choices))
        near = [f"did you mean '{found}'?" for found in difflib.get_close_matches(value, choices, n=1, cutoff=0.65)]
        what = f"{name} cannot be '{value}'"
        hint = other_names.value_hint(plain(name), value) or next(iter(near), f"use {', '.join(choices)}")
    elif isinstance(param.type, click.Path) and (files := files_near(Path(value), lambda entry: False)):
        hint = did_you_mean(Path(value).name, files)
    return UserError(what, where=context.command_path, hint=hint or _about(param, context))


def _too_much(more: str, context: click.Context) -> UserError:
    """The refusal of arguments that a verb has no place for."""
    path, verb = context.command_path, str(context.info_name)
    places = [p for p in context.command.get_params(context) if isinstance(p, click.Argument)]
    filled = [str(context.params[p.name]) for p in places if p.name and context.params.get(p.name)]
    first, words, known = (filled or [""])[0], more.split(), _known(context)
    flags = {spelling: how.strip("'") for key, how in known.items() for spelling in (plain(key), plain(how.strip("'")))}
    hint = f"it takes one {places[-1].human_readable_name}" if places else _help_of(context)
    if all("=" in word for word in words):
        pairs = [word.partition("=") for word in words]
        hint = "write " + " ".join(f"{flags.get(plain(key), f'--{key}')} {value}" for key, _, value in pairs)
    elif verb in _MORE:
        texts = shell_word(" ".join([*filled[1:], more]))
        hint = _MORE[verb].format(first=shell_word(first), more=shell_word(words[0]), texts=texts)
    return UserError(f"'{more}' has no place here", where=path, hint=hint)


def _about(param: click.Parameter, context: click.Context) -> str | None:
    """A parameter with what its help says."""
    record = param.get_help_record(context)
    return ": ".join(part.strip() for part in record if part) if record else _help_of(context)


def _help_of(context: click.Context) -> str:
    return f"'{context.command_path} --help' shows what it takes"
