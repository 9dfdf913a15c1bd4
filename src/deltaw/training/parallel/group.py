"""Several processes that train as one: process 0 decides and writes, the others follow its orders.

Two things travel in a step: a few numbers (losses, counts, whether anyone was asked to stop), and the trained
parameters' gradients as one flat vector (:mod:`deltaw.training.parallel.group`). Between steps
process 0 sends orders of three numbers. At the beginning it sends the state of the training, as JSON and
tensors; nothing is pickled, and no process has a state that another needs.

Knows the state of a training; not models, rows or files.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deltaw.data.example import rows_of
from deltaw.data.packing import common_prefix, sort_key
from deltaw.errors import UserError
from deltaw.training.losses import Watched
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.parallel.reducer import Parameters, Reducer, Spare, StepSums
from deltaw.training.state import SavedState, TrainState

# The sum of gradients over processes: one flat vector, whose ranges travel while the backward goes on.
#
# The vector holds the parameters from the last to the first, about the order in which a backward is done with
# them, and is cut into a few ranges. In the last microbatch of a step, a range travels once all of its
# parameters have their gradients and the ranges before it are on their way; the others follow after the
# backward. So all processes send the same ranges in the same order, whatever each has computed by then, and the
# sum is equal to the bit to that of the same ranges after the backward.

# A ring sends a range as one part for each process. Below so many bytes a part, what a message costs at all
# would outweigh what is gained; and more ranges than this gain little.
PART_BYTES = 256 * 1024
MOST_RANGES = 8

Item = TypeVar("Item")


@contextlib.contextmanager
def unprinted() -> Iterator[None]:
    """Drop what native code prints on standard output while open: Gloo of older versions of torch reports there whom
    it is connected to, among the command's own output."""
    try:
        before = os.dup(1)
    except OSError:  # standard output is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


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
        self, parameters: Parameters, sources: Parameters, begin: Callable[[Tensor], Waited], *, size: int
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
                noticing = functools.partial(self._is_there, number)
                self._hooks.append(source.register_post_accumulate_grad_hook(noticing))

    def _is_there(self, number: int, source: Tensor) -> None:
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


# Which process computes which rows of a step: as much work for each, and rows that begin alike together.
#
# A step's time is that of its slowest process. Rows are dealt by the tokens that they cost, in one of two ways:
# the rows in the order of their tokens, cut into runs (a prefix is computed once where the rows that share it
# meet), or the longest first, each to the process with the least to do. The way whose busiest process has less
# to do is taken. A group of rows, as a pair of answers, is dealt as one row, which costs what its rows do not
# share. Everything follows from the rows alone, so that each process knows all parts.


def deal(rows: Sequence[Any], parts: int, *, share: bool) -> list[list[int]]:
    """For each part the places of its rows, ascending; the first part has one wherever there are rows.

    Args:
        share: whether a prefix is computed once for the rows of a part.
    """
    whole = [_cost(row, share) for row in rows]
    even = _longest_first(whole, parts)
    firsts = [rows_of(row)[0] for row in rows]
    if not share or parts == 1 or not all(hasattr(row, "tokens") for row in firsts):
        return even
    order = sorted(range(len(rows)), key=lambda place: sort_key(firsts[place].tokens))
    saved = [0] + [_alike(firsts[a], firsts[b]) for a, b in itertools.pairwise(order)]
    runs = _in_runs([whole[place] for place in order], saved, parts)
    together = [sorted(order[i] for i in run) for run in runs]
    most = max(sum(whole[place] for place in part) for part in even)
    return together if _busiest(runs, [whole[place] for place in order], saved) <= most else even


def _cost(row: Any, share: bool) -> int:
    """Tokens of a row, or 1 where it has none, as an image; of a group, those of its rows, where they
    ``share`` a prefix without what is computed once for them."""
    if not hasattr(row, "__len__"):
        return 1
    own = rows_of(row)
    if share and len(own) > 1:
        own = tuple(sorted(own, key=lambda one: sort_key(one.tokens)))
        return max(1, len(row) - sum(_alike(a, b) for a, b in itertools.pairwise(own)))
    return max(1, len(row))


def _alike(row: Any, other: Any) -> int:
    """Tokens at the beginning of both that are computed once for both."""
    return common_prefix(row.tokens[: row.shareable], other.tokens[: other.shareable])


def _longest_first(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Each row to the part with the least so far, the longest row first."""
    heap = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        load, part = heapq.heappop(heap)
        dealt[part].append(place)
        heapq.heappush(heap, (load + costs[place], part))
    return [sorted(part) for part in dealt]


def _in_runs(costs: Sequence[int], saved: Sequence[int], parts: int) -> list[list[int]]:
    """Cut a sequence into at most ``parts`` runs so that the costliest costs the least (by bisection).

    A row behind another of its run costs what it does not share with it.
    """
    low, high = max(costs, default=0), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(costs, saved, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    runs = _cut(costs, saved, low)
    return runs + [[] for _ in range(parts - len(runs))]


def _cut(costs: Sequence[int], saved: Sequence[int], most: int) -> list[list[int]]:
    """Runs of at most this cost, each as long as it can be."""
    runs: list[list[int]] = []
    load = 0
    for place, cost in enumerate(costs):
        added = cost - saved[place]
        if runs and load + added <= most:
            runs[-1].append(place)
            load += added
        else:
            runs.append([place])
            load = cost
    return runs


def _busiest(runs: Sequence[Sequence[int]], costs: Sequence[int], saved: Sequence[int]) -> int:
    return max(sum(costs[i] - (saved[i] if n else 0) for n, i in enumerate(run)) for run in runs)


# Orders: a step begins, the loop ends, a set of rows is evaluated, the run is over, a text follows, a block's
# rows are gathered.
STEP, END, EVALUATE, BYE, TEXT, GATHER = range(6)
# What a tensor's head says: its type, its dimensions, and up to four sizes.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
_HEAD = 6


class LostProcess(UserError):
    """Another process ended or does not answer."""


@dataclass(frozen=True)
class Told:
    """What the environment says of the processes; ``seconds`` is the time limit of what all do together."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    agent: bool
    attempt: str
    seconds: float


class Group(Reducer):
    """This process among several.

    Args:
        who: this process and the others, with the time limit of what all do together.
        orders: a gloo group for what process 0 says, with a long time limit.
        gradients: a group of the same processes for the sum of gradients alone.

    Attributes:
        lost: whether another process is lost.
        evaluate: called by an order, with the number of a set of rows; processes from 1 on.
        gather: called by an order, with the number of a block of a divided base model; processes from 1 on.
        sharded: whether the base model is divided, so that all run its blocks in one order.
        together: whether all run the same blocks at the moment; else process 0 runs some by itself, and
            orders each gathering.
    """

    def __init__(self, who: Told, orders: dist.ProcessGroup, gradients: dist.ProcessGroup) -> None:
        self.rank, self.size, self.local_rank, self.local_size = who.rank, who.size, who.local_rank, who.local_size
        self.lost = False
        self.evaluate: Callable[[int], None] = lambda number: None
        self.gather: Callable[[int], None] = lambda number: None
        self.sharded, self.together = False, True
        self._orders, self._apart = orders, gradients
        self._seconds = who.seconds
        self._gradients: GradientSum | None = None

    # Orders

    def order(self, kind: int, first: int = 0, second: int = 0) -> None:
        """Process 0 tells the others what comes next."""
        self._broadcast(torch.tensor([kind, first, second]))

    def obey(self) -> tuple[int, int, int]:
        """The next order that is no evaluation and no gathering; these are done on the way."""
        while True:
            kind, first, second = self._broadcast(torch.zeros(3, dtype=torch.int64)).tolist()
            if kind == EVALUATE:
                self.evaluate(first)
            elif kind == GATHER:
                self.gather(first)
            else:
                return kind, first, second

    def send_text(self, text: str) -> None:
        """From process 0 to all others."""
        given = _bytes_of(text)
        self.order(TEXT, len(given))
        self._broadcast(given)

    def receive_text(self) -> str:
        """What :meth:`send_text` sent."""
        _, length, _ = self.obey()
        return bytes(self._broadcast(torch.zeros(length, dtype=torch.uint8)).tolist()).decode()

    # What the loop asks

    def texts(self, text: str) -> list[str]:
        own = _bytes_of(text)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        sizes = self.add(sizes, patient=True)
        every = torch.zeros(self.size, int(sizes.max()), dtype=torch.uint8)
        every[self.rank, : len(own)] = own
        every = self.add(every, patient=True)
        return [bytes(row[:size].tolist()).decode() for row, size in zip(every, sizes.tolist(), strict=True)]

    def begin(self, state: TrainState) -> bool:
        if self.rank == 0:
            view = state.view()
            shapes = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in view.tensors.items()}
            self.send_text(json.dumps({"values": view.values, "tensors": shapes}))
            for tensor in view.tensors.values():
                self._broadcast(tensor.detach().cpu().contiguous())
        else:
            told = json.loads(self.receive_text())
            tensors = {
                name: self._broadcast(torch.zeros(shape, dtype=getattr(torch, dtype)))
                for name, (dtype, shape) in told["tensors"].items()
            }
            state.restore(SavedState(told["values"], tensors))
        self._gradients = GradientSum(state.trained, state.sources, self._begin_sum, size=self.size)
        self.wait()
        return self.rank != 0

    def goes_on(self, state: TrainState, wanted: Callable[[], bool]) -> bool:
        if self.rank == 0:
            go = wanted()
            self.order(STEP if go else END, state.step, state.total_steps)
            self.together = go
            return go
        kind, step, total = self.obey()
        if kind != STEP:
            return False
        if step != state.step:
            raise RuntimeError(f"process {self.rank} is at step {state.step}, and process 0 at {step}")
        if total != state.total_steps:
            state.replan(total)
        return True

    def deal(self, rows: Sequence[Any], batcher: AnyBatcher) -> Sequence[Any]:
        costing = getattr(batcher, "costing", lambda given: given)(rows)
        share = bool(getattr(batcher, "share", False))
        return [rows[place] for place in deal(costing, self.size, share=share)[self.rank]]

    @torch.no_grad()
    def add(self, numbers: Tensor, *, patient: bool = False) -> Tensor:
        own = numbers.detach().cpu()
        found = own.clone() if own is numbers else own
        with self._wire():
            dist.all_reduce(found, group=self._orders if patient else None)
        return found.to(numbers.device)

    def own_random_numbers(self, seed: int, step: int) -> None:
        if self.rank:  # else all would drop the same
            torch.manual_seed((seed * 1_000_003 + step) * 65_537 + self.rank)

    def stops(self, stopped: Callable[[], bool]) -> Callable[[], bool]:
        if not self.sharded:
            return stopped
        agreed = self._most(int(stopped())) > 0  # all stop or none: the others would wait for its rows
        return lambda: agreed

    def batches(self, batcher: AnyBatcher, own: Sequence[Any], rows: Sequence[Any]) -> Iterable[Any]:
        if not self.sharded:
            return batcher.batches(own)
        given = list(batcher.batches(own))
        lacking = self._most(len(given)) - len(given)
        if not lacking:
            return given
        shortest = min(rows, key=lambda row: len(row) if hasattr(row, "__len__") else 1)
        return [*given, *[Spare(next(iter(batcher.batches([shortest]))))] * lacking]

    def microbatches(self, batches: Iterable[Any]) -> Iterable[Any]:
        return batches if self._gradients is None else self._gradients.microbatches(batches)

    @torch.no_grad()
    def total(self, parameters: Parameters, sums: StepSums | None, watched: Watched | None = None) -> StepSums | None:
        self.together = False
        gradients = self._gradients
        assert gradients is not None, "begin() was not called"
        own = [p.grad is not None for p in parameters]
        gradients.send_all()
        numbers = [0.0, 0.0, 1.0, 0.0]
        loss = 0.0
        if sums is not None:
            loss = float(sums.loss)
            numbers = [float(sums.row_tokens), float(sums.tokens), 0.0, float(sum(own))]
        counts = torch.zeros(0) if watched is None else watched.totals().cpu()
        summed = self._add(torch.cat([torch.tensor([loss, *numbers], dtype=torch.float64), counts.double()]))
        found = summed[:5].tolist()
        with self._wire():
            gradients.wait()
        if found[3]:
            return None
        wanted = own
        if found[4] != self.size * len(own):  # somewhere a parameter took no part
            wanted = (self._add(torch.tensor(own, dtype=torch.int32)) > 0).tolist()
        gradients.use(wanted)
        if watched is not None:
            watched.count(summed[5:])
        return StepSums(torch.tensor(found[0], dtype=torch.float64), int(found[1]), int(found[2]))

    def dismiss(self) -> None:
        self.order(BYE)

    # A divided base model

    def divide(self) -> dist.ProcessGroup:
        """From here on the base model is divided; the group over which its blocks are gathered.

        It is one of its own, so that what is gathered and what is summed cannot meet.
        """
        self.sharded = True
        with unprinted():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._seconds))
        assert group is not None
        return group

    def gathering(self, number: int, gather: Callable[[], Any]) -> Any:
        """Gather a block's rows (a :data:`deltaw.runtime.sharded.Wire`)."""
        if self.rank == 0 and not self.together:
            self.order(GATHER, number)
        with self._wire():
            return gather()

    def _most(self, number: int) -> int:
        """The largest of all processes' numbers."""
        found = torch.tensor([number])
        with self._wire():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    # The wire

    def share_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Let all have the values of process 0."""
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(self._broadcast(parameter.detach().cpu().contiguous()))

    def send(self, tensor: Tensor) -> None:
        """To process 0."""
        given = tensor.detach().cpu().contiguous()
        head = [_DTYPES.index(given.dtype), given.dim(), *given.shape]
        with self._wire():
            dist.send(torch.tensor(head + [0] * (_HEAD - len(head))), 0, group=self._orders)
            dist.send(given, 0, group=self._orders)

    def receive(self, rank: int) -> Tensor:
        """What a process sent, on the processor."""
        head = torch.zeros(_HEAD, dtype=torch.int64)
        with self._wire():
            dist.recv(head, rank, group=self._orders)
            dtype, dims, *shape = head.tolist()
            found = torch.zeros(shape[:dims], dtype=_DTYPES[dtype])
            dist.recv(found, rank, group=self._orders)
        return found

    def wait(self) -> None:
        """Until all are here."""
        with self._wire():
            dist.barrier(group=self._orders)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        with self._wire():
            dist.broadcast(tensor, 0, group=self._orders)
        return tensor

    def _add(self, tensor: Tensor) -> Tensor:
        with self._wire():
            dist.all_reduce(tensor)
        return tensor

    def _begin_sum(self, tensor: Tensor) -> dist.Work:
        with self._wire():
            work = dist.all_reduce(tensor, group=self._apart, async_op=True)
        assert work is not None
        return work

    @contextlib.contextmanager
    def _wire(self) -> Iterator[None]:
        """What the wire raises, in words."""
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            what = f"did not answer within {self._seconds:g} seconds" if late else "ended"
            again = "the same command, with any number of processes, goes on from the last checkpoint"
            hint = f"what that process printed says why; {again}"
            what = f"another of the {self.size} processes {what}"
            raise LostProcess(what, where=f"process {self.rank}", hint=hint) from error


def _bytes_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
