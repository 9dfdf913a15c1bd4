"""Show the progress of a run: a header and a live line on a terminal, log lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.live import Live
from rich.text import Text

from deltaw.kernels.busy_machine import Load, current_watch
from deltaw.machine.choices import Choice
from deltaw.machine.memory import resident_bytes
from deltaw.memory.plan import Plan
from deltaw.progress import Detail, track_progress
from deltaw.reports.live_line import LiveLine, update_mean
from deltaw.reports.page.run_view import score_warnings
from deltaw.reports.page.write import PAGE_FILE as REPORT
from deltaw.reports.page.write import write_rate_figure
from deltaw.reports.plan import long_rows_lines, plan_lines
from deltaw.reports.svg import running_mean
from deltaw.reports.tables import (
    WIDTH,
    TerminalOutput,
    count,
    duration,
    format_time,
    format_value,
    gigabytes,
    metric_name,
    metric_value,
    one_line,
    rate,
    time_by_part,
)
from deltaw.reports.work_display import FIRST_LINE, NEXT_LINE
from deltaw.runs.folder import FINISHED, INTERRUPTED, Run
from deltaw.runs.result import Result
from deltaw.runs.summary import next_commands
from deltaw.training.callbacks import Callback, RateSearch, RunStart, Sample
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import Outcome, Step, TrainState

# A plan above this share of the available memory is reported as tight.
TIGHT_SHARE = 0.9
# Number of suggested commands and sample answers that are printed. The run's page shows all of them.
MAX_COMMANDS = 4
MAX_SAMPLES = 2
# Speed and remaining time follow the last steps. A step's weight falls to 1/e after this number of seconds.
SPEED_MEMORY = 120.0


def print_summary(console: TerminalOutput, result: Result) -> None:
    """Print the results of a run and the suggested next commands, one per line for copying."""
    for name, text in summary_rows(result):
        console.print_line(f"{name}: {text}" if name else f"  {text}")
    state = INTERRUPTED if result.interrupted else FINISHED
    if (result.output / REPORT).is_file():
        console.print_line(f"report: {result.output / REPORT}")
    commands = next_commands(result.output, state, result.method, result.task, generates_text=result.generates_text)
    for suggestion in commands[: None if console.verbose else MAX_COMMANDS]:
        line = f"next: {suggestion['command']}"
        comment = f"  # {suggestion['what']}"
        console.print(line + comment if len(line + comment) <= WIDTH else f"{line}\n{comment}")
    if verdict := result.generation.get("line"):
        console.print(Text(verdict), soft_wrap=True)  # one line, so that scripts can read the last one


def summary_rows(result: Result) -> Iterator[tuple[str, str]]:
    """Yield a name and a text for each line of the summary."""
    outcome = result.outcome
    generation = result.generation
    if text := generation.get("line"):
        name, _, reasons = str(text).partition(": ")
        yield name, reasons
        yield from [("", str(generation["hint"]))] if generation["hint"] else []
    if result.interrupted:
        steps = "1 step" if outcome.steps == 1 else f"{outcome.steps:,} steps"
        yield f"interrupted after {steps}", "the adapter of the last completed step is saved"
    if outcome.seconds:
        speed = f"{rate(outcome.rows / outcome.seconds)} rows/s, {outcome.tokens / outcome.seconds:,.0f} tokens/s"
        yield "training", f"{outcome.rows:,} rows, {outcome.steps:,} steps in {duration(outcome.seconds)}: {speed}"
    if (run := Run(result.output)).progress == "reward":
        _, rewards = run.metrics.column("reward")
        first_and_last = " → ".join(metric_value("reward", float(value)) for value in running_mean(rewards)[[0, -1]])
        yield "training reward", f"{first_and_last}, first step and running mean"
    elif outcome.steps:
        yield "training loss", f"{outcome.loss:.4f}, the mean over all steps"
    if result.stopped_early is not None:
        yield "stopped early", result.stopped_early
    evaluation = result.evaluation
    base = {metric_name(k): v for k, v in run.base.items()}
    intervals = evaluation.named_intervals()
    if base and evaluation.metrics:
        is_base = result.generates_text and not run.values.get("start")
        yield "held-out rows", f"{'base model' if is_base else 'before training'} → after training"
    for name, value in evaluation.named_metrics().items():
        bounds = " to ".join(metric_value(name, bound) for bound in intervals.get(name, ()))
        interval = f" (95 % interval {bounds})" if bounds else ""
        before = f"{metric_value(name, base[metric_name(name)])} → " if metric_name(name) in base else ""
        yield f"held-out {metric_name(name)}", before + metric_value(name, value) + interval
    yield from (("", line) for line in score_warnings(run))
    planned = result.planned_memory_bytes
    planned_text = "" if planned is None else f", {gigabytes(planned)} planned"
    yield "memory", f"{gigabytes(result.peak_memory_bytes)} at the peak{planned_text}"
    if result.seconds_by_part:
        predicted = result.planned_seconds
        note = "" if predicted is None else f" ({duration(predicted)} predicted)"
        first, *following = time_by_part(result.seconds_by_part, WIDTH - len("time: "), note)
        yield from [("time", first), *(("", line) for line in following)]
    if result.load.busy_seconds:
        yield "other programs", load_line(result.load)
    if result.drift is not None:
        first, *following = result.drift.lines()
        yield "drift", first.removeprefix("drift: ")
        for line in following:
            yield "", line.strip()
    yield "adapter", os.fspath(result.output)


def load_line(load: Load) -> str:
    """Return a sentence about other programs that used the CPU during a run."""
    waited = duration(load.waited_seconds)
    return f"used the CPU for {duration(load.busy_seconds)}; deltaw's threads together waited {waited} for it"


def start_lines(start: RunStart) -> Iterator[str]:
    """Yield the lines about the method, steps and output of a run. Rows, memory and precision were printed earlier."""
    config = start.config
    train = start.config.train
    share = start.trained_parameters / start.total_parameters if start.total_parameters else 0.0
    rank = f" of rank {config.lora.rank}" if config.method == "lora" else ""
    trained = f"{count(start.trained_parameters)} of {count(start.total_parameters)} parameters trained"
    yield Detail(f"method: {config.method}{rank}: {trained} ({share:.2%})")
    epochs = "1 epoch" if train.epochs == 1 else f"{train.epochs:g} epochs"
    limit = epochs if train.max_steps is None else f"max_steps: {train.max_steps}"
    rate = start.chosen.get("train.learning_rate", Choice(train.learning_rate, "as set"))
    yield f"steps: {start.total_steps:,} of {train.batch_size} rows ({limit}), learning rate {format_value(rate.value)}"
    yield f"output: {start.folder} ({REPORT} shows the progress, run.yaml all settings)"


class TerminalCallback(Callback):
    """Print the progress of a run on a console: a header, training progress, evaluations and answers.

    A terminal shows a live line with the loss or reward, its running mean, tokens per second, memory and remaining
    time. Other consoles print the same line at intervals.
    """

    def __init__(self, console: TerminalOutput) -> None:
        self.console = console
        self._line = LiveLine(0)
        self._state: TrainState | None = None
        self._live: Live | None = None
        self._planned: int | None = None
        self._mean: float | None = None
        self._tokens = 0.0
        self._seconds = 0.0
        self._steps = 0.0
        self._named_load = False
        self._last_line_time = time.monotonic()
        self._base: dict[int, str] = {}
        self._first_model = "base model"
        self._logged_choices: set[str] = set()
        self._step_progress = contextlib.ExitStack()
        self._is_finished = False

    def on_line(self, line: str) -> None:
        self.console.print_line(line)

    def on_choice(self, name: str, choice: Choice) -> None:
        self._logged_choices.add(name)
        if name == "precision" or (name == "device" and choice.value != "cpu"):
            self.on_line(f"{name}: {choice}")
        else:
            super().on_choice(name, choice)

    def on_plan(self, plan: Plan, limit_bytes: int) -> None:
        self._planned = plan.peak_resident_bytes
        tight = ", which is tight" if limit_bytes * TIGHT_SHARE < plan.required_bytes <= limit_bytes else ""
        on = "" if plan.device == "cpu" else f" on {plan.device}"
        self.on_line(f"memory: {gigabytes(self._planned)} planned of {gigabytes(limit_bytes)}{on}{tight}")
        for line in [*map(Detail, plan_lines(plan, limit_bytes)), *long_rows_lines(plan)]:
            self.on_line(line)
        if plan.seconds is not None:
            remaining = plan.seconds - sum(plan.seconds_by_phase.get(name, 0.0) for name in ("starting", "reading"))
            end = f"about {duration(remaining)}, until {format_time(time.time() + remaining, short=True)}"
            uncertain = f"; uncertain: {plan.time_uncertain}" if plan.time_uncertain else ""
            self.on_line(f"time: {end} ({duration(plan.seconds_per_step)} per step{uncertain})")

    def on_start(self, start: RunStart) -> None:
        self._first_model = "base model" if start.config.start_from is None else "start"
        for name, choice in start.chosen.items():
            if name not in self._logged_choices:
                self.on_choice(name, choice)
        for line in start_lines(start):
            self.on_line(line)

    def on_begin(self, state: TrainState) -> None:
        self._line = LiveLine(state.total_steps, state.step, planned=self._planned)
        self._state = state
        self._last_line_time = time.monotonic()
        if self.console.redraws:
            self._live = Live(self._line, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        self._wait_for(state.step + 1)

    def _wait_for(self, step: int) -> None:
        """Show a step as work in progress, unless the terminal has a live line."""
        if self._live is None and step <= self._line.total:
            self._step_progress.enter_context(track_progress(f"computing step {step:,} of {self._line.total:,}"))

    def on_step(self, step: Step) -> None:
        self._step_progress.close()
        line = self._line
        line.metric = "reward" if "reward" in step.metrics else "loss"
        line.value = step.metrics.get("reward", step.loss)
        line.length = step.metrics.get("length")
        self._mean = line.mean = update_mean(self._mean, line.value)
        decay = math.exp(-step.seconds / SPEED_MEMORY)
        self._tokens = decay * self._tokens + step.tokens
        self._seconds = decay * self._seconds + step.seconds
        self._steps = decay * self._steps + 1
        line.step = step.step
        if self._state is not None:
            line.total = self._state.total_steps  # updated during a run with a time budget
        line.tokens_per_second = self._tokens / self._seconds if self._seconds else None
        line.memory = resident_bytes()
        line.remaining_seconds = self._seconds / self._steps * (line.total - step.step)
        self._name_load()
        if self._live is not None:
            return
        if step.seconds > FIRST_LINE:
            self._wait_for(step.step + 1)
        now = time.monotonic()
        if now - self._last_line_time >= NEXT_LINE or step.step in (1, line.total):
            self._last_line_time = now
            self.on_line(line.log_line(min(WIDTH, self.console.width)))

    def _name_load(self) -> None:
        """Print once that other programs slow down the run."""
        watch = current_watch()
        if watch is not None and watch.is_busy and not self._named_load:
            self._named_load = True
            self.on_line("other programs use the CPU, so steps take longer than predicted")

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if step < self._line.total:
            named = evaluation.named_metrics().items()
            metrics = ", ".join(f"{metric_name(name)} {metric_value(name, value)}" for name, value in named)
            self.on_line(f"step {step}/{self._line.total}  held-out {metrics}")

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        if step == 0:
            self._base = {sample.row: sample.answer for sample in samples}
        for sample in samples[:MAX_SAMPLES]:
            prompt = one_line(sample.prompt, 24)
            width = WIDTH - len(f'step {step}, row {sample.row}: "" -> ""') - 24
            if not self._is_finished:
                line = f'step {step}, row {sample.row}: "{prompt}" -> "{one_line(sample.answer, width)}"'
                self.on_line(line if step else Detail(line))
                continue
            self.on_line(f'row {sample.row}: "{one_line(sample.prompt, WIDTH - len(f"row {sample.row}: ") - 2)}"')
            texts = {
                self._first_model: self._base.get(sample.row),
                "adapter": sample.answer,
                "expected": sample.expected,
            }
            for name, text in texts.items():
                if text is not None:
                    self.on_line(f"  {name + ':':<12}{one_line(text, WIDTH - 14)}")

    def on_rate_search(self, search: RateSearch, folder: Path) -> None:
        write_rate_figure(search, folder)

    def on_end(self, outcome: Outcome | None) -> None:
        self._is_finished = True
        self._step_progress.close()
        if self._live is not None:
            self._live.stop()
            self._live = None
