"""What gathering a block's rows takes: FSDP's way over gloo, and straight into the block's weights.

    python benchmarks/gathering.py [--width 768] [--processes 2 4] [--rounds 6]

The weights are those of a Llama block in fp32. FSDP gathers them with one ``all_gather`` into a flat buffer,
and copies them out of it; deltaw sends each weight's rows from where they are to where they belong.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from machine import machine_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.width, given.rounds)
        return
    print("\n".join(machine_lines(1)))
    for processes in given.processes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # As in a run whose base is divided, large blocks of memory go back to the system when they are freed.
        shared |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        options = ["--width", str(given.width), "--rounds", str(given.rounds)]
        running = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", *options], env=os.environ | shared | {"RANK": str(rank)}
            )
            for rank in range(processes)
        ]
        ended = [process.wait(timeout=300) for process in running]
        if any(ended):
            sys.exit("a process failed")


def work(width: int, rounds: int) -> None:
    """As one process: gather in both ways by turns; process 0 prints the fastest round of each."""
    import torch
    import torch.distributed as dist

    from deltaw.runtime.sharded import gather_rows

    dist.init_process_group("gloo")
    size, group = dist.get_world_size(), dist.group.WORLD
    assert group is not None
    inner = width * 8 // 3 // 32 * 32
    sizes = [width * width] * 4 + [width * inner] * 3 + [width] * 2
    rows = [torch.randn(-(-count // size)) for count in sizes]
    out = [torch.empty(size, len(own)) for own in rows]

    def as_fsdp() -> None:
        flat = torch.cat(rows)
        whole = torch.empty(size * len(flat))
        dist.all_gather_into_tensor(whole, flat)
        torch.split_with_sizes_copy(whole.view(size, -1), [len(own) for own in rows], dim=1, out=out)

    ways: dict[str, Callable[[], None]] = {
        "all_gather and copies": as_fsdp,
        "straight into the weights": lambda: gather_rows(rows, out, group),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first one is a warm-up
        for name, gather in ways.items():
            dist.barrier()
            begun = time.perf_counter()
            gather()
            dist.barrier()
            taken[name].append(time.perf_counter() - begun)
    if dist.get_rank() == 0:
        told = ", ".join(f"{name} {min(times[1:]) * 1e3:.1f} ms" for name, times in taken.items())
        print(f"{size} processes, {sum(sizes) * 4 / 1e6:.1f} MB: {told}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
