"""How long a training of a comparison may take at most: in steps, in time, or both.

It knows settings and numbers, and no training.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltaw.train_settings import TrainSettings, duration_seconds
from deltaw.training.loop import count_steps


@dataclass(frozen=True)
class Budget:
    """The most that one training may take; at least one of the two is given.

    Attributes:
        steps: optimizer steps. seconds: on the clock, evaluations included.
    """

    steps: int | None = None
    seconds: float | None = None

    def times(self, share: float) -> Budget:
        """A share of it, at least one step."""
        return Budget(
            None if self.steps is None else max(1, round(share * self.steps)),
            None if self.seconds is None else share * self.seconds,
        )


def budget_of(settings: TrainSettings, rows: int) -> Budget:
    """The budget that the settings give: ``train.time``, if it is set, in place of ``train.epochs``.

    Args:
        rows: that are trained on.
    """
    if settings.time is not None:
        return Budget(settings.max_steps, duration_seconds(settings.time))
    return Budget(count_steps(rows, settings.batch_size, settings.epochs, settings.max_steps))
