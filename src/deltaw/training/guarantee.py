"""The guarantee that what a run says it trains is trained: checked at its first two steps, by value.

Every parameter that the optimizer was handed must have a gradient at the first step. At the first or the
second step its gradient must be more than zeros (the factor A of a pair has none as long as B is zero), and
the number with the largest gradient must have moved. A parameter that fails ends the run. Where a model may
skip a parameter by design (an expert that no token was routed to, an embedding whose tokens did not occur),
it is a warning.

Knows parameters and their names; not what they belong to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deltaw.errors import UserError, first_names
from deltaw.lora.fingerprint import has_values

# Steps that are checked.
STEPS = 2


class UntrainedParameterError(UserError):
    """A parameter that is said to be trained is not."""


class UntrainedParameterWarning(UserWarning):
    """A parameter was not trained in the first steps, as its model allows."""


class TrainedCheck:
    """Watches the first steps of a training; free afterwards.

    Args:
        names: of the parameters, for the error.
        parameters: as the optimizer has them: master weights where there are some.
        may_skip: whether a model may leave the parameter of this name out by design.
        steps_done: of a training that goes on.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        may_skip: Callable[[str], bool] = lambda name: False,
        steps_done: int = 0,
    ) -> None:
        self._watched = dict(zip(names, parameters, strict=True))
        self._may_skip = may_skip
        self._still = {name for name, p in self._watched.items() if has_values(p.data) and p.numel()}
        self._marks: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
        self._steps = steps_done

    @property
    def done(self) -> bool:
        return self._steps >= STEPS or not self._still

    @torch.no_grad()
    def before_update(self) -> None:
        """Call with the step's gradients in place.

        Raises:
            UntrainedParameterError: at the first step, a parameter has none.
        """
        self._marks = {}
        if self.done:
            return
        missing = [name for name in self._watched if name in self._still and self._watched[name].grad is None]
        if self._steps == 0:
            self._refuse(missing, "received no gradient in the first step")
        for name in self._still.difference(missing):
            parameter = self._watched[name]
            assert parameter.grad is not None
            at = _largest(parameter.grad)
            if parameter.grad[at] != 0:
                self._marks[name] = (at, parameter[at].clone())

    @torch.no_grad()
    def after_update(self) -> None:
        """Call once the optimizer has changed the parameters.

        Raises:
            UntrainedParameterError: at the second step, a parameter has not moved yet.
        """
        if self.done:
            return
        for name, (at, before) in self._marks.items():
            if self._watched[name][at] != before:
                self._still.discard(name)
        self._marks = {}
        self._steps += 1
        if self._steps == STEPS:
            self._refuse([name for name in self._watched if name in self._still], "did not move in two steps")

    def _refuse(self, names: Sequence[str], what: str) -> None:
        skipped = [name for name in names if self._may_skip(name)]
        if skipped:
            text = f"{first_names([repr(name) for name in skipped])} {what}"
            warnings.warn(text, UntrainedParameterWarning, stacklevel=3)
            self._still.difference_update(skipped)
        failed = [name for name in names if name not in skipped]
        if failed:
            raise UntrainedParameterError(
                f"{first_names([repr(name) for name in failed])} {what}, though said to be trained",
                where="the parameters handed to the optimizer",
                hint="leave out what the model does not use; nothing was saved as trained",
            )


def _largest(values: Tensor) -> tuple[Tensor, ...]:
    """Where the largest magnitude is, found without a copy of the values: a gradient may be as large as the
    model's largest weight, and all the training's memory is in use when it is there."""
    if not values.dim():
        return ()
    places = [torch.unravel_index(place, values.shape) for place in (values.argmax(), values.argmin())]
    return max(places, key=lambda place: float(values[place].abs()))


def may_skip(model: nn.Module) -> Callable[[str], bool]:
    """Which parameters of a model it may leave out of a step by design, by name.

    These are embeddings, of which a step reads the rows of its own tokens, and members of a list inside of a
    block (experts), of which a router picks some.
    """
    skipped = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [f"{name}." for name, _ in lists]
    for name, module in lists:
        if any(name.startswith(prefix) for prefix in outer):
            skipped |= {id(p) for p in module.parameters()}
    names = tuple(name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in skipped)
    return lambda name: bool(names) and name.startswith(names)  # a part of one is named after it
