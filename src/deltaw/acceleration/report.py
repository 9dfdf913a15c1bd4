"""Report of the parts that run accelerated, and of the reasons for the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Report:
    """Effect of :func:`deltaw.accelerate`. ``print(report)`` shows it as a table.

    Attributes:
        parts: Accelerated parts with a description, in the order of the computation.
        refused: Parts that run the original code of the model or the trainer, with the reason.
        fallbacks: Number of calls that ran the model's original code, by reason, updated during training.
        restore: Undoes the acceleration.
    """

    parts: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    restore: Callable[[], None] = field(default=lambda: None, repr=False)

    def accept(self, part: str, description: str) -> None:
        """Record that a part runs accelerated."""
        self.refused.pop(part, None)
        self.parts[part] = description

    def refuse(self, part: str, reason: str) -> None:
        """Record that a part runs its original code."""
        self.parts.pop(part, None)
        self.refused[part] = reason

    def count_fallback(self, reason: str) -> None:
        """Count a call that ran the model's original code."""
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __str__(self) -> str:
        rows = [("accelerated", part, text) for part, text in self.parts.items()]
        rows += [("unchanged", part, text) for part, text in self.refused.items()]
        rows += [("unchanged", f"{count} calls", reason) for reason, count in self.fallbacks.items()]
        if not rows:
            return "nothing is accelerated"
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
