"""Outputs at padding, which an accelerated model does not compute.

Most scripts ignore them. Whether a script does is only known after a backward pass: then the gradient of these outputs
is zero. Until then, they are computed by the model's original code, without its graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class PaddingUse:
    """What is known about a script's use of outputs at padding.

    Attributes:
        is_read: True if a loss depends on them, False if not, None before a backward pass has shown it.
        same_in_evaluation: True if code that calls the model without gradient reads them only if the loss does.
    """

    is_read: bool | None = None
    same_in_evaluation: bool = False

    def observe(self, gradient: Tensor, padding: Tensor) -> None:
        """Update ``is_read`` with the gradient of outputs.

        Args:
            gradient: (rows, columns, …).
            padding: (rows, columns) bool, True at padding.
        """
        if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
            return
        self.is_read = bool(gradient[padding].any())


@dataclass(eq=False)
class OriginalOutputs:
    """Outputs of the model's original code, without their graph, which can be computed again.

    Args:
        run: Runs the original code.

    Attributes:
        values: The outputs.
    """

    run: Callable[[], Tensor]
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._state = torch.get_rng_state()
        self._autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            self.values = self.run()

    def gradients(self, parameters: list[nn.Parameter], gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of parameters for a gradient of the outputs. Dropout has the same masks as before."""
        with torch.enable_grad(), self._same_context():
            outputs = self.run()
        return torch.autograd.grad(outputs, parameters, gradient.to(outputs.dtype), allow_unused=True)

    @contextlib.contextmanager
    def _same_context(self) -> Iterator[None]:
        enabled, dtype = self._autocast
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", dtype, enabled=enabled):
            torch.set_rng_state(self._state)
            yield


def with_original_padding(
    outputs: Tensor, padding: Tensor, original: OriginalOutputs, use: PaddingUse, parameters: list[nn.Parameter]
) -> Tensor:
    """Return outputs with the original values at padding.

    If the loss depends on them, the gradients of all parameters are those of the original code. Otherwise they are
    those of the accelerated outputs.

    Args:
        outputs: (rows, columns, …) accelerated outputs.
        padding: (rows, columns) bool, True at padding.
        original: Outputs of the original code.
        use: Updated by the backward pass.
        parameters: Trained parameters that the outputs depend on.
    """
    values = outputs.detach().clone()
    values[padding] = original.values[padding].to(values.dtype)
    # Without parameters, the gradient of this tensor makes the backward pass reach the outputs.
    anchor = torch.zeros((), requires_grad=True)
    arguments = values, padding, original, use
    result: Tensor = _OriginalPadding.apply(*arguments, anchor, outputs, *parameters)  # type: ignore[no-untyped-call]
    return result


class _OriginalPadding(torch.autograd.Function):
    """Replaces values at padding, and selects the computation of the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        padding: Tensor,
        original: OriginalOutputs,
        use: PaddingUse,
        anchor: Tensor,
        outputs: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.saved = padding, original, use, list(parameters)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        padding, original, use, parameters = ctx.saved
        use.observe(gradient, padding)
        unused = None, None, None, None, None
        if not bool(gradient[padding].any()) or not parameters:
            return *unused, gradient, *(None for _ in parameters)
        return *unused, None, *original.gradients(parameters, gradient)


def check_padding_is_unread(outputs: Tensor, padding: Tensor) -> None:
    """Let a backward pass fail if the loss depends on outputs at padding, which are zero."""

    def check(gradient: Tensor) -> None:
        if bool(gradient.isfinite().all()) and bool(gradient[padding].any()):
            hint = "mask them in the loss, or call deltaw.restore before this step"
            raise RuntimeError(
                f"the loss depends on outputs at padding, which an accelerated model leaves zero; {hint}"
            )

    if outputs.requires_grad:
        outputs.register_hook(check)
