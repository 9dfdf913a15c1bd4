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


def count_sums(into: Path) -> None:
    """Note the bytes and the type of each tensor that is summed over the processes."""
    inner = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        with into.open("a") as file:
            file.write(json.dumps([str(tensor.dtype), tensor.numel() * tensor.element_size()]) + "\n")
        return inner(tensor, *args, **kwargs)

    dist.all_reduce = counted


def die_at(step: int) -> None:
    """Kill this process, as the system does, in the middle of a step (counted from 0)."""
    inner = _Loop.own_gradients

    def dying(self, *args):
        found = inner(self, *args)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    _Loop.own_gradients = dying


def note_held(into: Path) -> None:
    """Note, before each step, what is held of the blocks' frozen weights."""
    from deltaw.runtime.fused_blocks import known_in_mode
    from deltaw.runtime.recognition import blocks_of

    inner = _Loop.own_gradients

    def noting(self, *args):
        model = self.objective.model
        frozen = [p for p in blocks_of(model)[1].parameters() if not p.requires_grad]
        whole = sum(p.numel() * p.element_size() for p in frozen)
        rows = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
        own = sum(p.numel() * p.element_size() for p in rows)
        fused = known_in_mode(model, "packed")
        with into.open("a") as file:
            file.write(json.dumps([own, whole, bool(fused and fused.choice.value)]) + "\n")
        return inner(self, *args)

    _Loop.own_gradients = noting


def break_at(step: int) -> None:
    """Let this process's part of a step (counted from 0) be infinite, as where a product overflows."""
    inner = _Loop.own_gradients

    def breaking(self, *args):
        sums, general = inner(self, *args)
        if self.state.step == step:
            sums.loss = sums.loss * float("inf")
        return sums, general

    _Loop.own_gradients = breaking


if __name__ == "__main__":
    group.PART_BYTES = 64
    if "COUNTED" in os.environ:
        count_sums(Path(os.environ["COUNTED"]))
    if "DIES_AT" in os.environ:
        die_at(int(os.environ["DIES_AT"]))
    if "HELD" in os.environ:
        note_held(Path(os.environ["HELD"]))
    if "BREAKS_AT" in os.environ:
        break_at(int(os.environ["BREAKS_AT"]))
    main(sys.argv[1:])
