"""The sum of gradients over processes: one flat vector, whose ranges travel while the backward goes on.

The vector holds the parameters from the last to the first, about the order in which a backward is done with
them, and is cut into a few ranges. In the last microbatch of a step, a range travels once all of its
parameters have their gradients and the ranges before it are on their way; the others follow after the
backward. So all processes send the same ranges in the same order, whatever each has computed by then, and the
sum is equal to the bit to that of the same ranges after the backward.

Knows parameters and something that adds up a tensor; not models, or how processes find each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

# A ring sends a range as one part for each process. Below so many bytes a part, what a message costs at all
# would outweigh what is gained; and more ranges than this gain little.
PART_BYTES = 256 * 1024
MOST_RANGES = 8

Item = TypeVar("Item")


class Waited(Protocol):
    """A sum on its way."""

    def wait(self) -> object:
        """Until it is there."""
        ...


class GradientSum:
    """Adds up the gradients of parameters over all processes.

    Args:
        parameters: whose gradients are added up, in any type. sources: for each of them the model's own,
            which the backward is done with when its gradient is there; itself, or what it is the master
            weight of.
        begin: begins to add up a tensor in place; called in the same order by all processes.
        size: how many processes there are.

    Attributes:
        early: ranges of the last step that were on their way before its backward had ended.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        sources: Sequence[nn.Parameter],
        begin: Callable[[Tensor], Waited],
        *,
        size: int,
    ) -> None:
        self.early = 0
        self._parameters, self._sources, self._begin = list(parameters), list(sources), begin
        wide = any(p.dtype == torch.float64 for p in parameters)
        self._dtype = torch.float64 if wide else torch.float32
        self._ranges = _ranges([p.numel() for p in self._parameters], size, 8 if wide else 4)
        self._range_of = {number: place for place, own in enumerate(self._ranges) for number in own}
        self._flat: list[Tensor] = []
        self._missing: list[int] = []
        self._waited: list[Waited] = []
        self._calls: dict[int, int] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        # Code of a model may bring the gradient of one parameter in several parts. The first step that has a
        # backward shows it, and sends nothing before its end.
        self._early_is_sound: bool | None = None

    def microbatches(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The microbatches of a step; ranges travel in the backward of the last one. It is known to be the
        last since the next is asked for one too early."""
        left = iter(batches)
        batch = next(left, None)
        while batch is not None:
            following = next(left, None)
            if following is None:
                self._watch()
            yield batch
            batch = following

    def send_all(self) -> None:
        """Let the ranges that are not on their way follow."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._calls and self._early_is_sound is None:
            self._early_is_sound = max(self._calls.values()) == 1
        self.early = len(self._waited)
        while len(self._waited) < len(self._ranges):
            self._send()

    def wait(self) -> None:
        """Until all ranges are added up."""
        for waited in self._waited:
            waited.wait()
        self._waited.clear()
        self._calls.clear()

    def use(self, wanted: Sequence[bool]) -> None:
        """Make the sums the gradients of these parameters; the others get none."""
        for own, flat in zip(self._ranges, self._flat, strict=True):
            for number, part in zip(own, self._parts(own, flat), strict=True):
                parameter = self._parameters[number]
                parameter.grad = part.to(parameter.dtype) if wanted[number] else None

    def _watch(self) -> None:
        self._missing = [len(own) for own in self._ranges]
        for number, source in enumerate(self._sources):
            if source.requires_grad:
                hook = source.register_post_accumulate_grad_hook(self._noticing(number))
                self._hooks.append(hook)

    def _noticing(self, number: int) -> Callable[[Tensor], None]:
        return lambda source: self._is_there(number)

    def _is_there(self, number: int) -> None:
        """The gradient of a parameter is there; ranges that are whole now leave."""
        calls = self._calls[number] = self._calls.get(number, 0) + 1
        place = self._range_of[number]
        if place < len(self._waited):
            raise RuntimeError(f"the gradient of parameter {number} changed after its sum had begun")
        if calls == 1:
            self._missing[place] -= 1
        while self._early_is_sound and len(self._waited) < len(self._ranges):
            if self._missing[len(self._waited)]:
                break
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Begin the sum of the next range."""
        if not self._flat:
            sizes = [sum(self._parameters[n].numel() for n in own) for own in self._ranges]
            device = self._parameters[0].device if self._parameters else None
            self._flat = list(torch.empty(sum(sizes), dtype=self._dtype, device=device).split(sizes))
        place = len(self._waited)
        own, flat = self._ranges[place], self._flat[place]
        for number, part in zip(own, self._parts(own, flat), strict=True):
            grad = self._parameters[number].grad
            if grad is None:
                part.zero_()
            else:
                part.copy_(grad)
        self._waited.append(self._begin(flat))

    def _parts(self, own: Sequence[int], flat: Tensor) -> list[Tensor]:
        """The places of a range's parameters in it."""
        parameters = [self._parameters[number] for number in own]
        parts = flat.split([p.numel() for p in parameters])
        return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def _ranges(counts: Sequence[int], size: int, bytes_each: int) -> list[list[int]]:
    """Parameters, by number, of each range, from the last one on: alike in all processes."""
    least = max(PART_BYTES * size, sum(counts) * bytes_each / MOST_RANGES)
    ranges: list[list[int]] = []
    full = True
    taken = 0
    for number in reversed(range(len(counts))):
        if full:
            ranges.append([])
            taken = 0
        ranges[-1].append(number)
        taken += counts[number] * bytes_each
        full = taken >= least
    if len(ranges) > 1 and not full:  # what is left at the end is no range of its own
        rest = ranges.pop()
        ranges[-1] += rest
    return ranges
