"""Sum of the gradients of all processes, which starts during the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from deltaw.training.reducer import Parameters

# A ring reduction sends a range as one part per process. The latency of smaller parts outweighs the overlap, and more
# ranges have little effect.
PART_BYTES = 256 * 1024
MAX_RANGES = 8

Item = TypeVar("Item")


class PendingReduction(Protocol):
    """Asynchronous reduction."""

    def wait(self) -> object:
        """Wait for the result."""
        ...


class GradientSum:
    """Sums the gradients of parameters over all processes.

    Args:
        parameters: Parameters of any dtype.
        sources: For each parameter, the model parameter whose backward hook signals the gradient: the parameter itself,
            or the one that it is the master weight of.
        start_sum: Starts the in-place reduction of a tensor. Called in the same order by all processes.
        size: Number of processes.

    Attributes:
        num_early: Number of ranges of the last step that were sent before the end of its backward pass.
    """

    def __init__(
        self, parameters: Parameters, sources: Parameters, start_sum: Callable[[Tensor], PendingReduction], *, size: int
    ) -> None:
        self.num_early = 0
        self._parameters = list(parameters)
        self._sources = list(sources)
        self._start_reduction = start_sum
        has_fp64 = any(p.dtype == torch.float64 for p in parameters)
        self._dtype = torch.float64 if has_fp64 else torch.float32
        self._ranges = _ranges([p.numel() for p in self._parameters], size, 8 if has_fp64 else 4)
        self._range_of = {number: range_index for range_index, members in enumerate(self._ranges) for number in members}
        self._flat: list[Tensor] = []
        self._missing: list[int] = []
        self._pending: list[PendingReduction] = []
        self._calls: dict[int, int] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        # A model can accumulate the gradient of a parameter in several parts. The first step detects this and sends
        # all ranges after its backward pass.
        self._can_send_early: bool | None = None

    def microbatches(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the microbatches of a step. Ranges are sent during the backward pass of the last one.

        Batches are requested one ahead, in order to detect the last one.
        """
        iterator = iter(batches)
        batch = next(iterator, None)
        while batch is not None:
            next_batch = next(iterator, None)
            if next_batch is None:
                self._register_hooks()
            yield batch
            batch = next_batch

    def send_all(self) -> None:
        """Send the remaining ranges."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._calls and self._can_send_early is None:
            self._can_send_early = max(self._calls.values()) == 1
        self.num_early = len(self._pending)
        while len(self._pending) < len(self._ranges):
            self._send()

    def wait(self) -> None:
        """Wait until all ranges are summed."""
        for reduction in self._pending:
            reduction.wait()
        self._pending.clear()
        self._calls.clear()

    def assign(self, is_used: Sequence[bool]) -> None:
        """Assign the sums as gradients of the selected parameters, and None to the rest."""
        for members, flat in zip(self._ranges, self._flat, strict=True):
            for number, part in zip(members, self._parts(members, flat), strict=True):
                parameter = self._parameters[number]
                parameter.grad = part.to(parameter.dtype) if is_used[number] else None

    def _register_hooks(self) -> None:
        self._missing = [len(members) for members in self._ranges]
        for number, source in enumerate(self._sources):
            if source.requires_grad:
                hook = functools.partial(self._on_gradient, number)
                self._hooks.append(source.register_post_accumulate_grad_hook(hook))

    def _on_gradient(self, number: int, source: Tensor) -> None:
        """Record the gradient of a parameter and send complete ranges."""
        calls = self._calls[number] = self._calls.get(number, 0) + 1
        range_index = self._range_of[number]
        if range_index < len(self._pending):
            raise RuntimeError(f"the gradient of parameter {number} changed after its sum was started")
        if calls == 1:
            self._missing[range_index] -= 1
        while self._can_send_early and (sent := len(self._pending)) < len(self._ranges) and not self._missing[sent]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Start the reduction of the next range."""
        if not self._flat:
            sizes = [sum(self._parameters[n].numel() for n in members) for members in self._ranges]
            device = self._parameters[0].device if self._parameters else None
            self._flat = list(torch.empty(sum(sizes), dtype=self._dtype, device=device).split(sizes))
        range_index = len(self._pending)
        members = self._ranges[range_index]
        flat = self._flat[range_index]
        for number, part in zip(members, self._parts(members, flat), strict=True):
            grad = self._parameters[number].grad
            if grad is None:
                part.zero_()
            else:
                part.copy_(grad)
        self._pending.append(self._start_reduction(flat))

    def _parts(self, members: Sequence[int], flat: Tensor) -> list[Tensor]:
        """Return views of a range's parameters in its flat tensor."""
        parameters = [self._parameters[number] for number in members]
        parts = flat.split([p.numel() for p in parameters])
        return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def _ranges(counts: Sequence[int], size: int, bytes_each: int) -> list[list[int]]:
    """Return the parameter indices of each range, from the last parameter on. Equal in all processes."""
    min_bytes = max(PART_BYTES * size, sum(counts) * bytes_each / MAX_RANGES)
    ranges = list[list[int]]()
    is_full = True
    num_bytes = 0
    for number in reversed(range(len(counts))):
        if is_full:
            ranges.append([])
            num_bytes = 0
        ranges[-1].append(number)
        num_bytes += counts[number] * bytes_each
        is_full = num_bytes >= min_bytes
    if len(ranges) > 1 and not is_full:  # merge a small remainder into the last range
        rest = ranges.pop()
        ranges[-1] += rest
    return ranges
