"""What few rows mean for a run: how far its scores vary, whether it has steps enough, and settings that suit.

It knows numbers of rows alone. A settings file keeps its values: a run says what would suit it better, and
``deltaw init`` writes that.
"""

from __future__ import annotations

import math

from deltaw.settings import TrainSettings
from deltaw.training.evaluation.base import wilson_interval
from deltaw.training.optimizer import count_steps

# Below so many held-out rows, or steps, a run says so.
HELD_OUT, STEPS = 50, 30
# Rows per step that are tried, and the most passes over the rows.
BATCH_SIZES, MOST_EPOCHS = (16, 8, 4), 10
# From so many rows on, one pass over them is usual; else so many.
MANY_ROWS, USUAL_EPOCHS = 1000, 3


def suited(rows: int) -> tuple[int, int]:
    """Epochs and rows per step for so many rows to train on: the largest batch that leaves :data:`STEPS`, and
    more epochs only where the smallest does not."""
    epochs = 1 if rows >= MANY_ROWS else USUAL_EPOCHS
    for batch_size in BATCH_SIZES:
        if count_steps(rows, batch_size, epochs, None) >= STEPS:
            return epochs, batch_size
    least = BATCH_SIZES[-1]
    return min(MOST_EPOCHS, max(epochs, math.ceil(STEPS / math.ceil(max(1, rows) / least)))), least


def held_out_share(rows: int) -> float | None:
    """The share of so many rows to hold out: :data:`HELD_OUT` of them, but 5 to 20 %; None of less than 10."""
    return None if rows < 10 else min(0.2, max(0.05, math.ceil(100 * HELD_OUT / rows) / 100))


def held_out_line(rows: int) -> str | None:
    """What is said of few held-out rows; None where they are enough."""
    if not 0 < rows < HELD_OUT:
        return None
    low, high = wilson_interval(0.5, rows)
    few = "1 held-out row is" if rows == 1 else f"{rows} held-out rows are"
    return f"{few} few: a score such as accuracy is known to ± {50 * (high - low):.0f} points"


def steps_line(rows: int, train: TrainSettings) -> str | None:
    """What is said of few steps; None where they are enough, or asked for by number or time."""
    steps = count_steps(rows, train.batch_size, train.epochs, None)
    if steps >= STEPS or train.max_steps is not None or train.time is not None:
        return None
    epochs, batch_size = suited(rows)
    better, few = count_steps(rows, batch_size, epochs, None), "1 step is" if steps == 1 else f"{steps} steps are"
    changed = [f"train.epochs: {epochs}"] * (epochs != train.epochs)
    changed += [f"train.batch_size: {batch_size}"] * (batch_size != train.batch_size)
    gives = "give" if len(changed) > 1 else "gives"
    more = f"; {' and '.join(changed)} {gives} {better}" if better > steps else ""
    return f"{few} few to learn from{more}"


def small_data_lines(rows: int, held_out: int, train: TrainSettings) -> list[str]:
    """What a run says of few held-out rows, and of few steps over its ``rows`` to train on."""
    return [line for line in (held_out_line(held_out), steps_line(rows, train)) if line is not None]
