"""What a person sees while a run trains: one moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deltaw.host.memory import resident_bytes
from deltaw.training.loop import Step

# Seconds between lines where there is no terminal to redraw.
PLAIN_INTERVAL = 10.0
# The loss shown is a running mean, so that it can be read.
SMOOTHING = 0.9


class TrainingProgress:
    """A context manager whose :meth:`update` is called after every step.

    It shows the loss (a running mean), tokens a second, the time left and the process's resident memory.
    """

    def __init__(self, console: Console, total_steps: int) -> None:
        self.console = console
        self.total = total_steps
        self._loss: float | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, facts="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: Step) -> None:
        self._loss = step.loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * step.loss
        self._tokens += step.tokens
        self._seconds += step.seconds
        facts = (
            f"loss {self._loss:.4f}  {self._tokens / self._seconds:,.0f} tokens/s"
            f"  {resident_bytes() / 1e9:.2f} GB"
        )
        self._bar.update(self._task, advance=1, facts=facts)
        now = time.monotonic()
        if not self.console.is_terminal and (
            now - self._said >= PLAIN_INTERVAL or step.step in (1, self.total)
        ):
            self._said = now
            left = self._seconds / step.step * (self.total - step.step)
            self.console.print(f"step {step.step}/{self.total}  {facts}  {left:.0f} s left", highlight=False)
