"""What the page of one run says, put together from its record: headline, answers, rows, settings, commands.

Everything here is plain text and figures; the template decides where it stands, and escapes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.reports.page.learned import Learned, learned_figures, what_was_learned
from deltaw.reports.page.run_figures import curve_figures, length_figure, memory_figure, rate_figure
from deltaw.reports.page.svg import Numbers, smoothed
from deltaw.reports.wording import count, duration, gigabytes, metric_name, metric_value, rate, short, shown, when
from deltaw.runs.folder import (
    INTERRUPTED,
    KILLED,
    RUNNING,
    STATES,
    Run,
    SampleAnswer,
    mapping,
    number,
    numbers,
    sequence,
)
from deltaw.runs.summary import next_commands
from deltaw.settings import settings as all_settings
from deltaw.training.drift import LARGE

# The most prompts whose answers are shown, answers in between of one, and characters of a text.
PROMPTS, BETWEEN, TEXT = 12, 20, 3000
SETTINGS_TEXT = 40_000
WARNINGS = {
    "gradient_norm": "the gradient norm was far above what it had been",
    "clipped": "nearly all gradients were clipped",
    "rising_loss": "the training loss was rising",
}
STATE_TEXTS = {state: state for state in STATES} | {KILLED: "killed before its end"}


@dataclass(frozen=True)
class Fact:
    """One of the large numbers at the top."""

    name: str
    value: str
    more: str = ""


def run_view(record: Run) -> dict[str, Any]:
    """The variables of the template ``run.html``."""
    learned = what_was_learned(record.path) or Learned()
    norms = [(name, short(norm)) for name, norm in learned.others[:60]]
    curves = curve_figures(record)
    answers = answers_of(record.metrics.samples)
    examples = examples_of(record.part("data").get("examples"))
    lines = [str(line) for line in sequence(record.part("data").get("lines"))]
    changed = settings_table(record)
    view: dict[str, Any] = {
        "title": f"{record.name} – deltaw run",
        **{key: getattr(record, key) for key in ("name", "model", "method", "task", "state")},
        "folder": os.fspath(record.path),
        "state_text": STATE_TEXTS.get(record.state, "state not known"),
        "when": when(record.started),
        "when_machine": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.started)),
        "error": {key: str(record.part("error").get(key) or "") for key in ("what", "where", "hint")},
        "notices": notices(record),
        "headline": headline(record),
        "curves": curves,
        "rates": rate_figure(record.learning_rates),
        "answers": answers,
        "drift": drift_text(record),
        "memory": memory_figure(record),
        "data_lines": lines,
        "lengths": length_figure(record),
        "examples": examples,
        "masked": any(piece["trained"] for example in examples for piece in example["pieces"]),
        "learned": learned_figures(learned),
        "learned_note": learned.note,
        "others": Numbers("Norms of what the adapter holds besides A and B", ("name", "norm"), norms),
        "settings": changed,
        "settings_text": record.settings_text[:SETTINGS_TEXT],
        "commands": commands_of(record),
        "machine": machine_text(record),
        "versions": ", ".join(f"{name} {value}" for name, value in record.part("versions").items()),
        "written": when(time.time()),
    }
    sections = (
        ("result", "Result", True),
        ("curves", "Training", curves),
        ("answers", "Answers", answers or view["drift"]),
        ("memory-heading", "Memory", view["memory"]),
        ("data", "Data", lines or examples),
        ("learned-heading", "What changed", view["learned"] or view["learned_note"]),
        ("settings", "Settings", changed.rows),
        ("next", "Next steps", True),
    )
    view["contents"] = [(identity, text) for identity, text, there in sections if there]
    return view


def headline(record: Run) -> list[Fact]:
    """The numbers that a person looks for first."""
    facts = []
    losses = record.held_out_losses
    if len(losses) > 1:
        first, value = losses[0]
        span = "before and after training" if first == 0 else f"from step {first:,} to the end"
        facts.append(Fact("held-out loss", f"{short(value)} → {short(losses[-1][1])}", span))
    elif losses:
        facts.append(Fact("held-out loss", short(losses[-1][1]), "after training"))
    score = record.score
    if score is not None and score[0] != record.loss_metric:
        told = numbers(sequence(mapping(record.result.get("score")).get("interval")))
        bounds = [metric_value(score[0], bound) for bound in told]
        more = f"95 % interval {bounds[0]} to {bounds[1]}" if len(bounds) == 2 else "on held-out rows"
        facts.append(Fact(metric_name(score[0]), metric_value(*score), more))
    _, steps = record.metrics.column("loss")
    if len(steps) and len(losses) < 2:
        mean = smoothed(steps)
        facts.append(Fact("training loss", f"{short(mean[0])} → {short(mean[-1])}", "first step, and mean of the last"))
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
    change = number(mapping(record.result.get("drift")).get("change"))
    if change is not None and change > LARGE:
        hint = "Try train.keep_general: 1, a lower train.learning_rate, or fewer train.epochs."
        found.append(f"Drift is large: the model may answer other questions worse than the base model. {hint}")
    return found


def drift_text(record: Run) -> str:
    """How far general answers moved, in a sentence; empty where it was not measured."""
    drift: Mapping[str, Any] = mapping(record.result.get("drift"))
    if not drift and record.metrics.drifts:
        drift = record.metrics.drifts[-1][1]
    base, loss, same = (number(drift.get(name)) for name in ("base_loss", "loss", "same"))
    if base is None or loss is None or same is None:
        return ""
    moved = f"from {base:.2f} to {loss:.2f} nats per token; {same:.0%} of their tokens are unchanged"
    return f"Drift: the loss on the base model's own answers to general questions went {moved}."


def answers_of(samples: Sequence[SampleAnswer]) -> list[dict[str, Any]]:
    """Each prompt with its first and its last answer, and those in between."""
    grouped: dict[tuple[int | None, str], list[SampleAnswer]] = {}
    for sample in samples:
        grouped.setdefault((sample.row, sample.prompt), []).append(sample)
    found: list[dict[str, Any]] = []
    for (row, prompt), answers in list(grouped.items())[:PROMPTS]:
        answers = sorted(answers, key=lambda sample: sample.step)
        expected = None if answers[-1].expected is None else _cut(answers[-1].expected)
        name = f"row {row}" if row is not None else f"prompt {len(found) + 1}"
        shown_ones = [_answer(sample) for sample in answers[:: max(1, len(answers) - 1)]]
        between = [_answer(sample) for sample in answers[1:-1][-BETWEEN:]]
        entry = {"name": name, "prompt": _cut(prompt), "expected": expected}
        found.append({**entry, "shown": shown_ones, "between": between})
    return found


def _answer(sample: SampleAnswer) -> dict[str, Any]:
    right = None if sample.expected is None else sample.answer.strip() == sample.expected.strip()
    named = "before training" if sample.step == 0 else f"step {sample.step:,}"
    return {"when": named, "answer": _cut(sample.answer) or "(nothing)", "right": right}


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


def settings_table(record: Run) -> Numbers:
    """The settings that are not the defaults, and what the run chose itself, with the reason."""
    defaults = {setting.key: setting.default for setting in all_settings()}
    given, chosen = record.flat_settings, {key: mapping(choice) for key, choice in record.chosen.items()}
    rows = []
    for key in dict.fromkeys([*given, *chosen]):
        default = defaults.get(key, ...)
        if key not in given or "value" in chosen.get(key, {}):
            rows.append((key, shown(chosen[key].get("value")), str(chosen[key].get("why", ""))))
        elif given[key] != (list(default) if isinstance(default, tuple) else default):
            rows.append((key, shown(given[key]), "as set"))
    return Numbers("Settings that are not the default, and what was chosen", ("setting", "value", "why"), rows)


def commands_of(record: Run) -> list[dict[str, str]]:
    """Commands to go on with: those in ``run.json``, or the usual ones."""
    told = [entry for entry in sequence(record.values.get("commands")) if isinstance(entry, Mapping)]
    if told:
        return [{key: str(entry.get(key, "")) for key in ("command", "what")} for entry in told]
    writes = record.task in ("causal-lm", "preference")
    return next_commands(record.path, record.state, record.method, writes)


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
