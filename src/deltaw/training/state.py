"""The state of a training: all that a continued run needs, as one object.

The loop works on it, and :meth:`TrainState.state` gives it as plain tensors and plain values, of which
:meth:`TrainState.restore` makes the same training again in another process: every later step is equal to the
bit. Nothing is pickled. Where it is written is somebody else's matter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.packing import epoch_order
from deltaw.errors import UserError
from deltaw.kernels import loader
from deltaw.training.optimizer import Schedule, adamw, set_rate, skipping
from deltaw.training.process import random_state, set_random_state

Item = TypeVar("Item")
HALF = (torch.bfloat16, torch.float16)


class MasterWeights:
    """The parameters as an optimizer sees them, while open: fp32 copies of those of lower precision.

    In bf16 a step of AdamW is mostly smaller than the distance to the next number and would vanish. The copy
    takes the gradient as soon as it is there, in fp32, so that gradients of several microbatches add up without
    loss and none is kept twice; after the optimizer's step the parameter is the copy, rounded.

    Attributes:
        trained: for each parameter itself, or its fp32 copy where it is of lower precision.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.trained: list[nn.Parameter] = []
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for parameter in parameters:
            half = parameter.dtype in HALF
            self.trained.append(nn.Parameter(parameter.detach().float()) if half else parameter)
            if half:
                self._pairs.append((parameter, self.trained[-1]))
        self._hooks = [own.register_post_accumulate_grad_hook(_into(master)) for own, master in self._pairs]

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copies into the parameters."""
        for parameter, master in self._pairs:
            parameter.copy_(master)

    def __enter__(self) -> MasterWeights:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the parameters have their own gradients again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _into(master: nn.Parameter) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        parameter.grad = None
        if master.grad is None:
            master.grad = grad.to(master.dtype)
        else:
            master.grad.add_(grad)

    return take


# Of the layout of a saved state; another number where an older one could not be read.
VERSION = 1
# Torch's names for what AdamW keeps of a parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class ArithmeticChangedWarning(UserWarning):
    """A training continues with another rounding than it began with."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a training goes.

    Attributes:
        learning_rate, total_steps, schedule, warmup: see :class:`deltaw.training.optimizer.Schedule`; a whole
            schedule takes the place of the three others.
        batch_size: rows per step. seed: of the order of rows, and of dropout.
        weight_decay, betas: AdamW's. rate_factors: what each parameter's learning rate is multiplied with; None is
            1 for all. max_grad_norm: gradients are scaled down to this norm; None: never.
        names: of the parameters, for messages and for saved states.
        may_skip: whether the model may leave the parameter of this name out of a step by design, which makes
            it a warning. :func:`deltaw.training.guarantee.may_skip` answers for a model.
        before_step, after_step: called with the state and a step's rows before it begins, and once the
            optimizer has changed the parameters.
        add_gradients: called with each step's number from 0 once its rows' gradients are there; adds those of
            another loss and returns it (:class:`deltaw.training.evaluation.general.KeepGeneral`).
        skip_not_finite: whether steps whose loss or gradient is not finite are left out, up to ``MOST_IN_ROW`` in a
            row; else the first ends the training.
    """

    learning_rate: float
    total_steps: int
    schedule: str | Schedule = "linear"
    warmup: float = 0.0
    batch_size: int = 16
    seed: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    rate_factors: Sequence[float] | None = None
    max_grad_norm: float | None = 1.0
    names: Sequence[str] | None = None
    may_skip: Callable[[str], bool] = lambda name: False
    before_step: Callable[[TrainState, Sequence[Any]], None] = lambda state, rows: None
    after_step: Callable[[], None] = lambda: None
    add_gradients: Callable[[int], Tensor | float] | None = None
    skip_not_finite: bool = False


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Attributes:
        step: its number, from 1. epoch: times that each row was seen by its end.
        loss: the sum of losses over ``label_tokens``, the objective's units (nats per label token of a
            language model).
        learning_rate, gradient_norm: that the step used; the norm is that before clipping.
        rows, tokens: of the data. computed_tokens: what went through the model. seconds: that it took.
        general_loss: the mean loss of the general answers in it; None without ``train.keep_general``.
        metrics: further numbers that the loss tells of the step, by name; they stand among the others in
            :meth:`as_dict`.
    """

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
    general_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return own | own.pop("metrics")


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
        skipped = {"loss": f"{self.loss:g}", "gradient_norm": f"{self.gradient_norm:g}"}
        return {"step": self.step, "skipped": skipped, "learning_rate": self.learning_rate}


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


@dataclass
class Outcome:
    """Sums over a training's steps: ``loss`` is the mean over all units (label tokens) seen.

    ``skipped`` of the ``steps`` changed nothing, since their loss or gradient was not finite; they are in no
    other sum.
    """

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    label_tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    interrupted: bool = False

    @property
    def loss(self) -> float:
        return self.loss_sum / self.label_tokens if self.label_tokens else float("nan")

    def add(self, step: Step) -> None:
        self.steps += 1
        self.loss_sum += step.loss * step.label_tokens
        for name in ("rows", "tokens", "computed_tokens", "label_tokens", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(step, name))


@dataclass(frozen=True)
class RowOrder:
    """Which rows each step sees: a function of three numbers and the step.

    Attributes:
        rows: of the data. batch_size: rows of a step; the last step of an epoch has those that are left.
        seed: of each epoch's permutation.
    """

    rows: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def place(self, step: int) -> tuple[int, int]:
        """The epoch (from 0) of step ``step`` (from 0), and where in its order of rows the step begins."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, within * self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """The rows of step ``step`` (from 0), by their place in the data."""
        epoch, position = self.place(step)
        return epoch_order(self.rows, epoch, self.seed)[position : position + self.batch_size]


def rows_of_step(examples: Sequence[Item], step: int, batch_size: int, seed: int) -> list[Item]:
    """The rows of optimizer step ``step`` (from 0): a function of its arguments alone."""
    return [examples[i] for i in RowOrder(len(examples), batch_size, seed).indices(step)]


@dataclass(frozen=True)
class SavedState:
    """A training's state without its objects.

    Attributes:
        values: plain values, ready for JSON. tensors: by name; they may be read from a file one by one.
    """

    values: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)

    def lasting(self, total_steps: int) -> SavedState:
        """The same state for a training of another length. The steps to come have the learning rates that a
        training of this length has at their place; those done keep what they had."""
        schedule = self.values["schedule"] | {"total_steps": total_steps}
        return replace(self, values=self.values | {"schedule": schedule})


class TrainState:
    """A training between two steps. A context manager: while open, gradients go to the master weights,
    and the random numbers of the process belong to the training.

    Args:
        parameters: what is trained, by name.
        schedule, order: of learning rates and of rows.
        rate_factors: what each parameter's learning rate is multiplied with; None is 1 for all.
        weight_decay, betas: AdamW's.

    Attributes:
        names, trained: the parameters as the optimizer has them: fp32 master weights of those in 16 bits.
        sources: the same as the model has them.
        optimizer: over ``trained``.
        sums: over the steps so far. skipped_in_row: the last so many steps were skipped.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        schedule: Schedule,
        order: RowOrder,
        *,
        rate_factors: Sequence[float] | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.names = list(parameters)
        self.schedule = schedule
        self.order = order
        self.sums = Outcome()
        self.skipped_in_row = 0
        self.sources = list(parameters.values())
        self._master_weights = MasterWeights(self.sources)
        self.trained = self._master_weights.trained
        adam: dict[str, Any] = {"factors": rate_factors, "weight_decay": weight_decay, "betas": betas}
        self.optimizer = adamw(self.trained, schedule.learning_rate, **adam)
        self._random: dict[str, Tensor] = {}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.sums.steps

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.schedule.rate(self.step)

    def replan(self, total_steps: int) -> None:
        """Let the training end after so many steps instead; its schedule then reaches its end there. A saved
        state brings the number that was planned."""
        self.schedule = self.schedule.replanned(self.step, total_steps)

    def __enter__(self) -> TrainState:
        self._master_weights.__enter__()
        self._random = random_state()
        return self

    def __exit__(self, *error: object) -> None:
        self._master_weights.__exit__(*error)

    def begin_step(self) -> np.ndarray:
        """The rows of the next step, by their place in the data. Whatever drew random numbers since the last
        one changes nothing."""
        set_random_state(self._random)
        return self.order.indices(self.step)

    def abandon_step(self) -> None:
        """Forget a step that was begun: the state is that before it."""
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, unless: Tensor | None = None) -> None:
        """Let the optimizer use the gradients, and bring the result into the parameters.

        Args:
            unless: a bool scalar on the parameters' device, which is not read here: where it is True, nothing
                but the gradients changes.
        """
        set_rate(self.optimizer, self.learning_rate)
        with skipping(self.optimizer, unless):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._master_weights.write_back()

    def end_step(self, step: Step) -> None:
        """Count a step that is done."""
        self.sums.add(step)
        self.skipped_in_row = 0
        self._random = random_state()

    def skip_step(self) -> None:
        """Count a step that was begun and changes nothing; the schedule and the rows go on."""
        self.abandon_step()
        self.sums.steps += 1
        self.sums.skipped += 1
        self.skipped_in_row += 1
        self._random = random_state()

    def state(self) -> SavedState:
        """All of it, copied: between two steps, or once the training is over."""
        seen = self.view()
        return SavedState(seen.values, {name: t.detach().to("cpu", copy=True) for name, t in seen.tensors.items()})

    def view(self) -> SavedState:
        """As :meth:`state`, with the training's own tensors, which the next step changes."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.trained, strict=True):
            tensors[f"parameter/{name}"] = parameter.detach()
            kept = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": kept[key] for key in MOMENTS if key in kept}
        tensors |= {f"random/{device}": state for device, state in self._random.items()}
        epoch, position = self.order.place(self.step)
        values: dict[str, Any] = {
            "version": VERSION,
            "step": self.step,
            "names": list(self.names),
            "schedule": asdict(self.schedule),
            "order": asdict(self.order),
            "place": {"epoch": epoch, "position": position},
            "arithmetic": loader.arithmetic().as_dict(),
            "skipped_in_row": self.skipped_in_row,
            "sums": {f.name: getattr(self.sums, f.name) for f in fields(Outcome) if f.name != "interrupted"},
        }
        return SavedState(values, tensors)

    @torch.no_grad()
    def restore(self, saved: SavedState) -> None:
        """Continue from what :meth:`state` gave.

        Where products are computed in another way than then, they round differently: a warning says so, and
        the steps to come are not equal to the bit.

        Raises:
            UserError: it is the state of another training: of other parameters, rows or schedule.
        """
        then = saved.values["schedule"]
        if then.get("planned"):  # the number of steps was planned on the way
            planned = ("total_steps", "warmup", "since", "decayed", "planned")
            self.schedule = replace(self.schedule, **{name: then[name] for name in planned})
        self._require_same(saved)
        _warn_of_other_arithmetic(saved.values.get("arithmetic"))
        for name, parameter in zip(self.names, self.trained, strict=True):
            value = saved.tensors[f"parameter/{name}"]
            if value.shape != parameter.shape:
                what = f"'{name}' has the shape {tuple(parameter.shape)}, and {tuple(value.shape)} in the saved state"
                hint = "continue with the model and the settings that it began with"
                raise UserError(what, where="the saved state", hint=hint)
            parameter.copy_(value)
            kept = {key: saved.tensors.get(f"{key}/{name}") for key in MOMENTS}
            on_device = {k: t.to(parameter.device, copy=True) for k, t in kept.items() if t is not None}
            if on_device:
                self.optimizer.state[parameter] = on_device
        self._master_weights.write_back()
        self.sums = Outcome(**saved.values["sums"])
        self.skipped_in_row = saved.values["skipped_in_row"]
        prefix = "random/"
        self._random = {key.removeprefix(prefix): saved.tensors[key] for key in saved.tensors if key.startswith(prefix)}

    def _require_same(self, saved: SavedState) -> None:
        if saved.values["version"] != VERSION:
            hint = "continue with the version of deltaw that wrote it"
            wrong = f"the saved state has version {saved.values['version']}, and this deltaw reads {VERSION}"
            raise UserError(wrong, where="the saved state", hint=hint)
        same = {
            "the trained parameters": (saved.values["names"], self.names),
            "the order of rows": (saved.values["order"], asdict(self.order)),
            "the schedule": (saved.values["schedule"], asdict(self.schedule)),
        }
        for what, (theirs, ours) in same.items():
            if theirs != ours:
                hint = "continue with the settings and the data that it began with"
                differs = f"{what} differs from that of the training to continue"
                raise UserError(differs, where="the saved state", hint=hint)


def _warn_of_other_arithmetic(saved: Mapping[str, str] | None) -> None:
    """Say where this process computes products otherwise than the one that saved a state."""
    if saved is None:
        return
    ours, theirs = loader.arithmetic().as_dict(), saved
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    if not differing:
        return
    changed = ", ".join(f"{name}: {ours[name]} instead of {theirs.get(name)}" for name in differing)
    how = "so the training continues, but not equal to the bit"
    text = f"products are computed differently than when the state was saved, {how} ({changed})"
    warnings.warn(text, ArithmeticChangedWarning, stacklevel=3)
