"""Several processes that train together. Process 0 decides and writes files, the rest execute its orders.

A step transfers a few numbers (losses, counts, stop requests) and the gradients of the trained parameters as one flat
vector. Between steps process 0 sends orders of three numbers. At the start it sends the state of the training as JSON
and tensors. Pickle is not used.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deltaw.errors import UserError
from deltaw.training.batcher import Batcher
from deltaw.training.losses import MetricAccumulator
from deltaw.training.parallel.gradient_sum import GradientSum
from deltaw.training.parallel.launch_environment import LaunchEnvironment
from deltaw.training.parallel.row_distribution import distribute_rows
from deltaw.training.reducer import Parameters, Reducer, SpareBatch, StepSums
from deltaw.training.state import SavedState, TrainState

# Gradients are summed over processes as one flat vector in ranges, overlapped with the backward pass.
#
# The vector contains the parameters from last to first, approximately the order of the backward pass. In the last
# microbatch of a step, a range is sent once all of its gradients are computed and all previous ranges are sent. The
# remaining ranges follow after the backward pass. All processes send the same ranges in the same order, so the sum is
# bitwise equal to a sum after the backward pass.


@contextlib.contextmanager
def suppress_native_stdout() -> Iterator[None]:
    """Discard output of native code to standard output. Gloo in older versions of torch prints connections there."""
    try:
        saved_descriptor = os.dup(1)
    except OSError:  # standard output is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as null_file:
            os.dup2(null_file.fileno(), 1)
        yield
    finally:
        os.dup2(saved_descriptor, 1)
        os.close(saved_descriptor)


# Orders: run a step, stop the training loop, evaluate a set of rows, exit, receive a text, gather a block's rows.
STEP, STOP_TRAINING, EVALUATE, EXIT, TEXT, GATHER = range(6)
# The header of a tensor has its dtype, its number of dimensions, and up to four sizes.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
_HEADER_SIZE = 6


class LostProcess(UserError):
    """Another process exited or does not answer."""


class Group(Reducer):
    """Communication of this process with the rest of the group.

    Args:
        launch: Ranks, sizes and the time limit of collective operations.
        orders: Gloo group for orders of process 0, with a long time limit.
        gradients: Group of the same processes for gradient sums only.

    Attributes:
        lost: True if another process is lost.
        evaluate: Handles an order to evaluate the set with this index, in processes from 1 on.
        gather: Handles an order to gather the block with this index of a sharded base model, in processes from 1 on.
        sharded: True if the base model is sharded, so that all processes run its blocks in the same order.
        synchronized: True while all processes run the same blocks. If it is False, process 0 runs blocks by itself and
            sends an order for each gather.
    """

    def __init__(self, launch: LaunchEnvironment, orders: dist.ProcessGroup, gradients: dist.ProcessGroup) -> None:
        self.rank = launch.rank
        self.size = launch.size
        self.local_rank = launch.local_rank
        self.local_size = launch.local_size
        self.lost = False
        self._orders = orders
        self._gradient_group = gradients
        self._seconds = launch.seconds
        self.start_run()

    def start_run(self) -> None:
        """Reset the state of a run, so that the group can train several runs one after the other."""
        self.evaluate: Callable[[int], None] = lambda number: None
        self.gather: Callable[[int], None] = lambda number: None
        self.sharded = False
        self.synchronized = True
        self._gradients: GradientSum | None = None

    # Orders

    def order(self, kind: int, first: int = 0, second: int = 0) -> None:
        """Send an order from process 0."""
        self._broadcast(torch.tensor([kind, first, second]))

    def obey(self) -> tuple[int, int, int]:
        """Return the next order. Evaluations and gathers are executed here and not returned."""
        while True:
            kind, first, second = self._broadcast(torch.zeros(3, dtype=torch.int64)).tolist()
            if kind == EVALUATE:
                self.evaluate(first)
            elif kind == GATHER:
                self.gather(first)
            else:
                return kind, first, second

    def send_text(self, text: str) -> None:
        """Send a text from process 0 to all processes."""
        data = _bytes_of(text)
        self.order(TEXT, len(data))
        self._broadcast(data)

    def receive_text(self) -> str:
        """Receive the text of :meth:`send_text`."""
        _, length, _ = self.obey()
        return bytes(self._broadcast(torch.zeros(length, dtype=torch.uint8)).tolist()).decode()

    # Interface of Reducer

    def texts(self, text: str) -> list[str]:
        data = _bytes_of(text)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        sizes = self.add(sizes, long_wait=True)
        all_data = torch.zeros(self.size, int(sizes.max()), dtype=torch.uint8)
        all_data[self.rank, : len(data)] = data
        all_data = self.add(all_data, long_wait=True)
        return [bytes(row[:size].tolist()).decode() for row, size in zip(all_data, sizes.tolist(), strict=True)]

    def broadcast_state(self, state: TrainState) -> bool:
        if self.rank == 0:
            view = state.view()
            shapes = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in view.tensors.items()}
            self.send_text(json.dumps({"values": view.values, "tensors": shapes}))
            for tensor in view.tensors.values():
                self._broadcast(tensor.detach().cpu().contiguous())
        else:
            message = json.loads(self.receive_text())
            tensors = {
                name: self._broadcast(torch.zeros(shape, dtype=getattr(torch, dtype)))
                for name, (dtype, shape) in message["tensors"].items()
            }
            state.restore(SavedState(message["values"], tensors))
        self._gradients = GradientSum(state.trained, state.sources, self._start_sum, size=self.size)
        self.wait()
        return self.rank != 0

    def should_continue(self, state: TrainState, has_next_step: Callable[[], bool]) -> bool:
        if self.rank == 0:
            continues = has_next_step()
            self.order(STEP if continues else STOP_TRAINING, state.step, state.total_steps)
            self.synchronized = continues
            return continues
        kind, step, total = self.obey()
        if kind != STEP:
            return False
        if step != state.step:
            raise RuntimeError(f"process {self.rank} is at step {state.step}, and process 0 at {step}")
        if total != state.total_steps:
            state.replan(total)
        return True

    def local_rows(self, rows: Sequence[Any], batcher: Batcher) -> Sequence[Any]:
        indices = distribute_rows(batcher.cost_rows(rows), self.size, share=batcher.share)[self.rank]
        return [rows[index] for index in indices]

    @torch.no_grad()
    def add(self, numbers: Tensor, *, long_wait: bool = False) -> Tensor:
        total = self._reduce(numbers.detach().cpu().clone(), group=self._orders if long_wait else None)
        return total.to(numbers.device)

    def seed_random_numbers(self, seed: int, step: int) -> None:
        if self.rank:  # otherwise all processes would use the same dropout masks
            torch.manual_seed((seed * 1_000_003 + step) * 65_537 + self.rank)

    def agree_on_stop(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        if not self.sharded:
            return should_stop
        agreed = self._max(int(should_stop())) > 0  # all processes must stop together, because they share gathers
        return lambda: agreed

    def batches(self, batcher: Batcher, local_rows: Sequence[Any], rows: Sequence[Any]) -> Iterable[Any]:
        if not self.sharded:
            return batcher.batches(local_rows)
        local_batches = list(batcher.batches(local_rows))
        num_spare = self._max(len(local_batches)) - len(local_batches)
        if not num_spare:
            return local_batches
        shortest = min(rows, key=lambda row: len(row) if hasattr(row, "__len__") else 1)
        return [*local_batches, *[SpareBatch(next(iter(batcher.batches([shortest]))))] * num_spare]

    def microbatches(self, batches: Iterable[Any]) -> Iterable[Any]:
        return batches if self._gradients is None else self._gradients.microbatches(batches)

    @torch.no_grad()
    def total(
        self, parameters: Parameters, sums: StepSums | None, accumulator: MetricAccumulator | None = None
    ) -> StepSums | None:
        self.synchronized = False
        gradients = self._gradients
        assert gradients is not None, "broadcast_state() was not called"
        is_used = has_gradient = [p.grad is not None for p in parameters]
        gradients.send_all()
        numbers = [0.0, 0.0, 0.0, 1.0, 0.0]
        if sums is not None:
            numbers = [float(sums.loss), float(sums.row_tokens), float(sums.tokens), 0.0, float(sum(has_gradient))]
        counts = torch.zeros(0) if accumulator is None else accumulator.totals().cpu()
        summed = self._reduce(torch.cat([torch.tensor(numbers, dtype=torch.float64), counts.double()]))
        totals = summed[:5].tolist()
        with self._wire():
            gradients.wait()
        if totals[3]:
            return None
        if totals[4] != self.size * len(has_gradient):  # a parameter has no gradient in some process
            is_used = (self._reduce(torch.tensor(has_gradient, dtype=torch.int32)) > 0).tolist()
        gradients.assign(is_used)
        if accumulator is not None:
            accumulator.count(summed[5:])
        return StepSums(torch.tensor(totals[0], dtype=torch.float64), int(totals[1]), int(totals[2]))

    def dismiss(self) -> None:
        self.order(EXIT)

    # Sharded base model

    def shard(self) -> dist.ProcessGroup:
        """Mark the base model as sharded and return the process group for its gathers.

        The group is separate, so that gathers and gradient sums are not mixed up.
        """
        self.sharded = True
        with suppress_native_stdout():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._seconds))
        assert isinstance(group, dist.ProcessGroup)
        return group

    def gather_block(self, number: int, gather: Callable[[], Any]) -> Any:
        """Gather a block's rows (a :data:`deltaw.runtime.sharded.GatherCallback`)."""
        if self.rank == 0 and not self.synchronized:
            self.order(GATHER, number)
        with self._wire():
            return gather()

    def _max(self, value: int) -> int:
        """Return the maximum over all processes."""
        return int(self._reduce(torch.tensor([value]), dist.ReduceOp.MAX))

    # Transport

    def share_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Copy the values of process 0 to all processes."""
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(self._broadcast(parameter.detach().cpu().contiguous()))

    def send(self, tensor: Tensor) -> None:
        """Send a tensor to process 0."""
        contiguous = tensor.detach().cpu().contiguous()
        header = [_DTYPES.index(contiguous.dtype), contiguous.dim(), *contiguous.shape]
        with self._wire():
            dist.send(torch.tensor(header + [0] * (_HEADER_SIZE - len(header))), 0, group=self._orders)
            dist.send(contiguous, 0, group=self._orders)

    def receive(self, rank: int) -> Tensor:
        """Receive a tensor from a process, on the CPU."""
        header = torch.zeros(_HEADER_SIZE, dtype=torch.int64)
        with self._wire():
            dist.recv(header, rank, group=self._orders)
            dtype, dims, *shape = header.tolist()
            tensor = torch.zeros(shape[:dims], dtype=_DTYPES[dtype])
            dist.recv(tensor, rank, group=self._orders)
        return tensor

    def wait(self) -> None:
        """Wait for all processes."""
        with self._wire():
            dist.barrier(group=self._orders)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        with self._wire():
            dist.broadcast(tensor, 0, group=self._orders)
        return tensor

    def _reduce(
        self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Reduce a tensor in place over all processes."""
        with self._wire():
            dist.all_reduce(tensor, operation, group=group)
        return tensor

    def _start_sum(self, tensor: Tensor) -> dist.Work:
        with self._wire():
            work = dist.all_reduce(tensor, group=self._gradient_group, async_op=True)
        assert isinstance(work, dist.Work)
        return work

    @contextlib.contextmanager
    def _wire(self) -> Iterator[None]:
        """Convert communication errors to LostProcess."""
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            is_timeout = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            problem = f"did not answer within {self._seconds:g} seconds" if is_timeout else "ended"
            advice = "the same command, with any number of processes, resumes from the last checkpoint"
            hint = f"see the output of that process for the reason; {advice}"
            problem = f"another of the {self.size} processes {problem}"
            raise LostProcess(problem, location=f"process {self.rank}", hint=hint) from error


def _bytes_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
