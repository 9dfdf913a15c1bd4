"""Trained parameters of low precision, and the fp32 copies that the optimizer works on.

In bf16 a step of AdamW is mostly smaller than the distance to the next number and would vanish. The copy
takes the gradient as soon as it is there, in fp32, so that gradients of several microbatches add up without
loss and none is kept twice; after the optimizer's step the parameter is the copy, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class MasterWeights:
    """The parameters as an optimizer sees them, while open.

    Attributes:
        trained: for each parameter itself, or its fp32 copy where it is of lower precision.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.trained: list[nn.Parameter] = []
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._hooks = []
        for parameter in parameters:
            if parameter.dtype not in HALF:
                self.trained.append(parameter)
                continue
            master = nn.Parameter(parameter.detach().float())
            self.trained.append(master)
            self._pairs.append((parameter, master))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_into(master)))

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
