"""`deltaw eval`: how well a run does on a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from deltaw import tasks
from deltaw.cli.options import console, json_flag, model_flags, print_json
from deltaw.errors import UserError
from deltaw.working import working

if TYPE_CHECKING:
    from rich.console import Console

    from deltaw.training.evaluation.causal import Score
    from deltaw.training.evaluation.drift import Drift
    from deltaw.training.inference import InferenceSession


@click.command("eval")
@click.argument("run")
@click.option(
    "--data", default=None, help="a file, hub id or package member; by default the run's held-out rows"
)
@click.option("--base", "with_base", is_flag=True, help="score the base model too")
@click.option("--rows", default=None, type=click.IntRange(1), help="only the first so many rows")
@click.option("--max-new-tokens", default=None, type=click.IntRange(1), help="longest answer to write")
@click.option("--answers", "shown", default=0, type=click.IntRange(0), help="show so many answers")
@click.option("--drift/--no-drift", "with_drift", default=True, help="measure how far the model has drifted")
@click.option(
    "--general", default=0, type=click.IntRange(0), help="show so many general answers of both models"
)
@click.option(
    "--task",
    default=None,
    type=click.Choice(tasks.names()),
    help="what a bare model is to do",
)
@model_flags
@json_flag
def command(
    run: str,
    data: str | None,
    with_base: bool,
    rows: int | None,
    max_new_tokens: int | None,
    shown: int,
    with_drift: bool,
    general: int,
    task: str | None,
    model: str | None,
    precision: str,
    device: str,
    as_json: bool,
) -> None:
    """Loss and exact match of RUN (a run's folder, an adapter's, or a model), or accuracy and its kin."""
    out = console(as_json)
    with working("starting"):
        from deltaw.data.example import Example
        from deltaw.data.settings import DataSettings
        from deltaw.reports.scores import answer_table, confusion_table, score_table
        from deltaw.serving.opening import SessionWriter
        from deltaw.training.inference import open_run, score_run
        from deltaw.training.tasks.eval_sets import read_run_data
    opened = open_run(run, model=model, precision=precision, device=device, task=task, say=out.print)
    if data is not None:
        settings = opened.data or DataSettings(train=data)
        examples, report = opened.task.read_file(data, settings, opened.classes)
    elif opened.config is not None:
        held_out = read_run_data(opened.task, opened.config.data, seed=opened.config.data_seed)
        examples, report = held_out.held_out, held_out.report
    else:
        raise UserError("there is no data to evaluate on", where=run, hint="name a file with --data")
    for line in report.lines():
        out.print(line)
    if not examples:
        raise UserError("the run held no rows out", where=run, hint="name a file with --data")
    examples = examples[:rows]
    prompts = [e.tokens[: e.prompt_length] for e in examples if isinstance(e, Example) and e.prompt_length]
    if (lacking := opened.not_invoked(prompts)) is not None:
        out.print(lacking, highlight=False, markup=False)

    writer = SessionWriter(opened, lambda line: out.print(line, highlight=False, markup=False))

    def scored() -> Score:
        with working("evaluating", len(examples)) as advance:
            return score_run(
                opened,
                examples,
                max_new_tokens=max_new_tokens,
                on_progress=lambda done, total: advance(done),
                writer=writer,
            )

    scores: dict[str, Score] = {}
    if with_base:
        with opened.base():
            scores["base"] = scored()
    scores["adapter" if opened.adapter else "model"] = scored()
    intervals = {name: (s.evaluation.main, s.evaluation.interval) for name, s in scores.items()}
    out.print(score_table({name: s.metrics for name, s in scores.items()}, intervals))
    last = list(scores.values())[-1].evaluation
    if last.confusion is not None:
        out.print(confusion_table(last.classes, last.confusion))
    if shown and any(s.answers for s in scores.values()):
        out.print(answer_table(_side_by_side(scores, shown)))
    drift = _drift(opened, out, general) if with_drift else None
    if as_json:
        result: dict[str, object] = {"eval": last.as_dict(), "score": last.score(), "rows": len(examples)}
        result["drift"] = None if drift is None else drift.as_dict()
        if last.confusion is not None:
            result |= {"classes": list(last.classes), "confusion": last.confusion.tolist()}
        if with_base:
            base = scores["base"].evaluation
            result |= {"base": base.as_dict(), "base_score": base.score()}
        print_json(result)


def _drift(opened: InferenceSession, out: Console, general: int) -> Drift | None:
    """How far general answers moved, shown; with ``general`` of them side by side."""
    from deltaw.reports.scores import general_table
    from deltaw.training.evaluation.general import NoGeneralAnswers
    from deltaw.training.inference_drift import answers_side_by_side, drift_of

    try:
        drift = drift_of(opened)
        for line in [] if drift is None else drift.lines():
            out.print(line, highlight=False)
        if general and drift is not None:
            out.print(general_table(answers_side_by_side(opened, general)))
    except NoGeneralAnswers as reason:
        out.print(f"drift: not measured ({reason})", highlight=False)
        return None
    return drift


def _side_by_side(
    scores: Mapping[str, Score], count: int
) -> list[tuple[str, str, dict[str, tuple[str, bool]]]]:
    """The first ``count`` questions with every model's answer."""
    together = zip(*(s.answers[:count] for s in scores.values()), strict=True)
    return [
        (
            answers[0].question,
            answers[0].expected,
            {name: (a.written, a.exact) for name, a in zip(scores, answers, strict=True)},
        )
        for answers in together
    ]
