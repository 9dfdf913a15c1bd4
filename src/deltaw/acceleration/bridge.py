"""One node of a script's autograd graph that contains the graph of a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.acceleration.peft_layers import Factor

Leaf = tuple[Tensor, Tensor, Factor | None]
"""A trained parameter of a copy, that of the script's model, and the conversion between them."""


def run_bridged(run: Callable[[], Tensor], leaves: Sequence[Leaf]) -> Tensor:
    """Return the result of ``run``, connected to the parameters of the script's model.

    Args:
        run: Computes a tensor from the parameters of the copy.
        leaves: Trained parameters that it depends on.
    """
    if not leaves or not torch.is_grad_enabled():
        return run()
    result: Tensor = _Bridge.apply(run, leaves, *(source for _, source, _ in leaves))  # type: ignore[no-untyped-call]
    return result


class _Bridge(torch.autograd.Function):
    """Computes the graph of a copy in the forward pass, and its gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], Tensor], leaves: Sequence[Leaf], *sources: Tensor) -> Tensor:
        with torch.enable_grad():
            output = run()
        ctx.output = output
        ctx.leaves = leaves
        return output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        output = ctx.output
        if output is None:
            hint = "call deltaw.restore before a backward pass with retain_graph=True"
            raise RuntimeError(f"the graph of an accelerated call supports one backward pass; {hint}")
        ctx.output = None
        if not output.requires_grad:
            return None, None, *(None for _ in ctx.leaves)
        parameters = [parameter for parameter, _, _ in ctx.leaves]
        computed = torch.autograd.grad(output, parameters, grads[0], allow_unused=True)
        converted = (_in_layout(g, factor) for g, (_, _, factor) in zip(computed, ctx.leaves, strict=True))
        return None, None, *converted


def _in_layout(gradient: Tensor | None, factor: Factor | None) -> Tensor | None:
    return gradient if gradient is None or factor is None else factor.gradient(gradient)
