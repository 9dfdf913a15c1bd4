"""Several processes that train as one: process 0 decides and writes, the others follow its orders.

Two things travel in a step: a few numbers (losses, counts, whether anyone was asked to stop), and the trained
parameters' gradients as one flat vector (:mod:`deltaw.training.parallel.gradient_sum`). Between steps
process 0 sends orders of three numbers. At the beginning it sends the state of the training, as JSON and
tensors; nothing is pickled, and no process has a state that another needs.

Knows the state of a training; not models, rows or files.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.training.losses import Watched
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.parallel.dealing import deal
from deltaw.training.parallel.gradient_sum import GradientSum
from deltaw.training.parallel.reducer import Reducer, Spare, StepSums
from deltaw.training.state import SavedState, TrainState

# Orders: a step begins, the loop ends, a set of rows is evaluated, the run is over, a text follows, a block's
# rows are gathered.
STEP, END, EVALUATE, BYE, TEXT, GATHER = range(6)
# What a tensor's head says: its type, its dimensions, and up to four sizes.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
_HEAD = 6


class LostProcess(UserError):
    """Another process ended or does not answer."""


class Group(Reducer):
    """This process among several.

    Args:
        rank, size, local_size, local_rank: as :class:`Reducer` has them.
        orders: a gloo group for what process 0 says, with a long time limit.
        gradients: a group of the same processes for the sum of gradients alone.
        seconds: the time limit of what all do together.

    Attributes:
        lost: whether another process is lost.
        evaluate: called by an order, with the number of a set of rows; processes from 1 on.
        gather: called by an order, with the number of a block of a divided base model; processes from 1 on.
        sharded: whether the base model is divided, so that all run its blocks in one order.
        together: whether all run the same blocks at the moment; else process 0 runs some by itself, and
            orders each gathering.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        local_size: int,
        orders: dist.ProcessGroup,
        gradients: dist.ProcessGroup,
        *,
        seconds: float,
        local_rank: int = 0,
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.lost = False
        self.evaluate: Callable[[int], None] = lambda number: None
        self.gather: Callable[[int], None] = lambda number: None
        self.sharded, self.together = False, True
        self._orders, self._apart = orders, gradients
        self._seconds = seconds
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
        given = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.order(TEXT, len(given))
        self._broadcast(given)

    def receive_text(self) -> str:
        """What :meth:`send_text` sent."""
        _, length, _ = self.obey()
        return bytes(self._broadcast(torch.zeros(length, dtype=torch.uint8)).tolist()).decode()

    # What the loop asks

    def texts(self, text: str) -> list[str]:
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
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
            shapes = {name: [_name(t.dtype), list(t.shape)] for name, t in view.tensors.items()}
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
    def total(
        self, parameters: Sequence[nn.Parameter], sums: StepSums | None, watched: Watched | None = None
    ) -> StepSums | None:
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
            raise LostProcess(
                f"another of the {self.size} processes {what}",
                where=f"process {self.rank}",
                hint="what that process printed says why; the same command, with any number of processes, "
                "goes on from the last checkpoint",
            ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
