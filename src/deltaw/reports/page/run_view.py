"""What the page of one run says, put together from its record: headline, answers, rows, settings, commands.

Everything here is plain text and figures; the template decides where it stands, and escapes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.reports.page.json_answers import marked_lines, pretty_json
from deltaw.reports.page.learned import Learned, learned_figures, what_was_learned
from deltaw.reports.page.run_figures import curve_figures, length_figure, memory_figure, rate_figure
from deltaw.reports.page.svg import Numbers, smoothed
from deltaw.reports.wording import count, duration, gigabytes, metric_name, metric_value, rate, short, shown, when
from deltaw.runs.folder import (
    FINISHED,
    INTERRUPTED,
    KILLED,
    LOSSES,
    RUNNING,
    STATES,
    Run,
    SampleAnswer,
    mapping,
    number,
    numbers,
    sequence,
)
from deltaw.runs.summary import OF_PEFT, next_commands
from deltaw.settings import settings as all_settings
from deltaw.training.drift import LARGE
from deltaw.training.evaluation.base import MATRIX_CLASSES

# The most prompts whose answers are shown, answers in between of one, characters of a text, and rows at once.
PROMPTS, BETWEEN, TEXT, ROWS = 12, 20, 4000, 2
SETTINGS_TEXT = 40_000
# Characters of an expected answer up to which an answer that differs is called wrong.
EXACT = 200
# Metrics that are better if they are lower.
LOWER = (*LOSSES, "perplexity", "rmse", "mae")
WARNINGS = {
    "gradient_norm": "the gradient norm was far above what it had been",
    "clipped": "nearly all gradients were clipped",
    "rising_loss": "the training loss was rising",
}
STATE_TEXTS = {state: state for state in STATES} | {KILLED: "killed before its end"}


@dataclass(frozen=True)
class Fact:
    """One of the large numbers at the top.

    Attributes:
        before: the value before training, if there is one. large: whether it answers what a run is for.
    """

    name: str
    value: str
    more: str = ""
    before: str = ""
    large: bool = False


def run_view(record: Run) -> dict[str, Any]:
    """The variables of the template ``run.html``."""
    learned = what_was_learned(record.path) or Learned()
    norms = [(name, short(norm)) for name, norm in learned.others[:60]]
    curves = curve_figures(record)
    answers, between = answers_of(record.metrics.samples, record.task)
    completions = completions_of(record)
    examples = examples_of(record.part("data").get("examples"))
    lines = [str(line) for line in sequence(record.part("data").get("lines"))]
    changed, chosen = settings_tables(record)
    view: dict[str, Any] = {
        "title": f"{record.name} – deltaw run",
        **{key: getattr(record, key) for key in ("name", "model", "method", "task", "state")},
        "folder": os.fspath(record.path),
        "state_text": STATE_TEXTS.get(record.state, "state not known"),
        "when": when(record.started),
        "when_machine": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.started)),
        "error": {key: str(record.part("error").get(key) or "") for key in ("what", "where", "hint")},
        "notices": notices(record),
        "sides": sides(record),
        "headline": headline(record),
        "curves": curves,
        "rates": rate_figure(record.learning_rates),
        "answers": answers,
        "between": between,
        "expects": any(one["expected"] is not None for one in answers),
        "differs": any(one["expected_lines"] for one in answers),
        "general": general_of(record),
        "predictions": predictions_of(record),
        "completions": completions,
        "completed": f"{record.metrics.completed:,}",
        "drift": drift_text(record),
        "memory": memory_figure(record),
        "data_lines": lines,
        "lengths": length_figure(record),
        "examples": examples[:ROWS],
        "more_examples": examples[ROWS:],
        "masked": any(piece["trained"] for example in examples for piece in example["pieces"]),
        "learned": learned_figures(learned),
        "learned_note": learned.note,
        "others": Numbers("Norms of what the adapter holds besides A and B", ("name", "norm"), norms),
        "settings": changed,
        "chosen": chosen,
        "notes": [str(note) for note in sequence(record.values.get("notes"))],
        "settings_text": record.settings_text[:SETTINGS_TEXT],
        "commands": commands_of(record),
        "machine": machine_text(record),
        "versions": ", ".join(f"{name} {value}" for name, value in record.part("versions").items()),
        "written": when(time.time()),
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
    view["contents"] = [(identity, text) for identity, text, there in sections if there]
    return view


def sides(record: Run) -> tuple[str, str]:
    """What the two columns of scores and answers are called. The head of a classifier is new, so what is evaluated
    before training is not the base model."""
    before = "base model" if record.values.get("writes_text", True) else "before training"
    return before, "adapter" if record.method in OF_PEFT else "after training"


def headline(record: Run) -> list[Fact]:
    """Whether it worked, then what it took."""
    facts = [*score_fact(record), *drift_fact(record)]
    losses = record.held_out_losses
    if losses and (record.score is None or record.score[0] != record.loss_metric):
        before, last = (short(losses[0][1]) if losses[0][0] == 0 else ""), losses[-1][1] if losses[-1][0] else None
        facts.append(Fact("held-out loss", short(last), "before and after training" if before else "", before))
    _, steps = record.metrics.column(record.progress)
    if len(steps):
        mean = smoothed(steps)
        facts.append(
            Fact(f"training {record.progress}", short(mean[-1]), "first step, and mean of the last", short(mean[0]))
        )
    if record.rows_per_second:
        tokens = f"{count(record.tokens_per_second)} tokens a second"
        facts.append(Fact("speed", f"{rate(record.rows_per_second)} rows/s", tokens))
    if record.seconds:
        total = record.total_steps
        of = f" of {total:,}" if total is not None and total != record.steps else ""
        facts.append(Fact("training time", duration(record.seconds), f"{record.steps:,}{of} steps"))
    if record.peak_bytes:
        more = f"planned {gigabytes(record.planned_bytes)}" if record.planned_bytes else ""
        facts.append(Fact("peak memory", gigabytes(record.peak_bytes), more))
    elif record.planned_bytes:
        facts.append(Fact("memory planned", gigabytes(record.planned_bytes)))
    trained = number(record.part("plan").get("trained_parameters") or record.result.get("trained_parameters"))
    total_parameters = number(record.part("plan").get("total_parameters"))
    if trained:
        share = f"{trained / total_parameters:.2%} of {count(total_parameters)}" if total_parameters else ""
        facts.append(Fact("trained parameters", count(trained), share))
    return facts


def score_fact(record: Run) -> Iterator[Fact]:
    """The score that counts: of the base model, and of the adapter."""
    if record.score is None:
        if record.state == FINISHED and not record.metrics.evaluations:
            yield Fact("held-out score", "none", "no rows were held out; data.eval says how many", large=True)
        return
    name, value = record.score
    base, bounds, rows = record.base.get(name), score_interval(record), held_out_rows(record)
    before, after = sides(record)
    if base is not None:
        told = f"{before} → {after}"
    else:
        without = "not evaluated before training" if before.startswith("before") else f"the {before} was not evaluated"
        told = "" if record.task == "preference" else f"{after}; {without}"
    if bounds:
        told += f"; 95 % interval {metric_value(name, bounds[0])} to {metric_value(name, bounds[1])}"
    title = f"{metric_name(name)} of {rows:,} held-out rows" if rows else f"held-out {metric_name(name)}"
    last = record.metrics.evaluations[-1][1] if record.metrics.evaluations else {}
    if (searched := last.get(f"{name.rpartition('/')[0]}/passages_searched".lstrip("/"))) is not None:
        title += f" among {searched:,.0f} passages"
    evaluated = record.result or record.metrics.evaluations[-1][0]  # and not before training alone
    shown_base = "" if base is None else metric_value(name, base)
    yield Fact(title, metric_value(name, value if evaluated else None), told.lstrip("; "), shown_base, large=True)


def score_interval(record: Run) -> Sequence[float]:
    """Of the score, lower and upper bound; empty where there is none."""
    bounds = numbers(sequence(mapping(record.result.get("score")).get("interval")))
    return bounds if len(bounds) == 2 else ()


def held_out_rows(record: Run) -> int | None:
    """How many rows were scored; None where several sets or nothing tells."""
    told = number(mapping(record.part("data").get("counts")).get("held_out"))
    return int(told) if told and record.score is not None and "/" not in record.score[0] else None


def drift_fact(record: Run) -> Iterator[Fact]:
    """How far general answers moved; that it was not measured, where the model writes text."""
    drift = drift_of(record)
    change, same = number(drift.get("change")), number(drift.get("same"))
    if (agreement := number(drift.get("agreement"))) is not None:
        yield Fact("drift", f"{agreement:.0%}", "of general sentences' neighbors are those of the base model")
        return
    if change is None:
        writes = record.values.get("writes_text") is True and record.state == FINISHED
        yield from [Fact("drift", "not measured", large=True)] if writes else []
        return
    more = f"{change:+.2f} nats per token of general answers"
    more += "" if same is None else f"; {same:.0%} of their tokens are unchanged"
    yield Fact("drift", "large" if change > LARGE else "small", more, large=True)


def drift_of(record: Run) -> Mapping[str, Any]:
    """The last measurement; empty where there is none."""
    return mapping(record.result.get("drift")) or dict(record.metrics.drifts[-1:]).get(record.steps, {})


def notices(record: Run) -> list[str]:
    """What a person should know before reading on."""
    found = []
    of = f" of {record.total_steps:,}" if record.total_steps else ""
    if record.state == RUNNING:
        found.append(f"This run goes on: step {record.steps:,}{of}. The page is written again every few minutes.")
    if record.state in (INTERRUPTED, KILLED):
        found.append(f"The run ended after {record.steps:,} steps{of}. The same command goes on with it.")
    if isinstance(record.result.get("stopped_early"), str):
        found.append(f"Stopped early: {record.result['stopped_early']}.")
    if record.metrics.skipped:
        steps = "1 step" if record.metrics.skipped == 1 else f"{record.metrics.skipped:,} steps"
        found.append(f"{steps} with a loss or gradient that is not finite left out.")
    for step, kind in record.metrics.warnings[:6]:
        found.append(f"At step {step:,}: {WARNINGS.get(kind, metric_name(kind))}.")
    if record.metrics.damaged:
        found.append(f"{record.metrics.damaged} lines of metrics.jsonl could not be read.")
    found += doubts(record)
    change = number(drift_of(record).get("change"))
    if change is not None and change > LARGE:
        hint = "Try train.keep_general: 1, a lower train.learning_rate, or fewer train.epochs."
        found.append(f"Drift is large: the model may answer other questions worse than the base model. {hint}")
    return found


def doubts(record: Run) -> Iterator[str]:
    """Why the score may not be better than the base model's, if so."""
    name, value = record.score or ("", 0.0)
    base, bounds = record.base.get(name), score_interval(record)
    if base is None or not bounds:
        return
    if value == base:
        yield f"Base and adapter do not differ: the {metric_name(name)} is the same as before training."
        return
    sign = -1 if name.rpartition("/")[2] in LOWER else 1
    if sign * value <= sign * base:
        yield f"The {metric_name(name)} is not better than before training."
    elif bounds[0] <= base <= bounds[1]:
        said = f"The interval of the {metric_name(name)} holds the value before training, too"
        yield f"{said}: the difference may be chance. More held-out rows would tell."


def drift_text(record: Run) -> str:
    """How far general answers moved, in a sentence; empty where it was not measured."""
    drift = drift_of(record)
    base, loss, same = (number(drift.get(name)) for name in ("base_loss", "loss", "same"))
    if base is None or loss is None or same is None:
        return ""
    moved = f"from {base:.2f} to {loss:.2f} nats per token; {same:.0%} of their tokens are unchanged"
    return f"Drift: the loss on the base model's own answers to general questions went {moved}."


def answers_of(samples: Sequence[SampleAnswer], task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts with the answers before the first step and after the last, and those that have further ones. Whether an
    answer is the expected one is said where it could be."""
    grouped: dict[tuple[int | None, str], list[SampleAnswer]] = {}
    for sample in samples:
        grouped.setdefault((sample.row, sample.prompt), []).append(sample)
    found: list[dict[str, Any]] = []
    between: list[dict[str, Any]] = []
    for (row, prompt), answers in list(grouped.items())[:PROMPTS]:
        answers = sorted(answers, key=lambda sample: sample.step)
        exact = task == "causal-lm" and len(answers[-1].expected or "") <= EXACT
        expected = None if answers[-1].expected is None else _cut(answers[-1].expected)
        name = f"row {row}" if row is not None else f"prompt {len(found) + 1}"
        lines = pretty_json(answers[-1].expected)
        reference = lines or (pretty_json(answers[0].answer) if answers[-1].expected is None else None)
        first = _answer(answers[0], exact, reference) if answers[0].step == 0 else None
        last = _answer(answers[-1], exact, reference) if answers[-1].step or len(answers) > 1 else None
        told: dict[str, Any] = {"expected": expected, "expected_lines": lines and marked_lines(lines, None)}
        found.append({"name": name, "prompt": _cut(prompt), **told, "base": first, "adapter": last})
        if further := [_answer(sample, exact, reference) for sample in answers[:-1] if sample.step][-BETWEEN:]:
            between.append({"name": name, "answers": further})
    return found, between


def general_of(record: Run) -> list[dict[str, str]]:
    """General prompts with both models' answers."""
    told = record.metrics.general[:PROMPTS]
    return [{key: _cut(str(one.get(key, ""))) for key in ("prompt", "base", "adapter")} for one in told]


def completions_of(record: Run) -> list[dict[str, str]]:
    """The best and the worst completions of the last rollout, the best first."""
    found = []
    for one in record.metrics.completions:
        parts = [(metric_name(str(name)), number(value)) for name, value in mapping(one.get("parts")).items()]
        told = ", ".join(f"{name.removeprefix('reward ')} {short(value)}" for name, value in parts)
        prompt, text = (_cut(str(one.get(key, ""))) for key in ("prompt", "text"))
        reward = short(number(one.get("reward")))
        found.append({"reward": reward, "parts": told, "prompt": prompt, "text": text or "(nothing)"})
    return found


def _answer(sample: SampleAnswer, exact: bool, reference: list[str] | None) -> dict[str, Any]:
    """Return an answer for the page.

    Args:
        exact: Compare it with the expected answer.
        reference: Lines of the JSON that it is compared with, or None for plain text.
    """
    right = None if sample.expected is None or not exact else sample.answer.strip() == sample.expected.strip()
    lines = pretty_json(sample.answer) if reference else None
    found: dict[str, Any] = {
        "when": f"step {sample.step:,}",
        "answer": _cut(sample.answer) or "(nothing)",
        "right": right,
    }
    found |= {"lines": lines and marked_lines(lines, reference), "invalid": bool(reference) and lines is None}
    return found | {"alike": right is False and lines is not None and lines == reference}


def predictions_of(record: Run) -> list[dict[str, Any]]:
    """Return by evaluation set the confusion of classes, the worst mistakes and example predictions."""
    found = []
    for name, recorded in record.metrics.predictions.items():
        told = mapping(recorded)
        score = str(told.get("score_name", ""))
        rows = {kind: _predicted_rows(told.get(kind), score) for kind in ("mistakes", "examples")}
        pairs = [one for one in sequence(told.get("confusion")) if isinstance(one, list) and len(one) == 4]
        counts = {(str(a), str(b)): (int(number(n) or 0), int(number(of) or 0)) for a, b, n, of in pairs}
        classes = [str(one) for one in sequence(told.get("classes"))][:MATRIX_CLASSES]
        if any(rows.values()) or counts:
            found.append({"name": name, "score": metric_name(score), "classes": classes, "counts": counts, **rows})
    return found


def _predicted_rows(told: object, score: str) -> list[dict[str, str]]:
    form = "{:.1%}".format if score == "confidence" else short
    return [
        {**{key: _cut(str(one.get(key, ""))) for key in ("row", "text", "expected", "predicted")}, "score": form(value)}
        for one in map(mapping, sequence(told))
        if (value := number(one.get("score"))) is not None
    ]


def examples_of(told: object) -> list[dict[str, Any]]:
    """Rows with their pieces, as run.json has them."""
    found = []
    for example in sequence(told):
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
        why = str(example.get("why", "one row"))
        found.append({"row": example.get("row", "?"), "why": why, "size": size, "pieces": pieces})
    return found


def settings_tables(record: Run) -> tuple[Numbers, Numbers]:
    """The settings that are not the defaults, and what the run chose itself, with the reason."""
    defaults = {setting.key: setting.default for setting in all_settings()}
    chosen = [(key, mapping(choice)) for key, choice in record.chosen.items()]
    found = [(key, shown(choice.get("value")), str(choice.get("why", ""))) for key, choice in chosen]
    given = []
    for key, value in record.flat_settings.items():
        default = defaults.get(key, ...)
        if key not in record.chosen and value != (list(default) if isinstance(default, tuple) else default):
            given.append((key, shown(value)))
    return (
        Numbers("Settings that are not the default", ("setting", "value"), given),
        Numbers("What the run chose itself", ("what", "value", "why"), found),
    )


def commands_of(record: Run) -> list[dict[str, str]]:
    """Commands to go on with, for where the run is now. Those that ``run.json`` names are somebody else's words."""
    writes = record.values.get("writes_text", record.task in ("causal-lm", "preference", "reward")) is True
    return next_commands(
        record.path.absolute(), record.state, record.method, record.task, writes_text=writes, every=True
    )


def machine_text(record: Run) -> str:
    """What the run ran on, in a sentence."""
    machine = record.part("machine")
    memory = number(machine.get("memory_bytes"))
    parts = [
        str(machine.get("processor") or ""),
        f"{machine['processors']} processors" if "processors" in machine else "",
        f"{gigabytes(int(memory))} of memory" if memory is not None else "",
        str(machine.get("system") or ""),
    ]
    return "; ".join(filter(None, parts))


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … {len(text) - TEXT:,} more characters"
