"""The line that a terminal shows while a run trains: it fits the width; what matters least goes first."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

# Characters of the bar, where there is room.
BAR_LEAST, BAR_MOST = 8, 30


@dataclass
class LiveLine:
    """What the line shows; it is drawn anew from these values.

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
        words = [word for _, word in pieces]
        line = Text(words[0], style="bold")
        if room >= BAR_LEAST:
            line.append("  ").append_text(self._bar(min(room, BAR_MOST)))
        for word in words[1:]:
            line.append(f"  {word}", style="not bold")
        line.truncate(width)
        return line

    def _bar(self, length: int) -> Text:
        filled = round(length * min(1.0, self.step / self.total)) if self.total else 0
        return Text().append("━" * filled, "cyan").append("━" * (length - filled), "bright_black")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text(options.max_width)


def clock(seconds: float) -> str:
    """``0:07``, ``12:05``, ``3:02:10``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _length(pieces: list[tuple[int, str]]) -> int:
    return sum(len(word) + 2 for _, word in pieces) - 2
