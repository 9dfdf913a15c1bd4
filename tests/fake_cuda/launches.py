"""Counts of kernel launches on the fake device.

An operator counts as one launch, with these exceptions:

- Functions that deltaw compiles run on the host here, without temporary buffers on the device. They count as the
  number of kernels that Inductor generates for them. ``test_kernels`` verifies this number.
- Packed attention runs in tiles here, and counts as the kernels of FlexAttention.
- Operators of lists of tensors count as the kernels of torch's multi-tensor implementation.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from deltaw.kernels import attention, compiled, rows
from deltaw.runtime import halves
from tests.fake_cuda.device import activity

# Kernels per compiled function.
KERNELS = {
    "norm_reference": 1,
    "norm_backward_reference": 1,
    "activation_reference": 1,
    "activation_backward_reference": 1,
    "rotate_reference": 1,
    "cross_entropy_reference_": 2,  # without a gradient 1
}
# Kernels of FlexAttention.
ATTENTION = 1
ATTENTION_BACKWARD = 2
# Tensors per kernel of a multi-tensor operator, by the number of its lists.
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


@dataclasses.dataclass
class Launches:
    """Counter of launches and synchronizations.

    Attributes:
        corrections: Difference of the counted launches from the calls of operators.
    """

    corrections: int = 0

    def read(self) -> tuple[int, int]:
        now = activity()
        return now.launches.total() + self.corrections, now.synchronizations.total()

    def counting(self, function: Callable[..., Any], kernels: int | Callable[..., int]) -> Callable[..., Any]:
        """Wrap a function so that each call counts as ``kernels`` launches, which may depend on the arguments."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = activity().launches.total()
            corrections = self.corrections
            result = function(*args, **kwargs)
            number = kernels if isinstance(kernels, int) else kernels(*args, **kwargs)
            self.corrections = corrections + number - (activity().launches.total() - before)
            return result

        return call

    def compile_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Replacement of :func:`deltaw.kernels.compiled.compile_function`."""
        return self.counting(on_host(function), KERNELS[function.__name__])


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes on the host, with arguments and results on the device."""

    def call(**arguments: Any) -> Any:
        result = function(**{k: host_alias(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
        return tuple(map(to_device, result)) if isinstance(result, tuple) else to_device(result)

    return call


def host_alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a host tensor with the memory of a tensor of the fake device."""
    storage = tensor.untyped_storage()
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(tensor, device="cuda")
    if tensor.numel():
        host_alias(result).copy_(tensor)
    return result


def multi_tensor_kernels(*args: Any, **kwargs: Any) -> int:
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
    return -(-len(lists[0]) // TENSORS_PER_LAUNCH[min(5, len(lists))]) if lists else 0


@contextlib.contextmanager
def counted_launches() -> Iterator[Launches]:
    """Context in which launches are counted according to the rules of the module."""
    launches = Launches()
    names = [name for name in dir(torch) if name.startswith(("_foreach_", "_fused_adam"))]
    replaced: list[tuple[Any, str, Any]] = [(torch, n, multi_tensor_kernels) for n in names]
    replaced += [(halves, "multiply_each", multi_tensor_kernels)]
    replaced += [(attention, "attend", ATTENTION), (attention, "attend_backward", ATTENTION_BACKWARD)]
    with contextlib.ExitStack() as stack:
        for owner, name, kernels in replaced:
            stack.enter_context(patch.object(owner, name, launches.counting(getattr(owner, name), kernels)))
        stack.enter_context(patch.object(compiled, "compile_function", launches.compile_function))
        for function in vars(rows).values():
            if isinstance(function, compiled.CompiledFunction):
                stack.enter_context(patch.dict(function._selected, clear=True))
        yield launches


def per_block(steps: Callable[[int], list[tuple[int, int]]], blocks: tuple[int, int] = (1, 3)) -> dict[str, float]:
    """Return launches per block, launches of a step outside of blocks, and synchronizations per step.

    Args:
        steps: Returns the launches and synchronizations of each step of a model with a number of blocks.
        blocks: Numbers of blocks to compare.
    """
    (few, synchronizations), (many, _) = (steps(number)[-1] for number in blocks)
    launches = (many - few) / (blocks[1] - blocks[0])
    return {"block": launches, "step": few - blocks[0] * launches, "synchronizations": synchronizations}
