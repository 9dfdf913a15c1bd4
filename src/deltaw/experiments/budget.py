"""How long a training of a comparison may take at most: in steps, in time, or both.

It knows settings and numbers, and no training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from deltaw.errors import UserError
from deltaw.train_settings import TrainSettings
from deltaw.training.loop import count_steps

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(r"(?:\d+(?:\.\d+)?[hms])+")


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

    Raises:
        UserError: ``train.time`` is no time.
    """
    if settings.time is not None:
        return Budget(settings.max_steps, seconds_of(settings.time))
    return Budget(count_steps(rows, settings.batch_size, settings.epochs, settings.max_steps))


def seconds_of(text: str, where: str = "train.time") -> float:
    """The seconds of ``90s``, ``10m``, ``1.5h`` or ``1h30m``.

    Raises:
        UserError: it is none of the kind, or nothing.
    """
    plain = text.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", plain) if _TIME.fullmatch(plain) else []
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not seconds:
        raise UserError(f"'{text}' is not a time", where=where, hint="write 90s, 10m, 2h or 1h30m")
    return seconds
