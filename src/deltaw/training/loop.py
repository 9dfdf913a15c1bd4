"""The training loop: from rows in an order to an adapter, readable from top to bottom.

It is given a model with something to train, an objective, and examples; it knows nothing of files, folders,
configuration or how progress is shown.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from deltaw.data.packing import epoch_order
from deltaw.errors import UserError
from deltaw.host.memory import keep_freed_memory, trim_memory
from deltaw.training.guarantee import TrainedCheck
from deltaw.training.master_weights import MasterWeights
from deltaw.training.optimizer import adamw, learning_rate_factor, set_rate, warmup_steps


class Labelled(Protocol):
    """What the loop asks of an example: how many labels it brings to the sum of losses."""

    @property
    def label_count(self) -> int: ...


# Freed memory is kept from step to step; so many steps apart it is given back, or the holes that rows of all
# lengths leave would add up over a long run.
STEPS_BETWEEN_TRIMS = 32

Row = TypeVar("Row", bound=Labelled)


Objective = Callable[[Any], Tensor]


class MicroBatcher(Protocol):
    """How the rows of a step go through the model: one batch after another."""

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]: ...

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]: ...


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. ``loss`` is the mean over its label tokens, in nats."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    rows: int
    tokens: int
    computed_tokens: int
    label_tokens: int
    seconds: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass
class Outcome:
    """Sums over a training: ``loss`` is the mean over all label tokens seen."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    label_tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def loss(self) -> float:
        return self.loss_sum / self.label_tokens if self.label_tokens else float("nan")

    def add(self, step: Step) -> None:
        self.steps += 1
        self.rows += step.rows
        self.tokens += step.tokens
        self.computed_tokens += step.computed_tokens
        self.label_tokens += step.label_tokens
        self.loss_sum += step.loss * step.label_tokens
        self.seconds += step.seconds


def count_steps(rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: every epoch ends with a step of the rows that are left."""
    per_epoch = math.ceil(rows / batch_size)
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * per_epoch))


def rows_of_step(examples: Sequence[Row], step: int, batch_size: int, seed: int) -> list[Row]:
    """The rows of optimizer step ``step`` (from 0): a function of its arguments alone."""
    per_epoch = math.ceil(len(examples) / batch_size)
    epoch, place = divmod(step, per_epoch)
    order = epoch_order(len(examples), epoch, seed)
    return [examples[i] for i in order[place * batch_size : (place + 1) * batch_size]]


def train(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Row],
    batcher: MicroBatcher,
    *,
    learning_rate: float,
    total_steps: int,
    rate_factors: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    may_skip: Callable[[str], bool] = lambda name: False,
    after_step: Callable[[], None] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    schedule: str = "linear",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    max_grad_norm: float | None = 1.0,
    on_step: Callable[[Step], None] | None = None,
) -> Outcome:
    """Train ``parameters`` with AdamW for ``total_steps`` optimizer steps.

    A step's loss is the sum of cross-entropies over all its passes, divided by the label tokens of the whole
    step: how the rows are cut into passes changes nothing.

    Args:
        objective: the sum of a batch's losses, such as
            :class:`deltaw.training.objective.CausalObjective`.
        rate_factors: what each parameter's learning rate is multiplied with; None is 1 for all.
        names: of the parameters, for messages.
        may_skip: whether a model may leave the parameter of this name out of a step by design; see
            :mod:`deltaw.training.guarantee`.
        after_step: called once the optimizer has changed the parameters.
        on_step: told of each step after it; the time it takes is not counted.

    Raises:
        UserError: the loss or the gradient is no longer finite; the parameters are those before that step.
        UntrainedParameterError: a parameter has no gradient in the first step, or did not move in two.
    """
    keep_freed_memory()
    warm = warmup_steps(warmup, total_steps)
    outcome = Outcome()
    with MasterWeights(parameters) as master_weights, _stop_signals() as stopped, _frozen_heap():
        check = TrainedCheck(
            names or [f"parameter {n}" for n in range(len(parameters))], master_weights.trained, may_skip
        )
        optimizer = adamw(
            master_weights.trained,
            learning_rate,
            factors=rate_factors,
            weight_decay=weight_decay,
            betas=betas,
        )
        for number in range(total_steps):
            begun = time.perf_counter()
            if number % STEPS_BETWEEN_TRIMS == 0:
                trim_memory()
            rows = rows_of_step(examples, number, batch_size, seed)
            labels = sum(example.label_count for example in rows)
            rate = learning_rate * learning_rate_factor(number, total_steps, warm, schedule)
            set_rate(optimizer, rate)

            loss_sum, tokens, computed = _gradients(objective, batcher, rows, labels, stopped)
            if stopped():
                outcome.interrupted = True
                break
            norm = _gradient_norm(master_weights.trained, max_grad_norm)
            _check_finite(loss_sum / labels, norm, where=f"step {number + 1} of {total_steps}")
            check.before_update()
            optimizer.step()
            check.after_update()
            optimizer.zero_grad(set_to_none=True)
            master_weights.write_back()
            if after_step is not None:
                after_step()

            per_epoch = math.ceil(len(examples) / batch_size)
            step = Step(
                step=number + 1,
                epoch=(number + 1) / per_epoch,
                loss=loss_sum / labels,
                learning_rate=rate,
                gradient_norm=norm,
                rows=len(rows),
                tokens=tokens,
                computed_tokens=computed,
                label_tokens=labels,
                seconds=time.perf_counter() - begun,
            )
            outcome.add(step)
            if on_step is not None:
                on_step(step)
    return outcome


def _gradients(
    objective: Objective,
    batcher: MicroBatcher,
    rows: Sequence[Any],
    labels: int,
    stopped: Callable[[], bool],
) -> tuple[float, int, int]:
    """Gradients of the mean loss over these rows, pass by pass; the sum of losses, the rows' tokens and those
    computed. Ends after the pass in which it is asked to stop."""
    loss_sum, tokens, computed = 0.0, 0, 0
    for batch in batcher.batches(rows):
        loss = objective(batch)
        (loss / labels).backward()
        loss_sum += loss.item()
        tokens += batch.row_tokens
        computed += batch.tokens
        if stopped():
            break
    return loss_sum, tokens, computed


def _check_finite(loss: float, norm: float, *, where: str) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise UserError(
        f"training diverged: loss {loss:.3g}, gradient norm {norm:.3g}",
        where=where,
        hint="lower train.learning_rate, or lengthen train.warmup",
    )


def _gradient_norm(parameters: Sequence[nn.Parameter], limit: float | None) -> float:
    """The norm of all gradients together; they are scaled down to ``limit`` where it is larger."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None and norm > limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """While open, the collector of garbage leaves alone what is there already: looking through all objects of
    the libraries takes as long as a step of short rows."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """While open, the first Ctrl-C or SIGTERM only asks the loop to stop; a second Ctrl-C stops at once.

    Signals can be caught in the main thread alone; elsewhere nothing changes.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not set from Python, and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def seeded(seed: int) -> None:
    """Fix torch's random state: dropout and whatever else draws from it."""
    torch.manual_seed(seed)
