"""`deltaw eval`: evaluate a run on held-out rows, a file or benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltaw.cli.options import console, json_flag, model_flags, print_json
from deltaw.cli.suggestions import RunArgument, TaskName
from deltaw.cli.text_options import SYSTEM_HELP
from deltaw.errors import UserError
from deltaw.progress import track_progress
from deltaw.settings import task_registry

if TYPE_CHECKING:
    from deltaw.decoding.generation import TextGenerator
    from deltaw.inference.opened_run import OpenedRun
    from deltaw.inference.scores import EvaluationScore
    from deltaw.reports.tables import TerminalOutput
    from deltaw.training.drift import Drift
    from deltaw.training.evaluation.answers import EvaluatedAnswer


# Parameters for tasks of lm-evaluation-harness, and flags that apply only to rows.
HARNESS = ("include_path", "fewshot", "chat")
ROWS = {"data": "--data", "names": "--set", "max_new_tokens": "--max-new-tokens"}
ROWS |= {"num_answers": "--answers", "general": "--general", "system": "--system"}
# Parameters for the evaluation of rewards.
REWARD = ("samples", "temperature", "threshold")
ROWS |= {name: f"--{name}" for name in REWARD}


@click.command("eval")
@click.argument("run", type=RunArgument())
@click.option("--data", help="file, hub id or package member with rows  [default: the run's held-out rows]")
@click.option("--set", "names", multiple=True, help="set of data.eval to evaluate; can be repeated")
@click.option("--with-base", is_flag=True, help="also evaluate the base model")
@click.option("--limit", type=click.IntRange(1), help="evaluate only the first N rows of each set or benchmark")
@click.option("--max-new-tokens", type=click.IntRange(1), help="maximum number of tokens per answer")
@click.option("--answers", "num_answers", default=0, type=click.IntRange(0), help="number of answers to print")
@click.option("--samples", default=0, type=click.IntRange(0), help="completions per prompt for pass@k, for reward runs")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="sample temperature  [default: the run's]")
@click.option("--threshold", type=float, help="minimum reward to pass, for reward runs  [default: 1 for each function]")
@click.option("--drift/--no-drift", "with_drift", default=True, help="measure the drift of answers from the base model")
@click.option("--system", metavar="TEXT", help=SYSTEM_HELP)
@click.option("--general", default=0, type=click.IntRange(0), help="number of general answers of both models to print")
@click.option("--task", type=TaskName(task_registry.names()), help="task of a model without an adapter")
@click.option("--benchmarks", "benchmarks", help="tasks of lm-evaluation-harness to evaluate instead of rows: a,b,c")
@click.option("--include-path", type=click.Path(path_type=Path), help="folder with task files, for --benchmarks")
@click.option("--fewshot", type=click.IntRange(0), help="number of few-shot examples, for --benchmarks")
@click.option("--chat", is_flag=True, help="apply the model's chat template, for --benchmarks")
@model_flags
@json_flag
def command(
    run: str, data: str | None, names: tuple[str, ...], with_base: bool, limit: int | None, as_json: bool, **flags: Any
) -> None:
    """Evaluate RUN: the folder of a run or an adapter, or a model. Prints loss and exact match, or the metrics of its
    task.
    """
    benchmarks = flags.pop("benchmarks")
    harness = {name: flags.pop(name) for name in HARNESS}
    if benchmarks is not None:
        parameters = click.get_current_context().params
        if mixed := [flag for name, flag in ROWS.items() if parameters[name]]:
            raise UserError("benchmarks have their own rows", location=mixed[0], hint="remove it or --benchmarks")
        for name in ("max_new_tokens", "num_answers", "general", "with_drift", "system", *REWARD):
            flags.pop(name)
        _evaluate_tasks(run, benchmarks, with_base, as_json, {**harness, "limit": limit}, flags)
        return
    if required := [name for name, value in harness.items() if value]:
        flag = f"--{required[0].replace('_', '-')}"
        raise UserError("the flag requires --benchmarks", location=flag, hint="add --benchmarks")
    general, with_drift, system = (flags.pop(name) for name in ("general", "with_drift", "system"))
    reward_options = {name: flags.pop(name) for name in REWARD}
    num_answers = flags.pop("num_answers")
    max_new_tokens = flags.pop("max_new_tokens")
    out = console(as_json)
    with track_progress("starting"):
        from deltaw.decoding.opening import SessionGenerator
        from deltaw.inference.open_run import open_run
        from deltaw.inference.scores import ScoreOptions
        from deltaw.runs.trained_rows import count_trained_rows
    if data is not None and names:
        raise UserError("--set selects sets of the run, not of --data", location="--data", hint="remove one of the two")
    if data is None and system is not None:
        hint = "add --data with a file whose rows have no system prompt"
        raise UserError("--system does not apply to the run's own rows", location="--system", hint=hint)
    session = open_run(run, log=out.print_line, **flags)
    required = [name for name, value in reward_options.items() if value]
    if required and not session.inference.samples_completions:
        message = f"the flag applies only to tasks that sample completions, and the run's task is {session.task.name}"
        raise UserError(message, location=f"--{required[0]}", hint=f"remove --{required[0]}")
    sets = {name: result[:limit] for name, result in _rows_by_set(session, run, data, names, system, out).items()}
    trained_rows = 0
    if data is not None and session.adapter_folder is not None:
        trained_rows = count_trained_rows(session.adapter_folder.folder, sets[""])
    if trained_rows:
        verb = "is also a training row" if trained_rows == 1 else "are also training rows"
        out.print_line(f"{trained_rows:,} of {len(sets['']):,} rows {verb} of the run, which inflates the scores")
    _warn_not_invoked(session, sets, out)
    writer = SessionGenerator(session, out.print_line)
    options = ScoreOptions(num_answers, max_new_tokens, **reward_options)

    def scored() -> dict[str, EvaluationScore]:
        """Each set's score, as the model is now."""
        return {name: session.score(examples, options, writer) for name, examples in sets.items()}

    by_model: dict[str, dict[str, EvaluationScore]] = {}
    if with_base:
        with session.base():
            by_model["base"] = scored()
    by_model["adapter" if session.adapter else "model"] = scored()
    for name, examples in sets.items():
        if name:
            count = "1 row" if len(examples) == 1 else f"{len(examples):,} rows"
            out.print(f"\n{name}: {count}")
        _print_scores({model: result[name] for model, result in by_model.items()}, out, num_answers)
        for model, result in by_model.items():
            if (warning := result[name].warning) is not None:
                out.print_line(f"{model}: {warning}")
    if num_answers and not any(score.answers for result in by_model.values() for score in result.values()):
        out.print(f"--answers has no effect: the scores of {session.task.name} do not require generation")
    drift = _drift(session, out, general, writer) if with_drift else None
    if as_json:
        output = _as_json(by_model, {name: len(examples) for name, examples in sets.items()})
        if data is not None:
            output["trained_rows"] = trained_rows
        if num_answers:
            answers = {
                name: _answers_as_dict({model: scores[name] for model, scores in by_model.items()}, num_answers)
                for name in sets
            }
            output["answers"] = answers.get("", answers)
        print_json(output | {"drift": None if drift is None else drift.as_dict()})


def _evaluate_tasks(run: str, benchmarks: str, with_base: bool, as_json: bool, harness: dict, opening: dict) -> None:
    """Evaluate tasks of lm-evaluation-harness, print the scores, and save them in the run's folder."""
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed", location="--benchmarks", hint="pip install 'deltaw[evaluate]'")
    if not (names := [name.strip() for name in benchmarks.split(",") if name.strip()]):
        raise UserError("no task is given", location="--benchmarks", hint="for example --benchmarks hellaswag,gsm8k")
    out = console(as_json)
    with track_progress("starting"):
        from deltaw.evaluation.harness import evaluate_tasks, save_scores
        from deltaw.inference.open_run import open_run
        from deltaw.reports.comparison import task_table
    options = {**harness, "folder": harness["include_path"], "trust_remote_code": opening["trust_remote_code"]}
    del options["include_path"]
    session = open_run(run, log=out.print_line, **opening)
    scores = {}
    if with_base and session.adapter:
        with session.base():
            scores["base"] = evaluate_tasks(session, names, log=out.print_line, **options)
    scores["adapter" if session.adapter else "model"] = evaluate_tasks(session, names, log=out.print_line, **options)
    out.print(task_table(scores))
    if session.adapter_folder is not None:
        out.print_line(f"saved to {save_scores(session.adapter_folder.folder, scores, options)}")
    if as_json:
        print_json({"tasks": {model: [asdict(s) for s in task_scores] for model, task_scores in scores.items()}})


def _rows_by_set(
    session: OpenedRun, run: str, data: str | None, names: Sequence[str], system: str | None, out: TerminalOutput
) -> dict[str, Sequence[Any]]:
    """Return the rows to evaluate by set name. A single unnamed set has an empty name.

    Raises:
        UserError: if there are no rows, or a set does not exist.
    """
    from deltaw.training.task import read_run_data

    sets: dict[str, Sequence[Any]]
    if data is not None:
        examples, lines = _rows_of_file(session, data, system)
        sets = {"": examples}
    elif session.config is not None and session.adapter_folder is not None:
        session.adapter_folder.require_rows()
        lines = []
        selected = read_run_data(session.task, session.config.data, seed=session.config.data_seed, log=lines.append)
        sets = dict(selected.sets)
        lines = [*selected.report.lines(), *lines]
    else:
        raise UserError("no data to evaluate", location=run, hint="give a file with --data")
    for line in lines:
        out.print_line(line)
    if unknown := [name for name in names if name not in sets]:
        available = [name for name in sets if name]
        hint = f"it has {', '.join(available)}" if available else "it has a single unnamed set; remove --set"
        raise UserError(f"the run has no evaluation set '{unknown[0]}'", location=run, hint=hint)
    sets = {name: selected for name, selected in sets.items() if len(selected) and (not names or name in names)}
    if not sets:
        raise UserError("the run has no held-out rows", location=run, hint="give a file with --data")
    return sets


def _rows_of_file(session: OpenedRun, data: str, system: str | None) -> tuple[Sequence[Any], list[str]]:
    """Read the rows of a file, and return them with lines for the user.

    If no row has a system prompt, the rows get the given one or that of the training rows.
    """
    from deltaw.settings.data import DataSettings

    settings = session.data or DataSettings(train=data)
    if system is not None:
        settings = replace(settings, system=system)
    examples, report = session.task.read_file(data, settings, session.classes)
    line = None if report.system_rows else session.prompting.line(system)
    if line is not None:
        settings = replace(settings, system=session.prompting.system)
        examples, report = session.task.read_file(data, settings, session.classes)
    return examples, [*report.lines(), *([line] if line and report.system_rows else [])]


def _warn_not_invoked(session: OpenedRun, sets: Mapping[str, Sequence[Any]], out: TerminalOutput) -> None:
    """Print a warning if prompts lack the invocation sequence of an activated adapter."""
    from deltaw.data.example import Example

    rows = [row for examples in sets.values() for row in examples]
    prompts = [row.tokens[: row.prompt_length] for row in rows if isinstance(row, Example) and row.prompt_length]
    if (warning := session.invocation_warning(prompts)) is not None:
        out.print_line(warning)


def _print_scores(scores: Mapping[str, EvaluationScore], out: TerminalOutput, num_answers: int) -> None:
    """Print the metrics of a set by model, and the requested answers. Of rewarded answers, print the best and the
    worst.
    """
    from deltaw.reports.comparison import answer_list, confusion_table, difference_line, score_table

    intervals = {name: s.evaluation.named_intervals() for name, s in scores.items()}
    out.print(score_table({name: s.metrics for name, s in scores.items()}, intervals))
    final = list(scores.values())[-1].evaluation
    if len(scores) > 1 and (line := difference_line(scores["base"].evaluation, final)) is not None:
        out.print(line)
    if final.confusion is not None:
        out.print(confusion_table(final.classes, final.confusion))
    if any(s.answers for s in scores.values()):
        out.print(answer_list(_answers(scores, num_answers)))


def _as_json(by_model: Mapping[str, Mapping[str, EvaluationScore]], rows: Mapping[str, int]) -> dict[str, object]:
    """Return the scores for ``--json``. If the sets are named, they are grouped by set, as in a run's result."""

    def named(values: Mapping[str, object]) -> object:
        return values[""] if "" in values else dict(values)

    final = {name: score.evaluation for name, score in list(by_model.values())[-1].items()}
    from deltaw.training.evaluation.base import paired_difference

    main_set = next(iter(final))
    result = {
        "eval": named({name: item.as_dict() for name, item in final.items()}),
        **({"intervals": named({n: item.intervals for n, item in final.items()})} if final[main_set].intervals else {}),
        "score": final[main_set].score(),
        "rows": named(rows),
    }
    if confusion := {name: item.confusion for name, item in final.items() if item.confusion is not None}:
        counts = named({name: item.tolist() for name, item in confusion.items()})
        result |= {"classes": list(final[main_set].classes), "confusion": counts}
    if "base" in by_model:
        base = {name: score.evaluation for name, score in by_model["base"].items()}
        scores = named({name: item.as_dict() for name, item in base.items()})
        result |= {"base": scores, "base_score": base[main_set].score()}
        if (difference := paired_difference(base[main_set], final[main_set])) is not None:
            result["difference"] = {"metric": final[main_set].main, "value": difference[0], "interval": difference[1]}
    return result


def _drift(session: OpenedRun, out: TerminalOutput, general: int, writer: TextGenerator) -> Drift | None:
    """Measure and print the drift of general answers, with ``general`` answers of both models side by side."""
    from deltaw.inference.run_drift import compare_answers, measure_run_drift
    from deltaw.reports.comparison import general_table
    from deltaw.training.evaluation.general import NoGeneralAnswers

    try:
        drift = measure_run_drift(session, writer)
        for line in [] if drift is None else drift.lines():
            out.print_line(line)
        if general and drift is not None:
            out.print(general_table(compare_answers(session, general, writer)))
    except NoGeneralAnswers as reason:
        out.print_line(f"drift: not measured ({reason})")
        return None
    return drift


def _answers(scores: Mapping[str, EvaluationScore], limit: int) -> list[dict[str, EvaluatedAnswer]]:
    """Return the answers to each question by model. Of rewarded answers, return the last model's best and worst."""
    rows = list(zip(*(score.answers for score in scores.values()), strict=True))
    if rows and rows[0][-1].reward is not None:
        rows.sort(key=lambda row: -row[-1].reward)
        rows = rows if len(rows) <= limit else rows[: -(-limit // 2)] + rows[len(rows) - limit // 2 :]
    return [dict(zip(scores, answers, strict=True)) for answers in rows]


def _answers_as_dict(scores: Mapping[str, EvaluationScore], limit: int) -> list[dict[str, object]]:
    rows = []
    for by_model in _answers(scores, limit):
        first = next(iter(by_model.values()))
        models = {name: answer.as_dict() for name, answer in by_model.items()}
        rows.append({"row": first.row, "question": first.question, "expected": first.expected, "answers": models})
    return rows
