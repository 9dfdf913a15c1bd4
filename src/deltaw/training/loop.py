"""The training loop: from rows in an order to a trained adapter, readable from top to bottom.

It is given a model with something to train, an objective, and rows; it knows nothing of files, folders,
configuration or how progress is shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.example import Example
from deltaw.data.packing import epoch_order
from deltaw.errors import UserError
from deltaw.host.memory import trim_memory
from deltaw.training.guarantee import TrainedCheck
from deltaw.training.losses import Watched, unrounded
from deltaw.training.microbatches import AnyBatcher, AnyObjective, Row
from deltaw.training.optimizer import Schedule
from deltaw.training.parallel.reducer import ALONE, Reducer, Spare, StepSums
from deltaw.training.process import frozen_heap, own_random_numbers, stop_signals
from deltaw.training.state import Outcome, RowOrder, SavedState, Step, TrainState

# ---- A step whose loss or gradient is not a finite number: what is known of it, and the error for it.
#
# Knows numbers and rows by their place; where the numbers broke is found by
# :mod:`deltaw.training.record`.


# With ``train.not_finite: skip`` a training ends once so many steps in a row had to be skipped: it has
# diverged, and would skip all others too.
MOST_IN_ROW = 10


@dataclass(frozen=True)
class NotFinite:
    """A step that changed nothing, since its loss or its gradient is infinite or not a number.

    Attributes:
        step: its number, from 1. total_steps: of the training.
        rows: (n,) its rows by their place in the data.
        loss, gradient_norm, learning_rate: as of :class:`deltaw.training.state.Step`.
    """

    step: int
    total_steps: int
    rows: np.ndarray
    loss: float
    gradient_norm: float
    learning_rate: float

    def as_dict(self) -> dict[str, object]:
        """Its line of ``metrics.jsonl``; JSON has no infinite numbers, so they are texts."""
        return {
            "step": self.step,
            "skipped": {"loss": f"{self.loss:g}", "gradient_norm": f"{self.gradient_norm:g}"},
            "learning_rate": self.learning_rate,
        }


# Asked what is wrong with a step's rows, while the model is as it was before the step; answers in lines.
Diagnose: TypeAlias = Callable[[NotFinite], Sequence[str]]


@dataclass(frozen=True)
class WhenNotFinite:
    """What a training does with such steps.

    Attributes:
        skip: leave them out, up to ``MOST_IN_ROW`` in a row; else the first ends the training.
        on_skip: told of one that is left out. diagnose: asked about one that ends the training.
    """

    skip: bool = False
    on_skip: Callable[[NotFinite], None] = lambda found: None
    diagnose: Diagnose = lambda found: ()


class NotFiniteError(UserError):
    """A training has diverged. The trained parameters are those before the step.

    Args:
        found: the step. lines: of the diagnosis. in_row: steps that were skipped just before.
    """

    def __init__(self, found: NotFinite, lines: Sequence[str] = (), in_row: int = 0) -> None:
        self.found = found
        again = f", after {in_row} steps in a row that were skipped" if in_row else ""
        what = f"training diverged: loss {found.loss:.3g}, gradient norm {found.gradient_norm:.3g}{again}"
        super().__init__(
            "\n".join([what, *(f"  {line}" for line in lines)]),
            where=f"step {found.step} of {found.total_steps}",
            hint="lower train.learning_rate, or lengthen train.warmup"
            + ("" if in_row else "; train.not_finite: skip leaves such steps out"),
        )


# ---- Keeping general answers: each step also learns one of the base model's own answers to general prompts.
#
# Self-distillation by rehearsal: the base model writes answers before training
# (:mod:`deltaw.training.evaluation.general`), and their cross-entropy is added to a step's loss. So the factors
# are pushed away from changes that general answers would pay for. The prompts are others than those that drift
# is measured on.


class KeepGeneral:
    """Adds the gradients of weight · (mean cross-entropy of general answers) to those of a step.

    Args:
        objective: the sum of a microbatch's losses. batcher: cuts rows into microbatches.
        rows: general answers, as the model is to see them.
        weight: what their mean loss is multiplied with; the data's mean loss has weight 1.
        seed: of their order. per_step: how many of them a step takes.
    """

    def __init__(
        self,
        objective: AnyObjective,
        batcher: AnyBatcher,
        rows: Sequence[Example],
        *,
        weight: float,
        seed: int,
        per_step: int = 1,
    ) -> None:
        self._objective = objective
        self._batcher = batcher
        self._rows = rows
        self._weight = weight
        self._seed = seed
        self._per_step = per_step

    def rows_of(self, step: int) -> list[Example]:
        """The answers of step ``step`` (from 0), a function of its number: each once before any twice."""
        count = len(self._rows)
        places = np.arange(step * self._per_step, (step + 1) * self._per_step)
        orders = {epoch: epoch_order(count, epoch, self._seed) for epoch in set((places // count).tolist())}
        return [self._rows[orders[place // count][place % count]] for place in places.tolist()]

    def __call__(self, step: int) -> Tensor:
        """Add the gradients for step ``step``; the mean loss of its answers in nats a token, unweighted: a
        scalar on the model's device, which is not waited for."""
        rows = self.rows_of(step)
        units = self._objective.units(rows)
        total = torch.zeros(())
        for batch in self._batcher.batches(rows):
            loss = self._objective(batch)
            (self._weight * loss / units).backward()
            total = total + unrounded(loss)
        return total / units


# ---- loop


# The command line's allocator keeps what is freed from step to step. So many steps apart it is given back to
# the system, or the holes that rows of all lengths leave would add up over a long run.
STEPS_BETWEEN_TRIMS = 32


def count_steps(rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: every epoch ends with a step of the rows that are left."""
    per_epoch = math.ceil(rows / batch_size)
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * per_epoch))


def rows_of_step(examples: Sequence[Row], step: int, batch_size: int, seed: int) -> list[Row]:
    """The rows of optimizer step ``step`` (from 0): a function of its arguments alone."""
    return [examples[i] for i in RowOrder(len(examples), batch_size, seed).indices(step)]


def train(
    objective: AnyObjective,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Row],
    batcher: AnyBatcher,
    *,
    learning_rate: float,
    total_steps: int,
    rate_factors: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    may_skip: Callable[[str], bool] = lambda name: False,
    before_step: Callable[[TrainState, Sequence[Row]], None] | None = None,
    after_step: Callable[[], None] | None = None,
    add_gradients: Callable[[int], Tensor | float] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    schedule: str | Schedule = "linear",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    max_grad_norm: float | None = 1.0,
    saved: SavedState | None = None,
    on_begin: Callable[[TrainState], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    ended: Callable[[], bool] = lambda: False,
    not_finite: WhenNotFinite | None = None,
    reducer: Reducer = ALONE,
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
        rate_factors: what each parameter's learning rate is multiplied with; None is 1 for all.
        names: of the parameters, for messages and for saved states.
        may_skip: whether the model may leave the parameter of this name out of a step by design, which makes
            it a warning. :func:`deltaw.training.guarantee.may_skip` answers for a model.
        before_step, after_step: called with the state and a step's rows before it begins, and once the
            optimizer has changed the parameters.
        add_gradients: called with each step's number from 0 once its rows' gradients are there; adds those of
            another loss and returns it (:class:`deltaw.training.loop.KeepGeneral`).
        batch_size: rows per step. seed: of the order of rows, and of dropout.
        schedule, warmup: see :class:`deltaw.training.optimizer.Schedule`; a whole schedule takes the place of
            ``learning_rate``, ``total_steps`` and ``warmup``.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        saved: the state of an earlier training with the same arguments, which goes on from there.
        on_begin: given the state before the first step; ``state.state()`` can be taken between steps.
        on_step: told of each step after it; the time it takes is not counted.
        should_stop: asked after each microbatch; True ends the training as Ctrl-C does. ended: asked before
            each step; True ends it as its last step does.
        not_finite: what to do with steps whose loss or gradient is not finite; None: end the training.
        reducer: of the processes that train together; every one calls this with the same arguments.

    Returns:
        sums over all steps, also those before ``saved``; ``interrupted`` where it was asked to stop.

    Raises:
        NotFiniteError: the loss or the gradient is not finite; the parameters are those before that step.
        UntrainedParameterError: a parameter has no gradient in the first step, or did not move in two.
    """
    names = list(names or (f"parameter {n}" for n in range(len(parameters))))
    if isinstance(schedule, str):
        schedule = Schedule(schedule, learning_rate, total_steps, warmup)
    named, order = dict(zip(names, parameters, strict=True)), RowOrder(len(examples), batch_size, seed)
    state = TrainState(named, schedule, order, rate_factors=rate_factors, weight_decay=weight_decay, betas=betas)
    begins, changed = before_step or (lambda state, rows: None), after_step or (lambda: None)
    how = (begins, changed, should_stop, ended, add_gradients, not_finite or WhenNotFinite(), reducer)
    loop = _Loop(state, objective, examples, batcher, max_grad_norm, *how)
    return loop.run(may_skip, saved, on_begin or (lambda state: None), on_step or (lambda step: None))


@dataclass
class _Loop:
    """A training with all that a step needs."""

    state: TrainState
    objective: AnyObjective
    examples: Sequence[Any]
    batcher: AnyBatcher
    max_grad_norm: float | None
    begins: Callable[[TrainState, Sequence[Any]], None]
    changed: Callable[[], None]
    should_stop: Callable[[], bool]
    ended: Callable[[], bool]
    add_gradients: Callable[[int], Tensor | float] | None
    not_finite: WhenNotFinite
    reducer: Reducer

    def run(
        self,
        may_skip: Callable[[str], bool],
        saved: SavedState | None,
        on_begin: Callable[[TrainState], None],
        on_step: Callable[[Step], None],
    ) -> Outcome:
        """All steps, from the first or from ``saved``."""
        state = self.state
        with stop_signals() as signaled, frozen_heap(), own_random_numbers(state.order.seed), state:
            if saved is not None:
                state.restore(saved)
                self.changed()
            if self.reducer.begin(state):
                self.changed()
            check = TrainedCheck(state.names, state.trained, may_skip, steps_done=state.step)
            on_begin(state)
            while self.reducer.goes_on(state, lambda: state.step < state.total_steps and not self.ended()):
                step = self.step(check, lambda: signaled() or self.should_stop())
                if step is None:
                    state.sums.interrupted = True
                    break
                if isinstance(step, Step):
                    on_step(step)
                else:
                    self.not_finite.on_skip(step)
        return state.sums

    def step(self, check: TrainedCheck, stopped: Callable[[], bool]) -> Step | NotFinite | None:
        """One optimizer step, or one that is left out; None, and nothing changed, where it was asked to
        stop."""
        state, begun = self.state, time.perf_counter()
        if state.step % STEPS_BETWEEN_TRIMS == 0:
            trim_memory()
        rows = [self.examples[i] for i in state.order.indices(state.step)]
        self.begins(state, rows)
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
        norm = _gradient_norm(state.trained, self.max_grad_norm)
        rate = state.learning_rate
        if not check.done:  # the check waits for the device anyway, and must not see a step that is left out
            loss, gradient_norm = _read(sums.loss / units, norm)
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                return self.leave_out(places, loss, gradient_norm)
        check.before_update()
        state.update(unless=~(torch.isfinite(sums.loss) & torch.isfinite(norm)))
        check.after_update()
        self.changed()
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
            general_loss=None if self.add_gradients is None else general_loss,
            metrics={} if watched is None else watched.means(),
        )
        state.end_step(step)
        return step

    def own_gradients(
        self, rows: Sequence[Row], units: int, stopped: Callable[[], bool]
    ) -> tuple[StepSums | None, Tensor | float]:
        """The gradients of this process's rows of a step, and of what is added to them: the sums, None where
        it was asked to stop, and the added loss."""
        state = self.state
        own = self.reducer.deal(rows, self.batcher)
        self.reducer.own_random_numbers(state.order.seed, state.step)
        begin = getattr(self.objective, "begin", None)
        if begin is not None:
            begin(rows, self.batcher, self.reducer)
        stopped = self.reducer.stops(stopped)
        batches = self.reducer.batches(self.batcher, own, rows)
        if self.add_gradients is None:
            batches = self.reducer.microbatches(batches)
        sums = _gradients(self.objective, batches, units, stopped)
        if sums is None or self.add_gradients is None:
            return sums, 0.0
        return sums, self.add_gradients(state.step)

    def leave_out(self, places: np.ndarray, loss: float, gradient_norm: float) -> NotFinite:
        """Count a step without effect, or end the training.

        Raises:
            NotFiniteError: such steps are not to be skipped, or too many of them came in a row.
        """
        state = self.state
        found = NotFinite(state.step + 1, state.total_steps, places, loss, gradient_norm, state.learning_rate)
        if self.not_finite.skip and state.skipped_in_row + 1 < MOST_IN_ROW:
            state.skip_step()
            return found
        state.abandon_step()
        state.begin_step()  # the diagnosis draws the random numbers that the step did
        lines = self.not_finite.diagnose(found)
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


def _gradient_norm(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """The norm of all gradients together; they are scaled down to ``limit`` where it is larger."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On the processor looking is free, and saves going over all gradients; a device would be waited for.
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
