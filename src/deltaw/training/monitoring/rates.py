"""A learning rate by a range test before training: rates that rise from step to step, on training rows.

The training that follows finds everything as it was: parameters to the bit, random numbers, and an optimizer
of its own. The curve is kept in the run's folder, where a run that goes on finds its rate again. Several
processes make the test together, as they train; process 0 reads its curve and tells the others the rate.
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

from deltaw.durable import write_text
from deltaw.machine.choices import Choice
from deltaw.training.callbacks import Callback, RateSearch
from deltaw.training.guarantee import UntrainedParameterWarning
from deltaw.training.monitoring.generation import text_watch
from deltaw.training.optimizer import RisingRates
from deltaw.training.parallel.group import Group
from deltaw.training.parallel.reducer import Reducer
from deltaw.training.session import RATE, Session
from deltaw.training.state import NotFiniteError, Step
from deltaw.working import working

# The curve of a learning-rate range test, and the rate that is read off it.
#
# Range test: L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, 3.3.
# Knows numbers; not how they came about.

# Width of the smoothing, in steps of the test: the losses of neighboring steps are of different rows.
SMOOTHING = 2.0
# The curve is level up to the rate at which the smoothed loss has risen again by this share of its fall.
# Where it is lowest before that is chance. The rate that is chosen lies so many times below that end.
LEVEL, BELOW_END = 0.05, 5.0
# A fall from the mean of the first losses to the lowest smoothed one is noise up to so many standard
# deviations of single losses. The lowest of some ten independent means lies half a one below by chance.
NOISE, FIRST = 2.0, 5


def read_curve(rates: Sequence[float], losses: Sequence[float], *, usual: float, diverged: bool) -> RateSearch:
    """The rate that a range test's curve speaks for.

    It is a fifth of the highest rate at which the smoothed loss is about as low as anywhere. Beyond that end
    a rate does harm within a few steps, and a whole training, whose steps add up, wants less. Where the loss
    does not fall by more than its noise, the curve says nothing, and the method's usual rate is taken.

    Args:
        rates, losses: of each step, in rising order of rates.
        usual: the method's usual rate.
        diverged: whether the loss ran away after the last of them.
    """
    # One loss that runs away would hide all that its neighbors say.
    first = sum(losses[:FIRST]) / FIRST
    most = 2.0 * first - min(losses, default=0.0)
    bounded = [min(loss, most) for loss in losses]
    smoothed = smooth(bounded)
    found = functools.partial(RateSearch, list(rates), list(losses), smoothed, usual=usual, diverged=diverged)
    at = int(np.argmin(smoothed)) if smoothed else 0
    fall = first - smoothed[at] if smoothed else 0.0
    if at < FIRST or fall <= NOISE * _noise(bounded, smoothed):
        why = "the method's usual rate: in the range test the loss fell by no more than its noise"
        return found(lowest=None, steepest=None, end=None, chosen=usual, why=why)
    logs = np.log(np.asarray(rates))
    slopes = np.gradient(np.asarray(smoothed), logs)
    steepest = float(rates[int(np.argmin(slopes[: at + 1]))])
    level = smoothed[at] + LEVEL * fall
    end = next((n - 1 for n in range(at, len(smoothed)) if smoothed[n] > level), len(smoothed) - 1)
    chosen = float(f"{rates[end] / BELOW_END:.2g}")
    edge = ", the highest rate tried" if end == len(rates) - 1 and not diverged else ""
    low = f"the highest rate at which the loss is still low, {rates[end]:.2g}{edge}"
    why = f"range test: a fifth of {low}; usual for the method is {usual:.2g}"
    return found(lowest=float(rates[at]), steepest=steepest, end=float(rates[end]), chosen=chosen, why=why)


def smooth(losses: Sequence[float]) -> list[float]:
    """Each loss averaged with its neighbors, weighted by a normal distribution over their distance.

    At both ends, where neighbors are missing on one side, a line is fitted instead of a mean, which would lag
    behind a slope.
    """
    values = np.asarray(losses, dtype=np.float64)
    places = np.arange(len(values), dtype=np.float64)
    smoothed = []
    for place in places:
        away = places - place
        weights = np.exp(-0.5 * (away / SMOOTHING) ** 2)
        total, first, second = weights.sum(), (weights * away).sum(), (weights * away**2).sum()
        determinant = total * second - first**2
        if determinant <= 0:
            smoothed.append(float(values[int(place)]))
            continue
        mean, slope = (weights * values).sum(), (weights * away * values).sum()
        smoothed.append(float((second * mean - first * slope) / determinant))
    return smoothed


def _noise(losses: Sequence[float], smoothed: Sequence[float]) -> float:
    """Standard deviation of single losses, by how they scatter around the smoothed ones.

    The median tells it, since losses that run away at the end are no noise.
    """
    off = np.abs(np.asarray(losses) - np.asarray(smoothed))
    own = 1.0 / (SMOOTHING * math.sqrt(2 * math.pi))  # a loss's share of its own smoothed one
    squares = 1.0 / (SMOOTHING * 2.0 * math.sqrt(math.pi))  # the sum of all squared shares
    return float(1.4826 * np.median(off) / math.sqrt(1.0 - 2.0 * own + squares))


CURVE = "learning_rate.json"
# Rates from the method's usual one divided by the first number to that times the second.
BELOW, ABOVE = 30.0, 30.0
# Steps of the test: a quarter of the run's, within these bounds.
FEWEST, MOST = 20, 60
# A loss so many times the first ones' mean has run away, and the test ends.
RUN_AWAY = 2.0


def choose_rate(session: Session, folder: Path, callback: Callback) -> bool:
    """Settle the session's learning rate where ``train.learning_rate`` is ``search``: by the curve in the
    run's folder where there is one, else by a range test, whose curve is written there.

    Returns:
        False where it was asked to stop.
    """
    if session.config.train.learning_rate != "search":
        return True
    found, processes = _known(folder / CURVE), session.processes
    if isinstance(processes, Group):
        processes.send_text(json.dumps(found is None))
    if found is None:
        with session.running(), working("searching for the learning rate"):
            found = search_rate(session, should_stop=callback.should_stop)
        if found is None:
            _tell(processes, None)
            return False
        write_text(folder / CURVE, json.dumps(found.as_dict(), indent=1) + "\n")
        callback.on_rate_search(found, folder)
    _tell(processes, found)
    session.chosen[RATE] = Choice(found.chosen, found.why)
    callback.on_line(f"learning rate {found.chosen:g}: {found.why}")
    return True


def _tell(processes: Reducer, found: RateSearch | None) -> None:
    """Let all processes have the rate; None where it was asked to stop."""
    if isinstance(processes, Group):
        processes.send_text(json.dumps(None if found is None else [found.chosen, found.why]))


def follow_rate(session: Session, group: Group) -> None:
    """In a process from 1 on: what :func:`choose_rate` does in process 0."""
    if session.config.train.learning_rate != "search":
        return
    if json.loads(group.receive_text()):
        with session.running():
            search_rate(session)
    told = json.loads(group.receive_text())
    if told is not None:
        session.chosen[RATE] = Choice(*told)


def _known(file: Path) -> RateSearch | None:
    """The curve in a file; None where there is none, or it holds something else."""
    try:
        found = RateSearch(**json.loads(file.read_text(encoding="utf-8")))
        return found if float(found.chosen) > 0 and isinstance(found.why, str) else None
    except (OSError, ValueError, TypeError):
        return None


def search_rate(session: Session, *, should_stop: Callable[[], bool] = lambda: False) -> RateSearch | None:
    """The learning rate that a range test finds; None where it was asked to stop. Call within
    ``session.running()``."""
    usual = session.usual_rate.value
    # Within a time budget nobody knows yet how many steps there will be.
    timed = session.config.train.time is not None
    steps = FEWEST if timed else min(MOST, max(FEWEST, session.total_steps // 4))
    schedule = RisingRates("constant", usual * ABOVE, steps, lowest=usual / BELOW)
    seen: list[Step] = []
    text_degrades, degraded = text_watch(session), list[float]()

    def has_run_away() -> bool:
        first = sum(step.loss for step in seen[:FIRST]) / FIRST
        return len(seen) > FIRST and seen[-1].loss > RUN_AWAY * first

    def should_end() -> bool:
        if len(seen) > FIRST and not degraded and text_degrades():
            degraded.append(seen[-1].learning_rate)
        return bool(degraded) or has_run_away()

    diverged = False
    with as_it_was(session), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedParameterWarning)  # the training itself says so
        try:
            outcome = session.train(
                schedule=schedule, total_steps=steps, on_step=seen.append, should_stop=should_stop, ended=should_end
            )
            if outcome.interrupted:
                return None
        except NotFiniteError:
            if len(seen) < FIRST:
                raise
            diverged = True
    finite = [step for step in seen if math.isfinite(step.loss)]
    diverged = diverged or has_run_away() or len(finite) < len(seen)
    rates, losses = [step.learning_rate for step in finite], [step.loss for step in finite]
    found = read_curve(rates, losses, usual=usual, diverged=diverged or bool(degraded))
    if degraded and found.end is not None:
        found = replace(
            found, why=f"{found.why}; the test ended when the model's own or the chosen answers got unlikely"
        )
    return found


@contextlib.contextmanager
def as_it_was(session: Session) -> Iterator[None]:
    """Afterwards the trained parameters are again what they were, bit for bit. The copy takes as much memory
    as they do."""
    method, model = session.method, session.model
    before = [parameter.detach().clone() for _, parameter in method.parameters(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for (_, parameter), value in zip(method.parameters(model), before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        method.after_step(model)
