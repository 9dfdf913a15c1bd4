"""State of a training.

:meth:`TrainState.state` returns plain tensors and plain values. :meth:`TrainState.restore` resumes the training from
them in another process, and all later steps are bitwise equal. Pickle is not used. The caller stores the values.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.packing import epoch_order, grouped_order
from deltaw.errors import UserError
from deltaw.kernels import loader
from deltaw.kernels.torch_private import multiply_each_
from deltaw.training.optimizer import Schedule, adamw, set_rate, skip_update_if
from deltaw.training.process import random_state, set_random_state

Item = TypeVar("Item")
HALF = (torch.bfloat16, torch.float16)


class MasterWeights:
    """Context manager with fp32 copies of 16-bit parameters for the optimizer.

    In bf16 most AdamW updates are smaller than the spacing of the numbers and would be lost. The fp32 copy receives
    each gradient as soon as it is computed, so that gradients of several microbatches are accumulated in fp32 and
    stored once. After the optimizer step the parameter is set to the rounded copy.

    Attributes:
        trained: Each parameter, or its fp32 copy if it has 16 bits.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.trained: list[nn.Parameter] = []
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for parameter in parameters:
            is_half = parameter.dtype in HALF
            self.trained.append(nn.Parameter(parameter.detach().float()) if is_half else parameter)
            if is_half:
                self._pairs.append((parameter, self.trained[-1]))
        self._hooks = [p.register_post_accumulate_grad_hook(_into(master)) for p, master in self._pairs]

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copies into the parameters."""
        for parameter, master in self._pairs:
            parameter.copy_(master)

    def __enter__(self) -> MasterWeights:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks, so that gradients accumulate in the parameters again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _into(master: nn.Parameter) -> Callable[[Tensor], None]:
    def move_gradient(parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        parameter.grad = None
        if master.grad is None:
            master.grad = grad.to(master.dtype)
        else:
            master.grad.add_(grad)

    return move_gradient


# Version of the layout of a saved state. Increase it if older states can no longer be read.
VERSION = 1
# Names of AdamW's state tensors in torch.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
LOSS_SCALE_INTERVAL = 2000


class ArithmeticChangedWarning(UserWarning):
    """A training is resumed with different rounding."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of the training loop.

    Attributes:
        learning_rate: Peak learning rate. See :class:`deltaw.training.optimizer.Schedule`.
        total_steps: Number of optimizer steps.
        schedule: Name of the schedule, or a schedule that replaces rate, steps and warm-up.
        warmup: Number or share of warm-up steps.
        batch_size: Rows per step.
        seed: Seed of the row order and of dropout.
        weight_decay: Weight decay of AdamW.
        betas: Betas of AdamW.
        rate_factors: Learning rate factor of each parameter. None for 1.
        max_grad_norm: Maximum gradient norm. None to disable clipping.
        names: Names of the parameters, for messages and saved states.
        may_skip: Returns True if the model may skip the parameter of this name by design, so that it is only a warning.
            See :func:`deltaw.training.trained_check.may_skip`.
        before_step: Called with the state and the rows before each step.
        after_step: Called after each optimizer update.
        add_gradients: Called with the index of the step and the loss scale after the gradients of the step are
            computed. Adds the scaled gradients of another loss and returns the loss.
        groups: Group of each row, see :class:`RowOrder`.
        skip_not_finite: Skip steps with a loss or gradient that is not finite, up to ``MAX_SKIPPED_IN_ROW`` in a row.
            If False, the first one stops the training.
        loss_scaling: Scale the loss dynamically, for fp16 models. A step with a gradient overflow is skipped.
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
    add_gradients: Callable[[int, float], Tensor | float] | None = None
    groups: np.ndarray | None = None
    skip_not_finite: bool = False
    loss_scaling: bool = False


class TrainOverrides(TypedDict, total=False):
    """Options of :class:`TrainOptions`, and functions by the names of the methods of a callback."""

    learning_rate: float
    total_steps: int
    schedule: str | Schedule
    warmup: float
    batch_size: int
    seed: int
    weight_decay: float
    betas: tuple[float, float]
    rate_factors: Sequence[float] | None
    max_grad_norm: float | None
    names: Sequence[str] | None
    may_skip: Callable[[str], bool]
    before_step: Callable[[TrainState, Sequence[Any]], None]
    after_step: Callable[[], None]
    add_gradients: Callable[[int, float], Tensor | float] | None
    skip_not_finite: bool
    loss_scaling: bool
    on_begin: Callable[[TrainState], object]
    on_step: Callable[[Step], object]
    on_skip: Callable[[NotFinite], object]
    should_stop: Callable[[], bool]
    should_finish: Callable[[], bool]
    diagnose: Callable[[NotFinite], Sequence[str]]


@dataclass
class LossScale:
    """Dynamic loss scale for fp16, with the rules of ``torch.amp.GradScaler``.

    It is a power of two, so that scaling rounds no gradient. It is halved if a gradient overflows, and doubled after
    ``LOSS_SCALE_INTERVAL`` steps without overflow.

    Attributes:
        value: Factor of the loss.
        steps: Number of steps since it changed.
    """

    value: float = 2.0**16
    steps: int = 0

    def update(self, overflowed: bool) -> None:
        """Adjust the scale after a step."""
        self.steps += 1
        if overflowed or self.steps == LOSS_SCALE_INTERVAL:
            self.value = self.value * (0.5 if overflowed else 2.0)
            self.steps = 0


@dataclass(frozen=True)
class Step:
    """Result of an optimizer step.

    Attributes:
        step: Number of the step, from 1.
        epoch: Number of completed epochs.
        loss: Summed loss divided by ``label_tokens`` (nats per label token for a language model).
        learning_rate: Learning rate of the step.
        gradient_norm: Gradient norm before clipping.
        rows: Number of rows.
        tokens: Number of tokens in the rows.
        computed_tokens: Number of tokens that the model computed.
        label_tokens: Number of units of the objective.
        seconds: Duration of the step.
        general_loss: Mean divergence from the base model on general answers, or None without ``train.keep_general``.
        metrics: Further metrics of the loss by name. :meth:`as_dict` merges them with the other values.
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
        values = {name: value for name, value in vars(self).items() if value is not None and name != "metrics"}
        return {**values, **self.metrics}


@dataclass(frozen=True)
class NotFinite:
    """Step without effect, because its loss or gradient is not finite.

    Attributes:
        step: Number of the step, from 1.
        total_steps: Number of steps of the training.
        rows: (n,) indices of the step's rows in the data.
        loss: Loss of the step.
        gradient_norm: Gradient norm of the step.
        learning_rate: Learning rate of the step.
        loss_scale: Loss scale of the step, if the training scales the loss.
        repeated: True if the same step is repeated with a smaller loss scale.
    """

    step: int
    total_steps: int
    rows: np.ndarray
    loss: float
    gradient_norm: float
    learning_rate: float
    loss_scale: float | None = None
    repeated: bool = False

    def as_dict(self) -> dict[str, object]:
        """Return the line of ``metrics.jsonl``. Values that are not finite are strings, because JSON cannot represent
        them.
        """
        values = {"loss": f"{self.loss:g}", "gradient_norm": f"{self.gradient_norm:g}"}
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale}
        kind = "repeated" if self.repeated else "skipped"
        return {"step": self.step, kind: values, "learning_rate": self.learning_rate, **scale}


class NotFiniteError(UserError):
    """The training has diverged. The parameters have their values before the step.

    Args:
        event: Step that failed.
        lines: Lines of the diagnosis.
        in_row: Number of skipped steps directly before it.
    """

    def __init__(self, event: NotFinite, lines: Sequence[str] = (), in_row: int = 0) -> None:
        self.event = event
        history = f", after {in_row} steps in a row that were skipped" if in_row else ""
        message = f"training diverged: loss {event.loss:.3g}, gradient norm {event.gradient_norm:.3g}{history}"
        text = "\n".join([message, *(f"  {line}" for line in lines)])
        hint = "lower train.learning_rate, or lengthen train.warmup"
        hint += "" if in_row else "; train.not_finite: skip leaves such steps out"
        hint += "" if event.loss_scale is None else "; fp16 overflows above 65504, unlike precision: fp32"
        super().__init__(text, location=f"step {event.step} of {event.total_steps}", hint=hint)


@dataclass
class Outcome:
    """Totals of a training. ``loss`` is the mean over all units (label tokens).

    ``skipped`` of the ``steps`` had no effect because their loss or gradient was not finite. They are not included in
    the other totals.
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
    """Rows of each step, as a function of the attributes.

    Attributes:
        rows: Number of rows in the data.
        batch_size: Rows per step. The last step of an epoch has the remaining rows.
        seed: Seed of the permutation of each epoch.
        groups: (rows,) group of each row. Rows of a group are consecutive in each epoch. None without groups.
    """

    rows: int
    batch_size: int
    seed: int
    groups: np.ndarray | None = field(default=None, compare=False)

    def as_dict(self) -> dict[str, object]:
        """Return JSON values that determine the order."""
        values: dict[str, object] = {"rows": self.rows, "batch_size": self.batch_size, "seed": self.seed}
        if self.groups is not None:
            values["groups"] = hashlib.blake2b(self.groups.tobytes(), digest_size=16).hexdigest()
        return values

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch (from 0) of step ``step`` (from 0) and the step's offset in the order of the epoch."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_of_epoch * self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """Return the indices of the rows of step ``step`` (from 0)."""
        epoch, position = self.position(step)
        order = epoch_order(self.rows, epoch, self.seed)
        if self.groups is not None:
            order = grouped_order(order, self.groups, epoch, self.seed)
        return order[position : position + self.batch_size]


def rows_of_step(examples: Sequence[Item], step: int, batch_size: int, seed: int) -> list[Item]:
    """Return the rows of optimizer step ``step`` (from 0)."""
    return [examples[i] for i in RowOrder(len(examples), batch_size, seed).indices(step)]


@dataclass(frozen=True)
class SavedState:
    """Serializable state of a training.

    Attributes:
        values: JSON values.
        tensors: Tensors by name, possibly loaded lazily from a file.
    """

    values: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)

    def with_total_steps(self, total_steps: int) -> SavedState:
        """Return the state for a training with another number of steps. This changes only later learning rates."""
        schedule = self.values["schedule"] | {"total_steps": total_steps}
        return replace(self, values=self.values | {"schedule": schedule})


class TrainState:
    """State of a training between two steps.

    As a context manager it redirects gradients to the master weights and uses the random numbers of the training.

    Args:
        parameters: Parameters to train.
        num_rows: Number of rows in the data.
        options: Options of the training.

    Attributes:
        schedule: Learning rate schedule.
        order: Order of the rows.
        names: Names of the parameters.
        trained: Parameters of the optimizer, with fp32 master weights of 16-bit parameters.
        sources: Parameters of the model.
        optimizer: Optimizer of ``trained``.
        sums: Totals of all steps so far.
        skipped_in_row: Number of skipped steps since the last one with effect.
        loss_scale: Scale of the loss, or None if it is not scaled.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_rows: int, options: TrainOptions) -> None:
        schedule = options.schedule
        if isinstance(schedule, str):
            schedule = Schedule(schedule, options.learning_rate, options.total_steps, options.warmup)
        self.schedule = schedule
        self.order = RowOrder(num_rows, options.batch_size, options.seed, options.groups)
        self.sums = Outcome()
        self.skipped_in_row = 0
        self.loss_scale = LossScale() if options.loss_scaling else None
        names = options.names or [f"parameter {n}" for n in range(len(parameters))]
        named = dict(zip(names, parameters, strict=True))
        self.names = list(named)
        self.sources = list(named.values())
        self._master_weights = MasterWeights(self.sources)
        self.trained = self._master_weights.trained
        factors = options.rate_factors
        self.optimizer = adamw(self.trained, schedule.learning_rate, factors, options.weight_decay, options.betas)
        self._random: dict[str, Tensor] = {}

    @property
    def step(self) -> int:
        """Number of completed optimizer steps."""
        return self.sums.steps

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return self.schedule.rate(self.step)

    def replan(self, total_steps: int) -> None:
        """Change the number of steps and adjust the end of the schedule. Saved states include the new number."""
        self.schedule = self.schedule.replanned(self.step, total_steps)

    def __enter__(self) -> TrainState:
        self._master_weights.__enter__()
        self._random = random_state()
        return self

    def __exit__(self, *error: object) -> None:
        self._master_weights.__exit__(*error)

    def start_step(self) -> np.ndarray:
        """Restore the random number state and return the indices of the next step's rows.

        Random numbers generated between steps do not affect the training.
        """
        set_random_state(self._random)
        return self.order.indices(self.step)

    def abandon_step(self) -> None:
        """Discard the gradients of a step. The state is that before the step."""
        self.optimizer.zero_grad(set_to_none=True)

    def unscale(self) -> None:
        """Divide the gradients by the loss scale."""
        if self.loss_scale is not None and (gradients := [p.grad for p in self.trained if p.grad is not None]):
            multiply_each_(gradients, [1 / self.loss_scale.value] * len(gradients))

    def update(self, unless: Tensor | None = None) -> None:
        """Run the optimizer and write the result to the parameters.

        Args:
            unless: A bool scalar on the parameters' device, which is not synchronized, except on mps. If it is True,
                parameters and optimizer state are unchanged. Gradients are cleared in both cases.
        """
        set_rate(self.optimizer, self.learning_rate)
        # torch's fused AdamW ignores the condition on mps.
        if unless is None or unless.device.type != "mps" or not unless:
            with skip_update_if(self.optimizer, unless):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.write_back()

    def write_back(self) -> None:
        """Round the master weights into the parameters of the model."""
        self._master_weights.write_back()

    def end_step(self, step: Step) -> None:
        """Record a completed step."""
        self.sums.add(step)
        self.skipped_in_row = 0
        self._random = random_state()
        if self.loss_scale is not None:
            self.loss_scale.update(overflowed=False)

    def skip_step(self) -> None:
        """Record a step without effect. The schedule and the rows advance."""
        self.abandon_step()
        self.sums.steps += 1
        self.sums.skipped += 1
        self.skipped_in_row += 1
        self._random = random_state()

    def state(self) -> SavedState:
        """Return a copy of the state, between two steps or after the training."""
        view = self.view()
        return SavedState(view.values, {name: t.detach().to("cpu", copy=True) for name, t in view.tensors.items()})

    def view(self) -> SavedState:
        """Return the state with the training's tensors, which the next step overwrites."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.trained, strict=True):
            tensors[f"parameter/{name}"] = parameter.detach()
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": moments[key] for key in MOMENTS if key in moments}
        tensors |= {f"random/{device}": state for device, state in self._random.items()}
        epoch, position = self.order.position(self.step)
        values: dict[str, Any] = {
            "version": VERSION,
            "step": self.step,
            "names": list(self.names),
            "schedule": asdict(self.schedule),
            "order": self.order.as_dict(),
            "place": {"epoch": epoch, "position": position},
            "arithmetic": loader.arithmetic().as_dict(),
            "skipped_in_row": self.skipped_in_row,
            "loss_scale": None if self.loss_scale is None else asdict(self.loss_scale),
            "sums": {f.name: getattr(self.sums, f.name) for f in fields(Outcome) if f.name != "interrupted"},
        }
        return SavedState(values, tensors)

    @torch.no_grad()
    def restore(self, state: SavedState) -> None:
        """Resume from the result of :meth:`state`.

        If kernels now round differently, a warning is issued and the following steps are not bitwise equal.

        Raises:
            UserError: if the state has other parameters, rows or another schedule.
        """
        stored_schedule = state.values["schedule"]
        if stored_schedule.get("planned"):  # total_steps was changed during the training
            planned = ("total_steps", "warmup", "since", "decayed", "planned")
            self.schedule = replace(self.schedule, **{name: stored_schedule[name] for name in planned})
        self._require_same(state)
        _warn_of_other_arithmetic(state.values.get("arithmetic"))
        for name, parameter in zip(self.names, self.trained, strict=True):
            value = state.tensors[f"parameter/{name}"]
            if value.shape != parameter.shape:
                message = f"'{name}' has shape {tuple(parameter.shape)}, and {tuple(value.shape)} in the saved state"
                hint = "resume with the original model and settings"
                raise UserError(message, location="the saved state", hint=hint)
            parameter.copy_(value)
            moments = {key: state.tensors.get(f"{key}/{name}") for key in MOMENTS}
            on_device = {k: t.to(parameter.device, copy=True) for k, t in moments.items() if t is not None}
            if on_device:
                self.optimizer.state[parameter] = on_device
        self.write_back()
        self.sums = Outcome(**state.values["sums"])
        self.skipped_in_row = state.values["skipped_in_row"]
        if self.loss_scale is not None and (scale := state.values.get("loss_scale")) is not None:
            self.loss_scale = LossScale(**scale)
        prefix = "random/"
        self._random = {key.removeprefix(prefix): state.tensors[key] for key in state.tensors if key.startswith(prefix)}

    def _require_same(self, state: SavedState) -> None:
        if state.values["version"] != VERSION:
            hint = "resume with the version of deltaw that wrote it"
            message = f"the saved state has version {state.values['version']}, and this deltaw reads {VERSION}"
            raise UserError(message, location="the saved state", hint=hint)
        pairs = {
            "the trained parameters": (state.values["names"], self.names),
            "the order of rows": (state.values["order"], self.order.as_dict()),
            "the schedule": (state.values["schedule"], asdict(self.schedule)),
        }
        for name, (stored, current) in pairs.items():
            if stored != current:
                hint = "resume with the original settings and data"
                differs = f"{name} differs from that of the training to continue"
                raise UserError(differs, location="the saved state", hint=hint)


def _warn_of_other_arithmetic(stored: Mapping[str, str] | None) -> None:
    """Warn if this process computes matrix products differently from the process that saved a state."""
    if stored is None:
        return
    current = loader.arithmetic().as_dict()
    previous = stored
    differing = [name for name in current if previous.get(name) != current[name]]
    if not differing:
        return
    changed = ", ".join(f"{name}: {current[name]} instead of {previous.get(name)}" for name in differing)
    consequence = "so the training is resumed, but is not bitwise equal"
    text = f"products are computed differently than when the state was saved, {consequence} ({changed})"
    warnings.warn(text, ArithmeticChangedWarning, stacklevel=3)
