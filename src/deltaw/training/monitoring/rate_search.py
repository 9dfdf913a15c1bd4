"""A learning rate by a range test before training: rates that rise from step to step, on training rows.

The training that follows finds everything as it was: parameters to the bit, random numbers, and an optimizer
of its own. The curve is kept in the run's folder, where a run that goes on finds its rate again. Several
processes make the test together, as they train; process 0 reads its curve and tells the others the rate.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from deltaw.durable import write_text
from deltaw.host.choices import Choice
from deltaw.training.callbacks import Callback
from deltaw.training.guarantee import UntrainedParameterWarning
from deltaw.training.monitoring.rate_curve import RateSearch, read_curve
from deltaw.training.not_finite import NotFiniteError
from deltaw.training.optimizer import RisingRates
from deltaw.training.parallel.group import Group
from deltaw.training.parallel.reducer import Reducer
from deltaw.training.session import RATE, Session, usual_rate_of
from deltaw.training.state import Step

CURVE = "learning_rate.json"
# Rates from the method's usual one divided by the first number to that times the second.
BELOW, ABOVE = 30.0, 30.0
# Steps of the test: a quarter of the run's, within these bounds.
FEWEST, MOST = 20, 60
# A loss so many times the first ones' mean has run away, and the test ends.
RUN_AWAY = 2.0
FIRST = 5


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
        with session.running():
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
    usual = usual_rate_of(session.method, session.model.config)
    # Within a time budget nobody knows yet how many steps there will be.
    timed = session.config.train.time is not None
    steps = FEWEST if timed else min(MOST, max(FEWEST, session.total_steps // 4))
    schedule = RisingRates("constant", usual * ABOVE, steps, lowest=usual / BELOW)
    rates: list[float] = []
    losses: list[float] = []

    def on_step(step: Step) -> None:
        rates.append(step.learning_rate)
        losses.append(step.loss)

    def has_run_away() -> bool:
        return len(losses) > FIRST and losses[-1] > RUN_AWAY * sum(losses[:FIRST]) / FIRST

    diverged = False
    with as_it_was(session), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedParameterWarning)  # the training itself says so
        try:
            outcome = session.train(
                schedule=schedule,
                total_steps=steps,
                on_step=on_step,
                should_stop=should_stop,
                ended=has_run_away,
            )
            if outcome.interrupted:
                return None
        except NotFiniteError:
            if len(losses) < FIRST:
                raise
            diverged = True
    finite = [place for place, loss in enumerate(losses) if math.isfinite(loss)]
    return read_curve(
        [rates[place] for place in finite],
        [losses[place] for place in finite],
        usual=usual,
        diverged=diverged or has_run_away() or len(finite) < len(losses),
    )


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
