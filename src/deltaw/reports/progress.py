"""What a person sees of a run while it goes on: a header and a live line on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from deltaw.machine.choices import Choice
from deltaw.machine.memory import resident_bytes
from deltaw.memory.plan import Plan
from deltaw.reports.page.write import NAME as REPORT
from deltaw.reports.page.write import write_rate_figure
from deltaw.reports.plan import plan_lines
from deltaw.reports.tables import facts, one_line
from deltaw.reports.wording import count, duration, gigabytes, metric_name, metric_value, rate, shown
from deltaw.reports.working import NEXT_LINE
from deltaw.runs.fit import Result
from deltaw.runs.folder import FINISHED, INTERRUPTED, Run
from deltaw.runs.summary import next_commands
from deltaw.training.callbacks import Callback, RateSearch, RunStart, Sample
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import Outcome, Step, TrainState
from deltaw.version import __version__

# Columns of what is printed: longer lines are hard to read.
WIDTH = 80
# Characters of the bar of a live line, where there is room.
BAR_LEAST, BAR_MOST = 8, 30
# The loss shown is a running mean, so that it can be read.
SMOOTHING = 0.9
# Sample answers that are printed; the page has all.
SAMPLES = 2


def show_end(console: Console, result: Result) -> None:
    """What a run came to, and the commands that go on from there, each on a line of its own, so that it can be
    copied."""
    rows = closing_rows(result)
    if console.is_terminal:
        console.print()
        console.print(facts(rows, min(100, console.width), fold=True), soft_wrap=False)
        console.print()
    else:
        for name, text in rows:
            console.print(f"{name}: {text}" if name else f"  {text}")
    state = INTERRUPTED if result.interrupted else FINISHED
    if (result.output / REPORT).is_file():
        console.print(f"report: {result.output / REPORT}")
    for entry in next_commands(result.output, state, result.method, result.writes_text):
        console.print(f"next: {entry['command']}  # {entry['what']}")


def closing_rows(result: Result) -> Iterator[tuple[str, str]]:
    """Name and text of each line."""
    done = result.outcome
    if result.interrupted:
        steps = "1 step" if done.steps == 1 else f"{done.steps:,} steps"
        yield f"interrupted after {steps}", "the adapter of the last whole step is saved"
    if done.seconds:
        speed = f"{rate(done.rows / done.seconds)} rows/s, {done.tokens / done.seconds:,.0f} tokens/s"
        yield "training", f"{done.rows:,} rows, {done.steps:,} steps in {duration(done.seconds)}: {speed}"
    if done.steps:
        yield "training loss", f"{done.loss:.4f}, the mean over all steps"
    if result.stopped_early is not None:
        yield "stopped early", result.stopped_early
    evaluation, base = result.evaluation, {metric_name(k): v for k, v in Run(result.output).base.items()}
    main = f"{evaluation.name} {evaluation.main}".strip()
    if base and evaluation.metrics:
        yield "held-out rows", f"{'base model' if result.writes_text else 'before training'} → after training"
    for name, value in evaluation.named_metrics().items():
        bounds = (evaluation.interval if name == main else None) or ()
        shown = " to ".join(metric_value(name, bound) for bound in bounds)
        interval = f" (95 % interval {shown})" if shown else ""
        before = f"{metric_value(name, base[metric_name(name)])} → " if metric_name(name) in base else ""
        yield f"held-out {metric_name(name)}", before + metric_value(name, value) + interval
    planned = result.planned_memory_bytes
    told = "" if planned is None else f", {gigabytes(planned)} planned"
    yield "memory", f"{gigabytes(result.peak_memory_bytes)} at the peak{told}"
    if result.drift is not None:
        first, *more = result.drift.lines()
        yield "drift", first.removeprefix("drift: ")
        for line in more:
            yield "", line.strip()
    yield "adapter", os.fspath(result.output)


def run_header(start: RunStart, plan: Plan | None, limit_bytes: int | None, width: int) -> RenderableType:
    """What a run is about to do, one fact a line in at most ``width`` columns: each value, and why it was chosen.
    What does not fit is in the run's ``run.yaml``.

    Args:
        plan: of the run's memory; None where there is none. limit_bytes: that the machine gives.
    """
    rows = [
        (name, Text(one_line(value, WIDTH // 2, end=True), style="bold").append(f"  {why}", style="not bold"))
        for name, value, why in header_rows(start, plan, limit_bytes)
    ]
    title = Text(one_line(os.fspath(start.folder), WIDTH - 20, end=True), style="bold").append(
        f"  deltaw {__version__}", style="dim"
    )
    return Group(Text(), title, facts(rows, min(width, WIDTH), fold=False), Text())


def header_rows(start: RunStart, plan: Plan | None, limit_bytes: int | None) -> Iterator[tuple[str, str, str]]:
    """Name, value and reason of each line."""
    config, train = start.config, start.config.train
    share = start.trained_parameters / start.total_parameters if start.total_parameters else 0.0
    yield "model", config.model, f"{count(start.total_parameters)} parameters"
    trained = f"{count(start.trained_parameters)} parameters trained ({share:.2%})"
    if config.method == "lora":
        targets = shown(config.lora.target_modules)
        trained += f"; rank {config.lora.rank}, alpha {config.lora.alpha:g}, {targets}"
    yield "method", config.method, trained
    held_out = f"{config.data.eval:g}" if isinstance(config.data.eval, float) else config.data.eval
    yield "data", shown(config.data.train), "" if held_out is None else f"eval: {held_out}"
    length = f"{train.epochs:g} epochs" if train.max_steps is None else f"max_steps: {train.max_steps}"
    yield "steps", f"{start.total_steps:,}", f"of {train.batch_size} rows; {length}"
    told = dict(start.chosen)
    rate = told.pop("train.learning_rate", Choice(train.learning_rate, "as set"))
    yield "learning rate", shown(rate.value), f"{rate.why}; {train.schedule}, warm-up {train.warmup:g}"
    for name, choice in told.items():
        yield name.rpartition(".")[2].replace("_", " "), shown(choice.value), choice.why
    if plan is not None:
        of = "" if limit_bytes is None else f"of {gigabytes(limit_bytes)}; "
        yield "memory", gigabytes(plan.peak_resident_bytes), f"{of}planned, at its peak in the {plan.phase}"
    if config.track is not None:
        yield "track", config.track, "as set"


@dataclass
class LiveLine:
    """The line that shows how a training goes. On a terminal it fits the width: what matters least goes first.

    Attributes:
        step, total: done and planned. loss: of the last step. mean: its running mean.
        tokens_per_second: of training. memory, planned: bytes that the process holds, and at its planned
            peak. left: seconds, None where nothing is known yet.
    """

    total: int
    step: int = 0
    loss: float | None = None
    mean: float | None = None
    tokens_per_second: float | None = None
    memory: int = 0
    planned: int | None = None
    left: float | None = None

    def pieces(self) -> list[tuple[int, str]]:
        """The parts from left to right, each with its importance: 0 always stays."""
        memory = f"{self.memory / 1e9:.2f}"
        of = "" if self.planned is None else f"/{self.planned / 1e9:.2f}"
        found = [(0, f"step {self.step:,}/{self.total:,}")]
        if self.loss is not None and self.mean is not None:
            found += [(4, f"loss {self.loss:.4f}"), (0, f"mean {self.mean:.4f}")]
        if self.tokens_per_second is not None:
            found.append((2, f"{self.tokens_per_second:,.0f} tokens/s"))
        if self.memory:
            found.append((3, f"{memory}{of} GB"))
        if self.left is not None:
            found.append((1, f"{clock(self.left)} left"))
        return found

    def text(self, width: int) -> Text:
        """The line in at most ``width`` characters."""
        pieces = self.pieces()
        while _length(pieces) > width and any(importance for importance, _ in pieces):
            least = max(importance for importance, _ in pieces)
            pieces = [piece for piece in pieces if piece[0] != least]
        room = width - _length(pieces) - 2
        (_, first), *others = pieces
        line = Text(first, style="bold")
        if room >= BAR_LEAST:
            length = min(room, BAR_MOST)
            filled = round(length * min(1.0, self.step / self.total)) if self.total else 0
            line.append("  ").append("━" * filled, "cyan").append("━" * (length - filled), "bright_black")
        for _, word in others:
            line.append(f"  {word}", style="not bold")
        line.truncate(width)
        return line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text(options.max_width)


def clock(seconds: float) -> str:
    """``0:07``, ``12:05``, ``3:02:10``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _length(pieces: list[tuple[int, str]]) -> int:
    return sum(len(word) + 2 for _, word in pieces) - 2


class TerminalCallback(Callback):
    """Shows a run on a console.

    On a terminal: notes as they come, a header with all that was chosen, and while it trains one line with
    the loss and its running mean, tokens per second, memory now and planned, and the time left. Elsewhere
    each of these is a line of text, and how the training goes is told now and then.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._line = LiveLine(0)
        self._state: TrainState | None = None
        self._live: Live | None = None
        self._plan: tuple[Plan, int] | None = None
        self._mean: float | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._steps = 0
        self._said = time.monotonic()

    def on_line(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def on_choice(self, name: str, choice: Choice) -> None:
        if not self.console.is_terminal:  # a terminal has them in the header
            super().on_choice(name, choice)

    def on_plan(self, plan: Plan, limit_bytes: int) -> None:
        self._plan = (plan, limit_bytes)
        if not self.console.is_terminal or plan.peak_resident_bytes > limit_bytes:
            for line in plan_lines(plan, limit_bytes):
                self.on_line(line)

    def on_start(self, start: RunStart) -> None:
        if self.console.is_terminal:
            plan, limit = self._plan or (None, None)
            self.console.print(run_header(start, plan, limit, self.console.width), soft_wrap=False)

    def on_begin(self, state: TrainState) -> None:
        planned = None if self._plan is None else self._plan[0].peak_resident_bytes
        self._line = LiveLine(state.total_steps, state.step, planned=planned)
        self._state = state
        self._said = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(self._line, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def on_step(self, step: Step) -> None:
        line = self._line
        self._mean = step.loss if self._mean is None else SMOOTHING * self._mean + (1 - SMOOTHING) * step.loss
        self._tokens += step.tokens
        self._seconds += step.seconds
        self._steps += 1
        line.step, line.loss, line.mean = step.step, step.loss, self._mean
        if self._state is not None:
            line.total = self._state.total_steps  # a time budget plans it anew
        line.tokens_per_second = self._tokens / self._seconds if self._seconds else None
        line.memory = resident_bytes()
        line.left = self._seconds / self._steps * (line.total - step.step)
        if self._live is not None:
            return
        now = time.monotonic()
        if now - self._said >= NEXT_LINE or step.step in (1, line.total):
            self._said = now
            self.on_line("  ".join(word for _, word in line.pieces()))

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if step < self._line.total:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.named_metrics().items())
            self.on_line(f"step {step}/{self._line.total}  held-out {shown}")

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        who = "base model" if step == 0 else f"step {step}"
        for sample in samples[:SAMPLES]:
            prompt, answer, expected = (one_line(t, 60) for t in (sample.prompt, sample.answer, sample.expected))
            self.on_line(f'{who}, row {sample.row}: "{prompt}" -> "{answer}" (expected "{expected}")')

    def on_rate_search(self, search: RateSearch, folder: Path) -> None:
        write_rate_figure(search, folder)

    def on_end(self, outcome: Outcome | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
