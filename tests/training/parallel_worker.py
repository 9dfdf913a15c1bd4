"""One process of a training over several: the command line, with what travels counted, or ended on the way.

Run as ``python -m tests.training.parallel_worker train run.yaml``, with RANK and so on in the environment.
``COUNTED`` names a file for the bytes of each sum; ``DIES_AT`` is the step at which this process is killed;
``BREAKS_AT`` the one whose loss is infinite in this process alone; ``HELD`` names a file for what each step
begins with: bytes of the blocks' frozen weights that this process holds, of all of them, and whether the
blocks run fused. Gradients travel in parts of a few bytes, so that those of a small model do so in several
ranges.
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
from deltaw.training.parallel import group


def count_sums(into: str) -> None:
    """Note the bytes and the type of each tensor that is summed over the processes."""
    inner = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        with Path(into).open("a") as file:
            file.write(json.dumps([str(tensor.dtype), tensor.numel() * tensor.element_size()]) + "\n")
        return inner(tensor, *args, **kwargs)

    dist.all_reduce = counted


def die_at(step: str) -> None:
    """Kill this process, as the system does, in the middle of a step (counted from 0)."""
    wrap_gradients(after=lambda loop, found: loop.state.step == int(step) and os.kill(os.getpid(), signal.SIGKILL))


def wrap_gradients(*, before=lambda loop: None, after=lambda loop, found: None) -> None:
    """Call something before and after a process computes its part of a step's gradients."""
    inner = _Loop.own_gradients

    def wrapped(self, *args):
        before(self)
        found = inner(self, *args)
        after(self, found)
        return found

    _Loop.own_gradients = wrapped


def note_held(into: str) -> None:
    """Note, before each step, what is held of the blocks' frozen weights."""
    from deltaw.runtime.fused_blocks import known_in_mode
    from deltaw.runtime.recognition import blocks_of

    def note(loop):
        model = loop.objective.model
        frozen = [p for p in blocks_of(model)[1].parameters() if not p.requires_grad]
        rows = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
        own, whole = (sum(p.numel() * p.element_size() for p in of) for of in (rows, frozen))
        fused = known_in_mode(model, "packed")
        with Path(into).open("a") as file:
            file.write(json.dumps([own, whole, bool(fused and fused.choice.value)]) + "\n")

    wrap_gradients(before=note)


def break_at(step: str) -> None:
    """Let this process's part of a step (counted from 0) be infinite, as where a product overflows."""

    def spoil(loop, found):
        if loop.state.step == int(step):
            found[0].loss = found[0].loss * float("inf")

    wrap_gradients(after=spoil)


if __name__ == "__main__":
    group.PART_BYTES = 64
    asked = {"COUNTED": count_sums, "DIES_AT": die_at, "HELD": note_held, "BREAKS_AT": break_at}
    for variable, call in asked.items():
        if variable in os.environ:
            call(os.environ[variable])
    main(sys.argv[1:])
