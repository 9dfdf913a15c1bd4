"""The training loop: from rows in an order to a trained adapter, readable from top to bottom.

It is given a model with something to train, an objective, and rows; it knows nothing of files, folders,
configuration or how progress is shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.machine.memory import trim_memory
from deltaw.training.callbacks import Callback, Calling
from deltaw.training.guarantee import TrainedCheck
from deltaw.training.losses import Watched
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.optimizer import Schedule, clipped_norm
from deltaw.training.parallel.reducer import ALONE, Reducer, Spare, StepSums
from deltaw.training.process import frozen_heap, own_random_numbers, stop_signals
from deltaw.training.state import (
    NotFinite,
    NotFiniteError,
    Outcome,
    RowOrder,
    SavedState,
    Step,
    TrainOptions,
    TrainState,
)

# The command line's allocator keeps what is freed from step to step. So many steps apart it goes back to the
# system, or the holes that rows of all lengths leave would add up over a long run.
STEPS_BETWEEN_TRIMS = 32
# With ``train.not_finite: skip`` a training that skips so many steps in a row has diverged, and ends.
MOST_IN_ROW = 10
# Methods of a callback that a training calls.
_CALLED = ("on_begin", "on_step", "on_skip", "should_stop", "ended", "diagnose")


def train(
    objective: AnyObjective,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Any],
    batcher: AnyBatcher,
    options: TrainOptions | None = None,
    *,
    callback: Callback | None = None,
    saved: SavedState | None = None,
    reducer: Reducer = ALONE,
    **changed: Any,
) -> Outcome:
    """Train ``parameters`` with AdamW for ``total_steps`` optimizer steps.

    A step's loss is the sum of the objective's losses over all its microbatches, divided by the units (label
    tokens) of the whole step, so cutting its rows otherwise changes nothing. The arguments alone decide the
    result: random numbers come from ``seed``. The process is left as it was: its random numbers, threads,
    signal handlers and garbage collector. The first two steps are checked: a parameter that was handed in and
    is not trained is an error that names it (:mod:`deltaw.training.guarantee`). Later steps wait for the
    device once, at their end, when all of their work has been queued.

    Args:
        objective: the sum of a microbatch's losses.
        parameters: what is trained. Those in 16 bits get fp32 master weights for the time.
        examples: the rows, or groups of rows. batcher: cuts those of a step into microbatches.
        options: how the training goes. changed: single options, as in ``learning_rate=1e-4, total_steps=100``.
        callback: told of each step, whose time its own does not count to. In its place single functions can be
            given by the names of its methods: ``on_begin``, ``on_step``, ``on_skip``, ``should_stop``, ``ended``
            and ``diagnose``.
        saved: the state of an earlier training with the same arguments, which goes on from there.
        reducer: of the processes that train together; every one calls this with the same arguments.

    Returns:
        sums over all steps, also those before ``saved``; ``interrupted`` where it was asked to stop.

    Raises:
        NotFiniteError: the loss or the gradient is not finite; the parameters are those before that step.
        UntrainedParameterError: a parameter has no gradient in the first step, or did not move in two.
    """
    functions = {name: changed.pop(name) for name in _CALLED if name in changed}
    options = TrainOptions(**changed) if options is None else replace(options, **changed)
    state = _first_state(parameters, len(examples), options)
    return _Loop(state, objective, examples, batcher, options, callback or Calling(**functions), reducer).run(saved)


def _first_state(parameters: Sequence[nn.Parameter], rows: int, options: TrainOptions) -> TrainState:
    names = options.names or [f"parameter {n}" for n in range(len(parameters))]
    schedule = options.schedule
    if isinstance(schedule, str):
        schedule = Schedule(schedule, options.learning_rate, options.total_steps, options.warmup)
    order = RowOrder(rows, options.batch_size, options.seed)
    adam: dict[str, Any] = {name: getattr(options, name) for name in ("rate_factors", "weight_decay", "betas")}
    return TrainState(dict(zip(names, parameters, strict=True)), schedule, order, **adam)


@dataclass
class _Loop:
    """A training with all that a step needs."""

    state: TrainState
    objective: AnyObjective
    examples: Sequence[Any]
    batcher: AnyBatcher
    options: TrainOptions
    callback: Callback
    reducer: Reducer

    def run(self, saved: SavedState | None) -> Outcome:
        """All steps, from the first or from ``saved``."""
        state, options, callback = self.state, self.options, self.callback
        with stop_signals() as signaled, frozen_heap(), own_random_numbers(options.seed), state:
            if saved is not None:
                state.restore(saved)
                options.after_step()
            if self.reducer.begin(state):
                options.after_step()
            check = TrainedCheck(state.names, state.trained, options.may_skip, steps_done=state.step)
            callback.on_begin(state)
            while self.reducer.goes_on(state, lambda: state.step < state.total_steps and not callback.ended()):
                step = self.step(check, lambda: signaled() or callback.should_stop())
                if step is None:
                    state.sums.interrupted = True
                    break
                if isinstance(step, Step):
                    callback.on_step(step)
                else:
                    callback.on_skip(step)
        return state.sums

    def step(self, check: TrainedCheck, stopped: Callable[[], bool]) -> Step | NotFinite | None:
        """One optimizer step, or one that is left out; None, and nothing changed, where it was asked to
        stop."""
        state, options, begun = self.state, self.options, time.perf_counter()
        if state.step % STEPS_BETWEEN_TRIMS == 0:
            trim_memory()
        rows = [self.examples[i] for i in state.order.indices(state.step)]
        checked = not check.done
        if (expand := getattr(self.batcher, "expand", None)) is not None:
            rows, teaching = expand(rows, state.step)
            checked = checked and teaching
        options.before_step(state, rows)
        places = state.begin_step()
        units = self.objective.units(rows)
        watched: Watched | None = getattr(self.objective, "watched", None)
        if watched is not None:
            watched.clear()
        sums, general = self.own_gradients(rows, units, stopped)
        sums = self.reducer.total(state.trained, sums, watched)
        if sums is None:
            state.abandon_step()
            return None
        norm = clipped_norm(state.trained, options.max_grad_norm)
        rate = state.learning_rate
        if checked:  # the check waits for the device anyway, and must not see a step that is left out
            loss, gradient_norm = _read(sums.loss / units, norm)
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                return self.leave_out(places, loss, gradient_norm)
        if checked:
            check.before_update()
        state.update(unless=~(torch.isfinite(sums.loss) & torch.isfinite(norm)))
        if checked:
            check.after_update()
        options.after_step()
        loss, gradient_norm, general_loss = _read(sums.loss / units, norm, general)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return self.leave_out(places, loss, gradient_norm)
        step = Step(
            step=state.step + 1,
            epoch=(state.step + 1) / state.order.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            gradient_norm=gradient_norm,
            rows=len(rows),
            tokens=sums.row_tokens,
            computed_tokens=sums.tokens,
            label_tokens=units,
            seconds=time.perf_counter() - begun,
            general_loss=None if options.add_gradients is None else general_loss,
            metrics={} if watched is None else watched.means(),
        )
        state.end_step(step)
        return step

    def own_gradients(
        self, rows: Sequence[Any], units: int, stopped: Callable[[], bool]
    ) -> tuple[StepSums | None, Tensor | float]:
        """The gradients of this process's rows of a step, and of what is added to them: the sums, None where
        it was asked to stop, and the added loss."""
        state, reducer, add_gradients = self.state, self.reducer, self.options.add_gradients
        own = reducer.deal(rows, self.batcher)
        reducer.own_random_numbers(state.order.seed, state.step)
        begin = getattr(self.objective, "begin", None)
        if begin is not None:
            begin(rows, self.batcher, reducer)
        stopped = reducer.stops(stopped)
        batches = reducer.batches(self.batcher, own, rows)
        if add_gradients is None:
            batches = reducer.microbatches(batches)
        sums = _gradients(self.objective, batches, units, stopped)
        if sums is None or add_gradients is None:
            return sums, 0.0
        return sums, add_gradients(state.step)

    def leave_out(self, places: np.ndarray, loss: float, gradient_norm: float) -> NotFinite:
        """Count a step without effect, or end the training.

        Raises:
            NotFiniteError: such steps are not to be skipped, or too many of them came in a row.
        """
        state = self.state
        found = NotFinite(state.step + 1, state.total_steps, places, loss, gradient_norm, state.learning_rate)
        if self.options.skip_not_finite and state.skipped_in_row + 1 < MOST_IN_ROW:
            state.skip_step()
            return found
        state.abandon_step()
        state.begin_step()  # the diagnosis draws the random numbers that the step did
        lines = self.callback.diagnose(found)
        state.abandon_step()
        raise NotFiniteError(found, lines, state.skipped_in_row)


def _gradients(
    objective: AnyObjective, batches: Iterable[Any], units: int, stopped: Callable[[], bool]
) -> StepSums | None:
    """Add up the gradients of the mean loss over a step's rows, microbatch by microbatch; None where it was
    asked to stop before or on the way. Nothing waits for the device."""
    sums = StepSums(torch.zeros(()))
    if stopped():
        return None
    for batch in batches:
        if isinstance(batch, Spare):
            (objective(batch.of) * 0).backward()
            continue
        loss = objective(batch)
        (loss / units).backward()
        sums.add(loss, batch.row_tokens, batch.tokens)
        if stopped():
            return None
    return sums


def _read(*numbers: Tensor | float) -> list[float]:
    """A step's numbers: the one place where the host waits for the device."""
    return [float(number) for number in numbers]
