"""Time of gathering the rows of a sharded block: all_gather with copies (FSDP over gloo) and direct sends (deltaw).

    python benchmarks/gathering.py [--width 768] [--processes 2 4] [--rounds 6]

The weights are those of a Llama block in fp32. FSDP gathers them with one ``all_gather`` into a flat buffer and copies
them out of it. deltaw sends the rows of each weight directly to their final position.
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
    args = parser.parse_args()
    if args.worker:
        measure_in_worker(args.width, args.rounds)
        return
    print("\n".join(machine_lines(1)))
    for processes in args.processes:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # As in a run with a sharded base, large freed allocations are returned to the system.
        shared |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        options = ["--width", str(args.width), "--rounds", str(args.rounds)]
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", *options], env=os.environ | shared | {"RANK": str(rank)}
            )
            for rank in range(processes)
        ]
        statuses = [process.wait(timeout=300) for process in workers]
        if any(statuses):
            sys.exit("a process failed")


def measure_in_worker(width: int, rounds: int) -> None:
    """Alternate between both implementations in one process. Process 0 prints the fastest round of each."""
    import torch
    import torch.distributed as dist

    from deltaw.runtime.sharded import gather_rows

    dist.init_process_group("gloo")
    size = dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    inner = width * 8 // 3 // 32 * 32
    sizes = [width * width] * 4 + [width * inner] * 3 + [width] * 2
    rows = [torch.randn(-(-count // size)) for count in sizes]
    out = [torch.empty(size, len(shard)) for shard in rows]

    def as_fsdp() -> None:
        flat = torch.cat(rows)
        gathered = torch.empty(size * len(flat))
        dist.all_gather_into_tensor(gathered, flat)
        torch.split_with_sizes_copy(gathered.view(size, -1), [len(shard) for shard in rows], dim=1, out=out)

    implementations: dict[str, Callable[[], None]] = {
        "all_gather and copies": as_fsdp,
        "straight into the weights": lambda: gather_rows(rows, out, group),
    }
    durations: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(rounds + 1):  # the first round is a warm-up
        for name, gather in implementations.items():
            dist.barrier()
            start = time.perf_counter()
            gather()
            dist.barrier()
            durations[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        text = ", ".join(f"{name} {min(times[1:]) * 1e3:.1f} ms" for name, times in durations.items())
        print(f"{size} processes, {sum(sizes) * 4 / 1e6:.1f} MB: {text}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
