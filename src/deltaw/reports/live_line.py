"""Progress line of a training."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

# Width of the progress bar in characters.
MIN_BAR_WIDTH = 8
MAX_BAR_WIDTH = 30
# Decay of the running mean of the loss or reward.
SMOOTHING = 0.9


@dataclass
class LiveLine:
    """Progress line of a training. On a terminal, less important parts are dropped until it fits the width.

    Attributes:
        total: Number of planned steps.
        step: Number of completed steps.
        value: Metric of the last step.
        mean: Running mean of the metric.
        tokens_per_second: Training speed.
        memory: Resident bytes of the process.
        planned: Planned peak memory in bytes.
        remaining_seconds: Remaining seconds, or None if unknown.
        metric: Name of the metric, ``loss`` or ``reward``.
        length: Mean length of the completions in tokens.
    """

    total: int
    step: int = 0
    value: float | None = None
    mean: float | None = None
    tokens_per_second: float | None = None
    memory: int = 0
    planned: int | None = None
    remaining_seconds: float | None = None
    metric: str = "loss"
    length: float | None = None

    def parts(self) -> list[tuple[int, str]]:
        """Return the parts from left to right with their importance. Parts with importance 0 are never dropped."""
        memory = f"{self.memory / 1e9:.2f}"
        planned = "" if self.planned is None else f"/{self.planned / 1e9:.2f}"
        parts = [(0, f"step {self.step:,}/{self.total:,}")]
        if self.value is not None and self.mean is not None:
            mean = "mean" if self.metric == "loss" else f"mean {self.metric}"
            parts += [(4, f"{self.metric} {self.value:.4f}"), (0, f"{mean} {self.mean:.4f}")]
        if self.length is not None:
            parts.append((2, f"length {self.length:.0f}"))
        if self.tokens_per_second is not None:
            parts.append((2, f"{self.tokens_per_second:,.0f} tokens/s"))
        if self.memory:
            parts.append((3, f"{memory}{planned} GB"))
        if self.remaining_seconds is not None:
            parts.append((1, f"{clock(self.remaining_seconds)} left"))
        return parts

    def fitting_parts(self, width: int) -> list[tuple[int, str]]:
        """Return the parts without the least important ones, so that they fit the width if possible."""
        pieces = self.parts()
        while _length(pieces) > width and any(importance for importance, _ in pieces):
            max_importance = max(importance for importance, _ in pieces)
            pieces = [piece for piece in pieces if piece[0] != max_importance]
        return pieces

    def log_line(self, width: int) -> str:
        """Return the line for a log."""
        return "  ".join(word for _, word in self.fitting_parts(width))

    def text(self, width: int) -> Text:
        """Return the line with a progress bar, in at most ``width`` characters."""
        pieces = self.fitting_parts(width)
        available = width - _length(pieces) - 2
        (_, first), *remaining = pieces
        line = Text(first, style="bold")
        if available >= MIN_BAR_WIDTH:
            length = min(available, MAX_BAR_WIDTH)
            filled = round(length * min(1.0, self.step / self.total)) if self.total else 0
            line.append("  ").append("━" * filled, "cyan").append("━" * (length - filled), "bright_black")
        for _, word in remaining:
            line.append(f"  {word}", style="not bold")
        line.truncate(width)
        return line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text(options.max_width)


def update_mean(mean: float | None, value: float) -> float:
    """Return the updated exponential moving average."""
    return value if mean is None else SMOOTHING * mean + (1 - SMOOTHING) * value


def clock(seconds: float) -> str:
    """Format seconds as ``0:07``, ``12:05`` or ``3:02:10``."""
    minutes, remainder = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{remainder:02d}" if hours else f"{minutes}:{remainder:02d}"


def _length(pieces: list[tuple[int, str]]) -> int:
    return sum(len(word) + 2 for _, word in pieces) - 2
