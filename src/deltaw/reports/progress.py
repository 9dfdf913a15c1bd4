"""What a person sees of a run while it goes on: a header and a live line on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from deltaw.host.choices import Choice
from deltaw.host.memory import resident_bytes
from deltaw.memory.plan import Plan
from deltaw.reports.header import run_header
from deltaw.reports.live import LiveLine, clock
from deltaw.reports.plan import plan_lines
from deltaw.reports.rate_figure import write_rate_figure
from deltaw.training.callbacks import Callback, RunStart
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.rate_curve import RateSearch
from deltaw.training.monitoring.written_answers import Sample
from deltaw.training.state import Outcome, Step, TrainState

# Seconds between lines where there is no terminal to redraw.
PLAIN_INTERVAL = 10.0
# The loss shown is a running mean, so that it can be read.
SMOOTHING = 0.9


class TerminalCallback(Callback):
    """Shows a run on a console.

    On a terminal: notes as they come, one table with all that was chosen, and while it trains one line with
    the loss and its running mean, tokens per second, memory now and planned, and the time left. Elsewhere
    each of these is a line of text.
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
        if now - self._said >= PLAIN_INTERVAL or step.step in (1, line.total):
            self._said = now
            self.on_line(plain_line(line))

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if step < self._line.total:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.named_metrics().items())
            self.on_line(f"step {step}/{self._line.total}  held-out {shown}")

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        who = "base model" if step == 0 else f"step {step}"
        for sample in samples:
            shown = (_one_line(sample.prompt), _one_line(sample.answer), _one_line(sample.expected))
            self.on_line("{}, row {}: {} -> {} (expected {})".format(who, sample.row, *shown))

    def on_rate_search(self, search: RateSearch, folder: Path) -> None:
        write_rate_figure(search, folder)

    def on_end(self, outcome: Outcome | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def plain_line(line: LiveLine) -> str:
    """All of a live line as text for a log."""
    of = "" if line.planned is None else f" of {line.planned / 1e9:.2f}"
    speed = "" if line.tokens_per_second is None else f"  {line.tokens_per_second:,.0f} tokens/s"
    left = "" if line.left is None else f"  {clock(line.left)} left"
    return (
        f"step {line.step}/{line.total}  loss {line.loss:.4f}  mean {line.mean:.4f}{speed}  "
        f"{line.memory / 1e9:.2f}{of} GB{left}"
    )


def _one_line(text: str, most: int = 60) -> str:
    """A text in one line of so many characters, in quotation marks."""
    joined = " ".join(text.split())
    return f'"{joined if len(joined) <= most else joined[: most - 1] + "…"}"'
