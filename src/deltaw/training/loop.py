"""The training loop, and the check that every parameter is trained.

It trains the parameters of a model with an objective and rows. It does not depend on files, settings or the user
interface.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.machine.memory import trim_memory
from deltaw.training.batcher import Batcher
from deltaw.training.callbacks import Callback, FunctionCallback
from deltaw.training.objective import Objective
from deltaw.training.optimizer import clipped_norm
from deltaw.training.process import frozen_heap, isolated_random_state, stop_signals
from deltaw.training.reducer import SINGLE_PROCESS, Reducer, SpareBatch, StepSums
from deltaw.training.state import (
    NotFinite,
    NotFiniteError,
    Outcome,
    SavedState,
    Step,
    TrainOptions,
    TrainOverrides,
    TrainState,
)
from deltaw.training.trained_check import TrainedCheck

if TYPE_CHECKING:
    from typing import Unpack  # not available at runtime in Python 3.10
# The command line's allocator does not return freed memory to the system. Trim it at this interval, because rows of
# different lengths fragment the heap.
STEPS_BETWEEN_TRIMS = 32
# With ``train.not_finite: skip``, a training is considered diverged after this number of skipped steps in a row.
MAX_SKIPPED_IN_ROW = 10
# Methods of a callback that the loop calls.
_CALLBACK_METHODS = ("on_begin", "on_step", "on_skip", "should_stop", "should_finish", "diagnose")


def train(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Any],
    batcher: Batcher,
    options: TrainOptions | None = None,
    *,
    callback: Callback | None = None,
    checkpoint: SavedState | None = None,
    reducer: Reducer = SINGLE_PROCESS,
    **overrides: Unpack[TrainOverrides],
) -> Outcome:
    """Optimize ``parameters`` with AdamW for ``total_steps`` steps.

    The loss of a step is the sum of the objective's losses over all microbatches, divided by the units (label tokens)
    of the step. It does not depend on the microbatch size. The result is deterministic: it depends only on the
    arguments, including ``seed``. Global state (random number generators, thread count, signal handlers, garbage
    collector) is restored on return. The first two steps verify that each parameter is trained
    (:class:`TrainedCheck`). Each later step synchronizes with the device once, at its end.

    Args:
        objective: Computes the summed loss of a microbatch.
        parameters: Parameters to train. 16-bit parameters get fp32 master weights.
        examples: Rows or groups of rows.
        batcher: Splits the rows of a step into microbatches.
        options: Training options.
        callback: Receives training events. Time spent in it does not count as step time. Alternatively, pass functions
            by the names of its methods: ``on_begin``, ``on_step``, ``on_skip``, ``should_stop``, ``should_finish`` and
            ``diagnose``.
        checkpoint: State of an interrupted training with the same arguments to resume from.
        reducer: Communication between processes that train together. Each process calls this function with the same
            arguments.
        overrides: Individual options, for example ``learning_rate=1e-4``.

    Returns:
        Totals over all steps, including those before ``checkpoint``. ``interrupted`` is True if the training was
        stopped.

    Raises:
        NotFiniteError: if the loss or the gradient is not finite. The parameters are restored to their values before
            the step.
        UntrainedParameterError: if a parameter has no gradient in the first step, or does not change in two steps.
    """
    changes: dict[str, Any] = {**overrides}
    functions = {name: changes.pop(name) for name in _CALLBACK_METHODS if name in changes}
    options = TrainOptions(**changes) if options is None else replace(options, **changes)
    state = TrainState(parameters, len(examples), options)
    callback = callback or FunctionCallback(**functions)
    return _Loop(state, objective, examples, batcher, options, callback, reducer).run(checkpoint)


@dataclass
class _Loop:
    """State and inputs of a training."""

    state: TrainState
    objective: Objective
    examples: Sequence[Any]
    batcher: Batcher
    options: TrainOptions
    callback: Callback
    reducer: Reducer

    def run(self, checkpoint: SavedState | None) -> Outcome:
        """Run all steps, from the first or from a checkpoint."""
        state = self.state
        options = self.options
        callback = self.callback
        with stop_signals() as signaled, frozen_heap(), isolated_random_state(options.seed), state:
            if checkpoint is not None:
                state.restore(checkpoint)
                options.after_step()
            if self.reducer.broadcast_state(state):
                options.after_step()
            check = TrainedCheck(state.names, state.trained, options.may_skip, steps_done=state.step)
            callback.on_begin(state)
            while self.reducer.should_continue(
                state, lambda: state.step < state.total_steps and not callback.should_finish()
            ):
                step = self.step(check, lambda: signaled() or callback.should_stop())
                if step is None:
                    state.sums.interrupted = True
                    break
                if isinstance(step, Step):
                    callback.on_step(step)
                else:
                    callback.on_skip(step)
        return state.sums

    def step(self, check: TrainedCheck, should_stop: Callable[[], bool]) -> Step | NotFinite | None:
        """Run one optimizer step.

        Returns:
            The step, or a NotFinite event if it had no effect, or None if the training was stopped. A stopped step
            changes no state.
        """
        state = self.state
        options = self.options
        start = time.perf_counter()
        if state.step % STEPS_BETWEEN_TRIMS == 0:
            trim_memory()
        step_rows = [self.examples[i] for i in state.order.indices(state.step)]
        rows, counts_for_check = self.batcher.expand(step_rows, state.step)
        check_step = counts_for_check and not check.done
        options.before_step(state, rows)
        indices = state.start_step()
        units = self.objective.units(rows)
        accumulator = self.objective.accumulator
        if accumulator is not None:
            accumulator.clear()
        loss_scale = 1.0 if state.loss_scale is None else state.loss_scale.value
        sums, added_loss = self.local_gradients(rows, units, loss_scale, should_stop)
        sums = self.reducer.total(state.trained, sums, accumulator)
        if sums is None:
            state.abandon_step()
            return None
        state.unscale()
        norm = clipped_norm(state.trained, options.max_grad_norm)
        rate = state.learning_rate
        if check_step:  # the check synchronizes anyway, and must not process a skipped step
            loss, gradient_norm = _read(sums.loss / units, norm)
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                return self.handle_not_finite(indices, loss, gradient_norm)
        if check_step:
            check.before_update()
        state.update(unless=~(torch.isfinite(sums.loss) & torch.isfinite(norm)))
        if check_step:
            check.after_update()
        options.after_step()
        loss, gradient_norm, added_loss_value = _read(sums.loss / units, norm, added_loss)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return self.handle_not_finite(indices, loss, gradient_norm)
        scale = {} if state.loss_scale is None else {"loss_scale": loss_scale}
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
            seconds=time.perf_counter() - start,
            general_loss=None if options.add_gradients is None else added_loss_value,
            metrics={**self.batcher.step_metrics, **({} if accumulator is None else accumulator.means()), **scale},
        )
        state.end_step(step)
        return step

    def local_gradients(
        self, rows: Sequence[Any], units: int, loss_scale: float, should_stop: Callable[[], bool]
    ) -> tuple[StepSums | None, Tensor | float]:
        """Compute the scaled gradients of this process's rows and of ``add_gradients``.

        Returns:
            The sums of the step, or None if the training was stopped, and the added loss.
        """
        state = self.state
        reducer = self.reducer
        add_gradients = self.options.add_gradients
        local_rows = reducer.local_rows(rows, self.batcher)
        reducer.seed_random_numbers(state.order.seed, state.step)
        self.objective.start_step(rows, self.batcher, reducer)
        should_stop = reducer.agree_on_stop(should_stop)
        batches = reducer.batches(self.batcher, local_rows, rows)
        if add_gradients is None:
            batches = reducer.microbatches(batches)
        sums = _gradients(self.objective, batches, units / loss_scale, should_stop)
        if sums is None or add_gradients is None:
            return sums, 0.0
        return sums, add_gradients(state.step, loss_scale)

    def handle_not_finite(self, indices: np.ndarray, loss: float, gradient_norm: float) -> NotFinite:
        """Skip a step with a loss or gradient that is not finite, or stop the training.

        If a gradient overflows because of the loss scale, the same step is repeated with a smaller scale.

        Raises:
            NotFiniteError: if skipping is disabled, or ``MAX_SKIPPED_IN_ROW`` steps were skipped in a row.
        """
        state = self.state
        scale = state.loss_scale
        repeated = scale is not None and scale.value > 1 and math.isfinite(loss)
        values = loss, gradient_norm, state.learning_rate, None if scale is None else scale.value, repeated
        event = NotFinite(state.step + 1, state.total_steps, indices, *values)
        if scale is not None and repeated:
            state.abandon_step()
            scale.update(overflowed=True)
            return event
        if self.options.skip_not_finite and state.skipped_in_row + 1 < MAX_SKIPPED_IN_ROW:
            state.skip_step()
            return event
        state.abandon_step()
        state.start_step()  # the diagnosis uses the random numbers of the step
        lines = self.callback.diagnose(event)
        state.abandon_step()
        raise NotFiniteError(event, lines, state.skipped_in_row)


def _gradients(
    objective: Objective, batches: Iterable[Any], units: float, should_stop: Callable[[], bool]
) -> StepSums | None:
    """Accumulate the gradients of a step's loss, divided by ``units``, over its microbatches.

    Does not synchronize with the device. Returns None if the training was stopped.
    """
    sums = StepSums(torch.zeros(()))
    if should_stop():
        return None
    for batch in batches:
        if isinstance(batch, SpareBatch):
            if (spare := objective(batch.of) * 0).requires_grad:
                spare.backward()
            continue
        loss = objective(batch)
        if loss.requires_grad:  # False if a trained connector has no image in this microbatch
            (loss / units).backward()
        sums.add(loss, batch.row_tokens, batch.tokens)
        if should_stop():
            return None
    return sums


def _read(*numbers: Tensor | float) -> list[float]:
    """Copy a step's values to the host. This is the only device synchronization of a step."""
    tensors = [number.detach() for number in numbers if isinstance(number, Tensor)]
    one_device = len({tensor.device for tensor in tensors}) == 1
    values = iter(torch.stack(tensors).tolist() if one_device else tensors)
    return [float(next(values) if isinstance(number, Tensor) else number) for number in numbers]
