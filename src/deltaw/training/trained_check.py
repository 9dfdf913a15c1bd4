"""Verification that the parameters passed to the optimizer are trained.

The check covers the first two steps. Each parameter must have a gradient in the first step. In one of the two steps
its gradient must not be all zeros, and the element with the largest gradient must change. (The factor A of a pair has
a zero gradient as long as B is zero.) A parameter that fails raises an error. It is only a warning if the model may
skip the parameter by design, such as an expert without tokens or an embedding whose tokens did not occur.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deltaw.errors import UserError, first_names
from deltaw.tensor_files import has_values

# Number of checked steps.
CHECKED_STEPS = 2


class UntrainedParameterError(UserError):
    """A parameter that should be trained is not."""


class UntrainedParameterWarning(UserWarning):
    """A parameter was not trained in the first steps, which its model allows."""


class TrainedCheck:
    """Checks the first steps of a training. It has no cost afterwards.

    Args:
        names: Names of the parameters, for messages.
        parameters: Parameters as passed to the optimizer, including fp32 master weights.
        may_skip: Returns True if the model may skip the parameter of this name by design.
        steps_done: Number of completed steps of a resumed training.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        may_skip: Callable[[str], bool] = lambda name: False,
        steps_done: int = 0,
    ) -> None:
        self._parameters = dict(zip(names, parameters, strict=True))
        self._may_skip = may_skip
        self._pending = {name for name, p in self._parameters.items() if has_values(p.data) and p.numel()}
        self._snapshots: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
        self._steps = steps_done

    @property
    def done(self) -> bool:
        return self._steps >= CHECKED_STEPS or not self._pending

    @torch.no_grad()
    def before_update(self) -> None:
        """Record parameter values. Call it once the gradients of the step are computed.

        Raises:
            UntrainedParameterError: if a parameter has no gradient in the first step.
        """
        self._snapshots = {}
        if self.done:
            return
        missing = [name for name in self._parameters if name in self._pending and self._parameters[name].grad is None]
        if self._steps == 0:
            self._reject(missing, "received no gradient in the first step")
        for name in self._pending.difference(missing):
            parameter = self._parameters[name]
            assert parameter.grad is not None
            index = _largest(parameter.grad)
            if parameter.grad[index] != 0:
                self._snapshots[name] = (index, parameter[index].clone())

    @torch.no_grad()
    def after_update(self) -> None:
        """Compare parameter values. Call it after the optimizer step.

        Raises:
            UntrainedParameterError: if a parameter has not changed after the second step.
        """
        if self.done:
            return
        for name, (index, before) in self._snapshots.items():
            if self._parameters[name][index] != before:
                self._pending.discard(name)
        self._snapshots = {}
        self._steps += 1
        if self._steps == CHECKED_STEPS:
            self._reject([name for name in self._parameters if name in self._pending], "did not move in two steps")

    def _reject(self, names: Sequence[str], problem: str) -> None:
        skipped = [name for name in names if self._may_skip(name)]
        if skipped:
            text = f"{first_names([repr(name) for name in skipped])} {problem}"
            warnings.warn(text, UntrainedParameterWarning, stacklevel=3)
            self._pending.difference_update(skipped)
        failed = [name for name in names if name not in skipped]
        if failed:
            message = f"{first_names([repr(name) for name in failed])} {problem}, but should be trained"
            hint = "leave out parameters that the model does not use; no adapter was saved"
            raise UntrainedParameterError(message, location="the parameters of the optimizer", hint=hint)


def _largest(values: Tensor) -> tuple[Tensor, ...]:
    """Return the index of the largest magnitude without copying the values.

    A gradient can be as large as the model's largest weight, and memory use is at its peak at this point.
    """
    if not values.dim():
        return ()
    indices = [torch.unravel_index(index, values.shape) for index in (values.argmax(), values.argmin())]
    return max(indices, key=lambda index: float(values[index].abs()))


def may_skip(model: nn.Module) -> Callable[[str], bool]:
    """Return a predicate for parameters that the model may skip in a step by design.

    These are embeddings, which read only the rows of the tokens that occur, and members of a module list inside a
    block, such as experts selected by a router.
    """
    skipped = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [f"{name}." for name, _ in lists]
    for name, module in lists:
        if any(name.startswith(prefix) for prefix in outer):
            skipped |= {id(p) for p in module.parameters()}
    names = tuple(name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in skipped)
    return lambda name: bool(names) and name.startswith(names)  # also matches parts of a parameter
