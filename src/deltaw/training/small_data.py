"""Recommended numbers of steps and held-out rows for small data sets.

A run does not change its settings. It reports better ones, and ``deltaw init`` writes them.
"""

from __future__ import annotations

import math

from deltaw.settings.config import TrainSettings
from deltaw.training.evaluation.base import wilson_interval
from deltaw.training.optimizer import count_steps

# A run warns below these numbers of held-out rows and steps.
MIN_EVAL_ROWS = 50
MIN_STEPS = 30
# Batch sizes to choose from, and the maximum number of epochs.
BATCH_SIZES = (16, 8, 4)
MAX_EPOCHS = 10
# One epoch is usual from this number of rows on. Below, it is USUAL_EPOCHS.
LARGE_DATASET_ROWS = 1000
USUAL_EPOCHS = 3


def recommended_settings(num_rows: int) -> tuple[int, int]:
    """Return epochs and batch size for this number of training rows.

    This is the largest batch size with at least :data:`MIN_STEPS` steps. Epochs are added only if the smallest batch
    size has fewer steps.
    """
    epochs = 1 if num_rows >= LARGE_DATASET_ROWS else USUAL_EPOCHS
    for batch_size in BATCH_SIZES:
        if count_steps(num_rows, batch_size, epochs, None) >= MIN_STEPS:
            return epochs, batch_size
    min_batch_size = BATCH_SIZES[-1]
    min_epochs = math.ceil(MIN_STEPS / math.ceil(max(1, num_rows) / min_batch_size))
    return min(MAX_EPOCHS, max(epochs, min_epochs)), min_batch_size


def eval_share(num_rows: int) -> float | None:
    """Return the share of rows to hold out: :data:`MIN_EVAL_ROWS` rows, but 5 to 20%. None below 10 rows."""
    return None if num_rows < 10 else min(0.2, max(0.05, math.ceil(100 * MIN_EVAL_ROWS / num_rows) / 100))


def eval_size_warning(num_rows: int) -> str | None:
    """Return a warning if the number of held-out rows is small."""
    if not 0 < num_rows < MIN_EVAL_ROWS:
        return None
    low, high = wilson_interval(0.5, num_rows)
    subject = "1 held-out row is" if num_rows == 1 else f"{num_rows} held-out rows are"
    return f"{subject} few: a score such as accuracy is known to ± {50 * (high - low):.0f} points"


def step_count_warning(num_rows: int, train: TrainSettings) -> str | None:
    """Return a warning if the number of steps is small, unless the user set the number of steps or the time."""
    steps = count_steps(num_rows, train.batch_size, train.epochs, None)
    if steps >= MIN_STEPS or train.max_steps is not None or train.time is not None:
        return None
    epochs, batch_size = recommended_settings(num_rows)
    recommended_steps = count_steps(num_rows, batch_size, epochs, None)
    subject = "1 step is" if steps == 1 else f"{steps} steps are"
    changes = [f"train.epochs: {epochs}"] * (epochs != train.epochs)
    changes += [f"train.batch_size: {batch_size}"] * (batch_size != train.batch_size)
    verb = "give" if len(changes) > 1 else "gives"
    advice = f"; {' and '.join(changes)} {verb} {recommended_steps}" if recommended_steps > steps else ""
    return f"{subject} few to learn from{advice}"


def small_data_warnings(num_train: int, num_eval: int, train: TrainSettings) -> list[str]:
    """Return the warnings about the numbers of held-out rows and steps."""
    return [line for line in (eval_size_warning(num_eval), step_count_warning(num_train, train)) if line is not None]
