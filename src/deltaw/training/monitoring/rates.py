"""Learning rate range test before a training: the rate rises from step to step on training rows.

Parameters (bitwise) and random numbers are restored afterwards, and the training creates a new optimizer. The curve is
stored in the run's folder, from which a resumed run reads its rate. Several processes run the test together, and
process 0 sends the chosen rate to the rest.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from deltaw.atomic_files import write_text
from deltaw.machine.choices import Choice
from deltaw.progress import track_progress
from deltaw.training.callbacks import Callback, FunctionCallback, RateSearch
from deltaw.training.monitoring.generation import text_watch
from deltaw.training.optimizer import RisingRates
from deltaw.training.parallel.group import Group
from deltaw.training.reducer import Reducer
from deltaw.training.session import RATE, Session
from deltaw.training.state import NotFiniteError, Step
from deltaw.training.trained_check import UntrainedParameterWarning

# Range test: L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, 3.3.

# Width of the smoothing in steps of the test. Losses of neighboring steps vary because they have different rows.
SMOOTHING = 2.0
# The curve is flat up to the rate at which the smoothed loss has risen by this share of its decrease. The position of
# the minimum before it is random. The chosen rate is the end of the flat part divided by this number.
MAX_RISE = 0.05
RATE_DIVISOR = 5.0
# A decrease from the mean of the first losses to the lowest smoothed loss is noise up to this number of standard
# deviations of single losses. The lowest of about ten independent means is half a standard deviation lower by chance.
NUM_DEVIATIONS = 2.0
NUM_FIRST = 5


def read_curve(rates: Sequence[float], losses: Sequence[float], *, usual: float, diverged: bool) -> RateSearch:
    """Choose the learning rate from the curve of a range test.

    It is a fifth of the highest rate at which the smoothed loss is about as low as at its minimum. Higher rates do
    damage within a few steps, and a long training needs a lower rate. If the loss does not decrease by more than its
    noise, the curve has no information, and the default rate of the method is used.

    Args:
        rates: Learning rate of each step, in ascending order.
        losses: Loss of each step.
        usual: Default rate of the method.
        diverged: True if the loss diverged after the last step.
    """
    # Clip diverging losses, which would dominate their neighbors.
    first = sum(losses[:NUM_FIRST]) / NUM_FIRST
    max_loss = 2.0 * first - min(losses, default=0.0)
    bounded = [min(loss, max_loss) for loss in losses]
    smoothed = smooth(bounded)
    result = functools.partial(RateSearch, list(rates), list(losses), smoothed, usual=usual, diverged=diverged)
    lowest_index = int(np.argmin(smoothed)) if smoothed else 0
    fall = first - smoothed[lowest_index] if smoothed else 0.0
    if lowest_index < NUM_FIRST or fall <= NUM_DEVIATIONS * _noise(bounded, smoothed):
        reason = "the method's usual rate: in the range test the loss fell by no more than its noise"
        return result(lowest=None, steepest=None, end=None, chosen=usual, why=reason)
    slopes = np.gradient(np.asarray(smoothed), np.log(np.asarray(rates)))
    steepest = float(rates[int(np.argmin(slopes[: lowest_index + 1]))])
    flat_limit = smoothed[lowest_index] + MAX_RISE * fall
    end = next((n - 1 for n in range(lowest_index, len(smoothed)) if smoothed[n] > flat_limit), len(smoothed) - 1)
    chosen = float(f"{rates[end] / RATE_DIVISOR:.2g}")
    edge = ", the highest rate tried" if end == len(rates) - 1 and not diverged else ""
    flat_end = f"the highest rate at which the loss is still low, {rates[end]:.2g}{edge}"
    reason = f"range test: a fifth of {flat_end}; usual for the method is {usual:.2g}"
    lowest = float(rates[lowest_index])
    end_rate = float(rates[end])
    return result(lowest=lowest, steepest=steepest, end=end_rate, chosen=chosen, why=reason)


def smooth(losses: Sequence[float]) -> list[float]:
    """Smooth losses with a Gaussian kernel.

    The estimate is a local linear fit instead of a mean, which would be biased at both ends of a slope.
    """
    values = np.asarray(losses, dtype=np.float64)
    steps = np.arange(len(values), dtype=np.float64)
    smoothed = []
    for step in steps:
        distances = steps - step
        weights = np.exp(-0.5 * (distances / SMOOTHING) ** 2)
        total = weights.sum()
        first = (weights * distances).sum()
        second = (weights * distances**2).sum()
        determinant = total * second - first**2
        if determinant <= 0:
            smoothed.append(float(values[int(step)]))
            continue
        mean = (weights * values).sum()
        slope = (weights * distances * values).sum()
        smoothed.append(float((second * mean - first * slope) / determinant))
    return smoothed


def _noise(losses: Sequence[float], smoothed: Sequence[float]) -> float:
    """Return the standard deviation of single losses, estimated from their deviations from the smoothed ones.

    It uses the median, so that diverging losses at the end do not count.
    """
    deviations = np.abs(np.asarray(losses) - np.asarray(smoothed))
    self_weight = 1.0 / (SMOOTHING * math.sqrt(2 * math.pi))  # weight of a loss in its own smoothed value
    squared_weights = 1.0 / (SMOOTHING * 2.0 * math.sqrt(math.pi))  # sum of all squared weights
    return float(1.4826 * np.median(deviations) / math.sqrt(1.0 - 2.0 * self_weight + squared_weights))


CURVE = "learning_rate.json"
# The test covers rates from the default rate divided by the first number to the default rate times the second.
LOWEST_DIVISOR = 30.0
HIGHEST_FACTOR = 30.0
# The test has a quarter of the run's steps, within these bounds.
MIN_STEPS = 20
MAX_STEPS = 60
# The loss has diverged, and the test stops, if it exceeds the mean of the first losses by this factor.
DIVERGENCE_FACTOR = 2.0


def choose_rate(session: Session, folder: Path, callback: Callback) -> bool:
    """Choose the session's learning rate if ``train.learning_rate`` is ``search``.

    The rate is read from the curve in the run's folder if it exists. Otherwise a range test is run and its curve
    written.

    Args:
        session: Session of the run.
        folder: Folder of the run.
        callback: Receives the result, and can stop the test.

    Returns:
        False if the test was stopped.
    """
    if session.config.train.learning_rate != "search":
        return True
    search = _read_curve(folder / CURVE)
    processes = session.processes
    if isinstance(processes, Group):
        processes.send_text(json.dumps(search is None))
    if search is None:
        with session.running(), track_progress("searching for the learning rate"):
            search = search_rate(session, should_stop=callback.should_stop)
        if search is None:
            _send_rate(processes, None)
            return False
        write_text(folder / CURVE, json.dumps(search.as_dict(), indent=1) + "\n")
        callback.on_rate_search(search, folder)
    _send_rate(processes, search)
    session.chosen[RATE] = Choice(search.chosen, search.why)
    callback.on_line(f"learning rate {search.chosen:g}: {search.why}")
    return True


def _send_rate(processes: Reducer, search: RateSearch | None) -> None:
    """Send the rate to all processes, or None if the test was stopped."""
    if isinstance(processes, Group):
        processes.send_text(json.dumps(None if search is None else [search.chosen, search.why]))


def follow_rate(session: Session, group: Group) -> None:
    """Take part in :func:`choose_rate` of process 0. Runs in processes from 1 on."""
    if session.config.train.learning_rate != "search":
        return
    if json.loads(group.receive_text()):
        with session.running():
            search_rate(session)
    choice = json.loads(group.receive_text())
    if choice is not None:
        session.chosen[RATE] = Choice(*choice)


def _read_curve(file: Path) -> RateSearch | None:
    """Return the curve in a file, or None if it is missing or invalid."""
    try:
        search = RateSearch(**json.loads(file.read_text(encoding="utf-8")))
        return search if float(search.chosen) > 0 and isinstance(search.why, str) else None
    except (OSError, ValueError, TypeError):
        return None


def search_rate(session: Session, *, should_stop: Callable[[], bool] = lambda: False) -> RateSearch | None:
    """Run a range test and return the chosen learning rate, or None if it was stopped.

    Call it inside ``session.running()``.
    """
    usual = session.default_learning_rate.value
    # The number of steps is not known yet with a time budget.
    has_time_budget = session.config.train.time is not None
    steps = MIN_STEPS if has_time_budget else min(MAX_STEPS, max(MIN_STEPS, session.total_steps // 4))
    schedule = RisingRates("constant", usual * HIGHEST_FACTOR, steps, lowest=usual / LOWEST_DIVISOR)
    steps_done: list[Step] = []
    text_degrades = text_watch(session)
    degraded_rates = list[float]()

    def has_diverged() -> bool:
        first = sum(step.loss for step in steps_done[:NUM_FIRST]) / NUM_FIRST
        return len(steps_done) > NUM_FIRST and steps_done[-1].loss > DIVERGENCE_FACTOR * first

    def should_finish() -> bool:
        if len(steps_done) > NUM_FIRST and not degraded_rates and text_degrades():
            degraded_rates.append(steps_done[-1].learning_rate)
        return bool(degraded_rates) or has_diverged()

    diverged = False
    with restored_parameters(session), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedParameterWarning)  # the training itself repeats the warning
        try:
            stops = FunctionCallback(on_step=steps_done.append, should_stop=should_stop, should_finish=should_finish)
            if session.train(stops, schedule=schedule, total_steps=steps).interrupted:
                return None
        except NotFiniteError:
            if len(steps_done) < NUM_FIRST:
                raise
            diverged = True
    finite = [step for step in steps_done if math.isfinite(step.loss)]
    diverged = diverged or has_diverged() or len(finite) < len(steps_done)
    rates = [step.learning_rate for step in finite]
    losses = [step.loss for step in finite]
    search = read_curve(rates, losses, usual=usual, diverged=diverged or bool(degraded_rates))
    if degraded_rates and search.end is not None:
        search = replace(search, why=f"{search.why}; the test stopped when general or chosen answers became unlikely")
    return search


@contextlib.contextmanager
def restored_parameters(session: Session) -> Iterator[None]:
    """Restore the trained parameters bitwise on exit. The copy takes the same amount of memory as the parameters."""
    method = session.method
    model = session.model
    copies = [parameter.detach().clone() for _, parameter in method.parameters(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for (_, parameter), value in zip(method.parameters(model), copies, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        method.after_step(model)
