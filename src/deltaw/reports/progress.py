"""What a person sees of a run: its lines, and its progress as a bar on a terminal or as lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deltaw.host.memory import resident_bytes
from deltaw.memory.plan import Plan
from deltaw.reports.plan import plan_lines
from deltaw.reports.rate_figure import write_rate_figure
from deltaw.training.callbacks import Callback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.rate_curve import RateSearch
from deltaw.training.monitoring.written_answers import Sample
from deltaw.training.state import Outcome, Step, TrainState

# Seconds between lines where there is no terminal to redraw.
PLAIN_INTERVAL = 10.0
# The loss shown is a running mean, so that it can be read.
SMOOTHING = 0.9


class TerminalCallback(Callback):
    """Shows a run on a console: its choices and its plan; while it trains, the loss (a running mean), tokens
    per second, the time left and the process's resident memory."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._total = 0
        self._state: TrainState | None = None
        self._loss: float | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._said = time.monotonic()
        self._bar: Progress | None = None

    def on_line(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def on_plan(self, plan: Plan, limit_bytes: int) -> None:
        for line in plan_lines(plan, limit_bytes):
            self.on_line(line)

    def on_begin(self, state: TrainState) -> None:
        self._total = state.total_steps
        self._state = state
        self._said = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._bar.add_task("", total=self._total, completed=state.step, facts="")
            self._bar.start()

    def on_step(self, step: Step) -> None:
        if self._state is not None and self._state.total_steps != self._total:  # planned anew
            self._total = self._state.total_steps
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], total=self._total)
        self._loss = step.loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * step.loss
        self._tokens += step.tokens
        self._seconds += step.seconds
        facts = (
            f"loss {self._loss:.4f}  {self._tokens / self._seconds:,.0f} tokens/s"
            f"  {resident_bytes() / 1e9:.2f} GB"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step.step, facts=facts)
            return
        now = time.monotonic()
        if now - self._said >= PLAIN_INTERVAL or step.step in (1, self._total):
            self._said = now
            left = self._seconds / step.step * (self._total - step.step)
            self.on_line(f"step {step.step}/{self._total}  {facts}  {left:.0f} s left")

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if step < self._total:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.named_metrics().items())
            self.on_line(f"step {step}/{self._total}  held-out {shown}")

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        who = "base model" if step == 0 else f"step {step}"
        for sample in samples:
            shown = (_one_line(sample.prompt), _one_line(sample.answer), _one_line(sample.expected))
            self.on_line("{}, row {}: {} -> {} (expected {})".format(who, sample.row, *shown))

    def on_rate_search(self, search: RateSearch, folder: Path) -> None:
        write_rate_figure(search, folder)

    def on_end(self, outcome: Outcome | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _one_line(text: str, most: int = 60) -> str:
    """A text in one line of so many characters, in quotation marks."""
    joined = " ".join(text.split())
    return f'"{joined if len(joined) <= most else joined[: most - 1] + "…"}"'
