"""Worker process of a multi-process run: the command line with instrumentation.

Run as ``python -m tests.training.parallel_worker train run.yaml`` with RANK and similar variables in the environment.
Further variables:

- ``COUNTED``: File for the bytes of each all-reduce.
- ``DIES_AT``: Step in which this process kills itself.
- ``BREAKS_AT``: Step in which the loss of only this process is infinite.
- ``HELD``: File for the state at the start of each step: bytes of the blocks' frozen weights in this process, bytes of
  all of them, and whether the blocks run fused.

Gradients are sent in parts of a few bytes, so that even a small model has several ranges.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from deltaw.cli import main
from deltaw.training.loop import _Loop
from deltaw.training.parallel import gradient_sum


def count_sums(path: str) -> None:
    """Record dtype and size in bytes of each all-reduced tensor."""
    inner = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        with Path(path).open("a") as file:
            file.write(json.dumps([str(tensor.dtype), tensor.numel() * tensor.element_size()]) + "\n")
        return inner(tensor, *args, **kwargs)

    dist.all_reduce = counted


def die_at(step: str) -> None:
    """Send SIGKILL to this process in the middle of a step (counted from 0)."""
    wrap_gradients(after=lambda loop, gradients: loop.state.step == int(step) and os.kill(os.getpid(), signal.SIGKILL))


def wrap_gradients(*, before=lambda loop: None, after=lambda loop, gradients: None) -> None:
    """Call functions before and after this process computes its part of a step's gradients."""
    inner = _Loop.local_gradients

    def wrapped(self, *args):
        before(self)
        gradients = inner(self, *args)
        after(self, gradients)
        return gradients

    _Loop.local_gradients = wrapped


def record_weight_bytes(path: str) -> None:
    """Record the size of the blocks' frozen weights before each step."""
    from deltaw.runtime.fused_blocks import cached_in_mode
    from deltaw.runtime.recognition import blocks_of

    def record(loop):
        model = loop.objective.model
        frozen = [p for p in blocks_of(model)[1].parameters() if not p.requires_grad]
        rows = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
        local_bytes, total_bytes = (sum(p.numel() * p.element_size() for p in tensors) for tensors in (rows, frozen))
        fused = cached_in_mode(model, "packed")
        with Path(path).open("a") as file:
            file.write(json.dumps([local_bytes, total_bytes, bool(fused and fused.choice.value)]) + "\n")

    wrap_gradients(before=record)


def break_at(step: str) -> None:
    """Make this process's loss infinite in a step (counted from 0), as an overflow would."""

    def spoil(loop, gradients):
        if loop.state.step == int(step):
            gradients[0].loss = gradients[0].loss * float("inf")

    wrap_gradients(after=spoil)


if __name__ == "__main__":
    gradient_sum.PART_BYTES = 64
    hooks = {"COUNTED": count_sums, "DIES_AT": die_at, "HELD": record_weight_bytes, "BREAKS_AT": break_at}
    for variable, call in hooks.items():
        if variable in os.environ:
            call(os.environ[variable])
    main(sys.argv[1:])
