"""Build the template variables of a run's page from its record: headline, answers, rows, settings and commands.

All values are plain text and figures. The template lays them out and escapes them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.reports.page.learned import AdapterSummary, learned_figures, marked_lines, measure_adapter, pretty_json
from deltaw.reports.page.run_figures import curve_figures, length_figure, memory_figure, rate_figure
from deltaw.reports.svg import FigureTable, running_mean
from deltaw.reports.tables import (
    count,
    duration,
    format_time,
    format_value,
    gigabytes,
    metric_name,
    metric_value,
    rate,
    short,
)
from deltaw.runs.folder import (
    FINISHED,
    INTERRUPTED,
    KILLED,
    LOSSES,
    RUNNING,
    STATES,
    Run,
    RunMetrics,
    SampleAnswer,
    mapping,
    number,
    sequence,
)
from deltaw.runs.summary import PEFT_METHODS, next_commands
from deltaw.settings import task_registry
from deltaw.settings.config import settings as all_settings
from deltaw.training.drift import LARGE
from deltaw.training.evaluation.base import MAX_MATRIX_CLASSES
from deltaw.training.monitoring.monitor import EQUAL_REWARDS_ADVICE

# Limits: prompts with answers, intermediate answers per prompt, characters of a text, and rows outside of details.
PROMPTS = 12
BETWEEN = 20
TEXT = 4000
ROWS = 2
SETTINGS_TEXT = 40_000
# Maximum length in characters of an expected answer for which a different answer is marked as wrong.
MAX_EXACT_LENGTH = 200
# Metrics for which lower values are better.
LOWER_IS_BETTER = (*LOSSES, "perplexity", "rmse", "mae")
WARNINGS = {
    "gradient_norm": "the gradient norm was far above its usual value",
    "clipped": "nearly all gradients were clipped",
    "rising_loss": "the training loss was rising",
    "equal_rewards": "all completions of a prompt had the same reward in every step",
}
STATE_TEXTS = {state: state for state in STATES} | {KILLED: "killed before it finished"}


@dataclass(frozen=True)
class HeadlineItem:
    """Large number at the top of the page.

    Attributes:
        name: Label.
        value: Formatted value.
        detail: Explanation below the value.
        before: Value before training, if it was measured.
        large: Show the item as one of the main results.
    """

    name: str
    value: str
    detail: str = ""
    before: str = ""
    large: bool = False


def run_view(record: Run) -> dict[str, Any]:
    """Return the variables of the template ``run.html``."""
    summary = measure_adapter(record.path) or AdapterSummary()
    norms = [(name, short(norm)) for name, norm in summary.other_norms[:60]]
    curves = curve_figures(record)
    answers, between = sample_answers(record.metrics, record.task)
    completions = completion_rows(record)
    examples = example_rows(record.part("data").get("examples"))
    lines = [str(line) for line in sequence(record.part("data").get("lines"))]
    changed, chosen = settings_tables(record)
    view: dict[str, Any] = {
        "title": f"{record.name} – deltaw run",
        **{key: getattr(record, key) for key in ("name", "model", "method", "task", "state")},
        "folder": os.fspath(record.path),
        "state_text": STATE_TEXTS.get(record.state, "state not known"),
        "when": format_time(record.started),
        "when_machine": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.started)),
        "error": {key: str(record.part("error").get(key) or "") for key in ("what", "where", "hint")},
        "notices": notices(record),
        "sides": column_names(record),
        "headline": headline(record),
        "curves": curves,
        "rates": rate_figure(record.learning_rates),
        "answers": answers,
        "between": between,
        "expects": any(answer["expected"] is not None for answer in answers),
        "differs": any(answer["expected_lines"] for answer in answers),
        "general": general_answers(record),
        "predictions": prediction_tables(record),
        "completions": completions,
        "completed": f"{record.metrics.completed:,}",
        "drift": drift_text(record),
        "memory": memory_figure(record),
        "data_lines": lines,
        "lengths": length_figure(record),
        "examples": examples[:ROWS],
        "more_examples": examples[ROWS:],
        "masked": any(piece["trained"] for example in examples for piece in example["pieces"]),
        "learned": learned_figures(summary),
        "learned_note": summary.note,
        "others": FigureTable("Norms of the tensors of the adapter other than A and B", ("name", "norm"), norms),
        "settings": changed,
        "chosen": chosen,
        "notes": [str(note) for note in sequence(record.values.get("notes"))],
        "settings_text": record.settings_text[:SETTINGS_TEXT],
        "commands": suggested_commands(record),
        "machine": machine_text(record),
        "versions": ", ".join(f"{name} {value}" for name, value in record.part("versions").items()),
        "written": format_time(time.time()),
    }
    sections = (
        ("result", "Result", True),
        ("answers", "Answers", answers or view["general"] or view["drift"]),
        ("predictions", "Predictions", view["predictions"]),
        ("completions", "Completions", completions),
        ("next", "Next steps", True),
        ("curves", "Training", curves),
        ("memory-heading", "Memory", view["memory"]),
        ("data", "Data", lines or examples),
        ("learned-heading", "What changed", view["learned"] or view["learned_note"]),
        ("settings", "Settings", changed.rows or chosen.rows),
    )
    view["contents"] = [(identity, text) for identity, text, content in sections if content]
    return view


def column_names(record: Run) -> tuple[str, str]:
    """Return the names of the two columns of scores and answers.

    A classifier's head is new, so its scores before training are not those of the base model.
    """
    is_base = record.values.get("writes_text", True) and not record.values.get("start")
    before = "base model" if is_base else "before training"
    return before, "adapter" if record.method in PEFT_METHODS else "after training"


def headline(record: Run) -> list[HeadlineItem]:
    """Return the results, then the cost of the run."""
    items = [*generation_items(record), *score_items(record), *drift_items(record)]
    losses = record.held_out_losses
    if losses and (record.score is None or record.score[0] != record.loss_metric):
        before = short(losses[0][1]) if losses[0][0] == 0 else ""
        last = losses[-1][1] if losses[-1][0] else None
        items.append(HeadlineItem("held-out loss", short(last), "before and after training" if before else "", before))
    _, steps = record.metrics.column(record.progress)
    if len(steps):
        mean = running_mean(steps)
        start = short(mean[0])
        end = short(mean[-1])
        items.append(HeadlineItem(f"training {record.progress}", end, "first step, and running mean", start))
    if record.rows_per_second:
        tokens = f"{count(record.tokens_per_second)} tokens per second"
        items.append(HeadlineItem("speed", f"{rate(record.rows_per_second)} rows/s", tokens))
    if record.seconds:
        total = record.total_steps
        total_text = f" of {total:,}" if total is not None and total != record.steps else ""
        items.append(HeadlineItem("training time", duration(record.seconds), f"{record.steps:,}{total_text} steps"))
    if record.peak_bytes:
        detail = f"planned {gigabytes(record.planned_bytes)}" if record.planned_bytes else ""
        items.append(HeadlineItem("peak memory", gigabytes(record.peak_bytes), detail))
    elif record.planned_bytes:
        items.append(HeadlineItem("memory planned", gigabytes(record.planned_bytes)))
    trained = number(record.part("plan").get("trained_parameters") or record.result.get("trained_parameters"))
    total_parameters = number(record.part("plan").get("total_parameters"))
    if trained:
        share = f"{trained / total_parameters:.2%} of {count(total_parameters)}" if total_parameters else ""
        items.append(HeadlineItem("trained parameters", count(trained), share))
    return items


def generation_items(record: Run) -> Iterator[HeadlineItem]:
    """Yield the verdict on the answers before and after training, if they were compared."""
    generation = mapping(record.result.get("generation"))
    if verdict := generation.get("verdict"):
        detail = f"greedy answers to {len(generation) - 3} sets of prompts, before and after training"
        yield HeadlineItem("generation", str(verdict), detail, large=True)


def score_items(record: Run) -> Iterator[HeadlineItem]:
    """Yield the main score of the base model and of the adapter."""
    if record.score is None:
        if record.state == FINISHED and not record.metrics.evaluations:
            yield HeadlineItem("held-out score", "none", "no rows were held out; set data.eval", large=True)
        return
    name, value = record.score
    base = record.base.get(name)
    bounds = record.score_interval
    rows = num_held_out_rows(record)
    before, after = column_names(record)
    if base is not None:
        note = f"{before} → {after}"
    else:
        missing = "not evaluated before training" if before.startswith("before") else f"the {before} was not evaluated"
        entry = task_registry.find(record.task)
        note = "" if entry is not None and entry.scores_against_base else f"{after}; {missing}"
    if bounds:
        note += f"; 95 % interval {metric_value(name, bounds[0])} to {metric_value(name, bounds[1])}"
    title = f"{metric_name(name)} of {rows:,} held-out rows" if rows else f"held-out {metric_name(name)}"
    last = record.metrics.evaluations[-1][1] if record.metrics.evaluations else {}
    if (num_passages := last.get(f"{name.rpartition('/')[0]}/passages_searched".lstrip("/"))) is not None:
        title += f" among {num_passages:,.0f} passages"
    evaluated = record.result or record.metrics.evaluations[-1][0]  # step 0 is the evaluation before training
    before = "" if base is None else metric_value(name, base)
    yield HeadlineItem(title, metric_value(name, value if evaluated else None), note.lstrip("; "), before, large=True)


def num_held_out_rows(record: Run) -> int | None:
    """Return the number of scored rows, or None if it is unknown or the score is that of one of several evaluation
    sets.
    """
    num_rows = number(mapping(record.part("data").get("counts")).get("held_out"))
    return int(num_rows) if num_rows and record.score is not None and "/" not in record.score[0] else None


def drift_items(record: Run) -> Iterator[HeadlineItem]:
    """Yield the drift, or "not measured" for a finished run of a model that generates text."""
    drift = last_drift(record)
    change = number(drift.get("change"))
    unchanged_share = number(drift.get("same"))
    if (agreement := number(drift.get("agreement"))) is not None:
        yield HeadlineItem("drift", f"{agreement:.0%}", "of general sentences' neighbors agree with the base model")
        return
    if change is None:
        writes = record.values.get("writes_text") is True and record.state == FINISHED
        yield from [HeadlineItem("drift", "not measured", large=True)] if writes else []
        return
    detail = f"{change:+.2f} nats per token of general answers"
    detail += "" if unchanged_share is None else f"; {unchanged_share:.0%} of their tokens are unchanged"
    yield HeadlineItem("drift", "large" if change > LARGE else "small", detail, large=True)


def last_drift(record: Run) -> Mapping[str, Any]:
    """Return the last drift measurement, or an empty mapping."""
    return mapping(record.result.get("drift")) or dict(record.metrics.drifts[-1:]).get(record.steps, {})


def notices(record: Run) -> list[str]:
    """Return the notices above the results."""
    generation = mapping(record.result.get("generation"))
    messages = [str(generation[name]) for name in ("line", "hint") if generation.get(name)]
    total = f" of {record.total_steps:,}" if record.total_steps else ""
    if record.state == RUNNING:
        messages.append(f"This run is in progress: step {record.steps:,}{total}. The page updates every few minutes.")
    if record.state in (INTERRUPTED, KILLED):
        messages.append(f"The run stopped after {record.steps:,} steps{total}. Repeat the command to resume it.")
    if isinstance(record.result.get("stopped_early"), str):
        messages.append(f"Stopped early: {record.result['stopped_early']}.")
    if record.metrics.skipped:
        steps = "1 step" if record.metrics.skipped == 1 else f"{record.metrics.skipped:,} steps"
        messages.append(f"Skipped {steps} because of a loss or gradient that is not finite.")
    for step, kind in record.metrics.warnings[:6]:
        messages.append(f"At step {step:,}: {WARNINGS.get(kind, metric_name(kind))}.")
    if record.metrics.damaged:
        messages.append(f"{record.metrics.damaged} lines of metrics.jsonl could not be read.")
    messages += score_warnings(record)
    change = number(last_drift(record).get("change"))
    if change is not None and change > LARGE:
        hint = "Try train.keep_general: 1, a lower train.learning_rate, or fewer train.epochs."
        messages.append(f"Drift is large: the model may answer other questions worse than the base model. {hint}")
    return messages


def score_warnings(record: Run) -> Iterator[str]:
    """Yield the reasons why the model may not be better than the base model."""
    if record.result.get("rewards_differed") is False:
        yield f"The rewards trained nothing: they were equal for all completions of a prompt. {EQUAL_REWARDS_ADVICE}."
    name, value = record.score or ("", 0.0)
    base = record.base.get(name)
    bounds = record.score_interval
    if base is None or not bounds:
        return
    if value == base:
        yield f"The score did not change: the {metric_name(name)} is the same as before training."
        return
    sign = -1 if name.rpartition("/")[2] in LOWER_IS_BETTER else 1
    if sign * value <= sign * base:
        yield f"The {metric_name(name)} is not better than before training."
    elif bounds[0] <= base <= bounds[1]:
        message = f"The interval of the {metric_name(name)} includes the value before training"
        yield f"{message}, so the difference may be due to chance. Evaluate on more held-out rows."


def drift_text(record: Run) -> str:
    """Return a sentence about the drift, or '' if it was not measured."""
    drift = last_drift(record)
    names = ("base_loss", "loss", "same", "start_loss")
    base, loss, unchanged_share, start = (number(drift.get(name)) for name in names)
    if base is None or loss is None or unchanged_share is None:
        return ""
    change = f"from {base:.2f} to {loss:.2f} nats per token; {unchanged_share:.0%} of their tokens are unchanged"
    text = f"Drift: the loss on the base model's answers to general questions changed {change}."
    return text if start is None else f"{text} It was {start:.2f} before this run, with the adapter of start_from."


def sample_answers(metrics: RunMetrics, task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return prompts with the first and the last answer, and prompts with their intermediate answers.

    An answer is marked as right or wrong if it can be compared with an expected answer.
    """
    entry = task_registry.find(task)
    grouped: dict[tuple[int | None, str], list[SampleAnswer]] = {}
    for sample in metrics.samples:
        grouped.setdefault((sample.row, sample.prompt), []).append(sample)
    prompts: list[dict[str, Any]] = []
    between: list[dict[str, Any]] = []
    for (row, prompt), answers in list(grouped.items())[:PROMPTS]:
        answers = sorted(answers, key=lambda sample: sample.step)
        exact = entry is not None and entry.trains_on_answers and len(answers[-1].expected or "") <= MAX_EXACT_LENGTH
        expected = None if answers[-1].expected is None else _cut(answers[-1].expected)
        name = f"row {row}" if row is not None else f"prompt {len(prompts) + 1}"
        lines = pretty_json(answers[-1].expected)
        reference = lines or (pretty_json(answers[0].answer) if answers[-1].expected is None else None)
        first = _answer(answers[0], exact, reference) if answers[0].step == 0 else None
        last = _answer(answers[-1], exact, reference) if answers[-1].step or len(answers) > 1 else None
        expectation: dict[str, Any] = {"expected": expected, "expected_lines": lines and marked_lines(lines, None)}
        answers_of_row = {"base": first, "adapter": last, "pictures": metrics.pictures.get(str(row), [])}
        prompts.append({"name": name, "prompt": _cut(prompt), **expectation, **answers_of_row})
        if intermediate := [_answer(sample, exact, reference) for sample in answers[:-1] if sample.step][-BETWEEN:]:
            between.append({"name": name, "answers": intermediate})
    return prompts, between


def general_answers(record: Run) -> list[dict[str, str]]:
    """Return general prompts with the answers of both models."""
    samples = record.metrics.general[:PROMPTS]
    return [{key: _cut(str(sample.get(key, ""))) for key in ("prompt", "base", "adapter")} for sample in samples]


def completion_rows(record: Run) -> list[dict[str, str]]:
    """Return the best and the worst completions of the last rollout, best first."""
    rows = []
    for completion in record.metrics.completions:
        parts = [(metric_name(str(name)), number(value)) for name, value in mapping(completion.get("parts")).items()]
        rewards = ", ".join(f"{name.removeprefix('reward ')} {short(value)}" for name, value in parts)
        prompt, text = (_cut(str(completion.get(key, ""))) for key in ("prompt", "text"))
        reward = short(number(completion.get("reward")))
        rows.append({"reward": reward, "parts": rewards, "prompt": prompt, "text": text or "(nothing)"})
    return rows


def _answer(sample: SampleAnswer, exact: bool, reference: list[str] | None) -> dict[str, Any]:
    """Return an answer for the page.

    Args:
        exact: Compare it with the expected answer.
        reference: Lines of the JSON that it is compared with, or None for plain text.
    """
    right = None if sample.expected is None or not exact else sample.answer.strip() == sample.expected.strip()
    lines = pretty_json(sample.answer) if reference else None
    answer = _cut(sample.answer) or "(nothing)"
    values: dict[str, Any] = {"when": f"step {sample.step:,}", "answer": answer, "right": right}
    values |= {"lines": lines and marked_lines(lines, reference), "invalid": bool(reference) and lines is None}
    return values | {"alike": right is False and lines is not None and lines == reference}


def prediction_tables(record: Run) -> list[dict[str, Any]]:
    """Return the class confusion, the worst mistakes and example predictions of each evaluation set."""
    tables = []
    for name, recorded in record.metrics.predictions.items():
        values = mapping(recorded)
        score = str(values.get("score_name", ""))
        rows = {kind: _predicted_rows(values.get(kind), score) for kind in ("mistakes", "examples")}
        pairs = [entry for entry in sequence(values.get("confusion")) if isinstance(entry, list) and len(entry) == 4]
        counts = {(str(a), str(b)): (int(number(n) or 0), int(number(size) or 0)) for a, b, n, size in pairs}
        classes = [str(entry) for entry in sequence(values.get("classes"))][:MAX_MATRIX_CLASSES]
        if any(rows.values()) or counts:
            tables.append({"name": name, "score": metric_name(score), "classes": classes, "counts": counts, **rows})
    return tables


def _predicted_rows(rows: object, score: str) -> list[dict[str, str]]:
    format_score = "{:.1%}".format if score == "confidence" else short
    return [
        {key: _cut(str(row.get(key, ""))) for key in ("row", "text", "expected", "predicted")}
        | {"score": format_score(value)}
        for row in map(mapping, sequence(rows))
        if (value := number(row.get("score"))) is not None
    ]


def example_rows(examples: object) -> list[dict[str, Any]]:
    """Return rows with their text spans, as stored in run.json."""
    rows = []
    for example in sequence(examples):
        if not isinstance(example, Mapping):
            continue
        size = f"{count(number(example.get('tokens')))} tokens"
        if "label_tokens" in example:
            size += f", {count(number(example['label_tokens']))} of them trained on"
        if "label" in example:
            size += f", label: {example['label']}"
        pieces = [
            {"text": str(piece.get("text", ""))} | {key: piece.get(key) is True for key in ("trained", "special")}
            for piece in map(mapping, sequence(example.get("pieces")))
        ]
        reason = str(example.get("why", "one row"))
        rows.append({"row": example.get("row", "?"), "why": reason, "size": size, "pieces": pieces})
    return rows


def settings_tables(record: Run) -> tuple[FigureTable, FigureTable]:
    """Return the settings that differ from the defaults, and the automatically chosen ones with reasons."""
    defaults = {setting.key: setting.default for setting in all_settings()}
    chosen = [(key, mapping(choice)) for key, choice in record.chosen.items()]
    chosen_rows = [(key, format_value(choice.get("value")), str(choice.get("why", ""))) for key, choice in chosen]
    changed_rows = []
    for key, value in record.flat_settings.items():
        default = defaults.get(key, ...)
        if key not in record.chosen and value != (list(default) if isinstance(default, tuple) else default):
            changed_rows.append((key, format_value(value)))
    return (
        FigureTable("Settings that differ from the default", ("setting", "value"), changed_rows),
        FigureTable("Automatically chosen settings", ("setting", "value", "reason"), chosen_rows),
    )


def suggested_commands(record: Run) -> list[dict[str, str]]:
    """Return the commands that are useful in the run's state. Commands stored in ``run.json`` are untrusted and not
    used.
    """
    path = record.path.absolute()
    writes = record.generates_text
    return next_commands(path, record.state, record.method, record.task, generates_text=writes, every=True)


def machine_text(record: Run) -> str:
    """Return a line about the machine that the run used."""
    machine = record.part("machine")
    memory = number(machine.get("memory_bytes"))
    parts = [
        str(machine.get("processor") or ""),
        f"{machine['processors']} CPUs" if "processors" in machine else "",
        f"{gigabytes(int(memory))} of memory" if memory is not None else "",
        str(machine.get("system") or ""),
    ]
    return "; ".join(filter(None, parts))


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … {len(text) - TEXT:,} more characters"
