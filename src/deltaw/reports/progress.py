"""What a person sees of a run while it goes on: a header and a live line on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from deltaw.machine.choices import Choice
from deltaw.machine.memory import resident_bytes
from deltaw.memory.plan import Plan
from deltaw.reports.page.run_view import doubts
from deltaw.reports.page.svg import smoothed
from deltaw.reports.page.write import NAME as REPORT
from deltaw.reports.page.write import write_rate_figure
from deltaw.reports.plan import long_rows_lines, plan_lines
from deltaw.reports.tables import WIDTH, Output, one_line
from deltaw.reports.wording import by_part, count, duration, gigabytes, metric_name, metric_value, rate, shown
from deltaw.reports.working import FIRST_LINE, NEXT_LINE
from deltaw.runs.fit import Result
from deltaw.runs.folder import FINISHED, INTERRUPTED, Run
from deltaw.runs.summary import next_commands
from deltaw.training.callbacks import Callback, RateSearch, RunStart, Sample
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import Outcome, Step, TrainState
from deltaw.working import Detail, working

# Of the memory that the machine gives; a plan above this share of it is called tight.
TIGHT = 0.9
# Commands to go on with and sample answers that are printed; the run's page has all.
COMMANDS, SAMPLES = 4, 2
# Characters of the bar of a live line, where there is room.
BAR_LEAST, BAR_MOST = 8, 30
# The loss or reward shown is a running mean, so that it can be read.
SMOOTHING = 0.9


def show_end(console: Output, result: Result) -> None:
    """What a run came to, and the commands that go on from there, each on a line of its own, so that it can be
    copied."""
    for name, text in closing_rows(result):
        console.say(f"{name}: {text}" if name else f"  {text}")
    state = INTERRUPTED if result.interrupted else FINISHED
    if (result.output / REPORT).is_file():
        console.say(f"report: {result.output / REPORT}")
    commands = next_commands(result.output, state, result.method, result.task, writes_text=result.writes_text)
    for entry in commands[: None if console.verbose else COMMANDS]:
        line, what = f"next: {entry['command']}", f"  # {entry['what']}"
        console.print(line + what if len(line + what) <= WIDTH else f"{line}\n{what}")
    if verdict := result.generation.get("line"):
        console.print(Text(verdict), soft_wrap=True)  # one line, so that scripts can read the last one


def closing_rows(result: Result) -> Iterator[tuple[str, str]]:
    """Name and text of each line."""
    done, generation = result.outcome, result.generation
    if text := generation.get("line"):
        name, _, reasons = str(text).partition(": ")
        yield name, reasons
        yield from [("", str(generation["hint"]))] if generation["hint"] else []
    if result.interrupted:
        steps = "1 step" if done.steps == 1 else f"{done.steps:,} steps"
        yield f"interrupted after {steps}", "the adapter of the last whole step is saved"
    if done.seconds:
        speed = f"{rate(done.rows / done.seconds)} rows/s, {done.tokens / done.seconds:,.0f} tokens/s"
        yield "training", f"{done.rows:,} rows, {done.steps:,} steps in {duration(done.seconds)}: {speed}"
    if (run := Run(result.output)).progress == "reward":
        _, rewards = run.metrics.column("reward")
        ends = " → ".join(metric_value("reward", float(value)) for value in smoothed(rewards)[[0, -1]])
        yield "training reward", f"{ends}, the first step's and the mean of the last"
    elif done.steps:
        yield "training loss", f"{done.loss:.4f}, the mean over all steps"
    if result.stopped_early is not None:
        yield "stopped early", result.stopped_early
    evaluation, base = result.evaluation, {metric_name(k): v for k, v in run.base.items()}
    intervals = evaluation.named_intervals()
    if base and evaluation.metrics:
        yield "held-out rows", f"{'base model' if result.writes_text else 'before training'} → after training"
    for name, value in evaluation.named_metrics().items():
        shown = " to ".join(metric_value(name, bound) for bound in intervals.get(name, ()))
        interval = f" (95 % interval {shown})" if shown else ""
        before = f"{metric_value(name, base[metric_name(name)])} → " if metric_name(name) in base else ""
        yield f"held-out {metric_name(name)}", before + metric_value(name, value) + interval
    yield from (("", line) for line in doubts(run))
    planned = result.planned_memory_bytes
    told = "" if planned is None else f", {gigabytes(planned)} planned"
    yield "memory", f"{gigabytes(result.peak_memory_bytes)} at the peak{told}"
    if result.seconds_by_part:
        first, *more = by_part(result.seconds_by_part, WIDTH - len("time: "))
        yield from [("time", first), *(("", line) for line in more)]
    if result.drift is not None:
        first, *more = result.drift.lines()
        yield "drift", first.removeprefix("drift: ")
        for line in more:
            yield "", line.strip()
    yield "adapter", os.fspath(result.output)


def first_lines(start: RunStart) -> Iterator[str]:
    """What a run is about to do; the rows, the memory and the precision were told before."""
    config, train = start.config, start.config.train
    share = start.trained_parameters / start.total_parameters if start.total_parameters else 0.0
    rank = f" of rank {config.lora.rank}" if config.method == "lora" else ""
    trained = f"{count(start.trained_parameters)} of {count(start.total_parameters)} parameters trained"
    yield Detail(f"method: {config.method}{rank}: {trained} ({share:.2%})")
    epochs = "1 epoch" if train.epochs == 1 else f"{train.epochs:g} epochs"
    length = epochs if train.max_steps is None else f"max_steps: {train.max_steps}"
    rate = start.chosen.get("train.learning_rate", Choice(train.learning_rate, "as set"))
    yield f"steps: {start.total_steps:,} of {train.batch_size} rows ({length}), learning rate {shown(rate.value)}"
    yield f"output: {start.folder} ({REPORT} shows how it goes, run.yaml every choice)"


@dataclass
class LiveLine:
    """The line that shows how a training goes. On a terminal it fits the width: what matters least goes first.

    Attributes:
        step, total: done and planned. metric: what is shown of the steps: ``loss``, or ``reward`` where there is one.
        value: that of the last step. mean: its running mean. length: of completions, in tokens.
        tokens_per_second: of training. memory, planned: bytes that the process holds, and at its planned
            peak. left: seconds, None where nothing is known yet.
    """

    total: int
    step: int = 0
    value: float | None = None
    mean: float | None = None
    tokens_per_second: float | None = None
    memory: int = 0
    planned: int | None = None
    left: float | None = None
    metric: str = "loss"
    length: float | None = None

    def pieces(self) -> list[tuple[int, str]]:
        """The parts from left to right, each with its importance: 0 always stays."""
        memory = f"{self.memory / 1e9:.2f}"
        of = "" if self.planned is None else f"/{self.planned / 1e9:.2f}"
        found = [(0, f"step {self.step:,}/{self.total:,}")]
        if self.value is not None and self.mean is not None:
            mean = "mean" if self.metric == "loss" else f"mean {self.metric}"
            found += [(4, f"{self.metric} {self.value:.4f}"), (0, f"{mean} {self.mean:.4f}")]
        if self.length is not None:
            found.append((2, f"length {self.length:.0f}"))
        if self.tokens_per_second is not None:
            found.append((2, f"{self.tokens_per_second:,.0f} tokens/s"))
        if self.memory:
            found.append((3, f"{memory}{of} GB"))
        if self.left is not None:
            found.append((1, f"{clock(self.left)} left"))
        return found

    def fitting(self, width: int) -> list[tuple[int, str]]:
        """The parts without those that matter least, so that they fit the width if they can."""
        pieces = self.pieces()
        while _length(pieces) > width and any(importance for importance, _ in pieces):
            least = max(importance for importance, _ in pieces)
            pieces = [piece for piece in pieces if piece[0] != least]
        return pieces

    def words(self, width: int) -> str:
        """The line of a log."""
        return "  ".join(word for _, word in self.fitting(width))

    def text(self, width: int) -> Text:
        """The line in at most ``width`` characters."""
        pieces = self.fitting(width)
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


def running_mean(mean: float | None, value: float) -> float:
    """The mean of the values up to now, the latest of which count most."""
    return value if mean is None else SMOOTHING * mean + (1 - SMOOTHING) * value


def clock(seconds: float) -> str:
    """``0:07``, ``12:05``, ``3:02:10``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _length(pieces: list[tuple[int, str]]) -> int:
    return sum(len(word) + 2 for _, word in pieces) - 2


class TerminalCallback(Callback):
    """Shows a run on a console: in a few lines what it is about to do, how the training goes, answers.

    On a terminal that redraws a line, one shows the loss or the reward and its running mean, tokens per second,
    memory now and planned, and the time left. Elsewhere the same is printed now and then.
    """

    def __init__(self, console: Output) -> None:
        self.console = console
        self._line = LiveLine(0)
        self._state: TrainState | None = None
        self._live: Live | None = None
        self._planned: int | None = None
        self._mean: float | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._steps = 0
        self._said = time.monotonic()
        self._base: dict[int, str] = {}
        self._told: set[str] = set()
        self._waiting = contextlib.ExitStack()
        self._over = False

    def on_line(self, line: str) -> None:
        self.console.say(line)

    def on_choice(self, name: str, choice: Choice) -> None:
        self._told.add(name)
        if name == "precision" or (name == "device" and choice.value != "cpu"):
            self.on_line(f"{name}: {choice}")
        else:
            super().on_choice(name, choice)

    def on_plan(self, plan: Plan, limit_bytes: int) -> None:
        self._planned = plan.peak_resident_bytes
        tight = ", which is tight" if limit_bytes * TIGHT < self._planned <= limit_bytes else ""
        self.on_line(f"memory: {gigabytes(self._planned)} planned of {gigabytes(limit_bytes)}{tight}")
        for line in [*map(Detail, plan_lines(plan, limit_bytes)), *long_rows_lines(plan)]:
            self.on_line(line)

    def on_start(self, start: RunStart) -> None:
        for name, choice in start.chosen.items():
            if name not in self._told:
                self.on_choice(name, choice)
        for line in first_lines(start):
            self.on_line(line)

    def on_begin(self, state: TrainState) -> None:
        self._line = LiveLine(state.total_steps, state.step, planned=self._planned)
        self._state = state
        self._said = time.monotonic()
        if self.console.redraws:
            self._live = Live(self._line, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        self._wait_for(state.step + 1)

    def _wait_for(self, step: int) -> None:
        """Until it is done, a step is long work; a terminal has its live line."""
        if self._live is None and step <= self._line.total:
            self._waiting.enter_context(working(f"computing step {step:,} of {self._line.total:,}"))

    def on_step(self, step: Step) -> None:
        self._waiting.close()
        line = self._line
        line.metric = "reward" if "reward" in step.metrics else "loss"
        line.value, line.length = step.metrics.get("reward", step.loss), step.metrics.get("length")
        self._mean = line.mean = running_mean(self._mean, line.value)
        self._tokens += step.tokens
        self._seconds += step.seconds
        self._steps += 1
        line.step = step.step
        if self._state is not None:
            line.total = self._state.total_steps  # a time budget plans it anew
        line.tokens_per_second = self._tokens / self._seconds if self._seconds else None
        line.memory = resident_bytes()
        line.left = self._seconds / self._steps * (line.total - step.step)
        if self._live is not None:
            return
        if step.seconds > FIRST_LINE:
            self._wait_for(step.step + 1)
        now = time.monotonic()
        if now - self._said >= NEXT_LINE or step.step in (1, line.total):
            self._said = now
            self.on_line(line.words(min(WIDTH, self.console.width)))

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if step < self._line.total:
            named = evaluation.named_metrics().items()
            shown = ", ".join(f"{metric_name(name)} {metric_value(name, value)}" for name, value in named)
            self.on_line(f"step {step}/{self._line.total}  held-out {shown}")

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        if step == 0:
            self._base = {sample.row: sample.answer for sample in samples}
        for sample in samples[:SAMPLES]:
            prompt, most = one_line(sample.prompt, 24), WIDTH - len(f'step {step}, row {sample.row}: "" -> ""') - 24
            if not self._over:
                told = f'step {step}, row {sample.row}: "{prompt}" -> "{one_line(sample.answer, most)}"'
                self.on_line(told if step else Detail(told))
                continue
            self.on_line(f'row {sample.row}: "{one_line(sample.prompt, WIDTH - len(f"row {sample.row}: ") - 2)}"')
            texts = {"base model": self._base.get(sample.row), "adapter": sample.answer, "expected": sample.expected}
            for name, text in texts.items():
                if text is not None:
                    self.on_line(f"  {name + ':':<12}{one_line(text, WIDTH - 14)}")

    def on_rate_search(self, search: RateSearch, folder: Path) -> None:
        write_rate_figure(search, folder)

    def on_end(self, outcome: Outcome | None) -> None:
        self._over = True
        self._waiting.close()
        if self._live is not None:
            self._live.stop()
            self._live = None
