"""`deltaw eval`: how well a run does on a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw import tasks
from deltaw.cli.mistakes import RunArgument, TaskName
from deltaw.cli.options import console, json_flag, model_flags, print_json
from deltaw.cli.text_options import SYSTEM_HELP
from deltaw.errors import UserError
from deltaw.working import working

if TYPE_CHECKING:
    from deltaw.reports.tables import Output
    from deltaw.runtime.generation import Writer
    from deltaw.training.drift import Drift
    from deltaw.training.origin import InferenceSession
    from deltaw.training.tasks.causal import Score


# The flags that say how tasks of lm-evaluation-harness are evaluated, and those that say the same of rows.
HARNESS = ("include_path", "limit", "fewshot", "chat")
ROWS = {"data": "--data", "names": "--set", "rows": "--rows", "max_new_tokens": "--max-new-tokens"}
ROWS |= {"shown": "--answers", "general": "--general", "system": "--system"}
# Those that say how completions are rewarded.
REWARD = ("samples", "temperature", "threshold")
ROWS |= {name: f"--{name}" for name in REWARD}


@click.command("eval")
@click.argument("run", type=RunArgument())
@click.option("--data", help="a file, hub id or package member; by default the run's held-out rows")
@click.option("--set", "names", multiple=True, help="only this set of data.eval; may be given several times")
@click.option("--base", "with_base", is_flag=True, help="score the base model too")
@click.option("--rows", type=click.IntRange(1), help="only the first so many rows of a set")
@click.option("--max-new-tokens", type=click.IntRange(1), help="longest answer to write")
@click.option("--answers", "shown", default=0, type=click.IntRange(0), help="show so many answers")
@click.option("--samples", default=0, type=click.IntRange(0), help="of a reward run: draw so many of each, for pass@k")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="with --samples; default: the run's own")
@click.option("--threshold", type=float, help="of a reward run: the reward that passes; default: 1 by each function")
@click.option("--drift/--no-drift", "with_drift", default=True, help="measure how far the model has drifted")
@click.option("--system", metavar="TEXT", help=SYSTEM_HELP)
@click.option("--general", default=0, type=click.IntRange(0), help="show so many general answers of both models")
@click.option("--task", type=TaskName(tasks.names()), help="what a bare model is to do")
@click.option("--tasks", "asked", help="instead, tasks of lm-evaluation-harness: a,b,c")
@click.option("--include-path", type=click.Path(path_type=Path), help="with --tasks: a folder with task files")
@click.option("--limit", type=click.IntRange(1), help="with --tasks: only the first so many rows of each")
@click.option("--fewshot", type=click.IntRange(0), help="with --tasks: so many examples before each row")
@click.option("--chat", is_flag=True, help="with --tasks: prompts by the model's chat template")
@model_flags
@json_flag
def command(
    run: str, data: str | None, names: tuple[str, ...], with_base: bool, rows: int | None, as_json: bool, **opening: Any
) -> None:
    """Loss and exact match of RUN (a run's folder, an adapter's, or a model), or accuracy and its kin."""
    asked, harness = opening.pop("asked"), {name: opening.pop(name) for name in HARNESS}
    if asked is not None:
        given = click.get_current_context().params
        if mixed := [flag for name, flag in ROWS.items() if given[name]]:
            raise UserError("tasks have their own rows", where=mixed[0], hint=f"leave out {mixed[0]}, or --tasks")
        for name in ("max_new_tokens", "shown", "general", "with_drift", "system", *REWARD):
            opening.pop(name)
        _evaluate_tasks(run, asked, with_base, as_json, harness, opening)
        return
    if needing := [name for name, value in harness.items() if value]:
        flag = f"--{needing[0].replace('_', '-')}"
        raise UserError("it belongs to tasks of lm-evaluation-harness", where=flag, hint="give --tasks too")
    shown, general, with_drift, system = (opening.pop(name) for name in ("shown", "general", "with_drift", "system"))
    how: dict[str, Any] = {"max_new_tokens": opening.pop("max_new_tokens"), "shown": shown}
    rewarded = {name: opening.pop(name) for name in REWARD}
    out = console(as_json)
    with working("starting"):
        from deltaw.serving.opening import SessionWriter
        from deltaw.training.origin import open_run, score_run
        from deltaw.training.tasks.reward import Asked
    if data is not None and names:
        raise UserError("--set chooses among the run's own sets", where="--data", hint="leave out one of the two")
    if data is None and system is not None:
        hint = "name a file with --data whose rows have none"
        raise UserError("the run's own rows are evaluated as they are", where="--system", hint=hint)
    opened = open_run(run, say=out.say, **opening)
    if not opened.task.rolls_out and (needing := [name for name, value in rewarded.items() if value]):
        what = f"completions are scored for task: reward, and this is {opened.task.name}"
        raise UserError(what, where=f"--{needing[0]}", hint=f"leave out --{needing[0]}")
    sets = {name: found[:rows] for name, found in _rows_by_set(opened, run, data, names, system, out).items()}
    _say_not_invoked(opened, sets, out)
    writer = SessionWriter(opened, out.say)
    how |= {"writer": writer, "sampler": writer.draw, "asked": Asked(**rewarded)}

    def scored() -> dict[str, Score]:
        """Each set's score, as the model is now."""
        return {name: score_run(opened, examples, **how) for name, examples in sets.items()}

    by_model: dict[str, dict[str, Score]] = {}
    if with_base:
        with opened.base():
            by_model["base"] = scored()
    by_model["adapter" if opened.adapter else "model"] = scored()
    for name, examples in sets.items():
        if name:
            count = "1 row" if len(examples) == 1 else f"{len(examples):,} rows"
            out.print(f"\n{name}: {count}")
        _print_scores({model: found[name] for model, found in by_model.items()}, out, shown)
    drift = _drift(opened, out, general, writer) if with_drift else None
    if as_json:
        found = _as_json(by_model, {name: len(examples) for name, examples in sets.items()})
        print_json(found | {"drift": None if drift is None else drift.as_dict()})


def _evaluate_tasks(
    run: str, asked: str, with_base: bool, as_json: bool, harness: dict[str, Any], opening: dict[str, Any]
) -> None:
    """The scores of tasks of lm-evaluation-harness, shown and kept in the run's folder."""
    if find_spec("lm_eval") is None:
        raise UserError("tasks need the package lm-eval", where="--tasks", hint="pip install 'deltaw[evaluate]'")
    if not (names := [name.strip() for name in asked.split(",") if name.strip()]):
        raise UserError("there is no task", where="--tasks", hint="name one or more: --tasks hellaswag,gsm8k")
    out = console(as_json)
    with working("starting"):
        from deltaw.reports.scores import task_table
        from deltaw.serving.harness import evaluate_tasks, keep_scores
        from deltaw.training.origin import open_run
    how = {**harness, "folder": harness["include_path"], "trust_remote_code": opening["trust_remote_code"]}
    del how["include_path"]
    opened = open_run(run, say=out.say, **opening)
    scores = {}
    if with_base and opened.adapter:
        with opened.base():
            scores["base"] = evaluate_tasks(opened, names, say=out.say, **how)
    scores["adapter" if opened.adapter else "model"] = evaluate_tasks(opened, names, say=out.say, **how)
    out.print(task_table(scores))
    if opened.found is not None:
        out.say(f"kept in {keep_scores(opened.found.folder, scores, how)}")
    if as_json:
        print_json({"tasks": {model: [asdict(one) for one in found] for model, found in scores.items()}})


def _rows_by_set(
    opened: InferenceSession, run: str, data: str | None, names: Sequence[str], system: str | None, out: Output
) -> dict[str, Sequence[Any]]:
    """The rows to evaluate on by the name of their set, which is empty where there is one set without a name.

    Raises:
        UserError: there are none, or no set of such a name.
    """
    from deltaw.training.tasks.base import read_run_data

    sets: dict[str, Sequence[Any]]
    if data is not None:
        examples, lines = _rows_of_file(opened, data, system)
        sets = {"": examples}
    elif opened.config is not None and opened.found is not None:
        opened.found.require_rows()
        lines = []
        found = read_run_data(opened.task, opened.config.data, seed=opened.config.data_seed, say=lines.append)
        sets, lines = dict(found.sets), [*found.report.lines(), *lines]
    else:
        raise UserError("there is no data to evaluate on", where=run, hint="name a file with --data")
    for line in lines:
        out.say(line)
    if unknown := [name for name in names if name not in sets]:
        there = [name for name in sets if name]
        hint = f"it has {', '.join(there)}" if there else "it has one set without a name; leave out --set"
        raise UserError(f"the run has no evaluation set '{unknown[0]}'", where=run, hint=hint)
    sets = {name: found for name, found in sets.items() if len(found) and (not names or name in names)}
    if not sets:
        raise UserError("the run held no rows out", where=run, hint="name a file with --data")
    return sets


def _rows_of_file(opened: InferenceSession, data: str, system: str | None) -> tuple[Sequence[Any], list[str]]:
    """The rows of a file, and what to say of them. If no row has a system prompt, each gets that of the training
    rows, or the one given."""
    from deltaw.data.settings import DataSettings

    settings = opened.data or DataSettings(train=data)
    if system is not None:
        settings = replace(settings, system=system)
    examples, report = opened.task.read_file(data, settings, opened.classes)
    line = None if report.system_rows else opened.prompting.line(system)
    if line is not None:
        settings = replace(settings, system=opened.prompting.system)
        examples, report = opened.task.read_file(data, settings, opened.classes)
    return examples, [*report.lines(), *([line] if line and report.system_rows else [])]


def _say_not_invoked(opened: InferenceSession, sets: Mapping[str, Sequence[Any]], out: Output) -> None:
    """How many prompts lack the invocation sequence of an activated adapter."""
    from deltaw.data.example import Example

    rows = [row for examples in sets.values() for row in examples]
    prompts = [row.tokens[: row.prompt_length] for row in rows if isinstance(row, Example) and row.prompt_length]
    if (lacking := opened.not_invoked(prompts)) is not None:
        out.say(lacking)


def _print_scores(scores: Mapping[str, Score], out: Output, shown: int) -> None:
    """One set's metrics by model, and the answers that were asked for; of rewarded ones the best and the worst."""
    from deltaw.reports.scores import answer_table, confusion_table, difference_line, score_table

    intervals = {name: s.evaluation.named_intervals() for name, s in scores.items()}
    out.print(score_table({name: s.metrics for name, s in scores.items()}, intervals))
    last = list(scores.values())[-1].evaluation
    if len(scores) > 1 and (line := difference_line(scores["base"].evaluation, last)) is not None:
        out.print(line)
    if last.confusion is not None:
        out.print(confusion_table(last.classes, last.confusion))
    if any(s.answers for s in scores.values()):
        out.print(answer_table(_side_by_side(scores, shown)))


def _as_json(by_model: Mapping[str, Mapping[str, Score]], rows: Mapping[str, int]) -> dict[str, object]:
    """What ``--json`` prints of the scores: by set if sets have names, as in a run's own result."""

    def named(values: Mapping[str, object]) -> object:
        return values[""] if "" in values else dict(values)

    last = {name: score.evaluation for name, score in list(by_model.values())[-1].items()}
    from deltaw.training.evaluation.base import paired_difference

    first = next(iter(last))
    found = {
        "eval": named({name: one.as_dict() for name, one in last.items()}),
        **({"intervals": named({n: one.intervals for n, one in last.items()})} if last[first].intervals else {}),
        "score": last[first].score(),
        "rows": named(rows),
    }
    if confusion := {name: one.confusion for name, one in last.items() if one.confusion is not None}:
        counts = named({name: one.tolist() for name, one in confusion.items()})
        found |= {"classes": list(last[first].classes), "confusion": counts}
    if "base" in by_model:
        base = {name: score.evaluation for name, score in by_model["base"].items()}
        scores = named({name: one.as_dict() for name, one in base.items()})
        found |= {"base": scores, "base_score": base[first].score()}
        if (difference := paired_difference(base[first], last[first])) is not None:
            found["difference"] = {"metric": last[first].main, "value": difference[0], "interval": difference[1]}
    return found


def _drift(opened: InferenceSession, out: Output, general: int, writer: Writer) -> Drift | None:
    """How far general answers moved, shown; with ``general`` of them side by side."""
    from deltaw.reports.scores import general_table
    from deltaw.training.drift import answers_side_by_side, drift_of
    from deltaw.training.evaluation.general import NoGeneralAnswers

    try:
        drift = drift_of(opened, writer)
        for line in [] if drift is None else drift.lines():
            out.say(line)
        if general and drift is not None:
            out.print(general_table(answers_side_by_side(opened, general, writer)))
    except NoGeneralAnswers as reason:
        out.say(f"drift: not measured ({reason})")
        return None
    return drift


def _side_by_side(scores: Mapping[str, Score], shown: int) -> list[tuple[str, str, dict[str, tuple[str, bool]]]]:
    """Questions with every model's answer; of rewarded ones, those that the last model did best and worst on."""
    from deltaw.training.tasks.reward import RewardedAnswer

    found = []
    rows = list(zip(*(score.answers for score in scores.values()), strict=True))
    if rows and isinstance(rows[0][-1], RewardedAnswer):
        rows.sort(key=lambda row: -row[-1].reward)
        rows = rows if len(rows) <= shown else rows[: -(-shown // 2)] + rows[len(rows) - shown // 2 :]
    for answers in rows:
        written = {name: (answer.shown, answer.exact) for name, answer in zip(scores, answers, strict=True)}
        found.append((answers[0].question, answers[0].expected, written))
    return found
